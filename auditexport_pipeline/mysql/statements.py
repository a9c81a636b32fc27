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


def prepared(statement: str) -> TextClause:
    """The statement; `IN :pks` takes a list of any length."""
    lists = dict.fromkeys(_LIST.findall(statement))
    return text(statement).bindparams(*(bindparam(name, expanding=True) for name in lists))


def statements(path: str) -> dict[str, TextClause]:
    """The statements of a `.sql` file of this package; `path` is like `mysql/outbox.sql`."""
    return {
        name: prepared(statement.replace("$batch_columns", BATCH_COLUMNS)) for name, statement in load(path).items()
    }


# Those of the outbox and the ledger, which several modules here share.
SQL = statements("mysql/outbox.sql")
