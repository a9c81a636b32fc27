"""Marking: the UPDATE that stamps rows exported, and the rows that it could not stamp.

What belongs here: the statements for a set of pks, and the form of the UPDATE for a server. What does not: the
transaction and its fence (`mysql.outbox`), chunks and pauses (`core.export`).

Half the cost of a mark cannot be saved: the row grows by the eight bytes of `deleted_at`. An application fills InnoDB's
pages to fifteen sixteenths, so InnoDB reorganizes a page for nearly every row (`benchmarks/README.md`).
"""

from __future__ import annotations

import re
from functools import cache

from sqlalchemy import Connection, TextClause
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from auditexport_pipeline.core.errors import MarkRefused
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Marked
from auditexport_pipeline.mysql.errors import code_and_words
from auditexport_pipeline.mysql.statements import PK_RANGE, SQL, prepared

# For more runs in a chunk than this, one statement with a list is faster than a statement for each run.
LIST_ABOVE_RUNS = 8
# The longest list of pks that every server looks up one by one. MariaDB joins a list of 1,000 as a table
# (in_predicate_conversion_threshold), and for 16,000 pks (optimizer_max_sel_args) it reads the whole outbox. MySQL does
# so when a list needs more than range_optimizer_max_mem_size: 36,000 pks in its 8 MB.
LIST_PKS = 900
# Errors of a trigger's own statements (no grant, no such column, table or routine, no definer, a signal, this table in
# use by the statement that fired the trigger), and of a CHECK of `deleted_at`.
_REFUSALS = {1054, 1142, 1143, 1146, 1305, 1364, 1370, 1442, 1449, 1644, 1690, 3819, 4025}
_SIGNAL = "45"  # the class of SQLSTATE for SIGNAL
ADMINISTRATORS_LOOK = (
    "SELECT trigger_name, action_timing, action_statement FROM information_schema.triggers WHERE event_object_schema = "
    "DATABASE() AND event_object_table = 'clickhouse_outbox' AND event_manipulation = 'UPDATE'"
)
# MariaDB's JSON type is a CHECK (json_valid(payload)), which every UPDATE of a row evaluates, whatever it sets.
UNCHECKED = "SET STATEMENT check_constraint_checks = 0 FOR "


def by_shape(kind: str, pks: PkSet) -> list[tuple[str, dict[str, object]]]:
    """The statements for these pks, in their order: a range for each of few runs, otherwise lists of `LIST_PKS`."""
    if len(pks.runs) > max(LIST_ABOVE_RUNS, -(-len(pks) // LIST_PKS)):
        return [(f"{kind}_in", {"pks": list(part)}) for part in pks.chunks(LIST_PKS)]
    return [(f"{kind}_between", {"first_pk": first, "last_pk": last}) for first, last in pks.runs]


def over(kind: str, pks: PkSet, before: str = "") -> list[tuple[TextClause, dict[str, object]]]:
    """As `by_shape`, with `before` in front of each statement. A few runs share one statement, to save round trips."""
    shapes = by_shape(kind, pks)
    if len(shapes) < 2 or len(shapes) > LIST_ABOVE_RUNS or "pks" in shapes[0][1]:
        return [(_statement(name, 1, before), values) for name, values in shapes]
    values = {f"{name}_{n}": pk for n, (_, run) in enumerate(shapes) for name, pk in run.items()}
    return [(_statement(shapes[0][0], len(shapes), before), values)]


@cache
def _statement(name: str, runs: int, before: str) -> TextClause:
    text = SQL[name].text
    if runs > 1:
        ranges = " OR ".join(f"pk BETWEEN :first_pk_{n} AND :last_pk_{n}" for n in range(runs))
        text = text.replace(PK_RANGE, f"({ranges})")
    return prepared(before + text)


def stamp(connection: Connection, pks: PkSet, exported_at_ms: int) -> Marked | None:
    """Sets `deleted_at` of these rows in the caller's transaction. None when some rows are gone or have another mark:
    then, and when a row is locked, the caller rolls back and uses `stamp_unlocked`.

    `deleted_at` is read again, because a trigger can undo the UPDATE. Raises `MarkRefused` when the UPDATE ends in a
    trigger's error.
    """
    _update(connection, pks, exported_at_ms)
    marked, ids = _marked(connection, pks, exported_at_ms)
    return Marked(ids=ids) if marked == len(pks) else None


def stamp_unlocked(connection: Connection, pks: PkSet, exported_at_ms: int) -> Marked:
    """As `stamp`, but reads every row first: locked rows stay unmarked and are returned as `locked`.

    Raises `MarkRefused` when rows do not keep the stamp; the caller rolls back.
    """
    stamps = _stamps(connection, "lock", pks)
    pending = PkSet.of(pk for pk, stamp_ms in stamps.items() if stamp_ms is None)
    if pending:
        _update(connection, pending, exported_at_ms)
        marked, ids = _marked(connection, pending, exported_at_ms)
        if marked < len(pending):
            raise MarkRefused(
                f"{len(pending) - marked:,} of {len(pending):,} rows do not keep their mark: deleted_at is another right after it "
                "was set. " + triggers_to_blame(connection)
            )
        if marked == len(pks):
            return Marked(ids=ids)
    others = pks - PkSet.of(stamps)
    stamps |= _stamps(connection, "stamps", others)
    locked = PkSet.of(pk for pk in others if pk in stamps and stamps[pk] is None)
    return Marked(
        elsewhere=sum(1 for stamp_ms in stamps.values() if stamp_ms not in (None, exported_at_ms)),
        vanished=len(pks) - len(stamps),
        ids=_marked(connection, pks - locked, exported_at_ms)[1],
        locked=locked,
    )


def _update(connection: Connection, pks: PkSet, exported_at_ms: int) -> None:
    before = UNCHECKED if _checks_json_only(connection) else ""
    try:
        for statement, values in over("mark", pks, before):
            connection.execute(statement, {**values, "exported_at_ms": exported_at_ms})
    except DBAPIError as error:
        if (refusal := _refusal(error)) is not None:
            raise MarkRefused(f"MySQL refuses to mark rows ({refusal}). {triggers_to_blame(connection)}") from None
        raise


def take_back(connection: Connection, pks: PkSet, exported_at_ms: int) -> None:
    """Clears the marks of these rows where the mark is this stamp, in the caller's transaction."""
    for statement, values in over("take_back", pks):
        connection.execute(statement, {**values, "exported_at_ms": exported_at_ms})


def _marked(connection: Connection, pks: PkSet, exported_at_ms: int) -> tuple[int, int]:
    """How many of these rows have the stamp, and the sum of their ids' hashes."""
    rows = ids = 0
    for statement, values in over("marked", pks):
        found = connection.execute(statement, {**values, "exported_at_ms": exported_at_ms}).one()
        rows, ids = rows + found.n, ids + int(found.ids)
    return rows, ids


def own_ids(connection: Connection, pks: PkSet, exported_at_ms: int) -> int:
    """The sum of the hashes of these rows' event ids, without rows that have another mark."""
    return sum(
        int(connection.execute(statement, {**values, "exported_at_ms": exported_at_ms}).scalar_one())
        for statement, values in over("own", pks)
    )


def _stamps(connection: Connection, kind: str, pks: PkSet) -> dict[int, int | None]:
    return {
        row.pk: row.deleted_at for statement, values in over(kind, pks) for row in connection.execute(statement, values)
    }


def _refusal(error: DBAPIError) -> str | None:
    """The server's error text, if the server refuses this UPDATE. The UPDATE sets one integer, so the cause is a
    trigger or a CHECK. None for a lock, a deadlock, or a lost connection.
    """
    code, words = code_and_words(error.orig)
    if isinstance(error, IntegrityError | DataError):
        return f"error {code}, of a table that a trigger writes to"  # the server's text would quote a value
    if code in _REFUSALS or str(getattr(error.orig, "sqlstate", "")).startswith(_SIGNAL):
        return f"error {code}: {words}"
    return None


def triggers_to_blame(connection: Connection) -> str:
    """The triggers on an UPDATE of the outbox that this user sees, or how an administrator sees them."""
    visible = [f"{row.name} ({row.timing} UPDATE)" for row in connection.execute(SQL["update_triggers"])]
    if visible:
        return f"On clickhouse_outbox there is the trigger {', '.join(visible)}; it must ignore an UPDATE that changes deleted_at only"
    return (
        "This user sees no trigger on clickhouse_outbox, because that needs the TRIGGER privilege; an administrator can use: "
        + ADMINISTRATORS_LOOK
    )


def _checks_json_only(connection: Connection) -> bool:
    """Whether this is MariaDB and the only CHECK on the outbox is that of the JSON column: then marking can skip it.

    A CHECK of the application, perhaps of `deleted_at`, stays in force. Read once for each connection.
    """
    known = connection.info.get("outbox_checks_json_only")
    if known is None:
        known = False
        if getattr(connection.dialect, "is_mariadb", False):
            clauses = [row.check_clause for row in connection.execute(SQL["outbox_checks"])]
            known = bool(clauses) and all(re.fullmatch(r"json_valid\(`\w+`\)", clause) for clause in clauses)
        connection.info["outbox_checks_json_only"] = known
    return bool(known)
