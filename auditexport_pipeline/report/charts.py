"""The pictures of a page: matplotlib draws them, and they become inline SVG without a resource or a script.

What belongs here: axes, marks and labels. What does not: which numbers (`figures`), and which colours (`look`).
Nothing here knows pyplot: a figure is an object, and no window or global state is behind it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from auditexport_pipeline.core.series import BatchLine, Hour, LagBin, LetterCount
from auditexport_pipeline.report.look import (
    CLICKHOUSE,
    COLOURS,
    FETCH,
    INK,
    LETTER,
    LINE,
    MUTED,
    OUTBOX,
    PENDING,
    WRONG,
)
from auditexport_pipeline.report.words import even, moment, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 10.4
SECOND_MS, MINUTE_MS, HOUR_MS, DAY_MS = 1_000, 60_000, 3_600_000, 86_400_000
# What may lie between two labels of a time axis, and of an axis of durations.
_TICKS_MS = [
    *(SECOND_MS * n for n in (1, 2, 5, 10, 15, 30)),
    *(MINUTE_MS * n for n in (1, 2, 5, 10, 15, 30)),
    *(HOUR_MS * n for n in (1, 2, 3, 6, 12)),
    *(DAY_MS * n for n in (1, 2, 7, 14, 28, 91, 182, 364)),
]
_TICKS_S = [
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60.0 * n for n in (1, 2, 5, 10, 15, 30)),
    *(3_600.0 * n for n in (1, 2, 3, 6, 12)),
    *(86_400.0 * n for n in (1, 2, 5, 10, 30, 90, 365)),
]
_DECADES_S = (0, 1, 10, 60, 600, 3_600, 6 * 3_600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400)
MOST_TIME_TICKS = 9
# All labels of a row of batches together.
MOST_ID_LETTERS = 75
# A chart of hours shows where something is, and at least this many.
FEWEST_HOURS = 12
BATCHES_DRAWN = 60
REASONS_DRAWN = 12
DAYS_DRAWN = 31
LABEL_LETTERS = 30

_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "text.parse_math": False,  # a reason is not a formula
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": LINE,
    "xtick.major.pad": 6,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def _drawn(name: str, described: str, height_in: float, draw: Callable[[Figure], None]) -> str:
    """A figure as an `<svg>` element; `described` is what a screen reader says."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {**_SETTINGS, "svg.hashsalt": f"auditexport-{name}"}
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        warnings.simplefilter("ignore")  # a glyph that its own fonts lack: the reader's browser has others
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure)
        file = io.StringIO()
        no_metadata: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _inline(file.getvalue(), name, described)


def _inline(svg: str, name: str, described: str) -> str:
    """The SVG fit for HTML: no prolog and no namespaces, ids of its own, and colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{escape(described)}">', svg
    )
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(?<=[\d.]) ?\n", " ", svg)
    svg = re.sub(r"\n\s*", "", svg)
    for colour, (variable, _) in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"(id=\"|#)([pmh][0-9a-f]{10})", rf"\1{name}-\2", svg)


# ── axes ─────────────────────────────────────────────────────────────────────────────────────────


def _counts(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _durations(axis: Any, most_s: float) -> None:
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    step_s = next((step for step in _TICKS_S if most_s / step <= 5), most_s / 4)
    axis.set_major_locator(MultipleLocator(step_s))
    axis.set_major_formatter(FuncFormatter(lambda value, _: even(round(value, 6))))


def _times(axes: Axes, from_ms: int, to_ms: int) -> None:
    """A time axis in UTC: at each label the hour, and the day where it begins; or the day, and the year."""
    step_ms = next((step for step in _TICKS_MS if (to_ms - from_ms) / step <= MOST_TIME_TICKS), _TICKS_MS[-1])
    ticks = list(range(-(-from_ms // step_ms) * step_ms, to_ms + 1, step_ms))
    small, large = "%-d %b", "%Y"
    if step_ms < DAY_MS:
        small, large = "%H:%M" if step_ms >= MINUTE_MS else "%H:%M:%S", "%-d %b"
    labels = []
    before = None
    for tick in ticks:
        whole = moment(tick, large)
        labels.append(moment(tick, small) + (f"\n{whole}" if whole != before else ""))
        before = whole
    axes.set_xticks(ticks, labels)
    axes.set_xlim(from_ms, to_ms)


def _grid(axes: Axes) -> None:
    axes.grid(visible=True, axis="y")
    axes.tick_params(length=0)


def _legend(axes: Axes, columns: int, **more: Any) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, borderaxespad=0.2, handlelength=1.4, **more)


def shortened(text: str) -> str:
    return text if len(text) <= LABEL_LETTERS else text[: LABEL_LETTERS - 1] + "…"


# ── the pictures ─────────────────────────────────────────────────────────────────────────────────


def hours(lines: Sequence[Hour], step_ms: int) -> str:
    """Events by hour in the outbox against ClickHouse, and below it the difference; empty when there is none."""
    there = [number for number, hour in enumerate(lines) if hour.rows or hour.entries or hour.pending]
    if not there:
        return ""
    first, last = there[0], there[-1]
    lack = max(0, FEWEST_HOURS - (last - first + 1))
    first = max(0, first - -(-lack // 2))
    last = min(len(lines) - 1, max(last, first + FEWEST_HOURS - 1))
    shown = lines[first : last + 1]
    edges = [hour.at_ms for hour in shown] + [shown[-1].at_ms + step_ms]
    rows = [hour.rows for hour in shown]
    pending = [hour.rows + hour.pending for hour in shown]
    unit = {HOUR_MS: "hour", DAY_MS: "day"}.get(step_ms, f"{step_ms // DAY_MS} days")

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
        above.stairs(rows, edges, fill=True, color=OUTBOX, alpha=0.45, label="outbox, exported rows")
        if any(hour.pending for hour in shown):
            above.stairs(
                pending, edges, baseline=rows, fill=True, color=PENDING, alpha=0.5, label="outbox, pending rows"
            )
        above.stairs(
            [hour.entries for hour in shown],
            edges,
            color=CLICKHOUSE,
            linewidth=2.2 if len(shown) <= 60 else 1.2,
            label="ClickHouse, entries",
        )
        above.set_ylim(0, max(1, *pending, *(hour.entries for hour in shown)) * 1.06)
        above.set_title(f"Events per {unit}")
        _counts(above.yaxis)
        _grid(above)
        _legend(above, 3)
        differences = [hour.difference for hour in shown]
        below.stairs(differences, edges, fill=True, color=WRONG)
        low, high = min(0, *differences), max(0, *differences)
        room = max(1, high - low) * 0.12
        below.set_ylim(low - room, high + room)
        below.axhline(0, color=MUTED, linewidth=0.8)
        below.set_title(f"Difference: exported rows without an entry, per {unit}")
        if not any(differences):
            below.set_ylim(-1, 1)
            below.set_yticks([0])
            below.text(0.5, 0.72, f"none in any {unit}", transform=below.transAxes, ha="center", color=MUTED)
        else:
            _counts(below.yaxis)
        _grid(below)
        _times(below, edges[0], edges[-1])
        below.set_xlabel(f"{unit} of the event's own time, UTC")

    described = (
        f"Events per {unit}: {sum(rows):,} exported rows in the outbox, {sum(hour.entries for hour in shown):,} entries in "
        f"ClickHouse, {sum(hour.pending for hour in shown):,} pending rows"
    )
    return _drawn("hours", described, 4.6, draw)


def lag_is_apart(points: Sequence[LagBin], now_s: float) -> bool:
    """Whether the worst lag would flatten all others into the axis: then the scale is logarithmic from a second on."""
    worst = sorted(point.worst_s for point in points if point.worst_s is not None)
    return bool(worst) and max(worst[-1], now_s) > max(60.0, 20 * worst[len(worst) // 2])


def lag(points: Sequence[LagBin], now_s: float) -> str:
    """The lag of batches over time, the worst and the mean of each part of the window, and the lag of now."""
    dated = [point for point in points if point.worst_s is not None]
    if not dated:
        return ""
    times = [point.at_ms for point in dated]
    worst = [point.worst_s or 0.0 for point in dated]
    mean = [point.mean_s or 0.0 for point in dated]
    margin = max(1_000, (times[-1] - times[0]) // 50)
    apart = lag_is_apart(points, now_s)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        marker = "o" if len(times) <= 60 else None
        axes.plot(times, worst, color=OUTBOX, linewidth=1.8, marker=marker, markersize=4, label="worst batch")
        axes.plot(times, mean, color=FETCH, linewidth=1.4, linestyle=(0, (4, 2)), label="mean of batches")
        most = max(*worst, now_s, 1.0)
        axes.axhline(now_s, color=CLICKHOUSE, linewidth=1.6, linestyle=(0, (1, 1.5)), label=f"now: {span(now_s)}")
        axes.set_ylim(0, most * (1.8 if apart else 1.1))
        axes.set_title("Lag: age of a batch's first row when it was exported")
        if apart:
            axes.set_yscale("symlog", linthresh=1.0)
            labelled = [mark for mark in _DECADES_S if mark <= most * 1.1]
            axes.set_yticks(labelled, [even(mark) for mark in labelled])
            axes.set_yticks([], minor=True)
        else:
            _durations(axes.yaxis, most * 1.1)
        _grid(axes)
        _legend(axes, 3)
        _times(axes, times[0] - margin, times[-1] + margin)
        axes.set_xlabel("time of export, UTC")

    described = f"Lag over time: at worst {span(max(worst))}, now {span(now_s)}"
    return _drawn("lag", described, 3.0, draw)


def batches(lines: Sequence[BatchLine]) -> str:
    """Rows of the newest batches, and how long each stage took."""
    shown = lines[-BATCHES_DRAWN:]
    if not shown:
        return ""
    places = range(len(shown))
    stages = [
        ("claimed → sealed", FETCH, [line.fetch_s or 0.0 for line in shown]),
        ("sealed → written", CLICKHOUSE, [line.write_s or 0.0 for line in shown]),
        ("written → verified", OUTBOX, [line.mark_s or 0.0 for line in shown]),
    ]
    totals = sorted(line.total_s for line in shown)
    # A batch that was verified a day later must not make all others invisible.
    usual = totals[int(0.9 * (len(totals) - 1))]
    most = max(totals[-1], 0.001)
    cut = usual * 1.6 if usual and most > usual * 4 else most * 1.08
    higher = sum(total > cut for total in totals)

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
        above.bar(places, [line.rows for line in shown], width=0.8, color=OUTBOX)
        above.set_title("Rows per batch")
        above.set_ylim(0, max(1, *(line.rows for line in shown)) * 1.06)
        _counts(above.yaxis)
        _grid(above)
        floor = [0.0] * len(shown)
        for name, colour, seconds in stages:
            below.bar(places, seconds, bottom=floor, width=0.8, color=colour, label=name)
            floor = [low + high for low, high in zip(floor, seconds, strict=True)]
        below.set_ylim(0, cut)
        below.set_title("Time per batch" + (f" ({higher} taller than shown, up to {span(most)})" if higher else ""))
        _durations(below.yaxis, cut)
        _grid(below)
        _legend(below, 3)
        step = -(-len(shown) * len(str(shown[-1].batch_id)) // MOST_ID_LETTERS)
        below.set_xticks(list(places)[::step], [str(line.batch_id) for line in shown[::step]])
        below.set_xlim(-0.8 if len(shown) > 8 else -3, len(shown) - 0.2 if len(shown) > 8 else max(len(shown) + 2, 8))
        below.set_xlabel("batch, by its number in the ledger; oldest claim first")

    described = (
        f"The newest {len(shown)} batches: at most {max(line.rows for line in shown):,} rows and {span(most)} each"
    )
    return _drawn("batches", described, 4.4, draw)


def letters(counts: Sequence[LetterCount]) -> str:
    """Dead letters by reason, and by the day on which they were set aside."""
    if not counts:
        return ""
    by_reason: dict[str, list[int]] = {}
    by_day: dict[int, list[int]] = {}
    for one in counts:
        for groups, key in ((by_reason, one.reason), (by_day, one.day_ms)):
            pair = groups.setdefault(key, [0, 0])  # type: ignore[arg-type]
            pair[one.state != "open"] += one.letters
    reasons = sorted(by_reason.items(), key=lambda item: (sum(item[1]), item[0]))[-REASONS_DRAWN:]
    last_day = max(by_day)
    first_day = max(min(by_day), last_day - (DAYS_DRAWN - 1) * DAY_MS)
    days = [(day, by_day.get(day, [0, 0])) for day in range(first_day, last_day + 1, DAY_MS)]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        names = [shortened(name) for name, _ in reasons]
        places = list(range(len(reasons)))
        left.barh(places, [pair[0] for _, pair in reasons], color=LETTER, height=0.7, label="open")
        left.barh(
            places,
            [pair[1] for _, pair in reasons],
            left=[pair[0] for _, pair in reasons],
            color=PENDING,
            height=0.7,
            label="retried, discarded or gone",
        )
        left.set_yticks(places, names)
        left.set_ylim(len(reasons) - max(len(reasons), 4) - 0.6, len(reasons) - 0.4)
        left.set_title("By reason")
        left.set_xlim(0, max(1, *(sum(pair) for _, pair in reasons)) * 1.06)
        _counts(left.xaxis)
        left.grid(visible=True, axis="x")
        left.tick_params(length=0)
        at = [day for day, _ in days]
        right.bar(at, [pair[0] for _, pair in days], width=0.7 * DAY_MS, color=LETTER, label="open")
        right.bar(
            at,
            [pair[1] for _, pair in days],
            bottom=[pair[0] for _, pair in days],
            width=0.7 * DAY_MS,
            color=PENDING,
            label="retried, discarded or gone",
        )
        right.set_title("By day")
        right.set_ylim(0, max(1, *(sum(pair) for _, pair in days)) * 1.06)
        _counts(right.yaxis)
        _grid(right)
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2, handlelength=1.4)
        step = -(-len(days) // 6)
        right.set_xticks(at[::step], [moment(day, "%-d %b") for day in at[::step]])
        right.set_xlim(at[0] - (0.7 if len(at) > 4 else 2) * DAY_MS, at[-1] + (0.7 if len(at) > 4 else 2) * DAY_MS)
        right.set_xlabel("day on which they were set aside, UTC")

    total = sum(one.letters for one in counts)
    return _drawn("letters", f"{total:,} dead letters by reason and by day", 1.4 + 0.3 * max(4, len(reasons)), draw)
