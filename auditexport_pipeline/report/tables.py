"""The tables of a page: pandas makes them, and escapes whatever an application chose.

What belongs here: columns and their order. What does not: which numbers (`figures`), and colours (`look`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.core.series import BatchLine, LetterCount
from auditexport_pipeline.report.figures import Figures
from auditexport_pipeline.report.words import count, moment, size, some_of, span

if TYPE_CHECKING:
    import pandas as pd

# Lines of a table; of a reconciliation, the prompt's `--json` has everything.
MOST_LINES = 50
_IN_JSON = "in <code>auditexport reconcile --json</code>"

Form = Callable[[Any], str]


def table(
    lines: Sequence[Mapping[str, Any]],
    forms: Mapping[str, Form],
    look: str,
    *,
    most: int = MOST_LINES,
    rest: str = "of them",
) -> str:
    """Some lines as an HTML table, each column by its form; every cell is escaped. Empty for no lines.

    `rest` says of those beyond `most` what they are, or where to find them; it is HTML.
    """
    import pandas as pd

    if not lines:
        return ""
    frame = pd.DataFrame(list(lines)[:most], columns=list(forms), dtype=object)
    return _html(frame, forms, look) + _more(len(lines) - most, rest)


def _html(frame: pd.DataFrame, forms: Mapping[str, Form], look: str) -> str:
    import pandas as pd

    shown = pd.DataFrame({name: [form(value) for value in frame[name]] for name, form in forms.items()}, dtype=object)
    with pd.option_context("display.max_colwidth", None):
        html = shown.to_html(index=False, escape=True, border=0, classes=look, justify="unset")
    return f'<div class="wide">{html}</div>'


def _more(lines: int, rest: str) -> str:
    return f'<p class="said">…and {lines:,} more {rest}.</p>' if lines > 0 else ""


def _some(number: int) -> str:
    """A count among which the zeros should not catch the eye."""
    return f"{number:,}" if number else "·"


def seen(text: str) -> str:
    """An id as it is, with what cannot be seen made visible: it is one line of a table."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


# ── what differs ─────────────────────────────────────────────────────────────────────────────────


def places(report: Report) -> str:
    """Workspaces and days with a discrepancy, the worst first."""
    lines = [
        {
            "workspace": workspace_id or "(swept)",
            "day": day_ms,
            "rows": place.rows,
            "entries": place.entries,
            "missing": place.missing,
            "duplicated": place.duplicated,
            "unexpected": place.unexpected,
            "altered": place.altered,
        }
        for (workspace_id, day_ms), place in report.places.items()
        if place.wrong
    ]
    lines.sort(key=lambda line: (-sum(int(str(line[name])) for name in _FOUND), line["workspace"], line["day"]))
    forms: dict[str, Form] = {
        "workspace": seen,
        "day": lambda day_ms: moment(day_ms, "%Y-%m-%d"),
        "rows": count,
        "entries": count,
    }
    return table(lines, {**forms, **dict.fromkeys(_FOUND, _some)}, "t2", rest=_IN_JSON)


_FOUND = ("missing", "duplicated", "unexpected", "altered")


def wrong_batches(report: Report) -> str:
    """Batches that differ, or of which something was explained."""
    lines = [
        {
            "batch": line.batch_id,
            "first export": line.inserted_at_ms,
            "sent": line.entries,
            "in ClickHouse": line.stored,
            "differs": str(line.found) if line.found else "no",
            "explained": some_of(line.explained) or "·",
        }
        for line in report.batches
        if line.found or line.explained
    ]
    lines.sort(key=lambda line: (line["differs"] == "no", line["batch"]))
    forms: dict[str, Form] = {
        "batch": str,
        "first export": moment,
        "sent": count,
        "in ClickHouse": count,
        "differs": str,
        "explained": str,
    }
    return table(lines, forms, "last2", rest=_IN_JSON)


def discrepant(found: Mapping[int, str]) -> str:
    lines = [{"batch": batch_id, "in ClickHouse": error} for batch_id, error in found.items()]
    return table(lines, {"batch": str, "in ClickHouse": seen}, "last")


def wrong_hours(figures: Figures) -> str:
    """The hours in which the two sides differ, the widest difference first."""
    grid = figures.grid
    named = [
        *((moment(hour.at_ms, "%Y-%m-%d %H:%M"), hour) for hour in figures.hours),
        (f"before {moment(grid.starts_ms, '%Y-%m-%d %H:%M')}", figures.before),
        (f"{moment(grid.high_ms, '%Y-%m-%d %H:%M')} and after", figures.after),
    ]
    lines = [
        {"hour (UTC)": name, "exported rows": hour.rows, "entries": hour.entries, "difference": hour.difference}
        for name, hour in named
        if hour.difference
    ]
    lines.sort(key=lambda line: (-abs(int(str(line["difference"]))), str(line["hour (UTC)"])))
    forms: dict[str, Form] = {"hour (UTC)": str, "exported rows": count, "entries": count}
    return table(lines, {**forms, "difference": lambda number: f"{number:+,}"}, "t1", most=20, rest="hours")


# ── the ledger ───────────────────────────────────────────────────────────────────────────────────


def stages(lines: Sequence[BatchLine]) -> str:
    """How long each stage takes: the median, the 95th percentile and the longest of these batches."""
    import pandas as pd

    if not lines:
        return ""
    frame = pd.DataFrame(
        {
            "claimed → sealed (waits for its turn, is fetched)": [line.fetch_s for line in lines],
            "sealed → written (ClickHouse has it)": [line.write_s for line in lines],
            "written → verified (rows are marked, counted back)": [line.mark_s for line in lines],
            "all of it": [line.total_s if line.mark_s is not None else None for line in lines],
        },
        dtype="Float64",
    )
    told = [
        {
            "stage": name,
            "batches": int(frame[name].count()),
            "median": _quantile(frame[name], 0.5),
            "95 %": _quantile(frame[name], 0.95),
            "longest": _quantile(frame[name], 1.0),
        }
        for name in frame.columns
    ]
    return table(told, {"stage": str, "batches": count, "median": span, "95 %": span, "longest": span}, "t1")


def _quantile(column: pd.Series, share: float) -> float | None:
    there = column.dropna()
    return float(there.astype("float64").quantile(share)) if len(there) else None


def batches(lines: Sequence[BatchLine], most: int = 15) -> str:
    """The newest batches, one line each."""
    told = [
        {
            "batch": line.batch_id,
            "state": line.state + (f", requeue {line.generation}" if line.generation else ""),
            "claimed (UTC)": line.claimed_at_ms,
            "rows": line.rows,
            "entries": line.entries,
            "payloads": line.bytes,
            "attempts": line.attempts,
            "fetch": line.fetch_s,
            "write": line.write_s,
            "mark, verify": line.mark_s,
        }
        for line in reversed(lines[-most:])
    ]
    forms: dict[str, Form] = {"batch": str, "state": str, "claimed (UTC)": moment, "rows": count, "entries": count}
    return table(
        told, {**forms, "payloads": size, "attempts": count, "fetch": span, "write": span, "mark, verify": span}, "t3"
    )


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────


def letters(counts: Sequence[LetterCount]) -> str:
    """Dead letters by reason: where they stand, and the first and the last day."""
    import pandas as pd

    if not counts:
        return ""
    frame = pd.DataFrame(
        [{"reason": one.reason, "state": one.state, "day": one.day_ms, "letters": one.letters} for one in counts]
    )
    states = ("open", "discarded", "retried", "gone")
    wide = frame.pivot_table(index="reason", columns="state", values="letters", aggfunc="sum", fill_value=0)
    wide = wide.reindex(columns=list(states), fill_value=0)
    days = frame.groupby("reason")["day"].agg(["min", "max"])
    told = [
        {
            "reason": str(reason),
            **{state: int(wide.loc[reason, state]) for state in states},
            "first day": int(days.loc[reason, "min"]),
            "last day": int(days.loc[reason, "max"]),
        }
        for reason in wide.sort_values(list(states), ascending=False).index
    ]
    day: Form = lambda at_ms: moment(at_ms, "%Y-%m-%d")  # noqa: E731
    return table(told, {"reason": seen, **dict.fromkeys(states, count), "first day": day, "last day": day}, "t1")
