"""Pages for people: every number on them counted independently, nothing loaded, nothing of an application's believed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.report import page
from auditexport_pipeline.report import source as counting
from auditexport_pipeline.report.figures import Figures
from auditexport_pipeline.report.gather import gather
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import event
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import urls

HOUR_MS = 3_600_000
# The start of an hour, so that what is asserted of hours can be counted by hand.
HOUR = 1_760_000_400_000 // HOUR_MS * HOUR_MS
DAY_MS = 24 * HOUR_MS


class Page(HTMLParser):
    """What a browser would load, run or show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.html = html
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "srcset")
        ]

    @property
    def text(self) -> str:
        body = re.sub(r"<style.*?</style>", "", self.html, flags=re.DOTALL)
        return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def put(stack: Stack, *, hour: int, count: int, prefix: str) -> None:
    """Events of one hour after `HOUR`."""
    stack.put(*(event(f"{prefix}_{n}", time=HOUR + hour * HOUR_MS + n * 1000) for n in range(count)))


def export(stack: Stack, **limits: int) -> None:
    drain(stack.outbox, stack.log, Limits(**limits), owner="a test")


def figures_of(stack: Stack) -> Figures:
    now_ms = stack.upkeep.now_ms()
    return gather(stack.outbox, stack.log, now_ms - DAY_MS, now_ms + 1)


def status_page(stack: Stack) -> Page:
    return Page(page.of_status(figures_of(stack), "a test"))


def lose(stack: Stack, where: str) -> None:
    stack.log.client().command(f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE {where}", settings={"mutations_sync": 2})


def auditexport(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    """The prompt as a process of its own, as whoever mails a page around starts it."""
    command = [sys.executable, "-m", "auditexport_pipeline.cli", *words]
    environment = {**os.environ, **urls(stack), "COLUMNS": "160"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_rows_and_entries_by_hour_are_those_that_the_databases_count(stack: Stack) -> None:
    """The picture is the proof that people look at: its columns have to be the truth on both sides."""
    for hour, count in ((0, 5), (1, 9), (3, 2)):
        put(stack, hour=hour, count=count, prefix=f"evt_{hour}")
    export(stack, batch_rows=4)
    put(stack, hour=1, count=3, prefix="evt_pending")
    now_ms = stack.upkeep.now_ms()
    window = counting.compared(stack.outbox, now_ms - DAY_MS, now_ms + 1)
    grid = counting.Grid.over(HOUR, HOUR + 4 * HOUR_MS)
    rows = counting.rows_by_hour(stack.outbox, window.pks, grid)
    entries = counting.entries_by_hour(stack.log, window, grid)
    assert rows == entries == {1: 5, 2: 9, 4: 2}
    pending = counting.rows_by_hour(stack.outbox, counting.pending(stack.outbox), grid)
    assert pending == {2: 3}
    found = figures_of(stack)
    assert (found.rows, found.entries, found.pending) == (16, 16, 3)
    assert found.backlog.rows == 3


@pytest.mark.slow
def test_a_lost_entry_is_a_difference_at_its_hour_and_a_discrepancy_by_name(stack: Stack, tmp_path: Path) -> None:
    """A sum over the whole window would hide a loss behind a duplicate; an hour and an id can be looked at."""
    put(stack, hour=0, count=5, prefix="evt_a")
    put(stack, hour=1, count=5, prefix="evt_b")
    export(stack)
    path = tmp_path / "page.html"
    clean = auditexport(stack, "reconcile", "--report", str(path))
    assert clean.returncode == 0, clean.stderr
    assert f"the page is {path}" in clean.stdout
    told = Page(path.read_text()).text
    assert "Reconciled clean: outbox and ClickHouse agree on all 10 entries." in told
    assert "None: nothing is missing, duplicated, unexpected or altered." in told

    lose(stack, "event_id = 'evt_b_3'")
    found = auditexport(stack, "reconcile", "--report", str(path), "--why", "a secret reason")
    assert found.returncode == 1
    told = Page(path.read_text()).text
    assert "Outbox and ClickHouse differ: 1 missing." in told
    assert "evt_b_3" in told
    assert "auditexport reconcile --repair" in told
    assert "a secret reason" not in told
    figures = figures_of(stack)
    assert (figures.rows, figures.entries) == (10, 9)
    assert sum(hour.difference for hour in figures.everywhen) == 1


def now_hour_ms() -> int:
    return int(datetime.now(timezone.utc).timestamp() * 1000) // HOUR_MS * HOUR_MS


def test_the_difference_stands_at_the_hour_of_the_lost_event_and_nowhere_else(stack: Stack) -> None:
    """Which deployment, which outage: an hour is what an operator can look for in his own records."""
    first_ms = now_hour_ms() - 5 * HOUR_MS
    stack.put(*(event(f"evt_{n}", time=first_ms + n * HOUR_MS // 3) for n in range(15)))
    export(stack)
    assert not any(hour.difference for hour in figures_of(stack).everywhen)
    lose(stack, "event_id IN ('evt_4', 'evt_5', 'evt_9')")
    differing = {hour.at_ms: (hour.rows, hour.entries) for hour in figures_of(stack).hours if hour.difference}
    assert differing == {first_ms + HOUR_MS: (3, 1), first_ms + 3 * HOUR_MS: (3, 2)}
    told = status_page(stack).text
    for at_ms, numbers in ((first_ms + HOUR_MS, "3 1 +2"), (first_ms + 3 * HOUR_MS, "3 2 +1")):
        assert f"{datetime.fromtimestamp(at_ms / 1000, tz=timezone.utc):%Y-%m-%d %H:%M} {numbers}" in told


def test_entries_that_no_row_has_are_a_difference_too(stack: Stack) -> None:
    """What somebody else wrote must not make up for what was lost."""
    first_ms = now_hour_ms() - 2 * HOUR_MS
    stack.put(*(event(f"evt_{n}", time=first_ms + n) for n in range(4)))
    export(stack)
    stack.log.client().command(
        "INSERT INTO audit_logs_raw_v1 (event_id, time, inserted_at, workspace_id) "
        f"SELECT concat('evt_stray_', toString(number)), {first_ms + HOUR_MS}, (SELECT max(inserted_at) FROM audit_logs_raw_v1), "
        "'ws' FROM numbers(2)"
    )
    lose(stack, "event_id = 'evt_1'")
    found = figures_of(stack)
    assert [hour.difference for hour in found.hours if hour.rows or hour.entries] == [1, -2]
    assert (found.rows, found.entries) == (4, 5)


def test_copies_that_have_not_merged_count_once(stack: Stack) -> None:
    """After a requeue, both copies are there until a merge; the picture must not show more entries than events."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    put(stack, hour=0, count=5, prefix="evt")
    export(stack)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk <= 3")
    export(stack)
    assert stack.counts() == (8, 5)
    found = figures_of(stack)
    assert (found.rows, found.entries) == (5, 5)
    assert not any(hour.difference for hour in found.everywhen)


def test_every_number_on_the_page_is_one_that_both_databases_count(stack: Stack, tmp_path: Path) -> None:
    """Counted here in other ways than the page counts: by mark, by table, by state."""
    seed_outbox(stack.mysql_url, seed=8, events=1_500, malformed=12, unknown=4, writers=2)
    export(stack, batch_rows=400)
    seed_outbox(stack.mysql_url, seed=9, events=60, writers=1)
    path = tmp_path / "page.html"
    assert auditexport(stack, "reconcile", "--report", str(path)).returncode == 0
    told = Page(path.read_text()).text

    def one(statement: str) -> int:
        return int(str(stack.sql(statement)[0][0]))

    marked = one("SELECT COUNT(*) FROM clickhouse_outbox WHERE deleted_at IS NOT NULL")
    ((shown,),) = stack.clickhouse("SELECT count() FROM audit_logs")
    letters = one("SELECT COUNT(*) FROM clickhouse_outbox_dead_letter WHERE state = 'open'")
    batches = one("SELECT COUNT(*) FROM clickhouse_outbox_batch WHERE batch_id > 0")
    assert (marked, shown, letters) == (1_500, 1_500, 12)
    for tile in (
        f"{marked:,} exported rows counted in the outbox",
        f"{shown:,} their entries in ClickHouse",
        "0 difference, hour by hour",
        "60 rows pending",
        f"{letters} dead letters open",
        "4 rows of unknown versions",
        "0 batches open",
    ):
        assert tile in told
    for reason, count in stack.outbox.dead_by_reason().items():
        assert f"{reason} {count} 0 0 0" in told
    assert f"{batches} first exports in the window" in told
    newest = stack.sql(
        "SELECT batch_id, row_count, entry_count FROM clickhouse_outbox_batch ORDER BY claimed_at_ms DESC, batch_id DESC LIMIT 1"
    )[0]
    assert re.search(
        rf"{newest.batch_id} verified \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {newest.row_count} {newest.entry_count} ", told
    )


def test_the_lag_of_a_batch_is_the_age_of_its_first_row_at_its_stamp(stack: Stack) -> None:
    """Also where an application wrote nonsense into created_at: the page says of how many it does not know."""
    put(stack, hour=0, count=3, prefix="evt")
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - 90000 + 1000 * pk")
    export(stack)
    first = stack.sql(
        "SELECT exported_at_ms - created_at AS lag_ms FROM clickhouse_outbox_batch JOIN clickhouse_outbox ON pk = first_pk"
    )[0]
    (point,) = figures_of(stack).lag
    assert (point.batches, point.rows, point.worst_s) == (1, 3, float(str(first.lag_ms)) / 1000)
    for absurd in (2**63 - 1, -(2**63), 0):
        stack.sql("UPDATE clickhouse_outbox SET created_at = :absurd", absurd=absurd)
        (point,) = figures_of(stack).lag
        assert (point.worst_s, point.undated) == (None, 1)
    assert "Of 1 batch that time is years off" in status_page(stack).text


def test_counting_entries_reads_the_parts_of_the_window_only(stack: Stack) -> None:
    """The table holds ninety days of everybody's events; a page about yesterday must not read them all."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    for n in range(4):
        put(stack, hour=n, count=3, prefix=f"evt_{n}")
        export(stack)
    last_ms = max(stack.log.count_by_inserted_at(0, 2**62))
    parameters = {"low_ms": 0, "high_ms": 2**60, "step_ms": HOUR_MS, "from_ms": last_ms, "to_ms": last_ms + 1}
    statement = counting._by_hour(VERSIONS["audit_log.v1"])

    def parts_read(query: str) -> set[str]:
        explained = stack.clickhouse(f"EXPLAIN indexes = 1 {query}", **parameters, excluded=[-1])
        return set(re.findall(r"Parts: (\d+/4)", "\n".join(str(line) for (line,) in explained)))

    assert "1/4" in parts_read(statement)
    assert parts_read(statement.replace("inserted_at >= {from_ms:Int64}", "inserted_at >= 0")) == {"4/4"}


def test_a_page_loads_nothing_runs_nothing_and_shows_no_secret(stack: Stack, tmp_path: Path) -> None:
    """It is mailed around and opened from a disk, by people who do not know what is in it."""
    put(stack, hour=0, count=3, prefix="evt")
    export(stack)
    path = tmp_path / "page.html"
    done = auditexport(stack, "status", "--report", str(path))
    assert done.returncode in (0, 1), done.stderr
    shown = Page(path.read_text())
    assert not {"script", "link", "iframe", "object", "embed", "form", "img"} & set(shown.tags)
    assert "svg" in shown.tags
    assert all(load.startswith("#") for load in shown.loads), shown.loads
    assert not re.search(r"url\((?!['\"]?#)", shown.html)
    assert path.stat().st_size < 1_000_000
    for url in urls(stack).values():
        assert url not in shown.html
        assert str(sa.make_url(url).port) not in shown.text
    assert "auditexport status --report" in shown.text


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b</td>", "` | x"]
)
def test_what_an_application_chose_is_text_on_the_page(stack: Stack, hostile: str) -> None:
    """An id is anybody's to choose, and the page is opened by whoever is on call."""
    stack.put(event(hostile[:40], workspace_id=hostile[:40], time=HOUR))
    stack.put((hostile[:40], hostile[:40], "[]"))
    stack.put(event("evt_unknown"), version=hostile[:40])
    export(stack)
    lose(stack, "1")
    now_ms = stack.upkeep.now_ms()
    from auditexport_pipeline.core.reconcile import reconcile

    report = reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=now_ms - DAY_MS, to_ms=now_ms + 1)
    shown = Page(page.of_reconciliation(report, figures_of(stack), "a test"))
    assert not {"script", "img"} & set(shown.tags)
    assert " ".join(hostile[:40].split()) in shown.text


def test_a_page_of_nothing_is_a_page(stack: Stack) -> None:
    """The first thing that somebody does on a new installation."""
    shown = status_page(stack)
    assert "Behind: nothing is pending." in shown.text
    assert "No batch in this window." in shown.text
    assert "No row was ever set aside." in shown.text


@pytest.mark.slow
@pytest.mark.parametrize("at_ms", [0, -1, 2**63 - 1, -(2**63), 253_402_300_800_000])
def test_an_event_time_that_is_no_date_is_counted_and_breaks_nothing(stack: Stack, at_ms: int) -> None:
    """Event times are any 64-bit integer, and one absurd one must not cost the page of all others."""
    stack.put(event("evt_absurd", time=at_ms))
    put(stack, hour=0, count=2, prefix="evt")
    stack.put(event("evt_now", time=int(datetime.now(timezone.utc).timestamp() * 1000)))
    export(stack)
    found = figures_of(stack)
    assert (found.rows, found.entries) == (4, 4)
    assert all(hour.difference == 0 for hour in found.everywhen)
    assert "svg" in status_page(stack).tags


def test_open_and_swept_batches_are_left_out_on_both_sides(stack: Stack) -> None:
    """Only one side could count them, and the picture would cry wolf every night after the sweep."""
    from auditexport_pipeline.core.actions import Actor
    from auditexport_pipeline.core.sweep import Retention, sweep

    put(stack, hour=0, count=4, prefix="evt_old")
    export(stack)
    sweep(stack.outbox, stack.upkeep, stack.log, Retention(outbox_days=0), Actor(who="a test", why="a test"))
    put(stack, hour=1, count=3, prefix="evt_new")
    export(stack)
    found = figures_of(stack)
    assert (found.rows, found.entries, found.compared.swept_entries) == (3, 3, 4)


def test_dead_letters_are_counted_by_reason_and_state(stack: Stack) -> None:
    """Ids and reasons only: the payloads are what they are set aside for."""
    stack.put(("ws_1", "evt_1", "[]"), ("ws_1", "evt_2", "[]"), event("evt_3", time="canary-51c"))
    export(stack)
    stack.sql("UPDATE clickhouse_outbox_dead_letter SET state = 'discarded' WHERE event_id = 'evt_2'")
    shown = status_page(stack)
    assert "not_an_object 1 1 0 0" in shown.text
    assert "wrong_type 1 0 0 0" in shown.text
    assert "canary-51c" not in shown.html


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_compared(stack: Stack, tmp_path: Path) -> None:
    """An hour of comparing must not end with a typing error in a path."""
    nowhere = tmp_path / "none" / "page.html"
    done = auditexport(stack, "reconcile", "--report", str(nowhere))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert stack.sql("SELECT * FROM clickhouse_outbox_action") == []
    with pytest.raises(InvalidConfig, match="cannot be written"):
        page.check_path(tmp_path)
