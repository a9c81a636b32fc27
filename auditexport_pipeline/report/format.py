"""How a number reads in a report: the same in sentences, tables and on axes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone

from auditexport_pipeline.core.status import format_duration as format_age

# Years 1 to 9999 are dates to Python; an event's time is any 64-bit integer.
_FIRST_MS, _LAST_MS = -62_135_596_800_000, 253_402_300_800_000
_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))


def counted(number: int, one: str, many: str = "") -> str:
    """`1 batch`, `2,000 batches`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def join_counts(counts: Mapping[str, int]) -> str:
    """`3 missing, 1 altered`."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)


def format_time(at_ms: int, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """In UTC; a time that is no date is shown as the number it is."""
    if not _FIRST_MS <= at_ms < _LAST_MS:
        return f"{at_ms} ms"
    return datetime.fromtimestamp(at_ms / 1000, tz=timezone.utc).strftime(form)


def format_seconds(seconds: float) -> str:
    """`85 ms`, `0.35 s`, and from a second on as the CLI does: `12 s`, `62 min`. Empty for NaN, a stage that is not over."""
    if seconds != seconds:
        return ""
    if 0 < seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.2f} s" if 0 < seconds < 0.995 else format_age(seconds)


def format_tick(seconds: float) -> str:
    """A duration as the label of an axis, in the largest unit that it is a multiple of: `0.5 s`, `5 min`, `2 d`."""
    seconds = round(seconds, 6)
    for length_s, unit in _UNITS:
        if seconds >= length_s and not seconds % length_s:
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{seconds:,.4g} s"


def format_bytes(number: int) -> str:
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if number >= 1000**power:
            return f"{number / 1000**power:,.1f} {unit}"
    return f"{number:,} B"


def printable(text: str) -> str:
    """An id on one line, with every character that does not print as its code."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
