"""KILL of our connections, by an administrator or a watchdog: one line at most, and never a traceback of a library."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sqlalchemy as sa

from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, everything_once
from auditexport_tests.support.prompts import Prompt

pytestmark = pytest.mark.mysql_sensitive


@pytest.mark.parametrize("moment", ["given back", "before its commit"])
def test_a_connection_that_is_killed_leaves_no_traceback(
    stack: Stack, auditexport: Prompt, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    """SQLAlchemy logged twenty lines, which an operator had to read to see that nothing was lost."""
    stack.put(*events(3))
    administrator = sa.create_engine(stack.mysql_url, isolation_level="AUTOCOMMIT")
    killed: list[int] = []

    def kill(process: int) -> None:
        if not killed:
            killed.append(process)
            with administrator.connect() as connection:
                connection.exec_driver_sql(f"KILL {process}")

    def at_reset(connection: Any, _record: object, _state: object) -> None:
        kill(connection.thread_id())

    def at_commit(connection: sa.Connection) -> None:
        kill(connection.connection.dbapi_connection.thread_id())  # type: ignore[union-attr]

    engine = stack.outbox.engine
    event, listener = ("reset", at_reset) if moment == "given back" else ("commit", at_commit)
    sa.event.listen(engine, event, listener)
    try:
        with caplog.at_level(logging.ERROR):
            done = auditexport("drain", status=None)
    finally:
        sa.event.remove(engine, event, listener)
        administrator.dispose()
    assert killed
    assert [record.name for record in caplog.records if record.exc_info] == []
    assert "Traceback" not in done.output
    auditexport("drain")
    everything_once(stack, 3)
