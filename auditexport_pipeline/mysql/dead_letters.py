"""MySQL: dead letters, added by a seal, and listed, shown, retried and discarded by operators.

What does not belong here: why a row becomes a dead letter (`core`), and who may act. Only `show` reads a payload, and only
on request: nothing is logged, and an action's record has conditions and pks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from string import Template

from sqlalchemy import Connection, Row, TextClause

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.dead_letters import (
    KEEPS_ROW_OUT,
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
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql import actions
from auditexport_pipeline.mysql.database import Database
from auditexport_pipeline.mysql.statements import SQL as OUTBOX_SQL
from auditexport_pipeline.mysql.statements import prepared, statements

SQL = statements("mysql/dead_letters.sql")
# The conditions of a filter, narrowest first. The first one that is given chooses the index, all of which begin with the state.
_CONDITIONS = {
    "pks": ("PRIMARY", "letter.pk IN :pks"),
    "reason": ("letter_reason_idx", "letter.reason = :reason"),
    "workspace_id": (
        "letter_workspace_idx",
        "letter.workspace_id = :workspace_id AND CAST(letter.workspace_id AS BINARY) = CAST(:workspace_id AS BINARY)",
    ),
    "version": (
        "letter_version_idx",
        "letter.version = :version AND CAST(letter.version AS BINARY) = CAST(:version AS BINARY)",
    ),
    "state": ("letter_pk_idx", "letter.state = :state"),
    "older_than_s": (
        "PRIMARY",
        "letter.created_at_ms <= CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) - 1000 * :older_than_s",
    ),
}
LAST_PK = 2**64 - 1
# Letters added or changed at a time. Their pks (twenty digits each at most) fit into an action's record (TEXT, 64 KB).
CHUNK_LETTERS = 2_000
# Workspaces that a count names; reasons and versions are few.
TOP_WORKSPACES = 10
TOP_OTHERS = 1_000
# Held rows that are read to say why.
HELD_LOOKED_AT = 10_000


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


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


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
    values = {**_values(which), "row_limit": letters}
    if beyond_pk is not None:
        values |= {"last_pk": beyond_pk - 1} if newest_first else {"first_pk": beyond_pk + 1}
    statement = _statement("page", which, direction="DESC" if newest_first else "ASC")
    with outbox.transaction("listing dead letters") as connection:
        return [_letter(row) for row in connection.execute(statement, values)]


def count(outbox: Database, which: DeadLetterFilter) -> LetterCounts:
    """How many letters the filter names: by reason, by version, and by workspace for the ten with the most.

    Source: as `page`, or the index of what is counted when only the state is given; its cost grows with the
    letters in that state.
    """
    found: dict[str, dict[str, int]] = {}
    with outbox.transaction("counting dead letters") as connection:
        for column, most in (("reason", TOP_OTHERS), ("workspace_id", TOP_WORKSPACES), ("version", TOP_OTHERS)):
            statement = _statement("count", which, column=column)
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
        exists = row.outbox_pk is not None
        payload = connection.execute(SQL["payload"], {"pk": pk}).scalar() if with_payload and exists else None
    here = RowState.PENDING if row.deleted_at is None else RowState.EXPORTED
    return LetterDetails(
        letter=letter,
        row=here if exists else RowState.DELETED,
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
    return _act(outbox, which, by, "retry", LetterState.RETRIED, KEEPS_ROW_OUT, at_most)


def discard(outbox: Database, which: DeadLetterFilter, by: Actor, *, at_most: int | None = None) -> Acted:
    """Gives open letters up: their rows stay in the outbox, unmarked, and no batch takes them.

    Durable effect: as `retry`, with `discarded`. A discarded letter can be retried. Raises `OutboxUnavailable`.
    """
    return _act(outbox, which, by, "discard", LetterState.DISCARDED, (LetterState.OPEN,), at_most)


def close_gone(outbox: Database) -> int:
    """Closes letters whose row is no longer pending, because it was deleted or marked: they become `gone`.

    Durable effect: their state, one transaction a chunk. Returns how many. Its cost grows with the letters that hold
    a row: two look-ups by primary key each.
    """
    gone = 0
    for state in KEEPS_ROW_OUT:
        for pks in _chunks(outbox, DeadLetterFilter(state=state)):
            with outbox.transaction("looking for the rows of dead letters") as connection:
                if without_row := pks - _pending(connection, pks):
                    gone += _set_gone(connection, _locked(connection, without_row, KEEPS_ROW_OUT))
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
    for state in [state for state in allowed if which.state in (None, state)]:
        for found in _chunks(outbox, replace(which, state=state)):
            pks = next(found.chunks(at_most - changed), PkSet()) if at_most is not None else found
            if not pks:
                break
            with outbox.transaction(f"recording the {verb} of dead letters") as connection:
                locked = _locked(connection, pks, (state,))
                pending = _pending(connection, locked) if locked else locked
                gone += _set_gone(connection, locked - pending)
                if pending:
                    selection = replace(which, pks=pending).selection
                    action_ids.append(actions.record(connection, verb, by, selection, len(pending)))
                    values = {"pks": list(pending), "state": to.value, "action_id": action_ids[-1]}
                    connection.execute(SQL["change"], values)
                    changed += len(pending)
    return Acted(changed=changed, gone=gone, action_ids=tuple(action_ids))


def _chunks(outbox: Database, which: DeadLetterFilter) -> Iterator[PkSet]:
    """The pks of the letters that the filter names, in chunks; each chunk is read when it is needed."""
    first_pk = 0
    for named in [None] if which.pks is None else which.pks.chunks(CHUNK_LETTERS):
        some = replace(which, pks=named)
        while True:
            values = {**_values(some), "first_pk": first_pk, "row_limit": CHUNK_LETTERS}
            with outbox.transaction("finding dead letters") as connection:
                pks = PkSet.of(connection.execute(_statement("page_pks", some), values).scalars())
            if not pks:
                break
            yield pks
            first_pk = pks.last + 1


def _pending(connection: Connection, pks: PkSet) -> PkSet:
    """Those of these letters whose rows are pending."""
    return PkSet.of(connection.execute(SQL["pending"], {"pks": list(pks)}).scalars())


def _locked(connection: Connection, pks: PkSet, states: Sequence[LetterState]) -> PkSet:
    values = {"pks": list(pks), "states": [state.value for state in states]}
    return PkSet.of(connection.execute(SQL["lock"], values).scalars())


def _set_gone(connection: Connection, pks: PkSet) -> int:
    if pks:
        connection.execute(SQL["gone"], {"pks": list(pks)})
    return len(pks)


# ── held rows ────────────────────────────────────────────────────────────────────────────────────


def release_held(outbox: Database, definition_of: Callable[[str], str]) -> int:
    """Releases held rows whose table has another definition now; returns how many.

    A run calls it before a plan, and a run that stays calls it now and then. `definition_of` returns the present definition of a
    version's table; it is called only when rows are held. Durable effect: the rows' state, one statement a version; the next
    claim takes them. Raises `OutboxUnavailable`, `AuditLogUnavailable`.
    """
    with outbox.transaction("looking for held rows") as connection:
        versions = {row.version for row in connection.execute(SQL["held_versions"])}
    released = 0
    for version in sorted(versions & set(VERSIONS)):
        values = {"version": version, "definition": definition_of(version)}
        with outbox.transaction("releasing held rows") as connection:
            released += connection.execute(SQL["release_held"], values).rowcount
    return released


def held_by_detail(connection: Connection) -> dict[str, int]:
    """Held rows by what refuses them, most frequent first."""
    values = {"looked_at": HELD_LOOKED_AT, "row_limit": TOP_WORKSPACES}
    return {row.detail: row.n for row in connection.execute(SQL["held_by_detail"], values)}


# ── statements by a filter ───────────────────────────────────────────────────────────────────────


def _statement(name: str, which: DeadLetterFilter, *, column: str = "", direction: str = "") -> TextClause:
    """A statement of `dead_letters.sql` with the index and the conditions of this filter, which are ours and never data."""
    given = [condition for condition in _CONDITIONS if getattr(which, condition) is not None]
    narrowest = given[0] if given else ""
    if column and narrowest == "state":
        narrowest = column
    index = _CONDITIONS[narrowest][0] if which.state or narrowest == "pks" else "PRIMARY"
    conditions = " AND ".join(_CONDITIONS[condition][1] for condition in given) or "TRUE"
    template = Template(SQL[name].text)
    return prepared(template.substitute(index=index, conditions=conditions, column=column, direction=direction))


def _values(which: DeadLetterFilter) -> dict[str, object]:
    given = {name: value for name in _CONDITIONS if (value := getattr(which, name)) is not None}
    if which.pks is not None:
        given["pks"] = list(which.pks)
    return {**given, "state": which.state and which.state.value, "first_pk": 0, "last_pk": LAST_PK}


def _letter(row: Row[tuple[object, ...]]) -> Letter:
    values = {column.name: getattr(row, column.name) for column in fields(Letter)}
    return Letter(**{**values, "state": LetterState(row.state)})
