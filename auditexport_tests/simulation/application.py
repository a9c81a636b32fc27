"""The application of a simulated history: writers, and other hands on its rows. The book has what was really committed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pymysql.err import MySQLError

from auditexport_pipeline.core.event import OutboxRow, Undecodable
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.chaos.application import FOREIGN_MARK, MEDDLING, Book, Kind, Row
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.mysql_server import SimulatedMySQL, Transaction
from auditexport_tests.simulation.statements import run

OUTBOX = "clickhouse_outbox"
LOCK_WAIT_S = 5.0
KNOWN, UNKNOWN = "audit_log.v1", "audit_log.v9"
# An event with such an id is refused by a constraint of the simulated table.
REFUSED = "refused"
_INSERT = (
    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
    "VALUES (:version, :workspace_id, :event_id, :payload, CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED))"
)

_CHANGE = "UPDATE clickhouse_outbox SET payload = :payload WHERE pk = :pk"


class Application:
    """One writer and its other hands, on a server that can fail."""

    def __init__(
        self, name: str, mysql: SimulatedMySQL, book: Book, choices: Choices, *, repeats: bool, odd_in: int = 40
    ) -> None:
        """With `repeats`, one event in `odd_in` is an earlier one; of the same rarity are rows of each other odd kind."""
        self._name = name
        self._repeats = repeats
        self._odd_in = odd_in
        self._mysql = mysql
        self._book = book
        self._choices = choices
        self._written: list[dict[str, Any]] = []
        self._number = 0

    def write(self, *, plain: bool = False) -> None:
        """One transaction of a few rows; `plain`: of one event. Some rest before their end, some are rolled back, some have no known end."""
        choose = self._choices
        transaction: Transaction | None = None
        rows: dict[int, Row] = {}
        try:
            transaction = self._mysql.begin(LOCK_WAIT_S)
            for _ in range(1 if plain else (1, 2, 3, 8)[choose.below(4)]):
                row = self._row(plain=plain)
                values = {"version": UNKNOWN if row.kind == "unknown" else KNOWN, "event_id": row.event_id}
                values |= {"workspace_id": row.workspace_id, "payload": row.payload}
                rows[run(transaction, _INSERT, values).last_key] = row
            if not plain and choose.chance(200):  # others commit higher pks meanwhile
                self._mysql.scheduler.sleep((0.1, 1.0, 30.0)[choose.below(3)])
            if not plain and choose.chance(100):
                transaction.roll_back()
                return
            transaction.commit()
        except MySQLError:
            if transaction is not None:
                transaction.roll_back()
        finally:
            if transaction is not None and transaction.committed:  # no step since the COMMIT
                self._book.rows |= rows

    def meddle(self, pks: Sequence[int], what: str) -> None:
        """Deletes or marks rows, or clears their marks, by SQL."""
        statement, changes = MEDDLING[what]
        if self._mysql.down:
            return
        transaction = self._mysql.begin(LOCK_WAIT_S)
        changed: dict[int, Any] = {}
        try:
            for pk in sorted(pks, reverse=True):  # against the exporter, which marks upwards, this can deadlock
                if transaction.get(OUTBOX, pk) is not None and transaction.lock(OUTBOX, pk):
                    row = transaction.get(OUTBOX, pk)
                    if row is not None and changes(row["deleted_at"]):
                        changed[pk] = row["deleted_at"]
            if changed:
                run(transaction, f"{statement} WHERE pk IN :pks", {"pks": [*changed]})
            transaction.commit()
        except MySQLError:
            transaction.roll_back()
        if not transaction.committed:
            return
        for pk, mark in changed.items():
            known = self._book.rows[pk]
            known.cleared += what == "clear"
            known.deleted |= what == "delete"
            known.taken |= what != "clear" and mark in (None, FOREIGN_MARK) and not known.cleared

    def change(self, pks: Sequence[int]) -> None:
        """Changes the payloads of rows, wherever their batches stand; a malformed one may be repaired."""
        if self._mysql.down:
            return
        changed: dict[int, Row] = {}
        transaction = self._mysql.begin(LOCK_WAIT_S)
        try:
            for pk in sorted(pks, reverse=True):
                row = self._book.rows.get(pk)
                if row is None or row.kind not in ("event", "malformed"):
                    continue
                event = {**json.loads(row.payload), "description": f"changed {self._choices.below(1000)}"}
                if row.kind == "malformed" and self._choices.below(2):
                    event["time"] = 1_700_000_000_000
                content = row_of("event" if isinstance(event["time"], int) else "malformed", event)
                if run(transaction, _CHANGE, {"pk": pk, "payload": content.payload}).matched:
                    changed[pk] = content
            transaction.commit()
        except MySQLError:
            transaction.roll_back()
        if transaction.committed:
            for pk, content in changed.items():
                self._book.rows[pk].becomes(content)

    def hold(self, pks: Sequence[int], seconds: float) -> None:
        """Locks rows, rests, and rolls back."""
        if self._mysql.down:
            return
        transaction = self._mysql.begin(LOCK_WAIT_S)
        try:
            for pk in sorted(pks, reverse=True):
                transaction.statement(f"locks row {pk}")
                transaction.lock(OUTBOX, pk)
            self._mysql.scheduler.sleep(seconds)
        except MySQLError:
            pass
        finally:
            transaction.roll_back()

    def _row(self, *, plain: bool = False) -> Row:
        choose = self._choices
        odd = self._odd_in - (0 if plain else choose.below(self._odd_in))
        if odd == 1 and self._written and self._repeats:  # the same event, as it was or with another description
            event = dict(choose.one_of(self._written))
            if choose.below(2):
                event["description"] = f"again {choose.below(100)}"
            return row_of("event", event)
        self._number += 1
        event = {
            "event_id": f"{self._name}-{self._number}",
            "time": 1_700_000_000_000 + choose.below(1_000),
            "workspace_id": f"ws_{choose.below(3)}",
            "bucket": "unkey_mutations",
            "event": "key.create",
        }
        if odd == 2:
            return row_of("malformed", {**event, "time": "soon"})
        if odd == 3:
            return row_of("unknown", event)
        if odd == 4:
            return row_of("refused", {**event, "event_id": f"{REFUSED}-{event['event_id']}"})
        self._written = [*self._written[-9:], event]
        row = row_of("event", event)
        if odd == 5:  # ClickHouse takes the payload only in normal form, in which the last of two keys counts
            row.payload = row.payload[:-1] + ', "meta": {"k": 1, "k": 2}}'
        return row


def row_of(kind: Kind, event: dict[str, Any]) -> Row:
    """A row as its writer means it, with what its entry must be."""
    payload = json.dumps(event)
    row = Row(kind=kind, event_id=event["event_id"], workspace_id=event["workspace_id"], payload=payload)
    if kind == "event":
        decoded = VERSIONS[KNOWN].decode(
            OutboxRow(pk=0, event_id=row.event_id, workspace_id=row.workspace_id, payload=payload.encode())
        )
        assert not isinstance(decoded, Undecodable)
        row.key = decoded.key
        row.columns = columns_of(decoded.key, decoded.fingerprint)
    return row


def columns_of(key: tuple[str, str, int, str], fingerprint: int) -> tuple[object, ...]:
    """An entry as `chaos.check` compares it: event_id, time, workspace and bucket first, metas last."""
    workspace_id, bucket, time_ms, event_id = key
    return (event_id, time_ms, workspace_id, bucket, fingerprint, "{}")
