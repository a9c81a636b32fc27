"""Marking: the UPDATE that stamps rows exported, and what it found of those it did not stamp.

What belongs here: how a set of pks becomes statements, and which form of the UPDATE a server gets. What does not: the
transaction and the fence around it (`stores.outbox`), chunks and rests (`core.export`).

Half of what a mark costs is not ours to save: the row grows by the eight bytes of `deleted_at`, and InnoDB, whose pages
an application fills to fifteen sixteenths, reorganizes a page for nearly every row of it (`benchmarks/README.md`).
"""

from __future__ import annotations

import re

from sqlalchemy import Connection, text

from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Marked
from auditexport_pipeline.stores.mysql import SQL, expanding

# Above this many runs in a chunk, one statement with a list beats a statement per run.
LIST_ABOVE_RUNS = 8
# Of one list, so that every server looks its pks up one by one. From 1,000 on MariaDB joins a list as a table
# (in_predicate_conversion_threshold) and from 16,000 (optimizer_max_sel_args) it reads the whole outbox, as MySQL does when
# a list takes more than range_optimizer_max_mem_size: 36,000 in its 8 MB.
LIST_PKS = 900
# MariaDB's JSON type is a CHECK (json_valid(payload)), which every UPDATE of a row evaluates, whatever it sets.
_UNCHECKED = {
    name: expanding(name, text(f"SET STATEMENT check_constraint_checks = 0 FOR {SQL[name].text}"))
    for name in ("mark_between", "mark_in")
}


def by_shape(kind: str, pks: PkSet) -> list[tuple[str, dict[str, object]]]:
    """The statements that cover these pks, in their order: a range each for few runs, else lists of `LIST_PKS`."""
    if len(pks.runs) > max(LIST_ABOVE_RUNS, -(-len(pks) // LIST_PKS)):
        return [(f"{kind}_in", {"pks": list(part)}) for part in pks.chunks(LIST_PKS)]
    return [(f"{kind}_between", {"first_pk": first, "last_pk": last}) for first, last in pks.runs]


def stamp(connection: Connection, pks: PkSet, exported_at_ms: int) -> Marked:
    """Sets `deleted_at` of the pending ones of these rows, in the caller's transaction, and says what the others are."""
    statements = _UNCHECKED if _checks_json_only(connection) else SQL
    stamped = 0
    for part, values in by_shape("mark", pks):
        stamped += connection.execute(statements[part], {**values, "exported_at_ms": exported_at_ms}).rowcount
    if stamped == len(pks):
        return Marked(stamped=stamped)
    ours = elsewhere = 0
    for part, values in by_shape("marks", pks):
        for row in connection.execute(SQL[part], {**values, "exported_at_ms": exported_at_ms}):
            if row.ours:
                ours += row.n
            else:
                elsewhere += row.n
    return Marked(stamped=stamped, earlier=ours - stamped, elsewhere=elsewhere, vanished=len(pks) - ours - elsewhere)


def _checks_json_only(connection: Connection) -> bool:
    """Whether this is MariaDB and the outbox's CHECKs are those of its JSON column: then marking need not repeat them.

    An application's own CHECK, of `deleted_at` perhaps, stays in force. Asked once a connection.
    """
    known = connection.info.get("outbox_checks_json_only")
    if known is None:
        known = False
        if getattr(connection.dialect, "is_mariadb", False):
            clauses = [row.check_clause for row in connection.execute(SQL["outbox_checks"])]
            known = bool(clauses) and all(re.fullmatch(r"json_valid\(`\w+`\)", clause) for clause in clauses)
        connection.info["outbox_checks_json_only"] = known
    return bool(known)
