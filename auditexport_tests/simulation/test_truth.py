"""Short stories: what the simulation found when it began to judge the numbers of runs, and payloads that change."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from auditexport_pipeline.core import small, threads
from auditexport_pipeline.sql import load
from auditexport_tests.simulation.application import KNOWN, OUTBOX, REFUSED, row_of
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.concurrency import SimulatedThreads
from auditexport_tests.simulation.scheduler import Process
from auditexport_tests.simulation.statements import run as statement
from auditexport_tests.simulation.truth import Truth
from auditexport_tests.simulation.world import LEDGER, LETTERS, Run, World

EVENT = {"time": 1_700_000_000_000, "workspace_id": "ws_1", "bucket": "b", "event": "key.create"}


def played(script: Callable[[World], None]) -> World:
    """A world without chance, after this script and all that it began."""
    world = World(Choices(given=()))

    def direct() -> None:
        transaction = world.mysql.begin(1.0)
        statement(transaction, load("mysql/schema.sql")["ledger_head"], {})
        transaction.commit()
        script(world)

    with ExitStack() as stack:
        stack.enter_context(threads.replaced(SimulatedThreads(world.scheduler)))
        world.scheduler.spawn("director", direct, Process("director"))
        world.scheduler.run()
    assert world.violations == []
    assert list(Truth(world).lies()) == []
    return world


def write(world: World, *event_ids: str) -> list[int]:
    """Commits one row for each of these events; returns their pks."""
    transaction = world.mysql.begin(1.0)
    pks = []
    for event_id in event_ids:
        row = row_of("refused" if event_id.startswith(REFUSED) else "event", {**EVENT, "event_id": event_id})
        values = {"version": KNOWN, "workspace_id": "ws_1", "event_id": event_id, "payload": row.payload}
        pk = statement(transaction, INSERT, values).last_key
        world.book.rows[pk] = row
        pks.append(pk)
    transaction.commit()
    return pks


CHANGE = "UPDATE clickhouse_outbox SET payload = :payload WHERE pk = :pk"
INSERT = (
    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
    "VALUES (:version, :workspace_id, :event_id, :payload, 1700000000000)"
)


def finished(world: World, run: Run) -> Run:
    assert world.scheduler.wait(lambda: run.ended, 7_200.0)
    return run


def test_a_probe_without_memory_sets_no_sound_row_aside() -> None:
    """A server that runs out of memory while the rows of a refused block are probed says nothing about the rows."""

    def script(world: World) -> None:
        write(world, "one", f"{REFUSED}-two", "three")
        conditions = world.clickhouse.conditions
        refuses = conditions.table_refuses

        def refuses_and_has_no_memory(entry: object) -> bool:
            conditions.most_rows = 0
            return refuses(entry)  # type: ignore[arg-type]

        conditions.table_refuses = refuses_and_has_no_memory
        finished(world, world.drain(quiet=True))
        assert world.mysql.tables[LETTERS].rows == {}
        world.calm_clickhouse()
        finished(world, world.drain(quiet=True))

    world = played(script)

    assert sorted(entry.key[3] for entry in world.clickhouse.entries()) == ["one", "three"]
    assert [row["deleted_at"] is None for row in world.mysql.tables[OUTBOX].rows.values()] == [False, True, False]


def test_own_batches_of_a_failed_plan_do_not_count_as_adopted() -> None:
    """`adopted` are batches of dead owners: a drain that plans again after an error takes up its own."""

    def script(world: World) -> None:
        write(world, "one", "two")
        answers = iter((True, True))
        world.clickhouse.conditions.dies = lambda: next(answers, False)  # also when it is asked again
        run = finished(world, world.drain(quiet=True))
        assert run.done is not None
        assert (run.done.batches, run.done.adopted, run.done.rows) == (1, 0, 2)

    played(script)


@pytest.mark.parametrize("most_rows", [0, small.MOST_ROWS])
def test_a_batch_that_the_run_exports_in_the_end_is_not_reported_as_lost(
    most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is paused until its INSERT is too late. No other run adopts the batch, and the run exports it; a small batch
    at once.
    """
    monkeypatch.setattr(small, "MOST_ROWS", most_rows)

    def script(world: World) -> None:
        write(world, "one")
        run = world.drain(quiet=True)
        pauses = iter((200.0,))

        def pause() -> bool:
            if "asks for the time" in world.scheduler.story[-1][2] and (seconds := next(pauses, 0.0)):
                run.process.paused_until_s = world.scheduler.now_s + seconds
            return False

        world.clickhouse.conditions.dies = pause
        finished(world, run)
        assert run.done is not None
        assert (run.done.rows, run.done.lost) == (1, [])
        assert world.mysql.tables[LEDGER].rows[1]["attempts"] == 2
        assert ("deadline" in str(world.scheduler.story)) == (not most_rows)

    played(script)


def test_a_payload_that_changes_before_the_seal_goes_out_as_changed() -> None:
    """After the seal a change stops the batch; after the export nothing goes out."""

    def script(world: World) -> None:
        (pk,) = write(world, "one")
        change(world, pk, "before the claim")
        conditions = world.clickhouse.conditions
        conditions.dies = lambda: "sends the INSERT" in world.scheduler.story[-1][2]
        run = world.drain(quiet=True)
        assert world.scheduler.wait(lambda: world.mysql.asked[run.owner] > 0 and world.open_batches() != [], 60)
        assert world.scheduler.wait(lambda: world.mysql.tables[LEDGER].rows[1]["attempts"] > 0, 60)
        change(world, pk, "after the seal")
        finished(world, run)
        world.calm_clickhouse()
        while world.open_batches():
            finished(world, world.drain(quiet=True))
            world.scheduler.sleep(60)
        change(world, pk, "after the export")
        finished(world, world.drain(quiet=True))

    world = played(script)

    sent = [json.loads(payload)["description"] for block in world.clickhouse.received for payload in block.payloads]
    assert sent == ["after the seal"]


def change(world: World, pk: int, description: str) -> None:
    changed = row_of("event", {**EVENT, "event_id": world.book.rows[pk].event_id, "description": description})
    transaction = world.mysql.begin(1.0)
    statement(transaction, CHANGE, {"pk": pk, "payload": changed.payload})
    transaction.commit()
    world.book.rows[pk].becomes(changed)


def test_the_ledger_says_what_is_still_wrong_after_a_repair() -> None:
    """One of two differences was repaired: the status must not show it for ever."""

    def script(world: World) -> None:
        _, two = write(world, "one", "two")
        finished(world, world.drain(quiet=True))
        world.clickhouse.mutate(lambda entry: None if entry.key[3] == "one" else entry)
        change(world, two, "changed")
        finished(world, world.reconcile(repair=True))
        assert world.mysql.tables[LEDGER].rows[1]["last_error"] == "in ClickHouse: 1 missing, 1 altered"
        finished(world, world.drain(quiet=True))
        finished(world, world.reconcile(repair=True))

    world = played(script)

    assert world.mysql.tables[LEDGER].rows[1]["last_error"] == "in ClickHouse: 1 altered"
