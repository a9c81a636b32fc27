"""The simulated MySQL and a real server answer alike: the exporter's statements, its stores, and sessions that meet.

The same tests run on MariaDB and on MySQL. AUDITEXPORT_TEST_CONTRACT_ROUNDS, by default 1, makes the random tests longer;
AUDITEXPORT_TEST_CONTRACT_SEED begins them elsewhere.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.batch import Batch, Claim, Counts
from auditexport_pipeline.core.errors import BatchLocked, RowsLocked
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Cut, PlannedBlock
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox, MySQLPlanning
from auditexport_pipeline.mysql.statements import prepared, texts
from auditexport_tests.simulation import statements as simulated_statements
from auditexport_tests.simulation.choices import Choices, shortest
from auditexport_tests.simulation.contract import sequences
from auditexport_tests.simulation.contract.random_tables import letter_filter, parameter, random_tables
from auditexport_tests.simulation.contract.sequences import StoreSequence, ledger_head
from auditexport_tests.simulation.contract.sides import (
    LEDGER,
    OUTBOX,
    RealSide,
    Side,
    SimulatedSide,
    Tables,
    asked,
    real_side,
)
from auditexport_tests.simulation.mysql_server import Transaction

ROUNDS = int(os.environ.get("AUDITEXPORT_TEST_CONTRACT_ROUNDS", "1"))
SEED = int(os.environ.get("AUDITEXPORT_TEST_CONTRACT_SEED", "0"))
# Tables of the statements' test, and sequences of the stores' test, in one round.
TABLES_A_ROUND, SEQUENCES_A_ROUND = 3, 8
SHRINK_TRIES = 300

FILES = ("outbox", "dead_letters", "maintenance", "actions", "totals", "ledger")
BY_FILTER = {"dead_letters.page", "dead_letters.page_pks", "dead_letters.count"}
# Statements that the simulated server does not answer, and why.
NOT_SIMULATED = {
    "outbox.outbox_checks": "its view of the catalogue is MariaDB's own, where the JSON column is a CHECK; no simulated table has one",
}
# Without an order, a LIMIT keeps any of the rows that match: as many, and each of them one that matches.
ANY_OF_THE_MATCHES = {"maintenance.batch_with"}
# Here numbers count by their value: for `MIN(CASE … NULL ELSE pk END)` MariaDB answers a DECIMAL, MySQL 9 an integer.
NUMBERS_BY_VALUE = {"outbox.oldest_pending"}


@pytest.fixture
def real(mysql_server: str) -> Iterator[RealSide]:
    with real_side(mysql_server) as side:
        yield side


# ── statements ───────────────────────────────────────────────────────────────────────────────────

Question = tuple[sa.TextClause, dict[str, Any]]


def statements() -> dict[str, str]:
    return {f"{file}.{name}": text for file in FILES for name, text in texts(f"mysql/{file}.sql").items()}


def question(name: str, text: str, choices: Choices) -> Question:
    """The statement as its store prepares it, and parameters."""
    if name in BY_FILTER:
        which = letter_filter(choices)
        given = {"direction": choices.one_of(("ASC", "DESC"))} if name.endswith("page") else {}
        given |= {"column": choices.one_of(("reason", "workspace_id", "version"))} if name.endswith("count") else {}
        statement = dead_letters._statement(name.split(".")[1], which, **given)
        return statement, {**dead_letters._values(which), "row_limit": choices.one_of((100, 1, 3))}
    found = dict.fromkeys(re.findall(r"(?<![\w:]):([a-z]\w*)", text))
    return prepared(text), {one: parameter(name.split(".")[1], one, choices) for one in found}


def difference(name: str, asked_for: Question, simulated: SimulatedSide, real: RealSide) -> str | None:
    """What the servers answer differently, or None."""
    statement, values = asked_for
    changes = re.search(r"^(UPDATE|DELETE|INSERT)", statement.text, re.MULTILINE) is not None
    ours, theirs = (asked(side, statement, values, changes=changes) for side in (simulated, real))
    ordered = re.search(r"ORDER BY[^)]*$", statement.text) is not None
    if name in ANY_OF_THE_MATCHES:
        whole = asked(simulated, prepared(statement.text.replace(" LIMIT 1", "")), values, changes=False)
        same = len(ours[0].rows) == len(theirs[0].rows) and set(theirs[0].rows) <= set(whole[0].rows)
    else:
        typed = name not in NUMBERS_BY_VALUE
        same = comparable(ours, ordered=ordered, typed=typed) == comparable(theirs, ordered=ordered, typed=typed)
    return None if same else f"{name} {values}\nsimulated: {shown(ours, theirs)}\nreal:      {shown(theirs, ours)}"


def comparable(answer: Any, *, ordered: bool, typed: bool) -> Any:
    """With the type of each value: Python says that 1 is Decimal(1), and a store may not. True is the server's 1."""
    if not isinstance(answer, list):
        return answer
    first, *tables = answer
    rows = [[(typed and _type_of(value), value) for value in row] for row in first.rows]
    return [first.names, rows if ordered else sorted(rows, key=repr), first.matched, first.last_key, *tables]


def _type_of(value: Any) -> type[Any]:
    if isinstance(value, bytes):  # the simulation counts those that are held
        return bytes
    return int if isinstance(value, bool) else type(value)


def shown(answer: Any, other: Any) -> Any:
    """The answer; of tables, only the rows that the other side has not got."""
    if not isinstance(answer, list) or not isinstance(other, list) or len(answer) == 1:
        return answer
    return [
        answer[0],
        {table: [row for row in rows if row not in other[1][table]] for table, rows in answer[1].items()},
    ]


@pytest.mark.mysql_sensitive
def test_every_statement_answers_as_the_server_does(real: RealSide) -> None:
    """What the simulation finds out about the stores holds only if their SQL means there what it means to MySQL."""
    if found := first_difference_of_statements(real, TABLES_A_ROUND * ROUNDS):
        pytest.fail(found)


@pytest.mark.mysql_sensitive
def test_a_statement_that_answers_otherwise_is_found(real: RealSide) -> None:
    """A comparison that cannot fail says nothing: here the simulated server groups texts by their spaces at the end."""
    with patch.object(simulated_statements, "alike", lambda value: value):
        assert first_difference_of_statements(real, TABLES_A_ROUND, shrink=False)


def first_difference_of_statements(real: RealSide, tables_to_try: int, *, shrink: bool = True) -> str | None:
    simulated = SimulatedSide()
    known = statements()
    for number in range(tables_to_try):
        choices = Choices(f"statements {SEED + number}")
        tables = random_tables(choices)
        of_tables = list(choices.taken)
        fill(tables, simulated, real)
        for name, text in known.items():
            if name in NOT_SIMULATED or leaves_out(name, tables):
                continue
            before = len(choices.taken)
            if found := difference(name, question(name, text, choices), simulated, real):
                numbers = [*of_tables, *choices.taken[before:]]
                return (shrunk_statement(name, text, numbers, simulated, real) if shrink else None) or found
    return None


def leaves_out(name: str, tables: Tables) -> bool:
    """The age of an empty ledger is that of its table, which nobody can set."""
    return name == "outbox.last_claim_ago" and not tables[LEDGER][-1:]


def fill(tables: Tables, *sides: SimulatedSide | RealSide) -> None:
    for side in sides:
        side.do(functools.partial(side.fill, tables))


def shrunk_statement(
    name: str, text: str, numbers: Sequence[int], simulated: SimulatedSide, real: RealSide
) -> str | None:
    """The smallest tables and parameters found for which the answers differ."""

    def differs(candidate: Sequence[int]) -> str | None:
        choices = Choices(given=candidate)
        tables = random_tables(choices)
        if leaves_out(name, tables):
            return None
        fill(tables, simulated, real)
        found = difference(name, question(name, text, choices), simulated, real)
        rows = {table: rows for table, rows in tables.items() if rows}
        return f"{found}\ntables: {rows}" if found else None

    if not differs(numbers):
        return None
    return differs(shortest(numbers, lambda candidate: bool(differs(candidate)), most_tries=SHRINK_TRIES))


def test_no_statement_is_left_out_of_the_contract() -> None:
    """A statement that is new, or that is gone, changes what the contract has to cover."""
    known = statements()
    assert set(NOT_SIMULATED) | BY_FILTER | ANY_OF_THE_MATCHES | NUMBERS_BY_VALUE <= set(known)
    choices = Choices(1)
    for name, text in known.items():
        assert question(name, text, choices), name


# ── stores ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.mysql_sensitive
def test_the_stores_do_the_same_on_both_servers(real: RealSide) -> None:
    """What a store returns, the errors that it raises and what it leaves in the tables are what a history judges."""
    for number in range(SEQUENCES_A_ROUND * ROUNDS):
        choices = Choices(f"stores {SEED + number}")
        if found := difference_of_stores(choices, real):
            numbers = shortest(
                choices.taken,
                lambda given: bool(difference_of_stores(Choices(given=given), real)),
                most_tries=SHRINK_TRIES,
            )
            pytest.fail(difference_of_stores(Choices(given=numbers), real) or found)


@pytest.mark.mysql_sensitive
def test_a_store_that_leaves_something_else_is_found(real: RealSide) -> None:
    """A comparison that cannot fail says nothing: here the simulated server commits what is to be rolled back."""
    with patch.object(Transaction, "roll_back", Transaction.commit):
        found = (difference_of_stores(Choices(f"stores {number}"), real) for number in range(SEQUENCES_A_ROUND))
        assert any(found)


def difference_of_stores(choices: Choices, real: RealSide) -> str | None:
    return StoreSequence(choices, (SimulatedSide(), real)).difference()


# Methods that a sequence does not call, and why.
NOT_COMPARED = {
    "disconnect": "closes this process's connections; the simulated server has no pool",
    "holders": "reads who has locked a row from tables of the server that are not simulated",
    "rows": "is what the other methods read by",
    "transaction": "is what the other methods run in",
    "marking_engine": "is SQLAlchemy's",
    "engine": "is SQLAlchemy's",
    "in_transaction": "is about this thread",
    "add": "of a dead letter: is what a seal calls",
    "close_gone": "is what `close_letters` calls",
}


def test_no_method_of_a_store_is_left_out_of_the_contract() -> None:
    """A method that is new has to be compared too."""
    source = inspect.getsource(sequences)
    methods = {name for store in (MySQLOutbox, MySQLPlanning, MySQLMaintenance) for name in dir(store)}
    methods |= {
        name for name, one in vars(dead_letters).items() if getattr(one, "__module__", "") == dead_letters.__name__
    }
    called = {name for name in methods if f".{name}(" in source}
    assert {name for name in methods - called if not name.startswith("_")} <= set(NOT_COMPARED)


# ── stores beside others that hold locks ─────────────────────────────────────────────────────────


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.mysql_sensitive)])
def side(request: pytest.FixtureRequest) -> Side:
    return SimulatedSide() if request.param == "simulated" else request.getfixturevalue("real")


@contextmanager
def locked(side: Side, table: str, key: str, value: int) -> Iterator[None]:
    """Another transaction has this row."""
    with side.outbox.engine.begin() as connection:
        statement = f"SELECT {key} FROM {table} WHERE {key} = :value FOR UPDATE"
        assert len(list(connection.execute(sa.text(statement), {"value": value}))) == 1
        yield


def planned(side: Side, *, lease_s: int = 60) -> Claim:
    """Three pending rows in a new batch."""
    side.fill(
        {OUTBOX: [(pk, "audit_log.v1", "w", f"e{pk}", "{}", 1, None) for pk in (1, 2, 3)], LEDGER: [ledger_head()]}
    )
    with side.outbox.planning("run 1", lease_s) as planning:
        return planning.add("audit_log.v1", 0, [PlannedBlock(pks=planning.candidates("audit_log.v1", 0, 9), bytes=6)])


def written(side: Side) -> tuple[Claim, Batch]:
    claim = planned(side)
    (batch,) = side.outbox.batches([claim.batch_id])
    side.outbox.seal(claim, Cut(blocks=batch.blocks, pks=batch.pks, counts=Counts(), digest="d"))
    return claim, side.outbox.record_written(claim, "d")


def test_a_mark_leaves_locked_rows_to_the_last_step(side: Side) -> None:
    """Rows that an application has locked stay pending, and a batch is not exported without them."""

    def work() -> Any:
        claim, batch = written(side)
        at_ms = batch.exported_at_ms
        assert at_ms is not None
        with locked(side, OUTBOX, "pk", 2):
            first = side.outbox.mark(claim, batch.pks, at_ms)
            try:
                side.outbox.finish_mark(claim, PkSet(((2, 2),)), at_ms, first, ids=0)
            except RowsLocked as error:
                return first.locked, str(error)

    assert side.do(work) == (PkSet(((2, 2),)), "1 of the last rows of batch 1 are locked; run again")


def test_a_plan_does_not_adopt_a_batch_that_is_locked(side: Side) -> None:
    """Its owner is alive, whatever its lease says; and the plan does not wait."""

    def work() -> Any:
        claim = planned(side, lease_s=0)
        with locked(side, LEDGER, "batch_id", claim.batch_id), side.outbox.planning("run 2", 60) as planning:
            (opened,) = planning.open_batches()
            return opened.lease_expired, planning.adopt(opened.batch)

    assert side.do(work) == (True, None)


def test_a_renewal_passes_a_batch_that_is_locked(side: Side) -> None:
    """The plan's other batches keep their leases."""

    def work() -> Any:
        claim = planned(side)
        with locked(side, LEDGER, "batch_id", claim.batch_id):
            before = side.outbox.batch_holders()[0].lease_until_ms
            side.now_ms += 1000
            with side.outbox.one_transaction():  # it waits for a lock as briefly as marks do
                side.outbox.renew(claim, 60)
            return side.outbox.batch_holders()[0].lease_until_ms - before

    assert side.do(work) == 0


def test_a_step_of_a_batch_that_is_locked_says_so(side: Side) -> None:
    """`BatchLocked` lets a run go on with its other batches."""

    def work() -> Any:
        claim = planned(side)
        with locked(side, LEDGER, "batch_id", claim.batch_id), pytest.raises(BatchLocked):
            with side.outbox.one_transaction():
                side.outbox.leave_written(claim, "why")
        return True

    assert side.do(work)
