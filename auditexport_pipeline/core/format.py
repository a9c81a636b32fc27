"""How counts, times, names and commands read: the same in the CLI, reports, alerts and the Dagster UI."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

_COMMAND = re.compile(r"`auditexport (?!--outbox)")


def counted(number: int, one: str, many: str = "") -> str:
    """`1 batch`, `2,000 batches`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def batches(number: int) -> str:
    return counted(number, "batch", "batches")


def join_counts(counts: Mapping[str, int]) -> str:
    """`3 missing, 1 altered`, without what is 0."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)


def format_counts(counts: Mapping[str, int]) -> str:
    """`wrong_type 2, not_json 1`: names that an application chose, with their counts."""
    return ", ".join(f"{printable(name) or '(empty)'} {count:,}" for name, count in counts.items())


def printable(text: str) -> str:
    """A text that an application chose, on one line, without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def is_date(at_ms: int) -> bool:
    """Whether it is in years 1 to 9999, which are dates to Python and to the Dagster UI. Event times are any 64-bit integer."""
    return -62_135_596_800_000 <= at_ms < 253_402_300_800_000


def format_time(at_ms: int, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """In UTC; a time that is no date is shown as the number it is."""
    if not is_date(at_ms):
        return f"{at_ms} ms"
    return time.strftime(form, time.gmtime(at_ms // 1000))


def format_duration(seconds: float) -> str:
    """A time that a person reads at a glance: 85 ms, 0.35 s, 45 s, 12 min, 3.5 h, 12 days. Empty for NaN."""
    if seconds != seconds:
        return ""
    if 0 < seconds < 0.995:
        return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"
    for unit, length_s, until_s in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < until_s:
            shown = seconds / length_s
            return f"{shown:.{int(shown < 9.95)}f} {unit}".replace(".0 ", " ")
    return f"{seconds / 86_400:,.0f} days"


def format_bytes(number: int) -> str:
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if number >= 1000**power:
            return f"{number / 1000**power:,.1f} {unit}"
    return f"{number:,} B"


def for_outbox(text: str, outbox: str) -> str:
    """The text with its `auditexport …` commands and its sensors and schedules, all between backticks, as they are named for
    this outbox. An empty `outbox` is the only one, whose names have no prefix.
    """
    if not outbox:
        return text
    text = _COMMAND.sub(f"`auditexport --outbox {outbox} ", text)
    return re.sub(rf"`(?!{outbox}_)(\w+_(?:sensor|schedule))`", rf"`{outbox}_\1`", text)
