"""How a page looks: one palette for every picture and table, by light and by night, and the style sheet.

What belongs here: colours and CSS. What does not: numbers.

The colours are Okabe and Ito's, which readers of every kind of colour vision tell apart; each means the same everywhere.
A picture is drawn in the light ones, and the SVG then names the variables, so that it follows the reader's scheme.
"""

from __future__ import annotations

INK, MUTED, LINE = "#1c2126", "#5b646e", "#d9dee3"
OUTBOX = "#0072b2"
CLICKHOUSE = "#e69f00"
WRONG = "#d55e00"
PENDING = "#8d96a0"
FETCH = "#56b4e9"
LETTER = "#cc79a7"
GOOD = "#009e73"

# light → (variable, dark)
COLOURS = {
    INK: ("--ink", "#e8eaed"),
    MUTED: ("--muted", "#a3acb6"),
    LINE: ("--line", "#363d45"),
    OUTBOX: ("--outbox", "#3d9bd8"),
    CLICKHOUSE: ("--clickhouse", "#f0b429"),
    WRONG: ("--wrong", "#ff8038"),
    PENDING: ("--pending", "#7f8993"),
    FETCH: ("--fetch", "#8accf2"),
    LETTER: ("--letter", "#dd9abf"),
    GOOD: ("--good", "#2bbf95"),
}


def _variables(dark: bool) -> str:
    return " ".join(f"{name}: {night if dark else day};" for day, (name, night) in COLOURS.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; --paper: #ffffff; --card: #f6f8fa; {_variables(False)} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --paper: #14181c; --card: #1d2329; {_variables(True)} }}
}}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 28px; }
h1 { font-size: 15px; font-weight: 600; margin: 0; color: var(--muted); }
h2 { font-size: 19px; margin: 40px 0 4px; }
h3 { font-size: 15px; margin: 20px 0 4px; }
p { margin: 6px 0; }
.said { color: var(--muted); max-width: 90ch; }
code { font: 0.92em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--card); padding: 1px 4px; border-radius: 4px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 12px 0; color: var(--muted); font-size: 14px; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.verdict { border-left: 6px solid var(--good); background: var(--card); padding: 14px 20px; margin: 16px 0; border-radius: 4px; }
.verdict.waiting { border-color: var(--clickhouse); } .verdict.bad { border-color: var(--wrong); }
.verdict strong { display: block; font-size: 24px; line-height: 1.25; margin-bottom: 6px; }
.verdict ul { margin: 6px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 16px 0; }
.tile { background: var(--card); border-radius: 4px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: 13px; }
.tile.bad b { color: var(--wrong); }
figure { margin: 8px 0; } figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
figcaption { color: var(--muted); font-size: 13px; max-width: 100ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
.last td:last-child, .last2 td:nth-last-child(-n+2) { white-space: normal; overflow-wrap: break-word; }
.t1 td:first-child, .t1 th:first-child, .t2 td:nth-child(-n+2), .t2 th:nth-child(-n+2), .t3 td:nth-child(-n+3),
.t3 th:nth-child(-n+3), .last td:last-child, .last th:last-child,
.last2 td:nth-last-child(-n+2), .last2 th:nth-last-child(-n+2) { text-align: left; }
footer { color: var(--muted); font-size: 13px; padding-top: 24px; padding-bottom: 40px; }
@media print {
  @page { margin: 14mm; }
  body { font-size: 12px; } table { font-size: 11px; } th, td { padding: 2px 7px; } h2 { margin-top: 24px; }
  .verdict strong { font-size: 19px; } .tiles { grid-template-columns: repeat(4, 1fr); } .tile b { font-size: 17px; }
  main, header, footer { max-width: none; padding: 0; } .wide { overflow: visible; }
  figure, tr, .verdict, .tiles { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .verdict, .tile, svg { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
)
