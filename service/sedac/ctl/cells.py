"""What a cell of a table says: names of enums, times, sizes, shares, estimates."""

from __future__ import annotations

import math

from google.protobuf.message import Message

from sedac.contract.v1 import evidence_pb2


def name_enum(enum: object, number: int, prefix: str) -> str:
    """Return an enum value's name without its prefix."""
    return str(enum.Name(number)).removeprefix(prefix)  # type: ignore[attr-defined]


def format_time(message: Message, field: str, missing: str = "-") -> str:
    """Return a timestamp field as UTC; `missing` where it is unset."""
    return getattr(message, field).ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC") if message.HasField(field) else missing


def format_bytes(size: int) -> str:
    """Return a size for people."""
    return f"{size} B" if size < 1 << 10 else f"{size / (1 << 10):.1f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MiB"


def format_share(share: float) -> str:
    """Return a share in per cent; - where there is none."""
    return "-" if math.isnan(share) else f"{share:.1%}"


def format_estimate(estimate: evidence_pb2.Estimate) -> str:
    """Return a mean between its confidence limits, and of how many requests."""
    if not estimate.num_requests or math.isnan(estimate.mean):
        return "-"
    return f"{estimate.lower:.4f} .. {estimate.mean:.4f} .. {estimate.upper:.4f}  ({estimate.num_requests})"


def format_milliseconds(seconds: float) -> str:
    """Return seconds as milliseconds; - where there is none."""
    return "-" if math.isnan(seconds) or not seconds else f"{seconds * 1e3:.1f} ms"
