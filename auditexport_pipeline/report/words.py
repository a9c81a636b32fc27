"""How a number reads: counts, times, spans, bytes. One way for sentences, tables and axes.

What belongs here: values to text. What does not: HTML.
"""

from __future__ import annotations

from datetime import datetime, timezone

from auditexport_pipeline.core.status import shown_s

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
    """As the prompt says it from a second on, `12 s`, `62 min`; below it `0.35 s`, `85 ms`. Empty for what is not over yet."""
    if seconds is None:
        return ""
    if 0 < seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.2f} s" if 0 < seconds < 0.995 else shown_s(seconds)


def even(seconds: float) -> str:
    """A span that comes out even, as a label of an axis: `0.5 s`, `5 min`, `12 h`, `2 d`."""
    for length_s, unit in _SPANS:
        if seconds >= length_s and not round(seconds % length_s, 6):
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{seconds:,.4g} s"


def size(number: int) -> str:
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if number >= 1000**power:
            return f"{number / 1000**power:,.1f} {unit}"
    return f"{number:,} B"


def some_of(counts: dict[str, int]) -> str:
    """`3 missing, 1 altered`."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
