"""How a number reads: counts, times, spans, bytes. One way for sentences, tables and axes.

What belongs here: values to text. What does not: HTML.
"""

from __future__ import annotations

from datetime import datetime, timezone

# Years 1 to 9999 are dates to Python; an event's time is any 64-bit integer.
_FIRST_MS, _LAST_MS = -62_135_596_800_000, 253_402_300_800_000
_SPANS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))


def count(number: int) -> str:
    return f"{number:,}"


def some(number: int, one: str, more: str | None = None) -> str:
    """`1 batch`, `2,000 batches`."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def moment(at_ms: int | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """UTC; a time that is no date is shown as the number it is."""
    if at_ms is None:
        return ""
    if not _FIRST_MS <= at_ms < _LAST_MS:
        return f"{at_ms} ms"
    return datetime.fromtimestamp(at_ms / 1000, tz=timezone.utc).strftime(form)


def span(seconds: float | None) -> str:
    """`0.35 s`, `12 s`, `3.5 min`, `2 h`, `4.1 d`."""
    if seconds is None:
        return ""
    for size, unit in _SPANS:
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}" if abs(seconds / size) < 1000 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.3g} s" if seconds else "0 s"


def size(number: int) -> str:
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if number >= 1000**power:
            return f"{number / 1000**power:,.1f} {unit}"
    return f"{number:,} B"


def some_of(counts: dict[str, int]) -> str:
    """`3 missing, 1 altered`."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
