"""Who holds a lock that we want: asked while one of our connections waits for it.

What belongs here: the look at the server's own tables of locks, which needs grants that an exporter does not have to have.
What does not: deciding what a lock means (`core.export`, `core.drain`).
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from auditexport_pipeline.mysql.statements import statements

_SQL = statements("mysql/blockers.sql")
# MariaDB keeps an answer about locks for a tenth of a second; the shortest wait for a lock is a second.
ASK_EVERY_S = 0.1
WAIT_S = 1
_ADMINISTRATORS_LOOK = {
    "mysql": "SELECT * FROM sys.innodb_lock_waits; SELECT * FROM performance_schema.metadata_locks; and SELECT * FROM "
    "information_schema.innodb_trx ORDER BY trx_started",
    "mariadb": "SELECT * FROM information_schema.innodb_trx ORDER BY trx_started; SHOW PROCESSLIST; "
    "and, after INSTALL SONAME 'metadata_lock_info', SELECT * FROM information_schema.metadata_lock_info",
}


def holders(engine: Engine, statement: str, values: Any = None) -> str:
    """Who holds the lock that this statement waits for: process, user, transaction, and what kind of statement it runs; or
    what an administrator can ask to see it.

    Takes a second at most: one connection says the statement again and waits, another one looks at whom it waits for.
    Nothing of it is kept.
    """
    family = "mariadb" if getattr(engine.dialect, "is_mariadb", False) else "mysql"
    found: list[str] = []
    state = ""
    try:
        with engine.connect() as waiting, engine.connect() as asking:
            waiting.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {WAIT_S}, lock_wait_timeout = {WAIT_S}")
            me = int(waiting.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one())
            ended = threading.Event()

            def wait() -> None:
                try:
                    waiting.exec_driver_sql(statement, values).close()
                except SQLAlchemyError:
                    pass  # nobody gave it up meanwhile, which is what is looked at here
                finally:
                    ended.set()

            thread = threading.Thread(target=wait, name="wait_for_a_lock", daemon=True)
            thread.start()
            try:
                while not found and not ended.wait(ASK_EVERY_S):
                    state = _state(asking, me) or state
                    found = _found(asking, family, me)
            finally:
                ended.wait()
                thread.join()
                waiting.invalidate()  # with its short wait, and without what it changed
    except SQLAlchemyError:
        pass  # what was seen before is said
    if found:
        return "; ".join(found)
    if not state:
        return "Nobody holds it any more"
    return (
        f"Ours waits there ({state}), and this server or the grants of this user do not show who holds it (it takes the PROCESS "
        f"privilege); an administrator can ask: {_ADMINISTRATORS_LOOK[family]}"
    )


def _state(asking: Connection, waiting: int) -> str:
    """What our connection is doing, in the server's words; "" when it does nothing."""
    state = asking.execute(_SQL["state"], {"waiting": waiting}).scalar()
    asking.rollback()
    return str(state or "")


def _found(asking: Connection, family: str, waiting: int) -> list[str]:
    """Who has what we wait for, a row's lock or a table's; none where this user may not see it."""
    for question in (family, f"{family}_table"):
        with suppress(SQLAlchemyError):
            found = list(asking.execute(_SQL[question], {"waiting": waiting}))
            if found:
                return [_said(row) for row in found]
        asking.rollback()
    return []


def _said(row: Any) -> str:
    who = f"process {row.process} ({row.user or 'unknown'}@{row.host or 'unknown'})"
    kind = re.match(r"\s*([A-Za-z]+)", row.info or "")
    does = f", which runs {kind[1].upper()}" if kind else ", which is idle"
    if not getattr(row, "granted", True):
        return f"Before us waits {who}{does}"
    if row.trx_id is None:
        return f"It is held by {who}{does}, for {row.since_s} s"
    return f"It is held by {who}{does}, in transaction {row.trx_id} that is open for {row.open_s} s"
