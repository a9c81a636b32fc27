"""The simulated MySQL server behaves as a real one does where the exporter depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pymysql.err import OperationalError

from auditexport_pipeline.mysql.errors import code_and_words
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.mysql_server import (
    ANSWER_LOST,
    CONNECTION_LOST,
    DEADLOCK,
    DIES,
    LOCK_WAIT_TIMEOUT,
    SimulatedMySQL,
    Transaction,
)
from auditexport_tests.simulation.scheduler import Process, Scheduler


def server(seed: int = 1, weather: Callable[[str], str | None] = lambda _: None) -> SimulatedMySQL:
    made = SimulatedMySQL(Scheduler(Choices(seed)), ["t"], weather)
    made.tables["t"].rows.update({1: {"n": 1}, 2: {"n": 2}})
    return made


def play(mysql: SimulatedMySQL, **tasks: Callable[[], Any]) -> dict[str, Any]:
    """Runs the tasks to their ends; what each returned, or the code of the server's error that ended it."""
    results: dict[str, Any] = {}

    def run(name: str, task: Callable[[], Any]) -> None:
        try:
            results[name] = task()
        except OperationalError as error:
            results[name] = code_and_words(error)[0]

    for name, task in tasks.items():
        mysql.scheduler.spawn(name, lambda name=name, task=task: run(name, task), Process(name))  # type: ignore[misc]
    mysql.scheduler.run()
    return results


def change(transaction: Transaction, key: int, n: int) -> None:
    transaction.statement("UPDATE")
    transaction.lock("t", key)
    transaction.put("t", key, {"n": n})


def test_a_read_sees_what_is_committed_and_its_own_changes() -> None:
    """READ COMMITTED: two reads of one transaction can differ."""
    mysql = server()
    one, two = mysql.begin(5), mysql.begin(5)

    def task() -> list[Any]:
        change(one, 1, 10)
        seen = [one.get("t", 1), two.get("t", 1)]
        one.commit()
        return [*seen, two.get("t", 1)]

    assert play(mysql, task=task)["task"] == [{"n": 10}, {"n": 1}, {"n": 10}]


def test_a_wait_for_a_lock_ends_with_the_lock_or_with_error_1205() -> None:
    """Skipping locked rows must not wait at all."""
    for hold_s, expected in ((1, "changed"), (10, LOCK_WAIT_TIMEOUT)):
        mysql = server()
        first, second = mysql.begin(5), mysql.begin(5)

        def hold(first: Transaction = first, hold_s: int = hold_s, mysql: SimulatedMySQL = mysql) -> None:
            change(first, 1, 10)
            mysql.scheduler.sleep(hold_s)
            first.commit()

        def wait(second: Transaction = second, mysql: SimulatedMySQL = mysql) -> str:
            mysql.scheduler.sleep(0.5)
            assert not second.lock("t", 1, skip=True)
            change(second, 1, 20)
            second.commit()
            return "changed"

        assert play(mysql, hold=hold, wait=wait)["wait"] == expected


def test_of_two_transactions_that_wait_for_each_other_one_fails() -> None:
    """Error 1213 rolls the whole transaction back; the other one goes on."""
    mysql = server()

    def cross(first: int, second: int) -> Callable[[], str]:
        def task() -> str:
            transaction = mysql.begin(50)
            change(transaction, first, 10)
            mysql.scheduler.sleep(1)
            change(transaction, second, 10)
            transaction.commit()
            return "committed"

        return task

    assert sorted(map(str, play(mysql, one=cross(1, 2), two=cross(2, 1)).values())) == [str(DEADLOCK), "committed"]
    assert not any(mysql.locks.values())


@pytest.mark.parametrize(("happens", "n"), [(DIES, 1), (ANSWER_LOST, 10)])
def test_a_commit_without_an_answer_may_have_happened(happens: str, n: int) -> None:
    """The client gets the same error for both."""
    mysql = server(weather=lambda what: happens if what == "COMMIT" else None)

    def task() -> None:
        transaction = mysql.begin(5)
        change(transaction, 1, 10)
        transaction.commit()

    assert play(mysql, task=task)["task"] == CONNECTION_LOST
    assert mysql.tables["t"].rows[1] == {"n": n}


def test_a_failover_takes_the_last_commits_back_and_ends_all_connections() -> None:
    """Keys that the lost commits had used are given out again."""
    mysql = server()

    def task() -> int:
        for _ in range(2):
            transaction = mysql.begin(5)
            key = transaction.new_key("t") + 2
            transaction.put("t", key, {"n": key})
            transaction.commit()
        open_one = mysql.begin(5)
        mysql.fail_over(lost_commits=1)
        with pytest.raises(OperationalError, match="Lost connection"):
            open_one.statement("SELECT")
        return mysql.begin(5).new_key("t")

    assert play(mysql, task=task)["task"] == 4
    assert sorted(mysql.tables["t"].rows) == [1, 2, 3]
