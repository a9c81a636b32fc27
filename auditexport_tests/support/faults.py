"""What tests of the preflight share: faults made for real, what is found, that nothing is claimed then, and the fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline import schema as setup
from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.findings import Finding
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.roles import Role
from auditexport_tests.conftest import Stack
from auditexport_tests.support.engines import chosen

LEDGER = "clickhouse_outbox_batch"
OUTBOX = "clickhouse_outbox"


class Fault(NamedTuple):
    """What breaks a setup (a statement), words of the finding, and whether it keeps a run from claiming."""

    statement: str
    words: str
    fatal: bool = True


def findings(stack: Stack, role: Role = Role.EXPORTER) -> list[Finding]:
    return but_for_the_engine(preflight.check(stack.outbox, stack.log, role=role))


def but_for_the_engine(found: Iterable[Finding]) -> list[Finding]:
    """These findings without what the preflight always says of the oldest engine."""
    return [one for one in found if chosen() != "25.8" or "an integer above 2^53" not in one.what]


def the_finding(stack: Stack, words: str, *, fatal: bool = True, role: Role = Role.EXPORTER) -> Finding:
    """The only finding for this role. A fatal one keeps a run from claiming; checking changes nothing."""
    (found,) = findings(stack, role)
    assert words in found.what
    assert found.fatal is fatal
    assert found.breaks
    if fatal and role is Role.EXPORTER:
        claims_nothing(stack)
    assert [words in again.what for again in findings(stack, role)] == [True]
    return found


def carry_out(stack: Stack, fix: str) -> None:
    """What an operator does with a printed fix for MySQL: `auditexport init`, or the statement."""
    if "`auditexport init" in fix:
        setup.create(stack.outbox, stack.log, with_outbox="--with-outbox" in fix)
    else:
        stack.sql(fix.split("so: ")[-1].split("if this is it: ")[-1])
    stack.outbox.disconnect()  # a global variable is read by new sessions


def mariadb(stack: Stack) -> bool:
    return "mariadb" in str(stack.sql("SELECT VERSION() AS v")[0].v).lower()


def content(stack: Stack) -> list[object]:
    """All that the tables of MySQL hold."""
    tables = sorted(str(row[0]) for row in stack.sql("SHOW TABLES"))
    return [[table, *(tuple(row) for row in stack.sql(f"SELECT * FROM {table}"))] for table in tables]


def claims_nothing(stack: Stack) -> None:
    """The first step of a run is refused, and leaves both databases as they were."""
    before = content(stack)
    preflight.forget()
    with pytest.raises(SetupIncomplete, match="nothing was claimed"):
        _plan(stack)
    assert content(stack) == before


def _plan(stack: Stack) -> None:
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    claiming.claim(stack.outbox, owner="a run", dead_owners=(), limits=Limits())


@contextmanager
def globally(stack: Stack, name: str, value: str) -> Iterator[None]:
    """A global variable of the server, for new sessions, put back afterwards."""
    before = stack.sql(f"SELECT @@GLOBAL.{name} AS value")[0].value
    stack.sql(f"SET GLOBAL {name} = {value}")
    stack.outbox.disconnect()
    try:
        yield
    finally:
        stack.sql(f"SET GLOBAL {name} = :value", value=before)
        stack.outbox.disconnect()
