"""Who holds a row locked that we want: asked while one of our connections waits for it.

What belongs here: the look at the server's own tables of locks, which needs grants that an exporter does not have to have.
What does not: deciding what a locked row means (`core.export`).
"""

from __future__ import annotations

import threading
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from auditexport_pipeline.stores.statements import load

_SQL = {name: text(statement) for name, statement in load("blockers.sql").items()}
# MariaDB keeps an answer about locks for a tenth of a second; the shortest wait for a lock is a second.
ASK_EVERY_S = 0.1
WAIT_S = 1
_ADMINISTRATORS_LOOK = {
    "mysql": "SELECT * FROM sys.innodb_lock_waits; and SELECT * FROM information_schema.innodb_trx ORDER BY trx_started",
    "mariadb": "SELECT * FROM information_schema.innodb_trx ORDER BY trx_started",
}


def holders(engine: Engine, table: str, column: str, value: int) -> str:
    """Who holds this row, by process, user, host and transaction; or what an administrator can ask to see it.

    Takes a second at most: one connection waits for the row, another one looks at whom it waits for. `table` and `column`
    are names of ours.
    """
    family = "mariadb" if getattr(engine.dialect, "is_mariadb", False) else "mysql"
    unseen = f"This user may not see who holds it (the PROCESS privilege); an administrator can: {_ADMINISTRATORS_LOOK[family]}"
    try:
        with engine.connect() as waiting, engine.connect() as asking:
            waiting.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {WAIT_S}")
            me = int(waiting.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one())
            ended = threading.Event()

            def wait() -> None:
                try:
                    waiting.exec_driver_sql(
                        f"SELECT {column} FROM {table} WHERE {column} = {int(value)} FOR UPDATE"
                    ).all()
                except SQLAlchemyError:
                    pass  # nobody gave it up meanwhile, which is what is looked at here
                finally:
                    ended.set()

            thread = threading.Thread(target=wait, name="wait_for_a_locked_row", daemon=True)
            thread.start()
            try:
                found: list[Any] = []
                while not found and not ended.wait(ASK_EVERY_S):
                    found = list(asking.execute(_SQL[family], {"waiting": me}))
                    asking.rollback()
            finally:
                ended.wait()
                thread.join()
                waiting.invalidate()  # with its short wait
            if not found:
                return "Nobody holds it any more"
            return "; ".join(
                f"It is held by process {row.process} ({row.user or 'unknown'}@{row.host or 'unknown'}), in transaction "
                f"{row.trx_id} that is open for {row.open_s} s"
                for row in found
            )
    except SQLAlchemyError:
        return unseen
