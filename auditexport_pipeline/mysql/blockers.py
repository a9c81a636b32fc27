"""Who has a lock that one of our connections waits for, from the server's own tables of locks.

These take grants that an exporter need not have. `core.export` and `core.drain` decide what a lock means.
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
# MariaDB caches its answer about locks for a tenth of a second; the shortest wait for a lock is a second.
ASK_EVERY_S = 0.1
WAIT_S = 1
_FOR_ADMINISTRATORS = {
    "mysql": "SELECT * FROM sys.innodb_lock_waits; SELECT * FROM performance_schema.metadata_locks; and SELECT * FROM "
    "information_schema.innodb_trx ORDER BY trx_started",
    "mariadb": "SELECT * FROM information_schema.innodb_trx ORDER BY trx_started; SHOW PROCESSLIST; "
    "and, after INSTALL SONAME 'metadata_lock_info', SELECT * FROM information_schema.metadata_lock_info",
}


def holders(engine: Engine, statement: str, values: Any = None) -> str:
    """Who has the lock that this statement waits for: process, user, transaction, and the kind of statement that it runs; or
    what an administrator can ask.

    Takes a second at most: one connection sends the statement again and waits, another one reads whom it waits for. The
    statement is rolled back.
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
                    pass  # the lock was not released within the second
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
                waiting.invalidate()  # rolls back, and no other user of the pool gets the short time-out
    except SQLAlchemyError:
        pass  # report what was found before
    if found:
        return "; ".join(found)
    if not state:
        return "The lock is free again"
    return (
        f"Ours waits there ({state}), and this server or the grants of this user do not show who has the lock (it takes the PROCESS "
        f"privilege); an administrator can ask: {_FOR_ADMINISTRATORS[family]}"
    )


def _state(asking: Connection, waiting: int) -> str:
    """What our connection waits for, in the server's words; empty when it does not wait."""
    state = asking.execute(_SQL["state"], {"waiting": waiting}).scalar()
    asking.rollback()
    return str(state or "")


def _found(asking: Connection, family: str, waiting: int) -> list[str]:
    """Who has the lock, of a row or of a table; empty where this user may not see it."""
    for question in (family, f"{family}_table"):
        with suppress(SQLAlchemyError):
            found = list(asking.execute(_SQL[question], {"waiting": waiting}))
            if found:
                return [_described(row) for row in found]
        asking.rollback()
    return []


def _described(row: Any) -> str:
    who = f"process {row.process} ({row.user or 'unknown'}@{row.host or 'unknown'})"
    kind = re.match(r"\s*([A-Za-z]+)", row.info or "")
    does = f", which runs {kind[1].upper()}" if kind else ", which is idle"
    if not getattr(row, "granted", True):
        return f"Before us, {who}{does}, waits for it"
    if row.trx_id is None:
        return f"It is locked by {who}{does}, for {row.since_s} s"
    return f"It is locked by {who}{does}, in transaction {row.trx_id} that is open for {row.open_s} s"
