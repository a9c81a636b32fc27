"""Alerts: the decisions, moment by moment, without Dagster and without a server."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from auditexport_pipeline.core.advice import Severity
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.notices import LINE, UNSENT, Board, Condition, Notice, Policy
from auditexport_pipeline.core.number_alerts import Around, NumberAlerts, reasons
from auditexport_pipeline.core.run_alerts import SEEN, Ended, Failure, Retry, RunAlerts
from auditexport_pipeline.core.status import Status
from auditexport_pipeline.core.targets import Targets
from auditexport_tests.integration.monitoring.test_status import QUIET

NOW_MS = 1_800_000_000_000
MINUTE_MS, HOUR_MS = 60_000, 3_600_000
AWAY = Failure(error="AuditLogUnavailable", step="plan_batches", line="ClickHouse is away; run again", rerun_helps=True)


def run(number: int, failure: Failure | None = None, retry: Retry = Retry.NO, *, ended_ms: int = NOW_MS) -> Ended:
    return Ended(
        run_id=f"run-{number}",
        job="audit_log_export",
        subject="audit_log_export",
        ended_ms=ended_ms + number,
        retry=retry,
        failure=failure,
    )


def hears(memory: RunAlerts, *runs: Ended, now_ms: int = NOW_MS) -> list[str]:
    """Kinds of the notices that these runs bring."""
    before = len(memory.board.unsent)
    for one in runs:
        memory.heard(one, Policy(), outbox="", now_ms=now_ms)
    return [notice.kind for notice in memory.board.unsent[before:]]


@pytest.fixture
def memory() -> RunAlerts:
    return RunAlerts(from_ms=NOW_MS, looked_ms=NOW_MS)


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_streak_is_one_alert_and_one_recovery(memory: RunAlerts) -> None:
    """A hundred failed runs in a night are one thing."""
    assert hears(memory, *(run(n, AWAY) for n in range(100)), run(200), run(201)) == ["alert", "recovered"]
    alert, recovered = memory.board.unsent
    assert alert.since_ms == recovered.since_ms == NOW_MS
    assert recovered.what == "a run of audit_log_export has succeeded; 100 runs had failed"


def test_failure_and_recovery_within_one_look_are_both_told(memory: RunAlerts) -> None:
    """A daemon that was down comes back to a history, and a failure that healed is still news."""
    assert hears(memory, run(1, AWAY), run(2), run(3, AWAY)) == ["alert", "recovered", "alert"]


def test_a_failure_older_than_a_success_that_was_heard_first_stands_for_nothing(memory: RunAlerts) -> None:
    """Two hosts' runs are stored in another order than they ended; the alarm would never be settled."""
    assert hears(memory, run(5), run(4, AWAY)) == []
    assert not memory.board.standing
    assert hears(memory, run(6, AWAY)) == ["alert"]


def test_causes_in_turn_are_told_once_each(memory: RunAlerts) -> None:
    """Two errors of one outage that alternate would page at every run."""
    other = replace(AWAY, error="InsertOutcomeUnknown")
    elsewhere = replace(AWAY, step="write_clickhouse")
    told = hears(memory, *(run(n, (AWAY, other, elsewhere)[n % 3]) for n in range(30)))
    assert told == ["alert"] * 3
    many = [replace(AWAY, error=f"Error{n}") for n in range(50)]
    assert len(hears(memory, *(run(100 + n, failure) for n, failure in enumerate(many)))) == 5  # of 8 causes at most


def test_a_retry_that_is_under_way_is_awaited_and_its_own_end_told(memory: RunAlerts) -> None:
    """From the death of a worker to the end of its retry nobody is called; a retry that fails too is told."""
    assert hears(memory, run(1, AWAY, Retry.WILL)) == []
    assert memory.is_new("run-1", NOW_MS + 1)
    assert hears(memory, run(1, AWAY, Retry.LAUNCHED)) == []
    assert not memory.is_new("run-1", NOW_MS + 1)
    assert memory.overdue(Policy(), outbox="", now_ms=NOW_MS + 24 * HOUR_MS) == []
    assert hears(memory, run(2, AWAY)) == ["alert"]


def test_a_retry_that_does_not_come_is_told_unless_another_run_succeeded(memory: RunAlerts) -> None:
    """Dagster's daemon can lose one; the next drain mends it all the same."""
    hears(memory, run(1, AWAY, Retry.WILL))
    assert memory.overdue(Policy(), outbox="", now_ms=NOW_MS + 4 * MINUTE_MS) == []
    assert [one.run_id for one in memory.overdue(Policy(), outbox="", now_ms=NOW_MS + 6 * MINUTE_MS)] == ["run-1"]
    assert [notice.kind for notice in memory.board.unsent] == ["alert"]
    hears(memory, run(2), run(3, AWAY, Retry.WILL), run(4))
    assert memory.waiting == {}
    assert memory.overdue(Policy(), outbox="", now_ms=NOW_MS + HOUR_MS) == []


def test_what_is_remembered_is_bounded_and_survives_as_text(memory: RunAlerts) -> None:
    """The cursor is read and written at every tick, for years."""
    for n in range(3 * SEEN):
        hears(memory, run(n, AWAY if n % 2 else None))
    assert len(memory.seen) == SEEN
    assert not memory.is_new(f"run-{3 * SEEN - 1}", NOW_MS)
    assert len(memory.board.unsent) == UNSENT
    assert memory.board.dropped == 3 * SEEN - 1 - UNSENT
    text = msgspec.json.encode(memory)
    assert len(text) < 60_000
    assert msgspec.json.decode(text, type=RunAlerts) == memory
    assert RunAlerts(from_ms=0, looked_ms=0).board.standing == {}  # nothing is shared between two memories


@pytest.mark.parametrize(
    ("failure", "todo"),
    [
        (AWAY, "the next run continues"),
        (replace(AWAY, error="SetupIncomplete", rerun_helps=False), "auditexport doctor: it prints the statement"),
        (replace(AWAY, error="VerificationFailed", rerun_helps=False), "auditexport reconcile --repair"),
        (replace(AWAY, error="RUN_WORKER_RESTART", rerun_helps=None), "look at the run's log"),
        (replace(AWAY, error="SomethingElse", rerun_helps=False), "auditexport doctor"),
    ],
)
def test_each_kind_of_failure_says_what_to_do(memory: RunAlerts, failure: Failure, todo: str) -> None:
    """An alert without a next step is a riddle."""
    hears(memory, run(1, failure))
    assert todo in memory.board.unsent[0].todo


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def backlog(rows: int, lag_s: float, *, capped: bool = False, unknown: int = 0) -> Status:
    return replace(
        QUIET,
        backlog=replace(
            QUIET.backlog,
            rows=rows,
            lag_s=lag_s,
            rows_at_least=capped,
            unknown_rows=unknown,
            unknown_versions=("v9",) if unknown else (),
        ),
    )


class Watch:
    """The sensor on numbers, a minute a look."""

    def __init__(self) -> None:
        self.memory = NumberAlerts()
        self.now_ms = NOW_MS
        self.policy = Policy()
        self.around = Around()

    def sees(self, *statuses: Status) -> list[tuple[str, str]]:
        """(kind, about) of the notices that these looks bring."""
        before = len(self.memory.board.unsent)
        for status in statuses:
            self.memory.looked(status, Targets(), self.policy, lambda: self.around, outbox="", now_ms=self.now_ms)
            self.now_ms += MINUTE_MS
        return [(notice.kind, notice.about) for notice in self.memory.board.unsent[before:]]


@pytest.mark.parametrize(
    ("looks", "told"),
    [
        ([backlog(100, 400 + n) for n in range(10)], []),
        ([backlog(100, 400 + n) for n in range(11)], [("alert", "lag")]),
        ([backlog(100 + n, 400 + n) for n in range(11)], [("alert", "lag")]),
        ([backlog(100 - n, 400 + n) for n in range(60)], []),
        ([backlog(100, 200) for n in range(60)], []),
        ([backlog(100, 200 if n == 5 else 400) for n in range(11)], []),
        ([backlog(1_000, 400 + 60 * n, capped=True) for n in range(11)], [("alert", "lag")]),
        ([backlog(1_000, 4_000 - 10 * n, capped=True) for n in range(60)], []),
        ([backlog(1_000 if n < 8 else 900, 4_000, capped=n < 8) for n in range(11)], []),
        ([backlog(0, 0) for n in range(60)], []),
    ],
    ids=[
        "too short", "the same", "growing", "shrinking", "within the target", "within it once", "capped and growing older",
        "capped and growing younger", "capped and then counted", "empty",
    ],
)  # fmt: skip
def test_a_backlog_is_stuck_when_late_at_every_look_and_no_smaller(
    looks: list[Status], told: list[tuple[str, str]]
) -> None:
    """The alarm of an exporter that does nothing must not be the alarm of one that has much to do."""
    assert Watch().sees(*looks) == told


def test_a_stuck_backlog_is_over_when_the_lag_is_within_its_target_and_not_before() -> None:
    """Once it shrinks nobody is reminded, and the all-clear waits until all is clear."""
    watch = Watch()
    assert watch.sees(*[backlog(1_000, 400 + n) for n in range(11)]) == [("alert", "lag")]
    assert watch.sees(*[backlog(1_000 - n, 8_000) for n in range(1, 600)]) == []
    assert watch.sees(backlog(10, 20)) == [("recovered", "lag")]


def test_a_warning_repeats_after_a_day_and_an_error_after_hours() -> None:
    """What nobody has mended is told again; a warning less often than an error."""
    watch = Watch()
    watch.policy = Policy(repeat_hours=1, repeat_warning_hours=3)
    assert watch.sees(*[backlog(0, 0, unknown=5)] * 400) == [
        ("alert", "unknown_versions"),
        ("still", "unknown_versions"),
        ("still", "unknown_versions"),
    ]
    watch = Watch()
    watch.policy = Policy(repeat_hours=1, repeat_warning_hours=3)
    told = watch.sees(*[backlog(9, 400)] * 140)
    assert told == [("alert", "lag"), ("still", "lag"), ("still", "lag")]


def test_mysql_away_settles_nothing_and_a_clock_that_is_set_back_alarms_nobody() -> None:
    """Not knowing is not recovery, and a stepped clock is not ten minutes."""
    watch = Watch()
    watch.sees(backlog(0, 0, unknown=5))
    for minute in range(10):
        watch.memory.unanswered(
            "MySQL is away", Policy(), permanent=False, outbox="", now_ms=watch.now_ms + minute * MINUTE_MS
        )
    assert [notice.about for notice in watch.memory.board.unsent] == ["unknown_versions", "mysql"]
    assert watch.sees(backlog(0, 0, unknown=5)) == [("recovered", "mysql")]
    watch = Watch()
    watch.sees(backlog(9, 400))
    watch.now_ms -= 24 * HOUR_MS
    assert watch.sees(*[backlog(9, 400)] * 10) == []
    assert watch.sees(backlog(9, 400)) == [("alert", "lag")]


@pytest.mark.parametrize(
    ("around", "status", "told"),
    [
        (Around(), backlog(1, 400), ["no run is at work, and nothing starts one"]),
        (Around(starters_off=["the_sensor"]), backlog(1, 400), ["and nothing starts one", "the_sensor are off"]),
        (Around(starters_on=["the_sensor"], failed_in_a_row=3, last_failure="LeaseLost: x"), backlog(1, 400),
         ["the last 3 runs failed (LeaseLost: x)", "no run is at work"]),
        (Around(queued=["12345678-9"]), backlog(1, 400), ["run 12345678 waits in the queue"]),
        (Around(running=["12345678-9"]), backlog(1, 400), ["run 12345678 is at work and has exported nothing lately"]),
        (Around(running=["12345678-9"], throttled_rows_per_s=50), replace(backlog(1, 400), rows_per_s=49.6),
         ["run 12345678 exports 50 rows/s, and more than that arrives", "throttled to 50 rows/s by max_rows_per_second"]),
        (Around(), backlog(1, 400, unknown=7), ["7 rows are of unknown versions, which no drain takes"]),
    ],
)  # fmt: skip
def test_the_likely_reasons_follow_from_what_is_around(around: Around, status: Status, told: list[str]) -> None:
    """Each has another remedy, and on call should not have to try them all."""
    text = "; ".join(reasons(status, around))
    for each in told:
        assert each in text


# ── the message and the settings ─────────────────────────────────────────────────────────────────


def condition(**changes: object) -> Condition:
    fields: dict[str, object] = {
        "about": "lag",
        "severity": Severity.ERROR,
        "cause": "x",
        "headline": "h",
        "what": "w",
        "todo": "t",
        "at_ms": NOW_MS,
    }
    return Condition(**{**fields, **changes})  # type: ignore[arg-type]


def notice(**changes: object) -> Notice:
    board = Board()
    board.raised(condition(**changes), Policy(), outbox="eu", now_ms=NOW_MS + 90_000)
    return board.unsent[0]


def test_what_an_application_chose_mentions_nobody_and_fills_no_screen() -> None:
    """A version named <!channel> would wake a whole company, and a line of a megabyte is refused by the chat."""
    text = notice(what="version <!channel> & <@U1>", todo="x" * 10_000).text
    assert "version &lt;!channel&gt; &amp; &lt;@U1&gt;" in text
    assert len(text) < 2 * LINE
    assert text.splitlines()[0] == "*[ERROR] auditexport eu: h*"
    assert text.splitlines()[2] == "Since: 2027-01-15 08:00:00 UTC (90 s)"


def test_a_notice_s_colour_and_mark_are_its_kind() -> None:
    """Green and red are read before any word."""
    board = Board()
    board.raised(condition(severity=Severity.WARNING), Policy(), outbox="", now_ms=NOW_MS)
    board.settled("lag", "over", outbox="", now_ms=NOW_MS + HOUR_MS)
    board.settled("lag", "over", outbox="", now_ms=NOW_MS + HOUR_MS)
    warned, over = board.unsent
    assert (warned.title, warned.body["attachments"][0]["color"]) == ("[WARNING] auditexport: h", "warning")  # type: ignore[index]
    assert (over.title, over.body["attachments"][0]["color"]) == ("[RECOVERED] auditexport: h", "good")  # type: ignore[index]


def test_settings_have_bounds_and_are_named_when_wrong() -> None:
    """A typing error in an alarm's setting must not be its silence."""
    assert Policy.of({}) == Policy()
    given = {"AUDITEXPORT_ALERT_NOT_SHRINKING_MINUTES": "5", "AUDITEXPORT_ALERT_WEBHOOK_URL": "https://x", "OTHER": "1"}
    assert Policy.of(given) == Policy(not_shrinking_minutes=5)
    for name, value in (
        ("REPEAT_HOURS", "0"),
        ("REPEAT_HOURS", "often"),
        ("REPEAT_HOURS", "nan"),
        ("REPAET_HOURS", "1"),
    ):
        with pytest.raises(InvalidConfig, match=r"AUDITEXPORT_ALERT_"):
            Policy.of({f"AUDITEXPORT_ALERT_{name}": value})
