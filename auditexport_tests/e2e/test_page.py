"""What an operator does in the Dagster UI, done by a real browser: launch, misconfigure, automate.

What belongs here: what only a browser can tell, that a person finds the button and sees the number. What does not:
what a launch does to the databases, which `integration.dagster` tests without one.
"""

from __future__ import annotations

import itertools

import pytest
from playwright.sync_api import Locator, Page, expect

from auditexport_pipeline.local.generator import seed_outbox
from auditexport_tests.e2e.conftest import PICTURES, SENSOR_ROWS, Dev
from auditexport_tests.support.waiting import wait_until

# A browser may be a minute late on a loaded machine, and each test waits for several things.
pytestmark = pytest.mark.timeout(900)

ASSET = "/assets/audit_logs_raw_v1"
LOCATION = "/locations/auditexport"
# Numbers of a run that the UI shows; `defs/report.py` has them all.
NUMBERS = ("rows", "entries", "batches", "bytes", "seconds", "rows_per_s", "verified_batches", "backlog_rows", "lag_s")

# A run's chart draws dotted boxes beside the window first, and moves them in as it learns when each step ran.
CHART_IS_DRAWN = """() => {
    const boxes = [...document.querySelectorAll('.chart-element.box')];
    return boxes.some(box => box.dataset.tooltip.includes('mark_exported[batch_'))
        && boxes.every(box => getComputedStyle(box).borderTopStyle !== 'dotted')
        && !document.getAnimations().some(animation => animation instanceof CSSTransition);
}"""

_seeds = itertools.count(1)


def commit_events(dev: Dev, count: int) -> None:
    """The application commits this many events, no two of them alike."""
    seed_outbox(dev.stack.mysql_url, seed=next(_seeds), events=count, writers=2)


def picture(page: Page, name: str) -> None:
    page.screenshot(path=PICTURES / f"{name}.png")


def open_launchpad(page: Page) -> Locator:
    """The dialog in which a launch of the asset is configured."""
    page.goto(ASSET)
    # As the button's own tooltip says: Shift+click to add configuration.
    page.get_by_role("button", name="Materialize").click(modifiers=["Shift"])
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".CodeMirror")).to_be_visible()
    return dialog


def configure(page: Page, dialog: Locator, yaml: str) -> None:
    """Replaces what the launchpad's editor holds, as a person who pastes would."""
    dialog.locator(".CodeMirror-lines").click()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(yaml)


def settings(**values: object) -> str:
    lines = [f"      {name}: {value}" for name, value in values.items()]
    return "\n".join(["ops:", "  audit_logs_raw_v1:", "    config:", *lines, ""])


def number(page: Page, name: str) -> str:
    """The value beside this name in the asset's metadata."""
    row = page.locator("tr").filter(has=page.locator("td:first-child").get_by_text(name, exact=True)).first
    return row.locator("td").nth(2).inner_text()  # after the name and its time


def runs(page: Page) -> list[dict[str, str]]:
    """Every run that this Dagster knows, newest first."""
    query = "{ runsOrError { ... on Runs { results { runId status jobName } } } }"
    answer = page.request.post("/graphql", data={"query": query})
    results: list[dict[str, str]] = answer.json()["data"]["runsOrError"]["results"]
    return results


def test_a_wrong_value_is_refused_in_the_launchpad_naming_the_field(dev: Dev, page: Page) -> None:
    """Whoever mistypes learns it where they typed, and no run is started to find it out."""
    before = runs(page)
    dialog = open_launchpad(page)
    configure(page, dialog, settings(batch_rows="many"))
    expect(dialog.get_by_text("Invalid scalar at path root:ops:audit_logs_raw_v1:config:batch_rows")).to_be_visible()

    configure(page, dialog, settings(batch_rows=0))
    expect(dialog.get_by_text("No errors")).to_be_visible()  # of the form; the bounds are looked at when it is sent
    dialog.get_by_role("button", name="Materialize").click()
    expect(page.get_by_text("batch_rows is 0; it must be an integer from 1 to").first).to_be_visible()
    picture(page, "launchpad-refuses")
    page.get_by_role("button", name="OK").click()
    assert runs(page) == before


def test_a_launch_with_a_config_exports_and_its_numbers_appear(dev: Dev, page: Page) -> None:
    """The first use: Materialize, watch the run end, read its numbers."""
    commit_events(dev, 700)
    dialog = open_launchpad(page)
    configure(page, dialog, settings(batch_rows=350))
    expect(dialog.get_by_text("No errors")).to_be_visible()
    picture(page, "launchpad")
    dialog.get_by_role("button", name="Materialize").click()

    page.wait_for_url("**/runs/**")
    expect(page.get_by_text("Success", exact=True).first).to_be_visible()
    # Without Dagster's own events, the log is a story of one line a verb.
    page.goto(f"{page.url.split('?')[0]}?levels=info")
    for line in ("claimed 2 batches, 700 rows", "fetched batch", "wrote batch", "marked batch", "verified 2 batches"):
        expect(page.get_by_text(line).first).to_be_visible()
    page.wait_for_function(CHART_IS_DRAWN)
    picture(page, "run")

    page.goto(f"{ASSET}?view=events")
    expect(page.get_by_text("Materialized in run")).to_be_visible()
    expect(page.get_by_text("rows_per_s", exact=True).first).to_be_visible()
    picture(page, "asset-events")
    page.goto(ASSET)
    expect(page.get_by_text("rows_per_s", exact=True)).to_be_visible()
    for name in NUMBERS:
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    assert number(page, "rows") == "700"
    assert number(page, "batches") == "2"
    assert number(page, "backlog_rows") == "0"
    picture(page, "asset")
    assert dev.stack.counts() == (700, 700)


def test_the_sensor_turned_on_starts_a_run_by_itself(dev: Dev, page: Page) -> None:
    """Nobody has to be there: one switch, and a backlog starts its own drain."""
    page.goto(f"{LOCATION}/sensors/outbox_backlog_sensor")
    switch = page.get_by_role("row", name="Running").get_by_role("checkbox")
    expect(switch).not_to_be_checked()
    # The box itself is drawn over; what a person clicks is its label.
    page.get_by_role("row", name="Running").locator("label").click()
    expect(switch).to_be_checked()
    known = {run["runId"] for run in runs(page)}

    commit_events(dev, SENSOR_ROWS + 500)
    run = wait_until(
        lambda: next((run for run in runs(page) if run["runId"] not in known), None),
        what="a run that the sensor starts",
        within_s=120,
        every_s=0.5,
    )
    assert run["jobName"] == "audit_log_export"
    page.goto(f"/runs/{run['runId']}")
    expect(page.get_by_text("Success", exact=True).first).to_be_visible()
    wait_until(lambda: dev.stack.pending() == 0, what="an outbox with nothing pending")
    entries, events = dev.stack.counts()
    assert entries == events

    page.goto(f"{LOCATION}/sensors/outbox_backlog_sensor")
    expect(page.get_by_text("1 run requested").first).to_be_visible()
    expect(page.get_by_role("button", name="View logs").first).to_be_visible()  # the ticks, which load after the rest
    picture(page, "sensor")


def test_the_schedule_is_there_to_be_turned_on(dev: Dev, page: Page) -> None:
    """An exporter that is idle still has to prove that it is alive, every quarter of an hour."""
    page.goto(f"{LOCATION}/schedules/audit_log_export_schedule")
    expect(page.get_by_text("Every 15 minutes").first).to_be_visible()
    switch = page.get_by_role("row", name="Running").get_by_role("checkbox")
    expect(switch).not_to_be_checked()
    page.get_by_role("row", name="Running").locator("label").click()
    expect(switch).to_be_checked()
    expect(page.get_by_text("Next tick").first).to_be_visible()
    picture(page, "schedule")
