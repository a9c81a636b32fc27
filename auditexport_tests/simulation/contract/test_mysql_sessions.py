"""Sessions of MySQL that meet: each behaviour that the exporter depends on, shown by a real server and by the simulated one.

The tests speak to a `Stage` of either side. The rows with the pks 1 and 2 are pending, row 3 is marked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_pipeline.mysql.statements import texts
from auditexport_tests.simulation.contract.sides import (
    SHORT_S,
    RealStage,
    Refused,
    SimulatedStage,
    Stage,
    real_database,
    real_tables,
)

READ = "SELECT deleted_at FROM clickhouse_outbox WHERE pk = :pk"
READ_ALL = "SELECT pk FROM clickhouse_outbox WHERE pk BETWEEN 1 AND 3 ORDER BY pk"
LOCK = "SELECT pk, deleted_at FROM clickhouse_outbox WHERE pk = :pk FOR UPDATE"
SHARE = "SELECT pk FROM clickhouse_outbox WHERE pk = :pk LOCK IN SHARE MODE"
SKIP = "SELECT pk FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE pk BETWEEN 1 AND 999 ORDER BY pk FOR UPDATE SKIP LOCKED"
LOCK_PENDING = (
    "SELECT pk FROM clickhouse_outbox FORCE INDEX (PRIMARY) "
    "WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at IS NULL ORDER BY pk FOR UPDATE"
)
MARK = "UPDATE clickhouse_outbox SET deleted_at = :stamp WHERE pk = :pk"
MARK_RANGE = (
    "UPDATE clickhouse_outbox FORCE INDEX (PRIMARY) SET deleted_at = :stamp "
    "WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at IS NULL"
)
MARK_RANGES = (
    "UPDATE clickhouse_outbox FORCE INDEX (PRIMARY) SET deleted_at = :stamp "
    "WHERE (pk BETWEEN :a AND :b OR pk BETWEEN :c AND :d) AND deleted_at IS NULL"
)
MARK_LISTED = (
    "UPDATE clickhouse_outbox FORCE INDEX (PRIMARY) SET deleted_at = :stamp WHERE pk IN :pks AND deleted_at IS NULL"
)
DELETE_MARKED = "DELETE FROM clickhouse_outbox WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at + 0 <= :before_ms"
DELETE = "DELETE FROM clickhouse_outbox WHERE pk = :pk"
WRITE = "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) VALUES ('v', 'w', 'e', '{}', 1)"
WRITE_KEY = (
    "INSERT INTO clickhouse_outbox (pk, version, workspace_id, event_id, payload, created_at) "
    "VALUES (:pk, 'v', 'w', 'e', '{}', 1)"
)
LETTER = (
    "INSERT INTO clickhouse_outbox_dead_letter (pk, state, version, workspace_id, event_id, reason, json_path, detail, "
    "batch_id, created_at_ms, updated_at_ms) VALUES (:pk, 'open', 'v', 'w', 'e', 'r', '', '', :batch_id, 1, 1) "
    "ON DUPLICATE KEY UPDATE batch_id = VALUES(batch_id)"
)
HOLD = "UPDATE clickhouse_outbox_dead_letter SET state = 'held' WHERE pk = :pk"
LOCK_LETTER = "SELECT pk FROM clickhouse_outbox_dead_letter WHERE pk = :pk FOR UPDATE"
RELEASE = texts("mysql/dead_letters.sql")["release_held"]
BATCH_OF_LETTER = "SELECT batch_id FROM clickhouse_outbox_dead_letter WHERE pk = :pk"
LOCK_WAIT_TIMEOUT, DEADLOCK, DUPLICATE = 1205, 1213, 1062
# A killed connection: by PyMySQL 2006 or 2013, by MariaDB's own words 1927.
LOST = (2006, 2013, 1927)


@pytest.fixture(scope="module")
def contract_url(mysql_server: str) -> Iterator[str]:
    with real_database(mysql_server) as url:
        yield url


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.mysql_sensitive)])
def stage(request: pytest.FixtureRequest) -> Stage:
    if request.param == "simulated":
        return SimulatedStage()
    return RealStage(request.getfixturevalue("contract_url"))


def on_a_stage(test: Callable[[Stage], None]) -> Callable[[Stage], None]:
    @functools.wraps(test)
    def directed(stage: Stage) -> None:
        stage.run(lambda: test(stage))

    return directed


def code_of(work: Callable[[], object]) -> int | None:
    """The code of the server's error that ends this, or None."""
    try:
        work()
    except Refused as error:
        return error.code
    return None


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


@on_a_stage
def test_a_plain_select_waits_for_no_lock_and_sees_commits_only(stage: Stage) -> None:
    """A plan reads the outbox while applications write it."""
    writer, reader = stage.session(), stage.session(wait_s=SHORT_S)
    writer.ask(MARK, pk=1, stamp=5)
    writer.ask(DELETE, pk=2)
    assert (reader.ask(READ, pk=1), reader.ask(READ_ALL)) == ([(None,)], [(1,), (2,), (3,)])
    writer.commit()
    assert (reader.ask(READ, pk=1), reader.ask(READ_ALL)) == ([(5,)], [(1,), (3,)])  # in the same transaction


@on_a_stage
def test_a_transaction_sees_its_own_changes(stage: Stage) -> None:
    """Marks are counted in the transaction that sets them."""
    session = stage.session()
    session.ask(MARK, pk=1, stamp=5)
    key = session.ask(WRITE)
    assert (session.ask(READ, pk=1), session.ask(READ, pk=key)) == ([(5,)], [(None,)])
    session.roll_back()
    assert (session.ask(READ, pk=1), session.ask(READ, pk=key)) == ([(None,)], [])


# ── row locks ────────────────────────────────────────────────────────────────────────────────────


@on_a_stage
def test_for_update_waits_and_then_reads_what_was_committed(stage: Stage) -> None:
    """A fence is worth something only if it reads the ledger's row as the last holder left it."""
    holder, other = stage.session(), stage.session()
    holder.ask(MARK, pk=1, stamp=5)
    waiting = stage.start(lambda: other.ask(LOCK, pk=1))
    stage.until_waiting(other)
    holder.commit()
    assert waiting() == [(1, 5)]


@on_a_stage
def test_for_update_waits_for_a_row_that_is_being_deleted(stage: Stage) -> None:
    """The row is there until the deletion is committed."""
    holder, other = stage.session(), stage.session()
    holder.ask(DELETE, pk=1)
    waiting = stage.start(lambda: other.ask(LOCK, pk=1))
    stage.until_waiting(other)
    holder.commit()
    assert waiting() == []


@on_a_stage
def test_for_update_waits_for_a_row_that_is_being_inserted(stage: Stage) -> None:
    """A locking statement meets rows that no plain SELECT sees yet."""
    holder, other = stage.session(), stage.session()
    key = holder.ask(WRITE)
    waiting = stage.start(lambda: other.ask(LOCK, pk=key))
    stage.until_waiting(other)
    holder.commit()
    assert waiting() == [(key, None)]


@on_a_stage
def test_share_locks_share_and_keep_others_out(stage: Stage) -> None:
    """Chunks of a batch are marked at the same time, and no plan adopts the batch meanwhile."""
    one, two, other = stage.session(), stage.session(wait_s=SHORT_S), stage.session()
    assert one.ask(SHARE, pk=1) == two.ask(SHARE, pk=1) == [(1,)]
    waiting = stage.start(lambda: other.ask(LOCK, pk=1))
    stage.until_waiting(other)
    one.commit()
    stage.until_waiting(other)
    two.commit()
    assert waiting() == [(1, None)]


@on_a_stage
def test_a_share_lock_waits_behind_one_that_waits(stage: Stage) -> None:
    """Locks are given in the order of the requests: chunks that go on being marked do not keep the last step of a batch out."""
    one, two, three = stage.session(), stage.session(), stage.session(wait_s=SHORT_S)
    one.ask(SHARE, pk=1)
    waiting = stage.start(lambda: two.ask(LOCK, pk=1))
    stage.until_waiting(two)
    assert code_of(lambda: three.ask(SHARE, pk=1)) == LOCK_WAIT_TIMEOUT
    one.commit()
    assert waiting() == [(1, None)]


@on_a_stage
def test_one_that_shares_a_row_gets_it_alone_before_those_that_wait(stage: Stage) -> None:
    """It need not queue; MariaDB 10.11 calls that a deadlock and rolls back the one that waits, 11.8 and MySQL 9 do not."""
    one, two = stage.session(), stage.session()
    one.ask(SHARE, pk=1)
    first = stage.start(lambda: code_of(lambda: two.ask(LOCK, pk=1)))
    stage.until_waiting(two)
    second = code_of(lambda: one.ask(MARK, pk=1, stamp=6))
    one.commit()
    assert second is None
    assert first() in (None, DEADLOCK)


@on_a_stage
def test_two_that_share_a_row_and_want_it_alone_deadlock(stage: Stage) -> None:
    """One of them gets the row when the other is rolled back."""
    one, two = stage.session(), stage.session()
    one.ask(SHARE, pk=1)
    two.ask(SHARE, pk=1)
    first = stage.start(lambda: code_of(lambda: one.ask(MARK, pk=1, stamp=5)))
    stage.until_waiting(one)
    second = code_of(lambda: two.ask(MARK, pk=1, stamp=6))
    assert sorted((second, first()), key=str) == [DEADLOCK, None]


@on_a_stage
def test_skip_locked_leaves_locked_rows_out(stage: Stage) -> None:
    """Marking goes on beside rows that an application has locked, deletes or inserts."""
    holder, other = stage.session(), stage.session(wait_s=SHORT_S)
    holder.ask(LOCK, pk=1)
    holder.ask(DELETE, pk=2)
    holder.ask(WRITE_KEY, pk=900)
    assert other.ask(SKIP) == [(3,)]


@on_a_stage
def test_a_wait_that_times_out_undoes_the_statement_only(stage: Stage) -> None:
    """Error 1205 leaves a transaction open, with its locks and its other changes."""
    holder, waiter, third = stage.session(), stage.session(wait_s=SHORT_S), stage.session(wait_s=SHORT_S)
    holder.ask(LOCK, pk=2)
    waiter.ask(MARK, pk=3, stamp=8)
    assert code_of(lambda: waiter.ask(MARK_RANGE, first_pk=1, last_pk=3, stamp=9)) == LOCK_WAIT_TIMEOUT
    assert (waiter.ask(READ, pk=1), waiter.ask(READ, pk=3)) == ([(None,)], [(8,)])
    assert code_of(lambda: third.ask(LOCK, pk=3)) == LOCK_WAIT_TIMEOUT  # still locked
    assert code_of(lambda: third.ask(LOCK, pk=1)) == LOCK_WAIT_TIMEOUT  # also by the statement that is undone
    waiter.commit()
    assert third.ask(READ, pk=3) == [(8,)]


@on_a_stage
def test_a_deadlock_rolls_one_whole_transaction_back(stage: Stage) -> None:
    """After error 1213 nothing of the transaction is left, not even its locks; the other one goes on."""
    one, two = stage.session(), stage.session()
    one.ask(MARK, pk=1, stamp=5)
    two.ask(MARK, pk=2, stamp=6)
    first = stage.start(lambda: code_of(lambda: one.ask(MARK, pk=2, stamp=5)))
    stage.until_waiting(one)
    codes = (code_of(lambda: two.ask(MARK, pk=1, stamp=6)), first())
    assert sorted(codes, key=str) == [DEADLOCK, None]
    one.commit()
    two.commit()
    stamp = 5 if codes[0] else 6
    assert one.ask(READ, pk=1) == one.ask(READ, pk=2) == [(stamp,)]


@on_a_stage
def test_the_transaction_that_changed_less_is_the_victim(stage: Stage) -> None:
    """A victim need not be the one that closes the circle: a deadlock can end a statement that has waited long."""
    small, large = stage.session(), stage.session()
    small.ask(LOCK, pk=1)
    large.ask(MARK, pk=2, stamp=6)
    for _ in range(4):
        large.ask(WRITE)
    waiting = stage.start(lambda: code_of(lambda: small.ask(LOCK, pk=2)))
    stage.until_waiting(small)
    assert large.ask(MARK, pk=1, stamp=6) == 1
    assert waiting() == DEADLOCK


# ── which rows a statement locks ─────────────────────────────────────────────────────────────────


@on_a_stage
def test_an_update_of_a_range_passes_rows_that_do_not_match(stage: Stage) -> None:
    """Semi-consistent read: of a locked row the committed version decides whether an UPDATE of a range waits."""
    holder, other = stage.session(), stage.session(wait_s=SHORT_S)
    holder.ask(LOCK, pk=3)
    holder.ask(WRITE_KEY, pk=900)
    assert other.ask(MARK_RANGE, first_pk=1, last_pk=999, stamp=5) == 2


@on_a_stage
def test_an_update_of_a_range_waits_for_rows_that_match(stage: Stage) -> None:
    """It looks at the row again when it has the lock: what was marked meanwhile keeps its mark."""
    holder, other = stage.session(), stage.session()
    holder.ask(MARK, pk=2, stamp=8)
    waiting = stage.start(lambda: other.ask(MARK_RANGE, first_pk=1, last_pk=3, stamp=5))
    stage.until_waiting(other)
    holder.commit()
    assert waiting() == 1
    other.commit()
    assert other.ask(READ, pk=2) == [(8,)]


@on_a_stage
def test_an_update_by_keys_waits_for_each_row(stage: Stage) -> None:
    """A row that a list names is locked before its condition is looked at."""
    holder, other = stage.session(), stage.session()
    holder.ask(LOCK, pk=3)
    waiting = stage.start(lambda: other.ask(MARK_LISTED, pks=[1, 3], stamp=5))
    stage.until_waiting(other)
    holder.roll_back()
    assert waiting() == 1


@on_a_stage
def test_an_update_of_a_range_of_one_key_waits_as_by_key(stage: Stage) -> None:
    """The servers take `BETWEEN 3 AND 3` for `= 3`."""
    holder, other = stage.session(), stage.session()
    holder.ask(LOCK, pk=3)
    waiting = stage.start(lambda: other.ask(MARK_RANGE, first_pk=3, last_pk=3, stamp=5))
    stage.until_waiting(other)
    holder.roll_back()
    assert waiting() == 0


@on_a_stage
def test_an_update_of_several_ranges_waits_for_those_of_one_key(stage: Stage) -> None:
    """Each range is read for itself."""
    holder, other = stage.session(), stage.session(wait_s=SHORT_S)
    holder.ask(LOCK, pk=3)
    assert other.ask(MARK_RANGES, a=1, b=1, c=2, d=3, stamp=5) == 2
    other.roll_back()
    assert code_of(lambda: other.ask(MARK_RANGES, a=1, b=2, c=3, d=3, stamp=5)) == LOCK_WAIT_TIMEOUT


@on_a_stage
def test_a_delete_waits_for_rows_that_do_not_match(stage: Stage) -> None:
    """A sweep meets every lock in its range: only an UPDATE looks at the committed version first."""
    holder, other = stage.session(), stage.session()
    holder.ask(LOCK, pk=1)
    waiting = stage.start(lambda: other.ask(DELETE_MARKED, first_pk=1, last_pk=3, before_ms=100))
    stage.until_waiting(other)
    holder.roll_back()
    assert waiting() == 1


@on_a_stage
def test_a_locking_select_waits_for_rows_that_do_not_match(stage: Stage) -> None:
    """As a DELETE."""
    holder, other = stage.session(), stage.session()
    holder.ask(LOCK, pk=3)
    waiting = stage.start(lambda: other.ask(LOCK_PENDING, first_pk=1, last_pk=3))
    stage.until_waiting(other)
    holder.roll_back()
    assert waiting() == [(1,), (2,)]


@on_a_stage
def test_a_row_that_does_not_match_is_unlocked_at_once(stage: Stage) -> None:
    """READ COMMITTED keeps only the locks of rows that a statement found."""
    one, other = stage.session(), stage.session(wait_s=SHORT_S)
    assert one.ask(LOCK_PENDING, first_pk=1, last_pk=3) == [(1,), (2,)]
    assert one.ask(MARK_LISTED, pks=[3], stamp=5) == 0
    assert one.ask(DELETE_MARKED, first_pk=3, last_pk=3, before_ms=1) == 0
    assert other.ask(LOCK, pk=3) == [(3, 7)]


@on_a_stage
def test_a_row_that_was_waited_for_stays_locked(stage: Stage) -> None:
    """Though it does not match any more: only a row that was free is unlocked again."""
    holder, waiter, other = stage.session(), stage.session(), stage.session(wait_s=SHORT_S)
    holder.ask(MARK, pk=2, stamp=8)
    waiting = stage.start(lambda: waiter.ask(MARK_RANGE, first_pk=1, last_pk=3, stamp=5))
    stage.until_waiting(waiter)
    holder.commit()
    assert waiting() == 1
    assert code_of(lambda: other.ask(LOCK, pk=2)) == LOCK_WAIT_TIMEOUT


@on_a_stage
def test_an_update_by_another_index_waits_for_what_that_index_finds(stage: Stage) -> None:
    """Only a statement that reads the primary key passes locked rows by their committed versions."""
    holder, other = stage.session(), stage.session()
    holder.ask(LETTER, pk=5, batch_id=1)
    holder.ask(HOLD, pk=5)
    holder.commit()
    holder.ask(LOCK_LETTER, pk=5)
    waiting = stage.start(lambda: other.ask(RELEASE, version="v", definition=""))
    stage.until_waiting(other)
    holder.commit()
    assert waiting() == 0


# ── inserting ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("committed", [True, False])
def test_an_insert_of_a_key_that_is_being_inserted_waits(stage: Stage, committed: bool) -> None:
    """It is refused when the other transaction commits, and done when that is rolled back."""

    def direct() -> None:
        one, other = stage.session(), stage.session()
        one.ask(WRITE_KEY, pk=77)
        waiting = stage.start(lambda: code_of(lambda: other.ask(WRITE_KEY, pk=77)))
        stage.until_waiting(other)
        if committed:
            one.commit()
        else:
            one.roll_back()
        assert waiting() == (DUPLICATE if committed else None)
        other.commit()
        assert other.ask(READ, pk=77) == [(None,)]

    stage.run(direct)


@pytest.mark.parametrize("committed", [True, False])
def test_an_insert_that_updates_waits_and_then_looks(stage: Stage, committed: bool) -> None:
    """Two batches that set the same row aside take turns; the second one changes the letter of the first."""

    def direct() -> None:
        one, other = stage.session(), stage.session()
        one.ask(LETTER, pk=77, batch_id=1)
        waiting = stage.start(lambda: other.ask(LETTER, pk=77, batch_id=2))
        stage.until_waiting(other)
        if committed:
            one.commit()
        else:
            one.roll_back()
        waiting()
        other.commit()
        assert other.ask(BATCH_OF_LETTER, pk=77) == [(2,)]

    stage.run(direct)


@on_a_stage
def test_a_key_that_was_rolled_back_is_used_up(stage: Stage) -> None:
    """Gaps among the pks are no sign of lost rows."""
    session = stage.session()
    first = session.ask(WRITE)
    session.roll_back()
    assert session.ask(WRITE) == first + 1


@on_a_stage
def test_a_lower_key_can_be_committed_later(stage: Stage) -> None:
    """So no plan may take the highest pk that it has seen as a mark up to which it has read."""
    early, late, reader = stage.session(), stage.session(), stage.session()
    low, high = early.ask(WRITE), late.ask(WRITE)
    late.commit()
    assert low < high
    assert (reader.ask(READ, pk=low), reader.ask(READ, pk=high)) == ([], [(None,)])
    early.commit()
    assert reader.ask(READ, pk=low) == [(None,)]


@on_a_stage
def test_a_given_key_moves_the_next_one(stage: Stage) -> None:
    """Also when it is rolled back: an application that copies rows leaves gaps."""
    session = stage.session()
    first = session.ask(WRITE)
    session.ask(WRITE_KEY, pk=first + 10)
    session.roll_back()
    assert session.ask(WRITE) == first + 11


@on_a_stage
def test_keys_begin_again_after_truncate(stage: Stage) -> None:
    """A pk can come to mean another row: dead letters and batches compare ids too."""
    stage.truncate("clickhouse_outbox")
    assert stage.session().ask(WRITE) == 1


@pytest.mark.slow
@pytest.mark.mysql_sensitive
def test_keys_go_on_after_a_restart(tmp_path: Path) -> None:
    """MariaDB 10.11, 11.8 and MySQL 9 keep AUTO_INCREMENT on disk. MySQL 5.7 begins again after the highest row, and so may
    a server that takes over: that is what `SimulatedMySQL.fail_over` does.
    """
    keys = []
    for remove in (True, False):
        with (
            LocalMySQL(tmp_path) as server,
            real_tables(server.url + "restarted") as engine,
            engine.begin() as connection,
        ):
            keys.append(connection.execute(sa.text(WRITE)).lastrowid)
            if remove:
                connection.execute(sa.text(DELETE), {"pk": keys[0]})
    assert keys == [1, 2]


# ── connections that end ─────────────────────────────────────────────────────────────────────────


@on_a_stage
def test_what_a_dead_client_changed_is_rolled_back(stage: Stage) -> None:
    """Its locks are free, and those that waited for it go on."""
    dying, other = stage.session(), stage.session()
    dying.ask(MARK, pk=1, stamp=5)
    waiting = stage.start(lambda: other.ask(LOCK, pk=1))
    stage.until_waiting(other)
    stage.kill(dying)
    assert waiting() == [(1, None)]
    assert code_of(lambda: dying.ask(READ, pk=1)) in LOST


@on_a_stage
def test_a_client_that_dies_while_it_waits_gets_no_lock(stage: Stage) -> None:
    """A run that is killed in a wait leaves nothing behind."""
    holder, dying, other = stage.session(), stage.session(), stage.session(wait_s=SHORT_S)
    holder.ask(LOCK, pk=1)
    dying.ask(MARK, pk=2, stamp=5)
    waiting = stage.start(lambda: code_of(lambda: dying.ask(LOCK, pk=1)))
    stage.until_waiting(dying)
    stage.kill(dying)
    assert waiting() in LOST
    assert other.ask(LOCK, pk=2) == [(2, None)]


@pytest.mark.parametrize("reaches_the_server", [True, False])
def test_a_commit_without_an_answer_may_have_happened(stage: Stage, reaches_the_server: bool) -> None:
    """The client sees one error for both, so every effect of ours can be repeated."""

    def direct() -> None:
        session, reader = stage.fragile_session(answer_lost=reaches_the_server), stage.session()
        session.ask(MARK, pk=1, stamp=5)
        assert code_of(session.commit) in LOST
        stage.until_gone(session)
        assert reader.ask(LOCK, pk=1) == [(1, 5 if reaches_the_server else None)]

    stage.run(direct)
