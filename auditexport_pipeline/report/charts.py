"""The charts of a report, drawn by matplotlib as inline SVG that needs no resource and no script.

Figures are plain objects: without pyplot there is no window and no global state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from auditexport_pipeline.core.format import format_duration
from auditexport_pipeline.core.units import DAY_MS, HOUR_MS

# The colours of Okabe and Ito, which people with any colour vision can tell apart; each has one meaning on the whole page.
# (day, night): a chart is drawn in the first, and its SVG then names the page's variable.
PALETTE = {
    "ink": ("#1c2126", "#e8eaed"),
    "muted": ("#5b646e", "#a3acb6"),
    "line": ("#d9dee3", "#363d45"),
    "outbox": ("#0072b2", "#3d9bd8"),
    "clickhouse": ("#e69f00", "#f0b429"),
    "wrong": ("#d55e00", "#ff8038"),
    "pending": ("#8d96a0", "#7f8993"),
    "fetch": ("#56b4e9", "#8accf2"),
    "letter": ("#cc79a7", "#dd9abf"),
    "good": ("#009e73", "#2bbf95"),
}
_COLOUR = {name: day for name, (day, _) in PALETTE.items()}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "text.parse_math": False,  # a reason is not a formula
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlecolor": _COLOUR["ink"],
    "axes.labelcolor": _COLOUR["muted"],
    "axes.edgecolor": _COLOUR["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _COLOUR["line"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "text.color": _COLOUR["ink"],
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in (("major.size", 0), ("minor.size", 0))},
    **{f"{axis}tick.labelcolor": _COLOUR["muted"] for axis in "xy"},
    "xtick.major.pad": 6,
    "timezone": "UTC",
}
_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))
_TICKS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60 * n for n in (1, 2, 5, 10, 15, 30)),
    *(3_600 * n for n in (1, 2, 3, 6, 12)),
    *(86_400 * n for n in (1, 2, 5, 10, 30, 90, 365)),
)
_LOG_TICKS_S = (0, 1, 10, 60, 600, 3_600, 6 * 3_600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400)
# The chart of hours shows the hours that have an event, and at least this many.
FEWEST_HOURS = 12
BATCHES_DRAWN = 60
REASONS_DRAWN = 12
DAYS_DRAWN = 31
MOST_LETTERS = 30
# All labels of a row of batches together.
MOST_ID_LETTERS = 75


def _svg(name: str, described: str, height_in: float, draw: Callable[[Figure], None]) -> str:
    """A figure as an `<svg>` element; `described` is what a screen reader says."""
    file = io.StringIO()
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.simplefilter("ignore")  # a glyph that its own fonts lack: the reader's browser has others
        figure = Figure(figsize=(10.4, height_in), layout="constrained")
        draw(figure)
        no_metadata: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    # Fit for HTML: no prolog, no style for the whole page, no id twice on it, the page's font and the page's colours.
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(described)}">{svg[svg.index(">") + 1 :]}'
    svg = re.sub(r'(?<=<g) id="[^"]*"|font-family: [^;"]*;? ?', "", svg.replace("xlink:href=", "href="))
    for variable, colour in _COLOUR.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", " ", svg)


def format_tick(seconds: float) -> str:
    """A duration as the label of an axis, in the largest unit that it is a multiple of: `0.5 s`, `5 min`, `2 d`."""
    seconds = round(seconds, 6)
    for length_s, unit in _UNITS:
        if seconds >= length_s and not seconds % length_s:
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{seconds:,.4g} s"


def _count_axis(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axis.set_major_formatter("{x:,.0f}")


def _duration_axis(axis: Any, most_s: float) -> None:
    axis.set_major_locator(MultipleLocator(next((step for step in _TICKS_S if most_s / step <= 5), most_s / 4)))
    axis.set_major_formatter(lambda seconds, _: format_tick(seconds))


def _time_axis(axis: Any) -> None:
    locator = AutoDateLocator(maxticks=10)  # type: ignore[no-untyped-call]
    axis.set_major_locator(locator)
    formats = ConciseDateFormatter(  # type: ignore[no-untyped-call]
        locator,
        formats=["%Y", "%b", "%-d %b", "%H:%M", "%H:%M", "%H:%M:%S.%f"],
        zero_formats=["", "%Y", "%-d %b", "%-d %b", "%H:%M", "%H:%M"],
        offset_formats=["", "%Y", "%Y", "%-d %b %Y", "%-d %b %Y", "%-d %b %Y"],
    )
    axis.set_major_formatter(formats)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)


def _dates(at_ms: Any) -> Any:
    """UTC as matplotlib reads it."""
    return pd.to_datetime(at_ms, unit="ms").to_numpy()


def hours(frame: pd.DataFrame, step_ms: int) -> str:
    """Events by hour in the outbox and in ClickHouse, and below them the difference; empty when there is no event."""
    busy = frame[["rows", "entries", "pending"]].any(axis="columns").to_numpy().nonzero()[0]
    if not busy.size:
        return ""
    lack = max(0, FEWEST_HOURS - int(busy[-1] - busy[0] + 1))
    first = max(0, int(busy[0]) - -(-lack // 2))
    shown = frame.iloc[first : max(int(busy[-1]) + 1, first + FEWEST_HOURS)]
    edges = _dates([*shown.index, shown.index[-1] + step_ms])
    unit = {HOUR_MS: "hour", DAY_MS: "day"}.get(step_ms, f"{step_ms // DAY_MS} days")
    outbox = shown["rows"] + shown["pending"]

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
        blue: Any = {"color": _COLOUR["outbox"], "alpha": 0.45, "label": "outbox, exported rows"}
        above.stairs(shown["rows"], edges, fill=True, **blue)
        if shown["pending"].any():
            grey: Any = {"color": _COLOUR["pending"], "alpha": 0.5, "label": "outbox, pending rows"}
            above.stairs(outbox, edges, baseline=shown["rows"], fill=True, **grey)
        width = 2.2 if len(shown) <= 60 else 1.2
        above.stairs(shown["entries"], edges, color=_COLOUR["clickhouse"], linewidth=width, label="ClickHouse, entries")
        above.set_title(f"Events per {unit}")
        _count_axis(above.yaxis)
        _legend(above)
        difference = shown["difference"]
        below.stairs(difference, edges, fill=True, color=_COLOUR["wrong"])
        below.axhline(0, color=_COLOUR["muted"], linewidth=0.8)
        below.set_title(f"Difference: exported rows without an entry, per {unit}")
        if difference.any():
            below.margins(y=0.12)
            _count_axis(below.yaxis)
        else:
            below.set_ylim(-1, 1)
            below.set_yticks([0])
            below.text(0.5, 0.72, f"none in any {unit}", transform=below.transAxes, ha="center", color=_COLOUR["muted"])
        below.set_xlim(edges[0], edges[-1])
        _time_axis(below.xaxis)
        below.set_xlabel(f"{unit} of the event's own time, UTC")

    described = (
        f"Events per {unit}: {shown['rows'].sum():,} exported rows in the outbox, {shown['entries'].sum():,} entries in "
        f"ClickHouse, {shown['pending'].sum():,} pending rows"
    )
    return _svg("hours", described, 4.6, draw)


def lag_is_logarithmic(points: pd.DataFrame, now_s: float) -> bool:
    """Whether the worst lag would flatten all others into the axis of a linear scale."""
    worst = points["worst_s"].dropna()
    return bool(len(worst)) and max(worst.max(), now_s) > max(60.0, 20 * worst.median())


def lag(points: pd.DataFrame, now_s: float) -> str:
    """The lag of batches over time, the worst and the mean of each part of the window, and the lag of now."""
    points = points.dropna(subset=["worst_s"])
    if points.empty:
        return ""
    worst_s = points["worst_s"].max()
    most_s = max(worst_s, now_s, 1.0)
    margin_ms = max(1_000, (points["at_ms"].max() - points["at_ms"].min()) / 50)
    times = _dates(points["at_ms"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        marker = "o" if len(points) <= 60 else None
        axes.plot(times, points["worst_s"], color=_COLOUR["outbox"], marker=marker, markersize=4, label="worst batch")
        axes.plot(
            times, points["mean_s"], color=_COLOUR["fetch"], linewidth=1.4, linestyle="--", label="mean of batches"
        )
        now = f"now: {format_duration(now_s)}"
        axes.axhline(now_s, color=_COLOUR["clickhouse"], linewidth=1.6, linestyle=":", label=now)
        axes.set_title("Lag: age of a batch's first row when it was exported")
        if lag_is_logarithmic(points, now_s):
            axes.set_ylim(0, most_s * 1.8)
            axes.set_yscale("symlog", linthresh=1.0)
            labelled = [tick for tick in _LOG_TICKS_S if tick <= most_s * 1.1]
            axes.set_yticks(labelled, [format_tick(tick) for tick in labelled])
            axes.set_yticks([], minor=True)
        else:
            axes.set_ylim(0, most_s * 1.1)
            _duration_axis(axes.yaxis, most_s * 1.1)
        _legend(axes)
        first, last = _dates([points["at_ms"].min() - margin_ms, points["at_ms"].max() + margin_ms])
        axes.set_xlim(first, last)
        _time_axis(axes.xaxis)
        axes.set_xlabel("time of export, UTC")

    return _svg("lag", f"Lag over time: at worst {format_duration(worst_s)}, now {format_duration(now_s)}", 3.0, draw)


def batches(frame: pd.DataFrame) -> str:
    """Rows of the newest batches, and how long each stage took."""
    shown = frame.tail(BATCHES_DRAWN)
    stages = shown[["fetch_s", "write_s", "mark_s"]].fillna(0)
    totals = stages.sum(axis="columns")
    most_s = max(totals.max(), 0.001)
    # A batch that was verified a day later must not make all others invisible.
    usual_s = totals.quantile(0.9, interpolation="lower")
    cut_s = usual_s * 1.6 if usual_s and most_s > usual_s * 4 else most_s * 1.08
    taller = int((totals > cut_s).sum())
    places = range(len(shown))

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
        above.bar(places, shown["row_count"], color=_COLOUR["outbox"])
        above.set_title("Rows per batch")
        _count_axis(above.yaxis)
        floors = stages.cumsum(axis="columns") - stages
        for stage, label, colour in (
            ("fetch_s", "claimed → sealed", "fetch"),
            ("write_s", "sealed → written", "clickhouse"),
            ("mark_s", "written → verified", "outbox"),
        ):
            below.bar(places, stages[stage], bottom=floors[stage], color=_COLOUR[colour], label=label)
        below.set_ylim(0, cut_s)
        note = f" ({taller} taller than shown, up to {format_duration(most_s)})" if taller else ""
        below.set_title(f"Time per batch{note}")
        _duration_axis(below.yaxis, cut_s)
        _legend(below)
        ids = shown["batch_id"].astype(str)
        step = -(-len(ids) * len(ids.iloc[-1]) // MOST_ID_LETTERS)
        below.set_xticks(places[::step], ids[::step])
        # A few batches stand in the middle, and are not as wide as the page.
        below.set_xlim(*((-0.8, len(shown) - 0.2) if len(shown) > 8 else (-3, max(len(shown) + 2, 8))))
        below.set_xlabel("batch, by its number in the ledger; oldest claim first")

    described = (
        f"The newest {len(shown)} batches: at most {shown['row_count'].max():,} rows and {format_duration(most_s)} each"
    )
    return _svg("batches", described, 4.4, draw)


def letters(frame: pd.DataFrame) -> str:
    """Dead letters by reason, and by the day on which they were set aside; empty when there are none."""
    if frame.empty:
        return ""
    frame = frame.assign(closed=frame["state"] != "open")
    by_reason, by_day = (
        frame.groupby([key, "closed"])["letters"]
        .sum()
        .unstack(fill_value=0)
        .reindex(columns=[False, True], fill_value=0)
        for key in ("reason", "day_number")
    )
    by_reason = by_reason.loc[by_reason.sum(axis="columns").sort_values(kind="stable").index[-REASONS_DRAWN:]]
    last_day = by_day.index.max()
    days = range(max(by_day.index.min(), last_day - DAYS_DRAWN + 1), last_day + 1)
    by_day = by_day.reindex(days, fill_value=0)
    dates = pd.to_datetime(list(days), unit="D")
    parts = ((False, "open", "letter"), (True, "retried, discarded or gone", "pending"))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        names = [f"{name[: MOST_LETTERS - 1]}…" if len(name) > MOST_LETTERS else name for name in by_reason.index]
        places = range(len(names))
        for closed, label, colour in parts:
            style: Any = {"color": _COLOUR[colour], "label": label}
            left.barh(places, by_reason[closed], left=by_reason[False] * closed, height=0.7, **style)
            right.bar(dates, by_day[closed], bottom=by_day[False] * closed, width=0.7, **style)
        left.set_title("By reason")
        left.set_yticks(places, names)
        left.set_ylim(len(names) - max(len(names), 4) - 0.6, len(names) - 0.4)
        _count_axis(left.xaxis)
        left.grid(visible=False, axis="y")
        left.grid(visible=True, axis="x")
        right.set_title("By day")
        right.set_ylim(0, by_day.sum(axis="columns").max() * 1.06)
        _count_axis(right.yaxis)
        step = -(-len(days) // 6)
        right.set_xticks(dates[::step], [f"{day:%-d %b}" for day in dates[::step]])
        margin = pd.Timedelta(days=0.7 if len(days) > 4 else 2)
        right.set_xlim(dates[0] - margin, dates[-1] + margin)
        right.set_xlabel("day on which they were set aside, UTC")
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2)

    described = f"{frame['letters'].sum():,} dead letters by reason and by day"
    return _svg("letters", described, 1.4 + 0.3 * max(4, len(by_reason)), draw)
