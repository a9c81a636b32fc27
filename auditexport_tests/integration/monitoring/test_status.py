"""Status: what it reads from a real ledger, and the advice for each kind of trouble, each with its negative control."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.advice import Advice, Command, Severity, advice, needs_operator, verdict
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.ports import Discrepancy
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.status import (
    RATE_WINDOW_S,
    BatchTimes,
    LastReconcile,
    OpenBatchStatus,
    Status,
    rate_of,
    runs_of,
    shown_s,
)
from auditexport_pipeline.core.sweep import Retention, sweep
from auditexport_pipeline.core.targets import Targets
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.status import read_status, targets
from auditexport_pipeline.roles import MYSQL_GRANTS, Role
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000
QUIET = Status(
    at_ms=NOW_MS,
    backlog=Backlog(
        rows=0,
        rows_at_least=False,
        lag_s=0.0,
        unknown_rows=0,
        unknown_versions=(),
        dead_rows=0,
        open_batches=0,
        waiting_batches=0,
        leasing_owners=(),
    ),
    recent_rows=0,
    rows_per_s=0.0,
    open_batches=(),
    runs=(),
    dead_by_reason={},
    unverified_batches=0,
    unverified_age_s=0.0,
    discrepant={},
    last_exported_at_ms=None,
    first_claimed_at_ms=None,
    oldest_unswept_age_s=0.0,
    last_sweep=None,
    last_reconcile=None,
)
OPEN = OpenBatchStatus(
    batch_id=7,
    state=State.SEALED,
    version="audit_log.v1",
    rows=50_000,
    owner="run-1",
    age_s=1_000.0,
    lease_left_s=-10.0,
    attempts=1,
    last_error="",
)
LOOKED = LastReconcile(
    at_ms=NOW_MS - HOUR_MS, who="ada", from_ms=0, to_ms=NOW_MS, batches=3, found=Discrepancy(missing=2)
)


def behind(rows: int, lag_s: float, *owners: str) -> Backlog:
    return replace(QUIET.backlog, rows=rows, lag_s=lag_s, leasing_owners=owners, open_batches=len(owners))


# Trouble, the same just within the target, how bad it is, and what the sentence and the remedy must name.
TROUBLES: dict[str, tuple[Status, Status, Severity, str, tuple[str, ...], str]] = {
    "nobody drains": (
        replace(QUIET, backlog=behind(12_000, 1_200.0)),
        replace(QUIET, backlog=behind(12_000, 300.0)),
        Severity.ERROR,
        "lag",
        ("12,000 rows are pending", "20 min", "target 5 min", "no drain is at work"),
        "auditexport drain",
    ),
    "a drain that exports nothing": (
        replace(QUIET, backlog=behind(12_000, 1_200.0, "run-1")),
        replace(QUIET, backlog=behind(12_000, 299.0, "run-1")),
        Severity.ERROR,
        "lag",
        ("run-1 is at work and has exported nothing in 15 min",),
        "auditexport doctor",
    ),
    "a drain that is not done yet": (
        replace(QUIET, backlog=behind(120_000, 1_200.0, "run-1"), rows_per_s=1_000.0),
        replace(QUIET, backlog=behind(120_000, 300.0, "run-1"), rows_per_s=1_000.0),
        Severity.WARNING,
        "lag",
        ("run-1 is at work at 1,000 rows/s", "2 min to go"),
        "auditexport status --watch",
    ),
    "a batch that nobody takes up": (
        replace(QUIET, open_batches=(replace(OPEN, last_error="rows changed"),)),
        replace(QUIET, open_batches=(replace(OPEN, age_s=900.0),)),
        Severity.ERROR,
        "open_batches",
        ("1 batch open for more than 15 min", "batch 7 (sealed, 50,000 rows, 17 min, owner run-1, rows changed)"),
        "auditexport drain",
    ),
    "a batch that is held long": (
        replace(QUIET, open_batches=(replace(OPEN, lease_left_s=200.0),)),
        replace(QUIET, open_batches=(replace(OPEN, lease_left_s=200.0, age_s=10.0),)),
        Severity.WARNING,
        "open_batches",
        ("their leases still run", "owner run-1"),
        "auditexport batches show 7",
    ),
    "batches that nobody verified": (
        replace(QUIET, unverified_batches=3, unverified_age_s=1_000.0),
        replace(QUIET, unverified_batches=3, unverified_age_s=900.0),
        Severity.WARNING,
        "unverified",
        ("3 exported batches are not verified, the oldest for 17 min",),
        "auditexport drain",
    ),
    "what ClickHouse lost": (
        replace(QUIET, discrepant={4: "in ClickHouse: 1 missing"}),
        QUIET,
        Severity.ERROR,
        "discrepant",
        ("1 batch is discrepant", "batch 4 (in ClickHouse: 1 missing)"),
        "auditexport reconcile --repair",
    ),
    "a reconciliation that found something": (
        replace(QUIET, last_reconcile=LOOKED),
        replace(QUIET, last_reconcile=replace(LOOKED, found=Discrepancy())),
        Severity.ERROR,
        "reconcile",
        ("60 min ago by ada, found 2 missing",),
        "auditexport reconcile --repair",
    ),
    "a reconciliation too long ago": (
        replace(QUIET, last_reconcile=replace(LOOKED, found=Discrepancy(), at_ms=NOW_MS - 37 * HOUR_MS)),
        replace(QUIET, last_reconcile=replace(LOOKED, found=Discrepancy(), at_ms=NOW_MS - 36 * HOUR_MS)),
        Severity.WARNING,
        "reconcile",
        ("the last reconciliation was 37 h ago", "every 36 h"),
        "auditexport reconcile",
    ),
    "never a reconciliation": (
        replace(QUIET, first_claimed_at_ms=NOW_MS - 50 * HOUR_MS),
        replace(QUIET, first_claimed_at_ms=NOW_MS - HOUR_MS),
        Severity.WARNING,
        "reconcile",
        ("exporting began 2 days ago and nobody has reconciled",),
        "auditexport reconcile",
    ),
    "dead letters": (
        replace(QUIET, backlog=replace(QUIET.backlog, dead_rows=3), dead_by_reason={"wrong_type": 2, "not_json": 1}),
        QUIET,
        Severity.WARNING,
        "dead_letters",
        ("3 dead letters", "wrong_type 2, not_json 1"),
        "auditexport dead-letters list",
    ),
    "unknown versions": (
        replace(
            QUIET,
            backlog=replace(
                QUIET.backlog, unknown_rows=25, unknown_versions=("v9",), unknown_by_version={"v9": 24, "": 1}
            ),
        ),
        QUIET,
        Severity.WARNING,
        "unknown_versions",
        ("25 rows", "v9 24", "(empty) 1"),
        "upgrade auditexport",
    ),
    "a sweep that is late": (
        replace(QUIET, oldest_unswept_age_s=33 * 86_400.0),
        replace(QUIET, oldest_unswept_age_s=32 * 86_400.0),
        Severity.WARNING,
        "sweep",
        ("33.0 days ago", "retention is 30 days"),
        "auditexport sweep",
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_each_trouble_is_told_with_its_numbers_and_its_remedy(name: str) -> None:
    """At night the sentence has to carry the numbers and the command; and one that is always there says nothing."""
    trouble, control, severity, about, words, todo = TROUBLES[name]
    (one,) = advice(trouble, Targets())
    assert (one.severity, one.about) == (severity, about)
    assert all(word in one.what for word in words), one.what
    assert one.todo.startswith(todo)
    assert needs_operator([one])
    assert verdict(trouble, [one]).startswith("needs an operator: 1 ")
    assert advice(control, Targets()) == []
    assert verdict(control, []).startswith("healthy")


@pytest.mark.parametrize("name", TROUBLES)
def test_each_remedy_names_the_outbox_in_commands_and_definitions(name: str) -> None:
    """One code location may have several outboxes, and a command for the wrong one changes another's rows."""
    (one,) = advice(TROUBLES[name][0], Targets(), "eu")
    commands = [step for step in one.steps if isinstance(step, Command)]
    assert one.todo.count("auditexport --outbox eu ") == len(commands)
    assert len(commands) == TROUBLES[name][-1].startswith("auditexport ")
    assert not re.search(r"\b(?<!eu_)(?:reconcile_schedule|sweep_schedule|outbox_backlog_sensor)", one.todo)


def test_the_worst_comes_first_and_a_note_calls_nobody() -> None:
    """Whoever reads one line only must read the one about evidence."""
    everything = replace(
        QUIET,
        backlog=replace(QUIET.backlog, dead_rows=1, rows=5, lag_s=4_000.0),
        discrepant={4: ""},
        unverified_batches=1,
        unverified_age_s=10_000.0,
        actions_read=False,
    )
    found = advice(everything, Targets())
    assert [one.about for one in found] == ["discrepant", "lag", "unverified", "dead_letters", "actions"]
    assert verdict(everything, found) == "needs an operator: 2 errors, 2 warnings"
    (note,) = advice(replace(QUIET, actions_read=False), Targets())
    assert note.severity is Severity.NOTE
    assert not needs_operator([note])


def test_a_name_that_an_application_chose_stays_on_its_line() -> None:
    """A version can hold whatever its writer likes, and a terminal obeys what it is sent."""
    hostile = replace(
        QUIET,
        backlog=replace(QUIET.backlog, unknown_rows=1, unknown_versions=("a",), unknown_by_version={"\x1b[2J\nv": 1}),
    )
    (one,) = advice(hostile, Targets())
    assert one.what.endswith("no drain takes: ?[2J?v 1")


def test_targets_are_read_from_the_environment_and_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target with a typing error in it would silence an alarm; the message has to name the variable."""
    assert Targets.of({"PATH": "/bin", "AUDITEXPORT_TARGET_LAG_S": ""}) == Targets()
    late = Targets.of({"AUDITEXPORT_TARGET_LAG_S": "20", "AUDITEXPORT_TARGET_DEAD_LETTERS": "5"})
    assert (late.lag_s, late.dead_letters, late.reconcile_hours) == (20.0, 5.0, 36.0)
    assert advice(replace(QUIET, backlog=behind(1, 21.0)), late)
    assert not advice(replace(QUIET, backlog=replace(QUIET.backlog, dead_rows=5)), late)
    for name, text in (
        ("AUDITEXPORT_TARGET_LAG_S", "0"),
        ("AUDITEXPORT_TARGET_LAG_S", "soon"),
        ("AUDITEXPORT_TARGET_RETENTION_DAYS", "nan"),
        ("AUDITEXPORT_TARGET_LAGS", "5"),
    ):
        with pytest.raises(InvalidConfig, match=name):
            Targets.of({name: text})
    with pytest.raises(InvalidConfig, match="batch_open_minutes"):
        Targets(batch_open_minutes=0)
    monkeypatch.setenv("AUDITEXPORT_TARGET_RECONCILE_HOURS", "48")
    assert targets().reconcile_hours == 48.0


def test_a_rate_counts_the_time_at_work_and_no_idle_time() -> None:
    """An ETA from a rate that an idle quarter of an hour had thinned would call somebody for nothing."""

    def batch(number: int, claimed_s: float, last_s: float, state: State = State.VERIFIED) -> BatchTimes:
        return BatchTimes(
            batch_id=number,
            epoch=number,
            owner="one",
            state=state,
            rows=1_000,
            claimed_at_ms=NOW_MS - int(claimed_s * 1000),
            last_at_ms=NOW_MS - int(last_s * 1000),
            leased=True,
        )

    # Two that overlap, from 100 s to 90 s before now; one begun before the window and done 5 s into it.
    done = [batch(1, 100, 95), batch(2, 98, 90), batch(3, RATE_WINDOW_S + 500, RATE_WINDOW_S - 5)]
    assert rate_of(done, [], now_ms=NOW_MS) == (3_000, 3_000 / 15)
    # And one at work for 5 s.
    assert rate_of(done, [batch(4, 5, 5, State.SEALED)], now_ms=NOW_MS) == (3_000, 3_000 / 20)
    assert rate_of([], [], now_ms=NOW_MS) == (0, 0.0)


def test_a_run_begins_with_its_own_plan_and_not_with_what_it_adopted() -> None:
    """Otherwise a run that cleans up after a crash looks as if it had taken the night for it."""

    def batch(number: int, epoch: int, owner: str, claimed_ms: int, state: State, last_ms: int) -> BatchTimes:
        return BatchTimes(
            batch_id=number,
            epoch=epoch,
            owner=owner,
            state=state,
            rows=100,
            claimed_at_ms=claimed_ms,
            last_at_ms=last_ms,
            leased=state is State.SEALED,
        )

    runs = runs_of(
        [
            batch(1, 1, "old", 1_000, State.VERIFIED, 3_000),
            batch(2, 5, "new", 1_000, State.DISCREPANT, 95_000),  # claimed by `old`, adopted by `new`
            batch(3, 5, "new", 90_000, State.VERIFIED, 96_000),
            batch(4, 6, "now", 98_000, State.SEALED, 99_000),
        ],
        now_ms=100_000,
        complete=False,
    )
    assert [(run.owner, run.batches, run.rows, run.seconds) for run in runs] == [
        ("now", 1, 0, 2.0),
        ("new", 2, 200, 6.0),
        ("old", 1, 100, 2.0),
    ]
    assert [run.worst for run in runs] == [State.SEALED, State.DISCREPANT, State.VERIFIED]
    assert [(run.at_work, run.partial) for run in runs] == [(True, False), (False, False), (False, True)]
    assert runs[1].rows_per_s == pytest.approx(200 / 6)


def test_times_are_shown_as_a_person_says_them() -> None:
    """A lag of 93,600 s is a number that nobody reads at night."""
    assert [shown_s(seconds) for seconds in (0, 0.42, 45.4, 300, 5_400, 40_000, 300_000)] == [
        "0 s",
        "0.4 s",
        "45 s",
        "5 min",
        "90 min",
        "11 h",
        "3 days",
    ]


# ── read from real servers ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def by() -> Actor:
    return Actor(who="ada", why="test")


def test_an_empty_installation_is_healthy(stack: Stack) -> None:
    """The first thing an operator types after `init` must not be an alarm."""
    status = read_status(stack.outbox)
    assert advice(status, Targets()) == []
    assert (status.runs, status.open_batches, status.eta_s, status.first_claimed_at_ms) == ((), (), 0.0, None)


def test_what_a_drain_did_is_in_the_status(stack: Stack, by: Actor) -> None:
    """Backlog, rate, runs, letters and versions come from one ledger, and must agree with what was put in."""
    seed_outbox(stack.mysql_url, seed=5, events=120, malformed=4, unknown=6, writers=1)
    before = read_status(stack.outbox)
    assert (before.backlog.rows, before.eta_s, before.rows_per_s) == (124, None, 0.0)
    drain(stack.outbox, stack.log, Limits(batch_rows=50), owner="one")
    status = read_status(stack.outbox)
    assert (status.backlog.rows, status.eta_s) == (0, 0.0)
    assert sum(status.backlog.unknown_by_version.values()) == 6
    assert sum(status.dead_by_reason.values()) == status.backlog.dead_rows == 4
    (run,) = status.runs
    assert (run.owner, run.rows, run.batches, run.worst, run.at_work) == ("one", 120, 3, State.VERIFIED, False)
    assert status.recent_rows == 120
    assert status.rows_per_s > 0
    assert status.last_exported_at_ms is not None
    assert [one.about for one in advice(status, Targets())] == ["dead_letters", "unknown_versions"]


def test_open_batches_are_told_with_owner_lease_and_state(stack: Stack) -> None:
    """Whether somebody is at work, and who, is the first question of whoever was called."""
    seed_outbox(stack.mysql_url, seed=6, events=60, writers=1)
    (claim,) = claiming.claim(stack.outbox, owner="web-1:77", dead_owners=(), limits=Limits(lease_s=600))
    (batch,) = read_status(stack.outbox).open_batches
    assert (batch.batch_id, batch.state, batch.rows, batch.owner) == (claim.batch_id, State.CLAIMED, 60, "web-1:77")
    assert 0 < batch.lease_left_s <= 600
    fetched = export.fetch(stack.outbox, stack.log, claim, Limits())
    export.mark(
        stack.outbox, stack.log, export.write(stack.outbox, stack.log, claim, fetched.bodies, Limits()), Limits()
    )
    status = read_status(stack.outbox)
    assert (status.open_batches, status.unverified_batches) == ((), 1)
    stack.sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - 3600000 WHERE batch_id > 0")
    (one,) = advice(read_status(stack.outbox), Targets())
    assert one.about == "unverified"


def test_a_reconciliation_leaves_when_by_whom_and_what_it_found(stack: Stack, by: Actor) -> None:
    """Without a trace nobody can tell whether the proof was ever asked for."""
    seed_outbox(stack.mysql_url, seed=7, events=40, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    now_ms = stack.upkeep.now_ms()

    def look(**options: object) -> LastReconcile | None:
        reconcile(
            stack.outbox,
            stack.upkeep,
            stack.log,
            from_ms=now_ms - DAY_MS,
            to_ms=now_ms + DAY_MS,
            **options,  # type: ignore[arg-type]
        )
        return read_status(stack.outbox).last_reconcile

    assert look() is None
    assert look(by=by, dry_run=True) is None
    clean = look(by=by)
    assert clean is not None
    assert (clean.who, clean.batches, clean.clean, clean.from_ms) == ("ada", 1, True, now_ms - DAY_MS)
    assert advice(read_status(stack.outbox), Targets()) == []
    ((event_id,),) = stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1 ORDER BY time LIMIT 1")
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = '{event_id}'", settings={"mutations_sync": 2}
    )
    found = look(by=by)
    assert found is not None
    assert found.found.missing == 1
    status = read_status(stack.outbox)
    assert list(status.discrepant.values()) == ["in ClickHouse: 1 missing"]
    assert [one.about for one in advice(status, Targets())] == ["discrepant", "reconcile"]


def test_a_sweep_is_told_and_one_that_is_late_as_well(stack: Stack, by: Actor) -> None:
    """An outbox that grows for ever ends an application's disk."""
    seed_outbox(stack.mysql_url, seed=8, events=40, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = deleted_at - 33 * 86400000")
    stack.sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - 33 * 86400000 WHERE batch_id > 0")
    (one,) = [one for one in advice(read_status(stack.outbox), Targets()) if one.about == "sweep"]
    assert "33.0 days" in one.what
    sweep(stack.outbox, stack.upkeep, stack.log, Retention(), by)
    status = read_status(stack.outbox)
    assert status.last_sweep is not None
    assert (status.last_sweep.rows, status.last_sweep.who, status.oldest_unswept_age_s) == (40, "ada", 0.0)
    assert advice(status, Targets()) == []


@pytest.fixture
def as_role(stack: Stack) -> Iterator[Callable[[Role], MySQLOutbox]]:
    """The stack's MySQL through a user that has one role's grants and no others."""
    url = sa.make_url(stack.mysql_url)
    made: list[MySQLOutbox] = []

    def user(role: Role) -> MySQLOutbox:
        name = f"status_{role.value}_{len(made)}"
        stack.sql(f"CREATE USER '{name}'@'127.0.0.1' IDENTIFIED BY 'role'")
        for table, privileges in MYSQL_GRANTS[role].items():
            stack.sql(f"GRANT {', '.join(privileges)} ON `{url.database}`.{table} TO '{name}'@'127.0.0.1'")
        made.append(MySQLOutbox(url.set(username=name, password="role").render_as_string(hide_password=False)))
        return made[-1]

    yield user
    for outbox in made:
        outbox.disconnect()
        stack.sql(f"DROP USER '{sa.make_url(outbox.url).username}'@'127.0.0.1'")


def test_a_reader_reads_all_of_it_and_an_exporter_all_but_the_actions(
    stack: Stack, as_role: Callable[[Role], MySQLOutbox]
) -> None:
    """A dashboard must not need an operator's user, and an asset check has the drain's."""
    seed_outbox(stack.mysql_url, seed=9, events=20, malformed=2, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    assert read_status(as_role(Role.READER)).actions_read
    status = read_status(as_role(Role.EXPORTER))
    assert (status.actions_read, status.backlog.dead_rows) == (False, 2)
    found: list[Advice] = advice(status, Targets())
    assert [one.about for one in found] == ["dead_letters", "actions"]


def test_whoever_may_not_record_is_told_and_reconciles_all_the_same(
    stack: Stack, by: Actor, as_role: Callable[[Role], MySQLOutbox]
) -> None:
    """What was found must not be lost over a grant on the table of records."""
    seed_outbox(stack.mysql_url, seed=10, events=20, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    sweeper = as_role(Role.SWEEPER)
    stack.sql(f"REVOKE INSERT ON clickhouse_outbox_action FROM '{sa.make_url(sweeper.url).username}'@'127.0.0.1'")
    report = reconcile(sweeper, MySQLMaintenance(sweeper), stack.log, from_ms=0, to_ms=2**62, by=by)
    assert report.clean
    assert "INSERT command denied" in report.unrecorded
    assert not reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62, by=by).unrecorded
