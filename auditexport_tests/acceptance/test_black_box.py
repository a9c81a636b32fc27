"""The promises as a user checks them: run the CLI or Dagster, then ask both databases.

Each command is a process of its own. Those that `integration.cli` runs in the process of the test too are slow tests here.
"""

from __future__ import annotations

import json
from threading import Event

import pytest

from auditexport_tests.acceptance.world import World, event
from auditexport_tests.support.http_proxy import Answer, Forward, HttpProxy, Request
from auditexport_tests.support.waiting import wait_until

IDS = [f"ev_{number:03}" for number in range(40)]
# A run of Dagster takes eight seconds to start: one of them is enough for `make test`.
RUNS = pytest.mark.parametrize("run", ["drain", pytest.param("materialize", marks=pytest.mark.slow)])


def export(world: World, run: str) -> None:
    if run == "drain":
        world.run("drain")
    else:
        world.materialize()


@pytest.mark.parametrize("run", ["drain", "materialize"])
def test_every_event_arrives_once_and_is_marked(empty_world: World, run: str) -> None:
    """The job itself, by the CLI and by Dagster, in tables that `init` created."""
    empty_world.run("init", "--with-outbox")
    empty_world.put(*IDS)
    export(empty_world, run)
    assert (empty_world.entries(), empty_world.pending()) == (IDS, 0)
    empty_world.run("drain")
    assert empty_world.entries() == IDS


@pytest.mark.slow
def test_a_drain_prints_what_it_did_for_programs(world: World) -> None:
    """A script reads one JSON object."""
    world.put(*IDS)
    world.put("other", version="other.v9")
    printed = world.json("drain")
    assert (printed["rows"], printed["entries"], printed["backlog_rows"], printed["unknown_rows"]) == (40, 40, 0, 1)
    assert (printed["unknown_versions"], printed["discrepant"], world.pending()) == ("other.v9", {}, 1)


@RUNS
@pytest.mark.slow
def test_a_kill_after_the_insert_doubles_nothing(world: World, run: str) -> None:
    """ClickHouse has the rows, MySQL has no mark: the next run must check before it sends."""
    world.put(*IDS)
    with world.connection() as application:
        with application.cursor() as cursor:
            cursor.execute("SELECT pk FROM clickhouse_outbox FOR UPDATE")
        with world.start("auditexport", "drain") as process:
            wait_until(lambda: world.entries() == IDS, what="the rows in ClickHouse")
            process.kill()
    assert world.pending() == len(IDS)
    export(world, run)
    assert (world.entries(), world.pending()) == (IDS, 0)


@RUNS
@pytest.mark.slow
def test_a_kill_before_the_insert_loses_nothing(world: World, run: str) -> None:
    """The batch is sealed, its INSERT is on the way and never arrives."""
    world.put(*IDS)
    held, released = Event(), Event()

    def hold(request: Request, forward: Forward) -> Answer:
        if request.inserts:
            held.set()
            released.wait(60)
            return Answer(status=503)
        return forward(request)

    with (
        HttpProxy(world.clickhouse_url, hold) as proxy,
        world.start("auditexport", "drain", AUDITEXPORT_CLICKHOUSE_URL=proxy.url) as process,
    ):
        assert held.wait(30), process.communicate(timeout=5)
        process.kill()
    released.set()
    assert (world.entries(), world.pending()) == ([], len(IDS))
    export(world, run)
    assert (world.entries(), world.pending()) == (IDS, 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["auditexport requeue", "SQL by hand"])
def test_requeued_events_keep_their_first_inserted_at(world: World, how: str) -> None:
    """Then ClickHouse can collapse them, retention does not start again, and the read side shows each event once."""
    world.put(*IDS)
    world.run("drain")
    first = world.stamps()
    if how == "SQL by hand":
        world.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE event_id IN ('ev_003', 'ev_004')")
    else:
        world.run("requeue", "--event-id", "ev_003", "--event-id", "ev_004", "--why", "a test")
    assert world.pending() == 2
    world.run("drain")
    assert (world.stamps(), world.pending()) == (first, 0)
    ((entries, events),) = world.clickhouse("SELECT count(), uniqExact(event_id) FROM audit_logs")
    assert (int(entries), int(events)) == (40, 40)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["drain", "materialize"])
def test_a_bad_row_stops_nobody_and_does_not_vanish(world: World, run: str) -> None:
    """The row becomes a dead letter with a reason. It is exported after it was fixed and retried."""
    world.put(*IDS[:20])
    world.put("bad", payload=json.dumps({"event_id": "bad", "time": "yesterday", "workspace_id": "ws_1"}))
    world.put(*IDS[20:])
    export(world, run)
    assert (world.entries(), world.pending()) == (IDS, 1)
    ((letter_pk,),) = world.sql("SELECT pk FROM clickhouse_outbox WHERE event_id = 'bad'")
    assert "time" in world.run("dead-letters", "show", str(letter_pk))
    world.sql("UPDATE clickhouse_outbox SET payload = %s WHERE pk = %s", event("bad"), letter_pk)
    world.run("dead-letters", "retry", "--pk", str(letter_pk), "--why", "a test")
    export(world, run)
    assert (world.entries(), world.pending()) == (["bad", *IDS], 0)


@pytest.mark.slow
def test_a_sweep_deletes_what_is_exported_and_spares_what_clickhouse_lost(world: World) -> None:
    """For a lost event, the outbox has the only copy."""
    world.put(*IDS)
    world.run("drain")
    world.put("new")
    world.run("sweep", "--outbox-days", "0")
    assert world.sql("SELECT event_id FROM clickhouse_outbox") == [("new",)]
    assert world.entries() == IDS
    world.run("drain")
    world.clickhouse("DELETE FROM audit_logs_raw_v1 WHERE event_id = 'new'")
    world.run("sweep", "--outbox-days", "0", status=1)
    assert world.sql("SELECT event_id FROM clickhouse_outbox") == [("new",)]


@pytest.mark.slow
def test_a_loss_is_found_repaired_and_gone(world: World) -> None:
    """What reconciliation is for."""
    world.put(*IDS)
    world.run("drain")
    world.run("reconcile")
    world.clickhouse("DELETE FROM audit_logs_raw_v1 WHERE event_id = 'ev_007'")
    assert "ev_007" in world.run("reconcile", status=1)
    world.run("reconcile", "--repair", status=1)
    world.run("drain")
    world.run("reconcile")
    assert (world.entries(), world.pending()) == (IDS, 0)


@pytest.mark.slow
def test_a_wrong_setup_is_named_before_anything_is_claimed(world: World) -> None:
    """A missing column is found by `doctor`, and by a drain before it takes a row."""
    world.put(*IDS)
    world.clickhouse("ALTER TABLE audit_logs_raw_v1 DROP COLUMN user_agent")
    assert "user_agent" in world.run("doctor", status=1)
    world.run("drain", status=2)
    assert (world.entries(), world.pending()) == ([], len(IDS))


@pytest.mark.slow
def test_two_drains_at_once_export_each_event_once(world: World) -> None:
    """An operator's drain beside the scheduled one."""
    world.put(*[f"ev_{number:05}" for number in range(1000)])
    with (
        world.start("auditexport", "drain", "--batch-rows", "50") as one,
        world.start("auditexport", "drain", "--batch-rows", "50") as two,
    ):
        assert one.wait(60) in (0, 3)
        assert two.wait(60) in (0, 3)
    world.run("drain")
    entries = world.entries()
    assert (len(entries), len(set(entries)), world.pending()) == (1000, 1000, 0)
