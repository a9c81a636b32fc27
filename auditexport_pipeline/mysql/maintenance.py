"""MySQL for requeue, sweep and reconcile, behind `core.ports.Maintenance`: the statements of `maintenance.sql`.

What does not belong here: the life of a batch (`mysql.outbox`), and any decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from auditexport_pipeline.core.actions import Action, Actor, Erasure, RecordedErasure, RowFilter
from auditexport_pipeline.core.batch import Batch, Holding, State, compacted_text, observed_to_text
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Discrepancy
from auditexport_pipeline.mysql import actions, dead_letters
from auditexport_pipeline.mysql.marking import LIST_PKS, by_shape
from auditexport_pipeline.mysql.outbox import IN_CLICKHOUSE, MySQLOutbox, batch_of
from auditexport_pipeline.mysql.statements import SQL as OUTBOX_SQL
from auditexport_pipeline.mysql.statements import statements

SQL = statements("mysql/maintenance.sql")
# Rows that one statement of a scan reads: a few megabytes of pages, some ten milliseconds.
SCAN_PKS = 20_000
# Marks of another exporter that one statement reads: its batches have some thousand rows each.
STAMPS_AT_ONCE = 20
# Ranges in which the ledger or the outbox is searched for a set of pks.
SPANS = 64


class MySQLMaintenance:
    """`core.ports.Maintenance` over the same database as a `MySQLOutbox`."""

    def __init__(self, outbox: MySQLOutbox) -> None:
        self.outbox = outbox

    def _rows(self, what: str, statement: str, **values: object) -> list[Row[Any]]:
        return self.outbox.rows(what, SQL[statement], values)

    # ── the ledger ───────────────────────────────────────────────────────────────────────────────

    def now_ms(self) -> int:
        return int(self.outbox.rows("asking for the time", OUTBOX_SQL["now_ms"])[0].now_ms)

    def inserted_between(self, from_ms: int, to_ms: int, after_id: int, batches: int) -> list[Batch]:
        values = {"from_ms": from_ms, "to_ms": to_ms, "after_id": after_id, "row_limit": batches}
        return [_with_sweep(row) for row in self._rows("reading the ledger", "inserted_between", **values)]

    def pks_by_batch(self, pks: PkSet) -> dict[int, PkSet]:
        """Which of these pks each batch of the ledger has, open or closed."""
        found: dict[int, PkSet] = {}
        with self.outbox.transaction("reading the ledger") as connection:
            for first_pk, last_pk in pks.spans(SPANS):
                for row in connection.execute(SQL["held_between"], {"first_pk": first_pk, "last_pk": last_pk}):
                    if common := PkSet.parse(row.pks) & pks:
                        found[row.batch_id] = common
        return found

    def batch_with(self, inserted_at_ms: int) -> int | None:
        values = {"inserted_at_ms": inserted_at_ms, "in_manifest": f'%"at":{inserted_at_ms},%'}
        found = self._rows("reading the ledger", "batch_with", **values)
        return int(found[0].batch_id) if found else None

    def first_inserted_ms(self) -> int | None:
        first_ms: int | None = self._rows("reading the ledger", "first_inserted")[0].first_ms
        return first_ms

    def record_reconciled(self, batch: Batch, discrepancy: Discrepancy, observed: Mapping[int, Holding]) -> None:
        values = {
            "batch_id": batch.batch_id,
            "state": str(State.DISCREPANT if discrepancy else State.VERIFIED),
            "error": f"{IN_CLICKHOUSE}{discrepancy}" if discrepancy else "",
            "observed": observed_to_text(observed),
        }
        with self.outbox.transaction(f"recording the reconciliation of batch {batch.batch_id}") as connection:
            connection.execute(SQL["reconciled"], values)

    # ── the outbox's marks ───────────────────────────────────────────────────────────────────────

    def foreign_marks(self, first_ms: int, last_ms: int, versions: Sequence[str]) -> Iterator[dict[int, int]]:
        """Rows whose `deleted_at`, in [first, last], no batch has set: `deleted_at` by pk, in portions by ascending mark.

        Source: `drainer_pending_idx`; one statement for up to `STAMPS_AT_ONCE` marks without a mark of ours between them.
        """
        with self.outbox.transaction("reading marks") as connection:
            limits = {"first_ms": first_ms, "last_ms": last_ms}
            stamps = sorted(row.stamp_ms for row in connection.execute(SQL["outbox_stamps"], limits))
            ours = {row.stamp_ms for row in connection.execute(SQL["ledger_stamps"])} if stamps else set()
        for group in _foreign_groups(stamps, ours):
            values = {"first_ms": group[0], "last_ms": group[-1], **_of_versions(versions)}
            if marks := {row.pk: row.stamp_ms for row in self._rows("reading marks", "marks_between", **values)}:
                yield marks

    def count_stamped(self, stamp_ms: int) -> int:
        return int(self._rows("counting marks", "count_stamped", stamp_ms=stamp_ms)[0].n)

    def stamped(self, stamp_ms: int, versions: Sequence[str]) -> PkSet:
        rows = self._rows("reading marks", "stamped", stamp_ms=stamp_ms, **_of_versions(versions))
        return PkSet.of(row.pk for row in rows)

    def dead_among(self, pks: PkSet) -> PkSet:
        """The rows that have a dead letter which was not retried, even if the rows have been marked since."""
        chunks = (self._rows("reading dead letters", "dead_among", pks=list(chunk)) for chunk in pks.chunks(LIST_PKS))
        return PkSet.of(row.pk for rows in chunks for row in rows)

    def marked(self, which: RowFilter, within: PkSet | None) -> Iterator[PkSet]:
        """The marked rows that a filter names, in portions by ascending pk; `within` limits the search.

        Source: `drainer_pending_idx` for a range of export time, else the primary key, some thousand rows a
        statement. No lock.
        """
        if which.from_exported_ms is not None or which.to_exported_ms is not None:
            limits = {"from_ms": which.from_exported_ms or 0, "to_ms": which.to_exported_ms or 2**63 - 1}
            found = PkSet.of(row.pk for row in self._rows("reading marks", "stamped_between", **limits))
            within = found if within is None else within & found
        last = which.to_pk if which.to_pk is not None else 2**64 - 1
        pks = PkSet(((which.from_pk or 0, last),))
        for first_pk, last_pk in (pks if within is None else within & pks).spans(SPANS):
            while True:
                with self.outbox.transaction("looking for rows") as connection:
                    first: int | None = connection.execute(SQL["next_pk"], {"pk": first_pk}).scalar()
                    if first is None or first > last_pk:
                        break
                    until = min(last_pk, first + SCAN_PKS - 1)
                    values = {"first_pk": first, "last_pk": until, **_conditions(which)}
                    pks = PkSet.of(row.pk for row in connection.execute(SQL["marked_between"], values))
                if within is not None:
                    pks &= within
                if pks:
                    yield pks
                first_pk = until + 1

    def by_workspace(self, pks: PkSet) -> dict[str, int]:
        """How many of these rows each workspace has in the outbox."""
        counts: Counter[str] = Counter()
        for statement, values in _chunks_by_shape("workspaces", pks):
            counts.update({row.workspace_id: row.n for row in self._rows("counting rows", statement, **values)})
        return counts

    def times(self, pks: PkSet) -> dict[int, tuple[int, int | None]]:
        found: dict[int, tuple[int, int | None]] = {}
        for chunk in pks.chunks(5_000):
            rows = self._rows("reading rows", "times", pks=list(chunk))
            found.update((row.pk, (row.created_at, row.deleted_at)) for row in rows)
        return found

    # ── actions and their effects ────────────────────────────────────────────────────────────────

    def record_action(self, verb: str, by: Actor, selection: Mapping[str, object]) -> int:
        """Writes the record of an action, which counts the rows of all its effects; returns its id."""
        with self.outbox.transaction(f"recording a {verb}") as connection:
            return actions.record(connection, verb, by, selection, 0)

    def actions(self, count: int) -> list[Action]:
        with self.outbox.transaction("reading actions") as connection:
            return actions.last(connection, count)

    def last_actions(self, verb: str, count: int) -> list[Action]:
        with self.outbox.transaction("reading actions") as connection:
            return actions.last_of_verb(connection, verb, count)

    def unmark(self, pks: PkSet, action_id: int) -> int:
        """Clears the marks of these rows and counts them in the action, in one transaction; returns how many."""
        with self.outbox.transaction("clearing marks") as connection:
            return _effect(connection, action_id, "unmark", pks)

    def sweepable(self, before_ms: int, after_id: int, batches: int) -> list[Batch]:
        values = {"before_ms": before_ms, "after_id": after_id, "row_limit": batches}
        return [_with_sweep(row) for row in self._rows("reading the ledger", "sweepable", **values)]

    def held_back(self, before_ms: int) -> int:
        return int(self._rows("counting batches", "held_back", before_ms=before_ms)[0].n)

    def discrepant_due(self, before_ms: int) -> dict[int, str]:
        found = self._rows("listing discrepant batches", "discrepant_due", before_ms=before_ms)
        return {row.batch_id: row.last_error.removeprefix(IN_CLICKHOUSE) for row in found}

    def count_due(self, pks: PkSet, before_ms: int) -> int:
        return sum(
            self._rows("counting rows", statement, **values, before_ms=before_ms)[0].n
            for statement, values in _chunks_by_shape("count_due", pks)
        )

    def delete(self, batch_id: int, pks: PkSet, before_ms: int, action_id: int) -> int:
        """Deletes those of these rows that were exported before, and counts them, in one transaction."""
        with self.outbox.transaction(f"sweeping rows of batch {batch_id}") as connection:
            rows = _effect(connection, action_id, "delete", pks, before_ms=before_ms)
            connection.execute(SQL["count_swept"], {"batch_id": batch_id, "rows": rows})
            return rows

    def record_swept(self, batch_id: int) -> None:
        with self.outbox.transaction(f"recording batch {batch_id} as swept") as connection:
            connection.execute(SQL["record_swept"], {"batch_id": batch_id})

    def compact(self, before_ms: int, batches: int, by: Actor) -> int:
        """Compacts swept batches exported before, at most `batches`, and records it; returns how many."""
        limits = {"before_ms": before_ms, "row_limit": batches}
        with self.outbox.transaction("compacting the ledger") as connection:
            due = [batch_of(row) for row in connection.execute(SQL["compactable"], limits)]
            for batch in due:
                values = {"batch_id": batch.batch_id, "manifest": compacted_text(batch.blocks)}
                connection.execute(SQL["compact"], values)
            if due:
                actions.record(connection, "compact", by, {"before_ms": before_ms}, len(due))
            return len(due)

    def close_letters(self) -> int:
        """Closes dead letters whose rows are gone from the outbox or were marked by another program or by hand."""
        return dead_letters.close_gone(self.outbox)

    # ── erasures ─────────────────────────────────────────────────────────────────────────────────

    def add_erasures(self, by: Actor, erasures: Collection[Erasure]) -> int:
        """Records erasures, all or none, and returns the action's id."""
        with self.outbox.transaction("recording erasures") as connection:
            workspaces = sorted({erasure.workspace_id for erasure in erasures})
            newest_pk = connection.execute(SQL["outbox_ends"]).one().last_pk or 0
            selection = {"workspaces": workspaces[:20], "erasures": len(erasures), "newest_pk": newest_pk}
            action_id = actions.record(connection, "erasure", by, selection, len(erasures))
            for erasure in erasures:
                connection.execute(SQL["add_erasure"], {"action_id": action_id, **asdict(erasure)})
            return action_id

    def erasures(self) -> list[RecordedErasure]:
        return [
            RecordedErasure(
                erasure=Erasure(
                    workspace_id=row.workspace_id, event_id=row.event_id, from_ms=row.from_ms, to_ms=row.to_ms
                ),
                at_ms=row.at_ms,
                by=Actor(who=row.who, why=row.why),
                newest_pk=_newest_pk(row.selection),
            )
            for row in self._rows("reading erasures", "erasures")
        ]


def _foreign_groups(stamps: Sequence[int], ours: Collection[int]) -> Iterator[list[int]]:
    """Groups the ascending marks of others: none of ours is between the marks of a group, and it has `STAMPS_AT_ONCE` at most."""
    group: list[int] = []
    for stamp in stamps:
        if group and (stamp in ours or len(group) == STAMPS_AT_ONCE):
            yield group
            group = []
        if stamp not in ours:
            group.append(stamp)
    if group:
        yield group


class _ErasureRecord(msgspec.Struct):
    newest_pk: int = 0


def _newest_pk(selection: str) -> int:
    """The outbox's highest pk when the erasure was recorded; 0 in records of earlier releases."""
    try:
        return msgspec.json.decode(selection, type=_ErasureRecord).newest_pk
    except msgspec.DecodeError:
        return 0


def _of_versions(versions: Sequence[str]) -> dict[str, object]:
    """The parameters for rows of these versions: by the index, and then byte by byte."""
    return {"versions": list(versions), "exact_versions": [version.encode() for version in versions]}


def _with_sweep(row: Row[Any]) -> Batch:
    return replace(batch_of(row), swept=row.swept_at_ms is not None)


def _chunks_by_shape(kind: str, pks: PkSet) -> Iterator[tuple[str, dict[str, object]]]:
    """The statements that cover these pks, `SCAN_PKS` rows each at most."""
    for chunk in pks.chunks(SCAN_PKS):
        yield from by_shape(kind, chunk)


def _effect(connection: Connection, action_id: int, kind: str, pks: PkSet, **values: object) -> int:
    """Changes these rows and counts them in the action."""
    changes = (connection.execute(SQL[statement], {**where, **values}) for statement, where in by_shape(kind, pks))
    rows = sum(change.rowcount for change in changes)
    actions.count_rows(connection, action_id, rows)
    return rows


def _conditions(which: RowFilter) -> dict[str, object]:
    return {
        "workspace_id": which.workspace_id,
        "any_event": 0 if which.event_ids else 1,
        "event_ids": [event_id.encode() for event_id in which.event_ids] or [b""],
        "from_event_ms": which.from_event_ms,
        "to_event_ms": which.to_event_ms,
    }
