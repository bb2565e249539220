"""How each fenced block of the pages is tested: by page and heading, one entry per block in order.

- CONTROL, PYTHON, GRPCURL: run against a real control service with an engine that answers its pushes (tests/docs/test_run.py). The
  blocks of a page run in their order on one service.
- ENGINE: run against a real `sedac serve` (tests/e2e/test_docs.py), those of all pages in order on one server.
- Parsed: not run, because it needs hours, a card, containers or your model; the program, its subcommand, options and values must exist. What
  it does is covered by the tests that are named.

`BEFORE` prepares what a block takes for granted; PATTERN in `EXPECTED` must be in what the block prints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.docs import pages
from tests.docs.pages import Block


@dataclass(frozen=True)
class Parsed:
    """A block that is held against the programs' options alone."""

    tests: tuple[str, ...]
    """that run what it does, as FILE or FILE::NAME; none for what is only worth running where it is measured"""


CONTROL, PYTHON, GRPCURL, ENGINE = "control", "python", "grpcurl", "engine"
Cover = Parsed | str

_SERVES = ("tests/e2e/test_serve.py::test_completes_and_chats_and_says_what_is_attached",)
_DOCTOR = ("tests/e2e/test_refusals.py::test_doctor_finds_the_installation_whole",)
_CONTAINERS = ("tests/container/test_image.py", "tests/deploy/test_compose.py::test_compose_accepts_the_file")
_COLLECTS = ("tests/probe/test_collect.py",)
_TRAINS = ("tests/probe/test_train.py",)
_CALIBRATES = ("tests/probe/test_calibrate.py::test_calibrates_and_compares_end_to_end",)
_VALIDATES = ("tests/probe/test_validate.py", *_CALIBRATES)
_CERTIFIES = ("tests/probe/test_certify.py",)
_BENCHES = ("tests/bench/test_bench.py::test_a_tiny_matrix_from_servers_to_the_page",)
_REPORTS = ("tests/probe/test_page.py::test_the_command_writes_the_page_and_refuses_nothing_to_report",)
_DISTILLS = ("tests/probe/test_distill.py", "tests/probe/test_reduced_draft.py::test_the_command_makes_a_draft", "tests/e2e/test_drafting.py")
_CONVERTS = ("tests/probe/test_convert.py",)
_SECURES = ("tests/control/test_security.py::test_tokens_travel_over_tls", "tests/client/test_access.py")
_RECOVERS = ("tests/control/test_faults.py", "tests/e2e/test_serve.py::test_kill_9_of_the_control_service_under_load")
_CARD, _CARD_ENGINE = "tests/cuda/test_benchmarks.py", "tests/cuda/test_engine_benchmark.py"
_CUDA_STARTS = "tests/cuda/test_start.py::test_documented_lines_start_inside_graphs"

COVER: dict[str, dict[str, list[Cover]]] = {
    "README.md": {
        "Five minutes": [Parsed(_SERVES), ENGINE, ENGINE, ENGINE, Parsed(_DOCTOR), Parsed(_CONTAINERS)],
        "Your own model": [Parsed((*_COLLECTS, *_TRAINS, *_CALIBRATES, *_CERTIFIES, *_SERVES))],
    },
    "CONTRIBUTING.md": {
        "Targets": [Parsed((".ci/run", "tests/docs/test_site.py")), Parsed((".ci/run",))],
        "Move to a new version of vLLM": [Parsed(_DOCTOR)],
    },
    "docs/compatibility.md": {"vLLM, Python, platforms": [Parsed(_DOCTOR)]},
    "docs/gpu.md": {
        "On a borrowed machine": [Parsed((_CARD, _CARD_ENGINE))],
        "On your own machine": [Parsed((_CARD, _CARD_ENGINE, _CUDA_STARTS)), Parsed(_CONTAINERS)],
    },
    "docs/benchmarking.md": {
        "Benchmarking": [Parsed(_BENCHES)],
        "The committed figures": [Parsed(("tests/bench/test_matrix.py", *_BENCHES))],
    },
    "docs/operating.md": {
        "Operating": [Parsed(_SERVES)],
        "Looking": [CONTROL],
        "Full compute, now": [CONTROL],
        "Changing knobs": [CONTROL, CONTROL, CONTROL, CONTROL],
        "What a request asks for, and what it got": [ENGINE],
        "Audits and the guard": [CONTROL],
        "Trying a policy on a part of the traffic": [CONTROL, ENGINE],
        "Probe sets without a restart": [CONTROL],
        "By Python": [PYTHON],
        "By grpcurl": [GRPCURL],
        "Numbers": [ENGINE],
    },
    "docs/results.md": {
        "Speed as a client sees it": [Parsed(("tests/bench/test_matrix.py", *_BENCHES))] * 3,
        "What reducing costs in quality": [Parsed(_CALIBRATES)],
        "What was certified": [Parsed(_CERTIFIES)],
        "Speed of the forward pass": [Parsed(())],
        "Speed of self-speculation": [Parsed(("tests/test_speculation_report.py", "tests/test_grown.py"))],
        "The control plane under load": [Parsed(("tests/e2e/test_serve.py::test_swaps_under_8_streams",))],
        "How soon the guard acts": [Parsed(("tests/control/test_guard.py",))],
    },
    "docs/runbook.md": {
        "Make every request exact": [CONTROL],
        "The disk is full": [CONTROL, Parsed(_SERVES)],
        "The control service is away": [Parsed(_RECOVERS)],
        "A certificate is refused": [CONTROL, Parsed((*_CERTIFIES, "tests/control/test_certificates.py"))],
        "SedacTornSteps": [CONTROL],
        "SedacEngineStale": [CONTROL],
        "SedacPolicyRefused": [CONTROL],
        "SedacExitRateZero": [CONTROL],
        "SedacExitRateOffTarget": [CONTROL],
        "SedacDraftDoesNotPay": [CONTROL, Parsed(_DISTILLS)],
        "SedacApplySlow": [CONTROL, Parsed(_SERVES)],
        "SedacNotAttached": [Parsed(_DOCTOR)],
        "SedacNoEngine": [ENGINE],
        "SedacNoControl": [CONTROL],
        "SedacNacked": [CONTROL],
        "SedacRevisionBehind": [ENGINE],
        "SedacGuardActed": [CONTROL],
        "SedacRolloutPaused": [CONTROL],
        "SedacAuditsFail": [CONTROL],
        "SedacCallsDenied": [CONTROL],
        "SedacCallsLimited": [Parsed(("tests/control/test_limits.py",))],
        "SedacFileRefused": [ENGINE],
    },
    "docs/security.md": {
        "What is open by default": [Parsed(_SERVES)],
        "The control service beyond this machine": [CONTROL, Parsed(_SECURES), Parsed(_SECURES)],
    },
    "docs/workshop.md": {
        "Workshop": [Parsed((*_COLLECTS, *_TRAINS, *_CALIBRATES, *_CERTIFIES, *_REPORTS))],
        "Collect": [Parsed(_COLLECTS)],
        "Train": [Parsed(_TRAINS)],
        "Calibrate": [Parsed(_CALIBRATES)],
        "Validate and compare": [Parsed(_VALIDATES)],
        "Certify": [Parsed(_CERTIFIES)],
        "Report and serve": [Parsed((*_REPORTS, *_SERVES))],
        "Distill a draft": [Parsed(_DISTILLS)],
        "Convert": [Parsed(_CONVERTS)],
    },
}

BEFORE = {
    ("docs/operating.md", "Trying a policy on a part of the traffic"): "sedac ctl policy set --audit-share 0.1 --wait 10",
    ("docs/runbook.md", "SedacExitRateOffTarget"): "sedac ctl policy set --enabled --rule first --adaptive --exit-rate all=0.3 --wait 10",
    ("docs/runbook.md", "SedacGuardActed"): "sedac ctl policy set --threshold all=0.9 --comment 'more daring' --wait 10",
    ("docs/runbook.md", "SedacRolloutPaused"): "sedac ctl rollout start --revision 1 --share 0.1 --wait 10 && sedac ctl rollout pause",
}
"""commands that make the state in which somebody comes to these blocks"""

EXPECTED = {
    ("README.md", "Five minutes", 1): '"object": ?"text_completion"',
    ("README.md", "Five minutes", 2): r"(?s)\S.*\n.*\S",
    ("README.md", "Five minutes", 3): "(?s)CERTIFIED.*sedac_policy_revision",
    ("docs/operating.md", "What a request asks for, and what it got", 0): '(?s)"tier": ?"conservative".*"state": ?"SYNCED"',
    ("docs/runbook.md", "SedacRevisionBehind", 0): '"state": ?"SYNCED"',
    ("docs/runbook.md", "SedacFileRefused", 0): "sedac_control_file_refused",
    ("docs/operating.md", "Looking", 0): "SYNCED",
    ("docs/operating.md", "Full compute, now", 0): "full compute",
    ("docs/operating.md", "Trying a policy on a part of the traffic", 0): r"became revision \d",
    ("docs/operating.md", "Trying a policy on a part of the traffic", 1): "CERTIFIED",
    ("docs/operating.md", "Probe sets without a restart", 0): "mine",
    ("docs/operating.md", "Numbers", 0): "(?s)sedac_policy_revision.*sedac_control_engines",
    ("docs/runbook.md", "SedacRolloutPaused", 0): "(?s)PAUSED.*ABORTED",
    ("docs/security.md", "The control service beyond this machine", 0): "the token, shown this once",
}
"""patterns in what these blocks print, on either stream"""


def find_blocks(how: str, page: str = "") -> list[Block]:
    """Return the blocks, of one page or of all, that are covered in this way."""
    listed = (block for name in ([page] if page else pages.list_pages()) for block in pages.read_blocks(name))
    return [block for block in listed if COVER[block.page][block.heading][block.number] == how]


def check_output(block: Block, printed: str) -> None:
    """Hold what a block printed against what is expected of it."""
    expected = EXPECTED.get((*block.key, block.number), "")
    assert re.search(expected, printed), f"{block}: {expected!r} is not in\n{printed}"
