"""The simulated ClickHouse stores a block whole or not at all, also after its sender is gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from auditexport_pipeline.core.batch import Batch, Block, State
from auditexport_pipeline.core.errors import InsertOutcomeUnknown, LeaseLost
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Refusal, RefusalKind
from auditexport_tests.simulation.audit_log import SimulatedAuditLog
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.clickhouse_server import SimulatedClickHouse
from auditexport_tests.simulation.scheduler import Process, Scheduler

AT_MS = 1_700_000_000_500
BLOCK = Block(number=0, inserted_at_ms=AT_MS, pks=PkSet.of([1, 2]), digest="d")
BATCH = Batch(
    batch_id=1,
    epoch=1,
    generation=0,
    version="audit_log.v1",
    state=State.SEALED,
    owner="run",
    pks=BLOCK.pks,
    blocks=(BLOCK,),
)


def payloads() -> list[bytes]:
    return [
        json.dumps({"event_id": f"evt_{n}", "time": n, "workspace_id": "ws", "event": "key.create"}).encode()
        for n in (1, 2)
    ]


def play(task: Callable[[SimulatedAuditLog], Any]) -> tuple[Any, SimulatedClickHouse]:
    scheduler = Scheduler(Choices(1))
    server = SimulatedClickHouse(scheduler)
    log = SimulatedAuditLog(server)
    results: list[Any] = []
    scheduler.spawn("run", lambda: results.append(task(log)), Process("run"))
    scheduler.run()
    return results[0], server


def insert(log: SimulatedAuditLog, *, within_s: float = 60, timeout_s: int = 60) -> Refusal | None:
    return log.insert(BATCH, BLOCK, payloads(), deadline_ms=log.deadline_ms(within_s), timeout_s=timeout_s)


def rows(log: SimulatedAuditLog) -> int:
    found = log.holdings([AT_MS]).get(AT_MS)
    return found.rows if found else 0


def test_a_block_is_stored_once_under_its_token() -> None:
    """A replay is acknowledged and adds nothing, while the window has the token."""

    def task(log: SimulatedAuditLog) -> list[Any]:
        return [insert(log), rows(log), insert(log), rows(log)]

    assert play(task)[0] == [None, 2, None, 2]


def test_an_insert_can_end_after_its_sender_looked_and_found_nothing() -> None:
    """The interleaving that a look-up alone cannot survive, and for which there is a deadline."""

    def task(log: SimulatedAuditLog) -> list[int]:
        server = log._server
        server.conditions.insert_s = lambda: 30.0
        server.conditions.answer_lost = lambda: True
        seen: list[int] = []

        def sender() -> None:
            with pytest.raises(InsertOutcomeUnknown):
                insert(log)

        server.scheduler.spawn("sender", sender, Process("sender"))
        server.scheduler.sleep(5)
        seen.append(rows(log))
        server.scheduler.sleep(60)
        return [*seen, rows(log)]

    assert play(task)[0] == [0, 2]


def test_an_insert_after_its_deadline_is_refused_by_the_servers_clock() -> None:
    """Whoever sends it, and however late it arrives."""

    def task(log: SimulatedAuditLog) -> int:
        deadline_ms = log.deadline_ms(1)
        log._server.clock_offset_ms = 2_000
        with pytest.raises(LeaseLost):
            log.insert(BATCH, BLOCK, payloads(), deadline_ms=deadline_ms, timeout_s=60)
        return rows(log)

    assert play(task)[0] == 0


def test_a_failing_view_is_an_error_after_the_block_is_stored() -> None:
    """An error does not say that nothing was written."""

    def task(log: SimulatedAuditLog) -> tuple[Any, int]:
        log._server.conditions.view_fails = lambda entry: entry.key[3] == "evt_1"
        return insert(log), rows(log)

    (refusal, stored), _ = play(task)
    assert (refusal.kind, stored) == (RefusalKind.VIEW, 2)


def test_a_block_above_a_limit_is_not_stored_at_all() -> None:
    """Half a block is what no run knows how to continue from."""

    def task(log: SimulatedAuditLog) -> tuple[Any, int]:
        log._server.conditions.most_rows = 1
        return insert(log), rows(log)

    (refusal, stored), _ = play(task)
    assert (refusal.kind, stored) == (RefusalKind.MEMORY, 0)


def test_a_merge_keeps_one_entry_of_a_key_and_the_ttl_takes_old_ones() -> None:
    """Both change what is there while nobody writes."""

    def task(log: SimulatedAuditLog) -> list[int]:
        server = log._server
        insert(log)
        server.tokens.clear()
        insert(log)
        seen = [rows(log)]
        server.merge(server.parts[0].month)
        seen.append(rows(log))
        server.clock_offset_ms = 91 * 86_400_000
        server.expire()
        return [*seen, rows(log)]

    assert play(task)[0] == [4, 2, 0]
