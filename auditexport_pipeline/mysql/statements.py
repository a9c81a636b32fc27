"""The statements of a `.sql` file, by name, as SQLAlchemy executes them. A parameter after IN stands for a list."""

from __future__ import annotations

import re

from sqlalchemy import TextClause, bindparam, text

from auditexport_pipeline.sql import load

_LIST = re.compile(r"\bIN :(\w+)")
# What `outbox.batch_of` reads of a row of the ledger; the files say `$batch_columns`.
BATCH_COLUMNS = (
    "batch_id, epoch, generation, version, state, owner, claim_key, process, pks, manifest, bytes, counts, digest, attempts, "
    "inserts_until_ms, exported_at_ms, oldest_event_ms, newest_event_ms, last_error, observed"
)


# Whether a row of the outbox, `held`, is the row of a dead letter, `letter`: a pk can begin again, and ids compare by bytes.
ROW_OF_LETTER = "held.pk = letter.pk" + "".join(
    f"\n  AND CAST(CONVERT(held.{column} USING utf8mb4) AS BINARY) = CAST(letter.{column} AS BINARY)"
    for column in ("version", "workspace_id", "event_id")
)
# A statement that says `$pks` is two, for a range of pks and for a list (`marking.by_shape`).
PKS = {"between": "pk BETWEEN :first_pk AND :last_pk", "in": "pk IN :pks"}


def prepared(statement: str) -> TextClause:
    """The statement; `IN :pks` takes a list of any length."""
    lists = dict.fromkeys(_LIST.findall(statement))
    return text(statement).bindparams(*(bindparam(name, expanding=True) for name in lists))


def texts(path: str) -> dict[str, str]:
    """The statements of a `.sql` file of this package as text; `path` is like `mysql/outbox.sql`."""
    found: dict[str, str] = {}
    for name, statement in load(path).items():
        whole = statement.replace("$batch_columns", BATCH_COLUMNS).replace("$row_of_letter", ROW_OF_LETTER)
        if "$pks" in whole:
            found |= {f"{name}_{shape}": whole.replace("$pks", pks) for shape, pks in PKS.items()}
        else:
            found[name] = whole
    return found


def statements(path: str) -> dict[str, TextClause]:
    """The statements of a `.sql` file of this package; `path` is like `mysql/outbox.sql`."""
    return {name: prepared(statement) for name, statement in texts(path).items()}


# Those of the outbox and the ledger, which several modules here share.
SQL = statements("mysql/outbox.sql")
