"""MySQL: dead letters, added by a seal, and listed, shown, retried and discarded by operators.

What belongs here: transactions around `dead_letters.sql`, in bounded chunks. What does not: why a row becomes a
dead letter (`core`), who may act, and how anything is shown. Only `show` reads a payload, and only on
request: nothing is logged, and an action keeps conditions and pks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import Template

from sqlalchemy import Connection, Row, TextClause

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.dead_letters import (
    HELD,
    PAGE_LETTERS,
    Acted,
    DeadLetterFilter,
    Letter,
    LetterCounts,
    LetterDetails,
    LetterState,
    RowState,
)
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import DeadLetter
from auditexport_pipeline.mysql import actions
from auditexport_pipeline.mysql.database import Database
from auditexport_pipeline.mysql.statements import SQL as OUTBOX_SQL
from auditexport_pipeline.mysql.statements import prepared, statements
from auditexport_pipeline.sql import load

SQL = statements("mysql/dead_letters.sql")
_PIECES = load("mysql/dead_letters.sql")  # of which a statement about some letters is put together
# Letters added or changed at a time. Their pks (twenty digits each at most) fit into an action's record (TEXT, 64 KB).
CHUNK_LETTERS = 2_000
# Workspaces that a count names; reasons and versions are few.
TOP_WORKSPACES = 10
TOP_OTHERS = 1_000
# Held rows that are read to say why.
HELD_LOOKED_AT = 10_000
# The first given condition of these chooses the index.
_NARROWEST = ("pks", "reason", "workspace_id", "version", "state")


def add(connection: Connection, claim: Claim, letters: Sequence[DeadLetter]) -> None:
    """Adds the dead letters of a batch, or opens them again, in the transaction that takes their rows out of the batch."""
    now_ms = connection.execute(OUTBOX_SQL["now_ms"]).scalar_one() if letters else 0
    for start in range(0, len(letters), CHUNK_LETTERS):
        connection.execute(
            SQL["add"],
            [
                {
                    "pk": letter.pk,
                    "state": (LetterState.HELD if letter.held else LetterState.OPEN).value,
                    "version": claim.version,
                    "workspace_id": letter.workspace_id,
                    "event_id": letter.event_id,
                    "reason": letter.problem.reason,
                    "json_path": letter.problem.json_path[:255],
                    "detail": letter.problem.detail[:255],
                    "batch_id": claim.batch_id,
                    "now_ms": now_ms,
                }
                for letter in letters[start : start + CHUNK_LETTERS]
            ],
        )


def held_by_detail(connection: Connection) -> dict[str, int]:
    """Held rows by what refuses them, most frequent first."""
    values = {"looked_at": HELD_LOOKED_AT, "row_limit": TOP_WORKSPACES}
    return {row.detail: row.n for row in connection.execute(SQL["held_by_detail"], values)}


# ── looking ──────────────────────────────────────────────────────────────────────────────────────


def page(
    outbox: Database,
    which: DeadLetterFilter,
    *,
    letters: int = PAGE_LETTERS,
    newest_first: bool = False,
    beyond_pk: int | None = None,
) -> list[Letter]:
    """The first `letters` letters by pk, from the oldest row or the newest, beyond the last pk of the page before.

    Source: one index of `clickhouse_outbox_dead_letter`, by the narrowest condition; no lock, no payload.
    """
    edge = None if beyond_pk is None else ("below" if newest_first else "from")
    direction = "DESC" if newest_first else "ASC"
    from_pk = beyond_pk if beyond_pk is None or newest_first else beyond_pk + 1
    values = {**_values(which), "edge_pk": from_pk, "row_limit": letters}
    with outbox.transaction("listing dead letters") as connection:
        return [_letter(row) for row in connection.execute(_about("page", which, edge, direction=direction), values)]


def count(outbox: Database, which: DeadLetterFilter) -> LetterCounts:
    """How many letters the filter names: by reason, by version, and by workspace for the ten with the most.

    Source: as `page`, or the index of what is counted when only the state is given; its cost grows with the
    letters in that state.
    """
    found: dict[str, dict[str, int]] = {}
    with outbox.transaction("counting dead letters") as connection:
        for column, most in (("reason", TOP_OTHERS), ("workspace_id", TOP_WORKSPACES), ("version", TOP_OTHERS)):
            statement = _about("count", which, column=column)
            rows = connection.execute(statement, {**_values(which), "row_limit": most})
            found[column] = {row.name: row.n for row in rows}
    return LetterCounts(
        letters=sum(found["reason"].values()),
        by_reason=found["reason"],
        by_workspace=found["workspace_id"],
        by_version=found["version"],
    )


def show(outbox: Database, pk: int, *, with_payload: bool = False) -> LetterDetails | None:
    """One letter with its row and its last action, or None; the payload, as the outbox holds it now, only on request."""
    with outbox.transaction("reading a dead letter") as connection:
        row = connection.execute(SQL["one"], {"pk": pk}).one_or_none()
        if row is None:
            return None
        letter = _letter(row)
        action = actions.one(connection, letter.action_id) if letter.action_id is not None else None
        wanted = with_payload and row.outbox_pk is not None
        payload = connection.execute(SQL["payload"], {"pk": pk}).scalar() if wanted else None
    here = RowState.PENDING if row.deleted_at is None else RowState.EXPORTED
    return LetterDetails(
        letter=letter,
        row=here if row.outbox_pk is not None else RowState.DELETED,
        exported_at_ms=row.deleted_at,
        action=action,
        payload=bytes(payload) if payload is not None else None,
    )


# ── acting ───────────────────────────────────────────────────────────────────────────────────────


def retry(outbox: Database, which: DeadLetterFilter, by: Actor, *, at_most: int | None = None) -> Acted:
    """Lets the rows of open or discarded letters go back to pending; the next drain tries them again.

    Durable effect, `CHUNK_LETTERS` at a time: the letters are `retried` (or `gone`, when their row is no longer
    pending), and the action is recorded, in one transaction. Interrupted, it leaves whole chunks; run it again.
    Raises `OutboxUnavailable`.
    """
    return _act(outbox, which, by, "retry", LetterState.RETRIED, HELD, at_most)


def discard(outbox: Database, which: DeadLetterFilter, by: Actor, *, at_most: int | None = None) -> Acted:
    """Gives open letters up: their rows stay in the outbox, unmarked, and no batch takes them.

    Durable effect: as `retry`, with `discarded`. A discarded letter can be retried. Raises `OutboxUnavailable`.
    """
    return _act(outbox, which, by, "discard", LetterState.DISCARDED, (LetterState.OPEN,), at_most)


def close_gone(outbox: Database) -> int:
    """Closes letters whose row is no longer pending, because somebody deleted or marked it: they become `gone`.

    Durable effect: their state, one transaction a chunk. Returns how many. Its cost grows with the letters that hold
    a row: two look-ups by primary key each.
    """
    gone = 0
    for state in HELD:
        for pks in _chunks(outbox, DeadLetterFilter(state=state)):
            with outbox.transaction("looking for the rows of dead letters") as connection:
                pending = connection.execute(SQL["pending"], {"pks": list(pks)}).scalars()
                without_row = pks - PkSet.of(pending)
                if without_row:
                    gone += _set_gone(connection, _locked(connection, without_row, HELD))
    return gone


def _act(
    outbox: Database,
    which: DeadLetterFilter,
    by: Actor,
    verb: str,
    to: LetterState,
    allowed: tuple[LetterState, ...],
    at_most: int | None,
) -> Acted:
    changed = gone = 0
    action_ids: list[int] = []
    for state in allowed if which.state is None else (which.state,) if which.state in allowed else ():
        for found in _chunks(outbox, which, state):
            pks = next(found.chunks(at_most - changed), PkSet()) if at_most is not None else found
            if not pks:
                return Acted(changed=changed, gone=gone, action_ids=tuple(action_ids))
            with outbox.transaction(f"recording the {verb} of dead letters") as connection:
                locked = _locked(connection, pks, (state,))
                if not locked:
                    continue
                pending = PkSet.of(connection.execute(SQL["pending"], {"pks": list(locked)}).scalars())
                gone += _set_gone(connection, locked - pending)
                if pending:
                    action_id = actions.record(connection, verb, by, which.of_pks(pending).selection, len(pending))
                    connection.execute(SQL["change"], {"pks": list(pending), "state": to.value, "action_id": action_id})
                    changed += len(pending)
                    action_ids.append(action_id)
    return Acted(changed=changed, gone=gone, action_ids=tuple(action_ids))


def _chunks(outbox: Database, which: DeadLetterFilter, state: LetterState | None = None) -> Iterator[PkSet]:
    """The pks of the letters that the filter names, in chunks; each chunk is read when it is needed."""
    from_pk = 0
    given = list(which.pks.chunks(CHUNK_LETTERS)) if which.pks is not None else [None]
    for part in given:
        while True:
            chosen = which.in_state(state or which.state).of_pks(part)
            values = {**_values(chosen), "edge_pk": from_pk, "row_limit": CHUNK_LETTERS}
            with outbox.transaction("finding dead letters") as connection:
                pks = PkSet.of(connection.execute(_about("page_pks", chosen, "from"), values).scalars())
            if not pks:
                break
            yield pks
            from_pk = pks.last + 1


def _locked(connection: Connection, pks: PkSet, states: Sequence[LetterState]) -> PkSet:
    values = {"pks": list(pks), "states": [state.value for state in states]}
    return PkSet.of(connection.execute(SQL["lock"], values).scalars())


def _set_gone(connection: Connection, pks: PkSet) -> int:
    if pks:
        connection.execute(SQL["gone"], {"pks": list(pks)})
    return len(pks)


# ── putting a statement together ─────────────────────────────────────────────────────────────────


def _about(
    name: str, which: DeadLetterFilter, edge: str | None = None, *, column: str = "", direction: str = ""
) -> TextClause:
    """A statement of this file with the index and the conditions for these letters: pieces of the file, never data."""
    given = [condition for condition in (*_NARROWEST, "older_than_s") if getattr(which, condition) is not None]
    narrowest = next((condition for condition in _NARROWEST if condition in given), "everything")
    if which.state is None and narrowest != "pks":
        narrowest = "everything"  # every other index begins with the state
    if column and narrowest == "state":
        narrowest = column
    conditions = [_PIECES[f"where.{condition}"] for condition in (*given, *([edge] if edge else ()))]
    return prepared(
        Template(_PIECES[name]).substitute(
            source=_PIECES[f"source.{narrowest}"],
            conditions=" AND ".join(conditions) or "TRUE",
            column=column,
            direction=direction,
        )
    )


def _values(which: DeadLetterFilter) -> dict[str, object]:
    values: dict[str, object] = {
        "state": which.state.value if which.state is not None else None,
        "workspace_id": which.workspace_id,
        "reason": which.reason,
        "version": which.version,
        "older_than_s": which.older_than_s,
        "pks": list(which.pks) if which.pks is not None else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _letter(row: Row[tuple[object, ...]]) -> Letter:
    return Letter(
        pk=row.pk,
        state=LetterState(row.state),
        version=row.version,
        workspace_id=row.workspace_id,
        event_id=row.event_id,
        reason=row.reason,
        json_path=row.json_path,
        detail=row.detail,
        batch_id=row.batch_id,
        created_at_ms=row.created_at_ms,
        updated_at_ms=row.updated_at_ms,
        action_id=row.action_id,
    )
