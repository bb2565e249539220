"""Figures of one cell: from the answers' streams and from what the server counted meanwhile.

Tokens per second are all output tokens of a cell divided by the time from its first request to its last token. The time to first token
is from sending a request to the arrival of the first piece with tokens.

Inter-token latency: a server that speculates sends several tokens at once. The time between two pieces is shared evenly by the tokens of
the later one, and each token counts once, so that the mean is the reader's pace whatever the size of the pieces. What a reader waits for
at once is `gap_ms_p99`: the time between two pieces, each counting once. `tokens_per_piece` tells how many come at once; above 1 without
speculation, the server or the client had no time to send or read them one by one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from sedac.bench.load import Stream

_WANTED = (
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:generation_tokens_total",
    "sedac_tokens_total",
    "sedac_decode_tokens_total",
    "sedac_mlp_blocks_computed_total",
    "sedac_layers",
)
"""Names of vLLM's counters (v1/spec_decode/metrics.py and v1/metrics/loggers.py, 0.32), and of SEDAC's (agent/metrics.py)."""


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that at least this share of the values does not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def measure_streams(streams: Sequence[Stream]) -> dict[str, float | None]:
    """Return the figures of a cell that a client sees: tokens per second, and latencies in milliseconds.

    Where every answer came in one piece, there is no time between pieces, and its latencies are None.
    """
    began, ended = min(stream.began for stream in streams), max(stream.ended for stream in streams)
    num_tokens = sum(stream.num_tokens for stream in streams)
    first = [1e3 * (stream.arrivals[0] - stream.began) for stream in streams]
    gaps, each = [], []
    for stream in streams:
        for before, arrived, count in zip(stream.arrivals, stream.arrivals[1:], stream.tokens[1:], strict=False):
            gaps.append(1e3 * (arrived - before))
            each += [gaps[-1] / count] * count
    return {
        "tokens_per_second": num_tokens / (ended - began),
        "num_requests": float(len(streams)),
        "num_tokens": float(num_tokens),
        "seconds": ended - began,
        "tokens_per_piece": num_tokens / sum(len(stream.arrivals) for stream in streams),
        "ttft_ms_p50": percentile(first, 0.5),
        "ttft_ms_p99": percentile(first, 0.99),
        "itl_ms_p50": percentile(each, 0.5),
        "itl_ms_p99": percentile(each, 0.99),
        "gap_ms_p99": percentile(gaps, 0.99),
    }


def read_counters(text: str) -> dict[str, float]:
    """Return the counters that are needed from a page of metrics, summed over their labels."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^([\w:]+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
        if name in _WANTED:
            found[name] = found.get(name, 0.0) + float(value)
    return found


def measure_counters(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float | None]:
    """Return what a server did between two readings of its counters; None where it does not do such a thing.

    `acceptance_rate` (AR) is accepted per proposed draft tokens, `token_ratio` (TRR) accepted draft tokens per output token,
    `work_saved` the share of the MLPs' work that was saved, of the tokens that were allowed to be reduced.
    """

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    proposed, accepted, generated = (grown(name) for name in _WANTED[:3])
    found: dict[str, float | None] = {"acceptance_rate": None, "token_ratio": None, "work_saved": None}
    if _WANTED[0] in after and generated:
        found |= {"acceptance_rate": accepted / proposed if proposed else None, "token_ratio": accepted / generated}
    if "sedac_layers" in after:
        tokens, allowed, computed = (grown(name) for name in _WANTED[3:6])
        layers = after["sedac_layers"]
        found["work_saved"] = (tokens * layers - computed) / (allowed * layers) if allowed else 0.0
    return found
