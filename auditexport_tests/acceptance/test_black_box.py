"""The promises as a user checks them: run the CLI or Dagster, then ask both databases."""

from __future__ import annotations

import json

import pytest

from auditexport_tests.acceptance.world import Gate, World, event, until

IDS = [f"ev_{number:03}" for number in range(40)]
RUNS = pytest.mark.parametrize("run", ["drain", "materialize"])
# A run of Dagster's takes eight seconds to start; what differs there is seen once in `make test`.
RUNS_SLOWLY = pytest.mark.parametrize("run", ["drain", pytest.param("materialize", marks=pytest.mark.slow)])


def export(world: World, run: str) -> None:
    if run == "drain":
        world.run("drain")
    else:
        world.materialize()


@RUNS
def test_every_event_arrives_once_and_is_marked(world: World, run: str) -> None:
    """The job itself, by the CLI and by Dagster."""
    world.put(*IDS)
    export(world, run)
    assert (world.entries(), world.pending()) == (IDS, 0)
    export(world, run)
    assert world.entries() == IDS


def test_a_drain_tells_programs_what_it_did(world: World) -> None:
    world.put(*IDS)
    world.put("other", version="other.v9")
    told = world.told("drain")
    assert (told["rows"], told["entries"], told["backlog_rows"], told["unknown_rows"]) == (40, 40, 0, 1)
    assert (told["unknown_versions"], told["discrepant"], world.pending()) == ("other.v9", {}, 1)


def test_what_a_payload_says_stands_in_its_columns(world: World) -> None:
    world.put(
        "ev_1",
        payload=event(
            "ev_1",
            source="",
            meta={"a": [1, {"c": "é"}]},
            targets=[{"type": "key", "id": "k1", "meta": {"n": 2**53 + 1}}],
        ),
    )
    world.run("drain")
    ((source, actor, target, meta, targets),) = world.clickhouse(
        "SELECT source, actor_id, `targets.id`, meta_text, targets_meta_text FROM audit_logs_raw_v1"
    )
    assert (source, actor, target, json.loads(meta)) == ("platform", "user_1", ["k1"], {"a": [1, {"c": "é"}]})
    assert str(2**53 + 1) in str(targets)


@RUNS_SLOWLY
def test_a_kill_after_the_insert_doubles_nothing(world: World, run: str) -> None:
    """ClickHouse has the rows, MySQL has no mark: the next run must look before it sends."""
    world.put(*IDS)
    with world.connection() as application:
        with application.cursor() as cursor:
            cursor.execute("SELECT pk FROM clickhouse_outbox FOR UPDATE")
        with world.start("auditexport", "drain") as process:
            until(lambda: world.entries() == IDS, "the rows are in ClickHouse")
            process.kill()
    assert world.pending() == len(IDS)
    export(world, run)
    assert (world.entries(), world.pending()) == (IDS, 0)


@RUNS_SLOWLY
def test_a_kill_before_the_insert_loses_nothing(world: World, run: str) -> None:
    """The batch is sealed, its INSERT is on the way and never arrives."""
    world.put(*IDS)
    with (
        Gate(world.clickhouse_url, hold=b"INSERT INTO audit_logs_raw_v1") as gate,
        world.start("auditexport", "drain", AUDITEXPORT_CLICKHOUSE_URL=gate.url) as process,
    ):
        assert gate.held.wait(30), process.communicate(timeout=5)
        process.kill()
    assert (world.entries(), world.pending()) == ([], len(IDS))
    export(world, run)
    assert (world.entries(), world.pending()) == (IDS, 0)


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
    assert world.clickhouse("SELECT count(), uniqExact(event_id) FROM audit_logs") == [
        ["40", "40"]
    ] or world.clickhouse("SELECT count(), uniqExact(event_id) FROM audit_logs") == [[40, 40]]


@RUNS_SLOWLY
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


def test_a_sweep_deletes_what_is_exported_and_nothing_else(world: World) -> None:
    world.put(*IDS)
    world.run("drain")
    world.put("new")
    world.run("sweep", "--outbox-days", "0")
    assert world.sql("SELECT event_id FROM clickhouse_outbox") == [("new",)]
    assert world.entries() == IDS


def test_a_sweep_spares_what_clickhouse_lost(world: World) -> None:
    """The outbox then has the only copy."""
    world.put(*IDS)
    world.run("drain")
    world.clickhouse("DELETE FROM audit_logs_raw_v1 WHERE event_id = 'ev_007'")
    world.run("sweep", "--outbox-days", "0", status=1)
    assert ("ev_007",) in world.sql("SELECT event_id FROM clickhouse_outbox")


def test_a_loss_is_found_repaired_and_gone(world: World) -> None:
    world.put(*IDS)
    world.run("drain")
    world.run("reconcile")
    world.clickhouse("DELETE FROM audit_logs_raw_v1 WHERE event_id = 'ev_007'")
    assert "ev_007" in world.run("reconcile", status=1)
    world.run("reconcile", "--repair", status=1)
    world.run("drain")
    world.run("reconcile")
    assert (world.entries(), world.pending()) == (IDS, 0)


def test_status_says_how_far_behind_the_export_is(world: World) -> None:
    assert world.told("status")["backlog_rows"] == 0
    world.put(*IDS)
    told = world.told("status")
    assert told["backlog_rows"] == 40
    assert told["lag_s"] >= 0
    world.run("drain")
    assert world.told("status")["backlog_rows"] == 0


def test_a_wrong_setup_is_named_before_anything_is_claimed(world: World) -> None:
    world.put(*IDS)
    world.run("doctor")
    world.clickhouse("ALTER TABLE audit_logs_raw_v1 DROP COLUMN user_agent")
    assert "user_agent" in world.run("doctor", status=1)
    world.run("drain", status=2)
    assert (world.entries(), world.pending()) == ([], len(IDS))


def test_two_drains_at_once_export_each_event_once(world: World) -> None:
    world.put(*[f"ev_{number:05}" for number in range(3000)])
    with (
        world.start("auditexport", "drain", "--batch-rows", "200") as one,
        world.start("auditexport", "drain", "--batch-rows", "200") as two,
    ):
        assert one.wait(60) in (0, 3)
        assert two.wait(60) in (0, 3)
    world.run("drain")
    assert (len(world.entries()), len(set(world.entries())), world.pending()) == (3000, 3000, 0)
