"""The tables of a report. pandas writes them as HTML, and escapes all text."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from auditexport_pipeline.core.format import format_bytes, format_duration, format_time, join_counts, printable
from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.report.figures import Figures

# Lines of a table; `auditexport reconcile --json` has everything.
MOST_LINES = 50
BATCHES_SHOWN = 15
_IN_JSON = "in <code>auditexport reconcile --json</code>"
_FOUND = ["missing", "duplicated", "unexpected", "altered"]
_STATES = ["open", "discarded", "retried", "gone"]
_STAGES = {
    "fetch_s": "claimed → sealed (waits for its turn, is fetched)",
    "write_s": "sealed → written (ClickHouse has it)",
    "mark_s": "written → verified (rows are marked, counted back)",
    "all": "all of it",
}
_count = "{:,}".format


def _day(at_ms: int) -> str:
    return format_time(at_ms, "%Y-%m-%d")


def _html(frame: pd.DataFrame, classes: str, *, most: int = MOST_LINES, rest: str = "of them") -> str:
    """A frame of texts as an HTML table; empty without a line. `rest` is HTML that follows the number of lines left out."""
    if frame.empty:
        return ""
    with pd.option_context("display.max_colwidth", None):
        html = frame.head(most).to_html(index=False, escape=True, border=0, classes=classes, justify="unset")
    more = len(frame) - most
    return f'<div class="wide">{html}</div>' + (f'<p class="note">…and {more:,} more {rest}.</p>' if more > 0 else "")


def places(report: Report) -> str:
    """Workspaces and days with a discrepancy, the worst first."""
    frame = pd.DataFrame(
        [
            (workspace_id, day_ms, place.rows, place.entries, *(getattr(place, name) for name in _FOUND))
            for (workspace_id, day_ms), place in report.places.items()
            if place.wrong
        ],
        columns=["workspace", "day", "rows", "entries", *_FOUND],
    )
    frame["wrong"] = -frame[_FOUND].sum(axis="columns")
    frame = frame.sort_values(["wrong", "workspace", "day"]).drop(columns="wrong")
    return _html(
        frame.assign(
            workspace=frame["workspace"].map(lambda name: printable(name) or "(swept)"),
            day=frame["day"].map(_day),
            rows=frame["rows"].map(_count),
            entries=frame["entries"].map(_count),
            # A dot for 0, so that other numbers stand out.
            **{name: frame[name].map(lambda number: f"{number:,}" if number else "·") for name in _FOUND},
        ),
        "t2",
        rest=_IN_JSON,
    )


def wrong_batches(report: Report) -> str:
    """Batches that differ, then batches with explained differences."""
    wrong = [line for line in report.batches if line.found or line.explained]
    return _html(
        pd.DataFrame(
            {
                "batch": line.batch_id,
                "first export": format_time(line.inserted_at_ms),
                "sent": _count(line.entries),
                "in ClickHouse": _count(line.stored),
                "differs": str(line.found) if line.found else "no",
                "explained": join_counts(line.explained) or "·",
            }
            for line in sorted(wrong, key=lambda line: (not line.found, line.batch_id))
        ),
        "last2",
        rest=_IN_JSON,
    )


def discrepant(found: Mapping[int, str]) -> str:
    """The discrepant batches of the ledger, newest first."""
    lines = [(batch_id, printable(found[batch_id].removeprefix("in ClickHouse: "))) for batch_id in sorted(found)[::-1]]
    return _html(pd.DataFrame(lines, columns=["batch", "in ClickHouse"]), "last")


def wrong_hours(figures: Figures) -> str:
    """The hours in which the two sides differ, the widest difference first."""
    starts = [format_time(at_ms, "%Y-%m-%d %H:%M") for at_ms in figures.bins.index]
    names = [f"before {starts[1]}", *starts[1:-1], f"{starts[-1]} and after"]
    frame = figures.bins.assign(hour=names).query("difference != 0")
    frame = frame.sort_values(
        ["difference", "hour"], key=lambda column: -column.abs() if column.name != "hour" else column
    )
    return _html(
        pd.DataFrame(
            {
                "hour (UTC)": frame["hour"],
                "exported rows": frame["rows"].map(_count),
                "entries": frame["entries"].map(_count),
                "difference": frame["difference"].map("{:+,}".format),
            }
        ),
        "t1",
        most=20,
        rest="hours",
    )


def stages(batches: pd.DataFrame) -> str:
    """The seconds of each stage: median, 95th percentile and longest of these batches."""
    seconds = batches[["fetch_s", "write_s", "mark_s"]]
    seconds = seconds.assign(all=seconds.sum(axis="columns").where(seconds["mark_s"].notna()))
    shown = seconds.quantile([0.5, 0.95, 1.0]).T.map(format_duration)
    shown.columns = pd.Index(["median", "95 %", "longest"])
    shown.insert(0, "stage", pd.Series(_STAGES))
    shown.insert(1, "batches", seconds.count().map(_count))
    return _html(shown, "t1")


def batches(frame: pd.DataFrame) -> str:
    """The newest batches, one line each."""
    newest = frame.tail(BATCHES_SHOWN)[::-1]
    requeue = newest["generation"].map(lambda generation: f", requeue {generation}" if generation else "")
    return _html(
        pd.DataFrame(
            {
                "batch": newest["batch_id"],
                "state": newest["state"] + requeue,
                "claimed (UTC)": newest["claimed_at_ms"].map(format_time),
                "rows": newest["row_count"].map(_count),
                "entries": newest["entry_count"].map(_count),
                "payloads": newest["bytes"].map(format_bytes),
                "attempts": newest["attempts"].map(_count),
                "fetch": newest["fetch_s"].map(format_duration),
                "write": newest["write_s"].map(format_duration),
                "mark, verify": newest["mark_s"].map(format_duration),
            }
        ),
        "t3",
    )


def letters(frame: pd.DataFrame) -> str:
    """Dead letters by reason: how many are in each state, and the first and the last day; most frequent first."""
    if frame.empty:
        return ""
    wide = frame.pivot_table(index="reason", columns="state", values="letters", aggfunc="sum", fill_value=0)
    wide = wide.reindex(columns=_STATES, fill_value=0).sort_values(_STATES, ascending=False).map(_count)
    days = frame.groupby("reason")["day_number"].agg(["min", "max"]).map(lambda day: _day(int(day) * DAY_MS))
    shown = wide.join(days.set_axis(["first day", "last day"], axis="columns"))
    shown.insert(0, "reason", shown.index.map(printable))
    return _html(shown, "t1")
