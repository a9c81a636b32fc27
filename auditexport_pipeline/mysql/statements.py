"""The statements of a `.sql` file, by name, as SQLAlchemy executes them. A parameter after IN stands for a list."""

from __future__ import annotations

import re

from sqlalchemy import TextClause, bindparam, text

from auditexport_pipeline.sql import load

PK_RANGE = "pk BETWEEN :first_pk AND :last_pk"
# A statement that says `$pks` is two, for a range of pks and for a list (`marking.by_shape`).
PKS = {"between": PK_RANGE, "in": "pk IN :pks"}
_LIST = re.compile(r"\bIN :(\w+)")
_FRAGMENTS = {name: fragment for name, fragment in load("mysql/outbox.sql").items() if name.startswith("$")}


def prepared(statement: str) -> TextClause:
    """The statement; `IN :pks` takes a list of any length."""
    lists = dict.fromkeys(_LIST.findall(statement))
    return text(statement).bindparams(*(bindparam(name, expanding=True) for name in lists))


def texts(path: str) -> dict[str, str]:
    """The statements of a `.sql` file of this package as text; `path` is like `mysql/outbox.sql`.

    Fragments of that file and of `mysql/outbox.sql` are filled in. A statement with `$pks` is returned as NAME_between
    and NAME_in.
    """
    loaded = load(path)
    fragments = {name: fragment for name, fragment in loaded.items() if name.startswith("$")} | _FRAGMENTS
    found: dict[str, str] = {}
    for name, statement in loaded.items():
        for fragment, replacement in fragments.items():
            statement = statement.replace(fragment, replacement)
        if "$pks" in statement:
            found |= {f"{name}_{shape}": statement.replace("$pks", pks) for shape, pks in PKS.items()}
        elif name not in fragments:
            found[name] = statement
    return found


def statements(path: str) -> dict[str, TextClause]:
    """The statements of a `.sql` file of this package, as `texts` has them."""
    return {name: prepared(statement) for name, statement in texts(path).items()}


# The statements about the outbox and the ledger, which several modules of this package share.
SQL = statements("mysql/outbox.sql")
