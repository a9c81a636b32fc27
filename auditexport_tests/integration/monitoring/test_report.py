"""Reports: every number is counted here in another way; the page loads nothing and escapes the text of applications."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from string import Template

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.core.units import DAY_MS, HOUR_MS
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.report import figures, page
from auditexport_pipeline.report.figures import Figures, gather
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import event
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import Prompt, prompt_in, urls

# The start of an hour, so that the hours of events can be counted by hand.
HOUR = 1_760_000_400_000 // HOUR_MS * HOUR_MS


class Page(HTMLParser):
    """What a browser loads, runs and shows of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self._texts: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self._texts.append(data)

    def values(self, *names: str) -> list[str]:
        return [value or "" for name, value in self.attributes if name in names]


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    return prompt_in({**urls(stack), "COLUMNS": "160"}, monkeypatch)


def put(stack: Stack, *, hour: int, count: int, prefix: str = "evt") -> None:
    """Events of one hour after `HOUR`."""
    stack.put(*(event(f"{prefix}_{n}", time=HOUR + hour * HOUR_MS + n * 1000) for n in range(count)))


def export(stack: Stack, **limits: int) -> None:
    drain(stack.outbox, stack.log, Limits(**limits), owner="a test")


def figures_of(stack: Stack) -> Figures:
    now_ms = stack.upkeep.now_ms()
    return gather(stack.outbox, stack.log, now_ms - DAY_MS, now_ms + 1)


def totals(found: Figures) -> tuple[int, int]:
    return found.total("rows"), found.total("entries")


def status_page(stack: Stack) -> Page:
    return Page(page.of_status(figures_of(stack), "a test"))


def lose(stack: Stack, where: str) -> None:
    stack.log.client().command(f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE {where}", settings={"mutations_sync": 2})


def this_hour_ms() -> int:
    return int(datetime.now(timezone.utc).timestamp() * 1000) // HOUR_MS * HOUR_MS


def test_a_lost_entry_is_on_the_page_of_a_reconciliation(stack: Stack, prompt: Prompt, tmp_path: Path) -> None:
    """A loss needs the id of the event, and the command that repairs it."""
    put(stack, hour=0, count=5, prefix="evt_a")
    put(stack, hour=1, count=5, prefix="evt_b")
    export(stack)
    path = tmp_path / "page.html"
    assert f"the page is {path}" in prompt("reconcile", "--report", str(path)).output
    text = Page(path.read_text()).text
    assert "Reconciled clean: outbox and ClickHouse agree on all 10 entries." in text
    assert "None: nothing is missing, duplicated, unexpected or altered." in text

    lose(stack, "event_id = 'evt_b_3'")
    prompt("reconcile", "--report", str(path), "--why", "a secret reason", status=1)
    text = Page(path.read_text()).text
    for part in ("Outbox and ClickHouse differ: 1 missing.", "evt_b_3", "auditexport reconcile --repair"):
        assert part in text
    assert "a secret reason" not in text


def test_rows_and_entries_are_counted_at_the_hours_of_their_events(stack: Stack) -> None:
    """A sum over the window would hide a loss behind an entry of another writer."""
    first_ms = this_hour_ms() - 5 * HOUR_MS
    stack.put(*(event(f"evt_{n}", time=first_ms + n * HOUR_MS // 3) for n in range(15)))
    export(stack, batch_rows=4)
    stack.put(*(event(f"evt_pending_{n}", time=first_ms + 2 * HOUR_MS) for n in range(2)))

    def hours() -> list[tuple[int, ...]]:
        """(rows, entries, difference, pending) of the five hours."""
        five = figures_of(stack).bins.loc[first_ms : first_ms + 4 * HOUR_MS]
        return [tuple(hour) for hour in five[["rows", "entries", "difference", "pending"]].to_numpy().tolist()]

    assert hours() == [(3, 3, 0, 0), (3, 3, 0, 0), (3, 3, 0, 2), (3, 3, 0, 0), (3, 3, 0, 0)]
    lose(stack, "event_id IN ('evt_4', 'evt_5', 'evt_9')")
    stack.log.client().command(
        "INSERT INTO audit_logs_raw_v1 (event_id, time, inserted_at, workspace_id) SELECT concat('stray_', toString(number)), "
        f"{first_ms + 4 * HOUR_MS}, (SELECT max(inserted_at) FROM audit_logs_raw_v1), 'ws' FROM numbers(3)"
    )
    assert hours() == [(3, 3, 0, 0), (3, 1, 2, 0), (3, 3, 0, 2), (3, 2, 1, 0), (3, 6, -3, 0)]
    assert totals(figures_of(stack)) == (15, 15)
    text = status_page(stack).text
    for hour, numbers in ((1, "3 1 +2"), (3, "3 2 +1"), (4, "3 6 -3")):
        at = datetime.fromtimestamp((first_ms + hour * HOUR_MS) / 1000, tz=timezone.utc)
        assert f"{at:%Y-%m-%d %H:%M} {numbers}" in text


def test_copies_that_have_not_merged_count_once(stack: Stack) -> None:
    """After a requeue both copies exist until a merge; the chart must not show more entries than events."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    put(stack, hour=0, count=5)
    export(stack)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk <= 3")
    export(stack)
    assert stack.counts() == (8, 5)
    found = figures_of(stack)
    assert totals(found) == (5, 5)
    assert not found.bins["difference"].any()


@pytest.mark.slow
def test_every_number_on_the_page_is_one_that_both_databases_count(
    stack: Stack, prompt: Prompt, tmp_path: Path
) -> None:
    """Counted here in other ways than the page counts: by mark, by table, by state."""
    seed_outbox(stack.mysql_url, seed=8, events=1_500, malformed=12, unknown=4, writers=2)
    export(stack, batch_rows=400)
    seed_outbox(stack.mysql_url, seed=9, events=60, writers=1)
    stack.sql("UPDATE clickhouse_outbox_dead_letter SET state = 'discarded' ORDER BY pk LIMIT 1")
    path = tmp_path / "page.html"
    prompt("reconcile", "--report", str(path))
    text = Page(path.read_text()).text

    def one(statement: str) -> int:
        return int(str(stack.sql(statement)[0][0]))

    marked = one("SELECT COUNT(*) FROM clickhouse_outbox WHERE deleted_at IS NOT NULL")
    ((shown,),) = stack.clickhouse("SELECT count() FROM audit_logs")
    letters = one("SELECT COUNT(*) FROM clickhouse_outbox_dead_letter WHERE state = 'open'")
    assert (marked, shown, letters) == (1_500, 1_500, 11)
    reasons = stack.sql(
        "SELECT reason, SUM(state = 'open') AS open, SUM(state = 'discarded') AS discarded FROM clickhouse_outbox_dead_letter "
        "GROUP BY reason"
    )
    newest = stack.sql(
        "SELECT batch_id, row_count, entry_count FROM clickhouse_outbox_batch ORDER BY claimed_at_ms DESC, batch_id DESC LIMIT 1"
    )[0]
    for part in (
        f"{marked:,} exported rows counted in the outbox",
        f"{shown:,} their entries in ClickHouse",
        "0 difference, hour by hour",
        "60 rows pending",
        f"{letters} dead letters open",
        "4 rows of unknown versions",
        "0 batches open",
        *(f"{row.reason} {row.open} {row.discarded} 0 0" for row in reasons),
        f"{one('SELECT COUNT(*) FROM clickhouse_outbox_batch WHERE batch_id > 0')} first exports in the window",
    ):
        assert part in text
    assert re.search(
        rf"{newest.batch_id} verified \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {newest.row_count} {newest.entry_count} ", text
    )


def test_the_lag_of_a_batch_is_the_age_of_its_first_row_when_exported(stack: Stack) -> None:
    """created_at can be nonsense: the page says for how many batches the lag is unknown."""
    put(stack, hour=0, count=3)
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - 90000 + 1000 * pk")
    export(stack)
    first = stack.sql(
        "SELECT exported_at_ms - created_at AS lag_ms FROM clickhouse_outbox_batch JOIN clickhouse_outbox ON pk = first_pk"
    )[0]
    (point,) = figures_of(stack).lag.itertuples()
    assert (point.batches, point.row_count, point.worst_s) == (1, 3, float(str(first.lag_ms)) / 1000)
    for absurd in (2**63 - 1, -(2**63), 0):
        stack.sql("UPDATE clickhouse_outbox SET created_at = :absurd", absurd=absurd)
        lag = figures_of(stack).lag
        assert lag["worst_s"].isna().tolist() == [True]
        assert lag["undated"].tolist() == [1]
    assert "Of 1 batch that time is years off" in status_page(stack).text


def test_counting_entries_reads_the_parts_of_the_window_only(stack: Stack) -> None:
    """The table has ninety days of events; a page about yesterday must not read them all."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    for n in range(4):
        put(stack, hour=n, count=3, prefix=f"evt_{n}")
        export(stack)
    last_ms = max(stack.log.count_by_inserted_at(0, 2**62))
    parameters = {"low_ms": 0, "high_ms": 2**60, "step_ms": HOUR_MS, "from_ms": last_ms, "to_ms": last_ms + 1}
    statement = Template(figures._PIECES["entries_by_hour"]).substitute(table="audit_logs_raw_v1")

    def parts_read(query: str) -> set[str]:
        explained = stack.clickhouse(f"EXPLAIN indexes = 1 {query}", **parameters, excluded=[-1])
        return set(re.findall(r"Parts: (\d+/4)", "\n".join(str(line) for (line,) in explained)))

    assert "1/4" in parts_read(statement)
    assert parts_read(statement.replace("inserted_at >= {from_ms:Int64}", "inserted_at >= 0")) == {"4/4"}


def test_a_page_loads_and_runs_nothing_and_shows_no_secret(stack: Stack, prompt: Prompt, tmp_path: Path) -> None:
    """Pages are sent by mail to people who do not know what is in them."""
    put(stack, hour=0, count=3)
    stack.put(event("evt_dead", time="canary-51c"))
    export(stack)
    path = tmp_path / "page.html"
    prompt("status", "--report", str(path), status=1)
    shown = Page(path.read_text())
    assert not {"script", "link", "iframe", "object", "embed", "form", "img"} & shown.tags
    assert "svg" in shown.tags
    assert "canary-51c" not in shown.html
    loads = shown.values("src", "href", "xlink:href", "action", "srcset")
    assert all(load.startswith("#") for load in loads), loads
    assert not re.search(r"url\((?!['\"]?#)", shown.html)
    assert path.stat().st_size < 1_000_000
    ids = shown.values("id")
    assert len(ids) == len(set(ids))
    for url in urls(stack).values():
        assert url not in shown.html
        assert str(sa.make_url(url).port) not in shown.text
    assert "auditexport status --report" in shown.text


def test_what_an_application_chose_is_text_on_the_page(stack: Stack) -> None:
    """Applications choose ids, and the engineer on call opens the page."""
    hostile = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a&b</td>", "` | x")
    for text in hostile:
        stack.put(event(text, workspace_id=text, time=HOUR), (text, text, "[]"))
        stack.put(event("evt_unknown"), version=text)
    export(stack)
    lose(stack, "1")
    now_ms = stack.upkeep.now_ms()
    report = reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=now_ms - DAY_MS, to_ms=now_ms + 1)
    shown = Page(page.of_reconciliation(report, figures_of(stack), "a test"))
    assert not {"script", "img"} & shown.tags
    # Among the event ids, in the table of workspaces and among the unknown versions.
    assert min(shown.text.count(text) for text in hostile) >= 3


def test_a_new_installation_has_a_page(stack: Stack) -> None:
    """The first report is often of an empty installation."""
    text = status_page(stack).text
    for part in ("Backlog: nothing is pending.", "No batch in this window.", "No row was ever set aside."):
        assert part in text


def test_event_times_that_are_no_dates_are_counted(stack: Stack) -> None:
    """An event time is any 64-bit integer; an absurd one must not break the page."""
    absurd = (0, -1, 2**63 - 1, -(2**63), 253_402_300_800_000)
    stack.put(*(event(f"evt_absurd_{n}", time=at_ms) for n, at_ms in enumerate(absurd)))
    put(stack, hour=0, count=2)
    stack.put(event("evt_now", time=this_hour_ms()))
    export(stack)
    found = figures_of(stack)
    assert totals(found) == (8, 8)
    assert not found.bins["difference"].any()
    assert found.bins["rows"].iloc[[0, -1]].tolist() == [5, 2]
    assert "svg" in status_page(stack).tags


def test_open_and_swept_batches_are_left_out_on_both_sides(stack: Stack) -> None:
    """Only one side has them, and the chart would show a false difference after every sweep."""
    put(stack, hour=0, count=4, prefix="evt_old")
    export(stack)
    sweep(stack.outbox, stack.upkeep, stack.log, Retention(outbox_days=0), Actor(who="a test", why="a test"))
    for n in range(2):
        put(stack, hour=1, count=3, prefix=f"evt_{n}")
        export(stack)
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'written' ORDER BY batch_id DESC LIMIT 1")
    found = figures_of(stack)
    assert (*totals(found), found.window.swept_entries, found.window.open_batches) == (3, 3, 4, 1)
    assert "1 open batch is left out on both sides." in status_page(stack).text


def test_a_page_that_cannot_be_written_is_refused_first(stack: Stack, prompt: Prompt, tmp_path: Path) -> None:
    """A wrong path is found before an hour of comparing, not after."""
    done = prompt("reconcile", "--report", str(tmp_path / "none" / "page.html"), status=2)
    assert "cannot be written" in done.output
    assert stack.sql("SELECT * FROM clickhouse_outbox_action") == []
    with pytest.raises(InvalidConfig, match="cannot be written"):
        page.check_path(tmp_path)
