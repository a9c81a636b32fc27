"""Requeues after a lingering run: one `inserted_at`, and so one INSERT, for each of its small drains.

What belongs here: batches of thousands of blocks and look-ups of thousands of keys. Other requeues are in
`integration.maintenance.test_requeue`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from auditexport_pipeline.cli import main
from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.batch import Block, batch_digest, blocks_from_text, blocks_to_text, pks_of, sealed_block
from auditexport_pipeline.core.event import Event
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.faults.test_identity import event
from auditexport_tests.support.builders import insert, small_event
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.maintenance import lose_events
from auditexport_tests.support.prompts import urls

LIMITS = Limits()
Prompt = Callable[..., Result]


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """`auditexport …` in this process, pointed at the stack."""
    for name, value in urls(stack).items():
        monkeypatch.setenv(name, value)
    return lambda *words: CliRunner().invoke(main, list(words))


def spread(stack: Stack, rows: int) -> tuple[dict[str, object], list[Block]]:
    """Exports rows, gives each entry an `inserted_at` of its own, and returns the batch's ledger row and the new
    blocks.
    """
    insert(stack, [event(f"evt_{number}", number) for number in range(rows)])
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    (batch,) = stack.sql("SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 1")
    (block,), _ = blocks_from_text(str(batch.manifest))
    client = stack.log.client()
    client.command(
        f"INSERT INTO audit_logs_raw_v1 SELECT * REPLACE ({block.inserted_at_ms} + 1 + time AS inserted_at) FROM audit_logs_raw_v1"
    )
    client.command(
        f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE inserted_at = {block.inserted_at_ms}",
        settings={"mutations_sync": 2},
    )
    stack.sql("UPDATE clickhouse_outbox_batch SET inserted_at_ms = inserted_at_ms + :n WHERE batch_id = 0", n=rows + 1)
    stack.sql("DELETE FROM clickhouse_outbox_batch WHERE batch_id = 1")
    blocks = []
    for row in stack.outbox.read(block.pks, row_bytes=200):
        decoded = VERSIONS["audit_log.v1"].decode(row)
        assert isinstance(decoded, Event)
        number = len(blocks)
        one = Block(number=number, inserted_at_ms=block.inserted_at_ms + 1 + number, pks=PkSet.of([row.pk]))
        blocks.append(sealed_block("audit_log.v1", one, one.pks, [row.payload], decoded.fingerprint, ids=None))
    return dict(batch._mapping), blocks


def record(stack: Stack, batches: list[dict[str, object]]) -> None:
    names = ", ".join(batches[0])
    values = ", ".join(f":{name}" for name in batches[0])
    with stack.outbox.engine.begin() as connection:
        connection.execute(sa.text(f"INSERT INTO clickhouse_outbox_batch ({names}) VALUES ({values})"), batches)


def of_blocks(batch: dict[str, object], batch_id: int, blocks: list[Block]) -> dict[str, object]:
    """The ledger row of a batch like that one with these blocks."""
    pks = pks_of(blocks)
    return batch | {
        "batch_id": batch_id,
        "row_count": len(pks),
        "entry_count": len(pks),
        "first_pk": pks.first,
        "last_pk": pks.last,
        "pks": str(pks),
        "manifest": blocks_to_text(blocks),
        "digest": batch_digest(blocks, PkSet()),
        "inserted_at_ms": blocks[-1].inserted_at_ms,
        "observed": None,
    }


def requeued(stack: Stack, prompt: Prompt, drains: int) -> None:
    """The rows of a lingering run's small drains, one each, pending again."""
    batch, blocks = spread(stack, drains)
    record(stack, [of_blocks(batch, 1 + number, [block]) for number, block in enumerate(blocks)])
    prompt("requeue", "--workspace", "ws", "--why", "a test", "--who", "me")
    assert stack.pending() == drains


def test_what_a_lingering_run_exported_can_be_requeued(
    stack: Stack, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch, the last INSERTs could not meet the deadline."""
    monkeypatch.setattr(claiming, "MOST_BLOCKS", 16, raising=False)
    monkeypatch.setattr(export, "BLOCKS_AT_ONCE", 5, raising=False)
    requeued(stack, prompt, 40)
    done = prompt("drain", "--once")
    assert done.exit_code == 0, done.output
    rows = stack.sql("SELECT state, manifest FROM clickhouse_outbox_batch WHERE batch_id > 40")
    assert [len(json.loads(str(row.manifest))) for row in rows] == [16, 16, 8]
    assert {str(row.state) for row in rows} == {"verified"}
    assert stack.pending() == 0
    assert stack.clickhouse("SELECT count(), uniqExact(event_id, inserted_at) FROM audit_logs") == [(40, 40)]


@pytest.mark.slow
def test_a_batch_of_thousands_of_blocks_is_finished(stack: Stack, prompt: Prompt) -> None:
    """An earlier release left such batches sealed; their look-up does not fit into one field of a form."""
    batch, blocks = spread(stack, 9_500)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")
    left = {"state": "sealed", "attempts": 1, "owner": "dead", "exported_at_ms": None, "verified_at_ms": None}
    record(stack, [of_blocks(batch | left, 1, blocks)])
    done = prompt("drain", "--once")
    assert (done.exit_code, stack.pending()) == (0, 0), done.output
    ((state,),) = stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id = 1")
    assert state == "verified"
    assert stack.counts() == (9_500, 9_500)


def test_losses_with_long_buckets_are_reported(stack: Stack, prompt: Prompt) -> None:
    """The look-up of 1,500 keys is too long for one field of a form."""
    rows = [small_event(f"evt_{number}", time=number, bucket="b" * 200) for number in range(1_500)]
    insert(stack, [*rows, small_event("large", bucket="ł" * 150_000)])
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    stack.log.client().command("TRUNCATE TABLE audit_logs_raw_v1")
    found = prompt("reconcile", "--json")
    assert found.exit_code == 1, found.output
    assert json.loads(found.output)["missing"] == 1_501


def test_a_discrepant_requeue_is_verified_once_nothing_differs(stack: Stack, prompt: Prompt) -> None:
    """Else no sweep would take its rows, and the alert would never end."""
    pks = stack.put(*(event(f"evt_{number}", number) for number in range(4)))
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk IN (:a, :b)", a=pks[0], b=pks[1])
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'exported' WHERE batch_id = 2")
    lose_events(stack, "evt_0")
    drain(stack.outbox, stack.log, LIMITS, owner="three")

    def states() -> list[str]:
        return [str(row.state) for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0")]

    assert states()[1] == "discrepant"
    prompt("reconcile", "--repair", "--why", "lost", "--who", "me")
    assert states()[1] == "discrepant"
    drain(stack.outbox, stack.log, LIMITS, owner="four")
    prompt("reconcile")
    assert states() == ["verified", "verified", "verified"]
