"""Alerts: when they fire, repeat and resolve, tick by tick."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from auditexport_pipeline.core.advice import Advice, Drains, Failure, Severity, likely_reasons
from auditexport_pipeline.core.alerts import (
    LINE,
    SEEN,
    UNSENT,
    AlertState,
    EndedRun,
    Notice,
    NumberAlerts,
    Policy,
    Retry,
    RunAlerts,
    Tick,
)
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.core.status import Status
from auditexport_tests.unit.core.test_advice import OPEN, QUIET

NOW_MS = 1_800_000_000_000
MINUTE_MS, HOUR_MS = 60_000, 3_600_000
AWAY = Failure(error="AuditLogUnavailable", step="plan_batches", line="ClickHouse is away; run again", rerun_helps=True)
DRAIN = "audit_log_export"


def at(after_ms: float = 0, *, outbox: str = "", **policy: float) -> Tick:
    return Tick(policy=Policy(**policy), outbox=outbox, drain_job=DRAIN, now_ms=NOW_MS + int(after_ms))


def run(number: int, failure: Failure | None = None, retry: Retry = Retry.NO, *, subject: str = DRAIN) -> EndedRun:
    """A run that ended `number` ms after the first tick."""
    why = msgspec.structs.asdict(failure or Failure())
    return EndedRun(subject=subject, ended_ms=NOW_MS + number, run_id=f"run-{number}", retry=retry, **why)


def observe(memory: RunAlerts, *runs: EndedRun, tick: Tick | None = None) -> list[str]:
    """Kinds of the notices that these runs bring."""
    before = len(memory.state.unsent)
    for one in runs:
        memory.observe(one, tick or at())
    return [notice.kind for notice in memory.state.unsent[before:]]


@pytest.fixture
def memory() -> RunAlerts:
    return RunAlerts(from_ms=NOW_MS, looked_ms=NOW_MS)


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_streak_is_one_alert_and_one_recovery(memory: RunAlerts) -> None:
    """A hundred failed runs in a night are one alert."""
    assert observe(memory, *(run(n, AWAY) for n in range(100)), run(200), run(201)) == ["alert", "recovered"]
    alert, recovered = memory.state.unsent
    assert alert.since_ms == recovered.since_ms == NOW_MS
    assert recovered.what == "a run of audit_log_export has succeeded; 100 runs had failed"
    assert (recovered.todo, recovered.run_id) == ("", "run-200")


def test_failure_and_recovery_within_one_tick_are_both_notified(memory: RunAlerts) -> None:
    """After an outage the daemon reads a history, and a failure that is over is still news."""
    assert observe(memory, run(1, AWAY), run(2), run(3, AWAY)) == ["alert", "recovered", "alert"]


def test_a_failure_older_than_a_success_fires_nothing(memory: RunAlerts) -> None:
    """Runs of two hosts are stored out of order; such an alert would never be resolved."""
    assert observe(memory, run(5), run(4, AWAY)) == []
    assert (memory.state.active, memory.fail_owed) == ({}, False)
    assert observe(memory, run(6, AWAY)) == ["alert"]


def test_each_cause_is_notified_once(memory: RunAlerts) -> None:
    """Two errors of one outage can alternate, and would page at every run."""
    failures = AWAY, *(msgspec.structs.replace(AWAY, **change) for change in ({"error": "Other"}, {"step": "mark"}))
    assert observe(memory, *(run(n, failures[n % 3]) for n in range(30))) == ["alert"] * 3
    many = (run(100 + n, msgspec.structs.replace(AWAY, error=f"Error{n}")) for n in range(50))
    assert len(observe(memory, *many)) == 5  # of 8 causes at most


def test_what_still_fails_is_repeated_after_hours(memory: RunAlerts) -> None:
    """A notice that was missed must come again, even without another failed run."""
    observe(memory, run(1, AWAY), run(2, AWAY))
    memory.state.unsent.clear()
    for hours in (5.9, 6.1, 12.0, 12.2):
        memory.state.repeat(at(hours * HOUR_MS))
    assert [notice.kind for notice in memory.state.unsent] == ["still", "still"]
    assert memory.state.unsent[0].what.startswith("still failing, 2 failed so far: AuditLogUnavailable")


def test_a_retry_is_awaited_and_its_own_end_notified(memory: RunAlerts) -> None:
    """A retry that succeeds needs no operator; a retry that fails fires."""
    assert observe(memory, run(1, AWAY, Retry.WILL)) == []
    assert memory.is_new("run-1", NOW_MS + 1)
    assert observe(memory, run(1, AWAY, Retry.LAUNCHED)) == []
    assert not memory.is_new("run-1", NOW_MS + 1)
    memory.observe_missing_retries(at(24 * HOUR_MS))
    assert memory.state.unsent == []
    assert observe(memory, run(2, AWAY)) == ["alert"]


def test_before_dagster_has_decided_on_a_retry_nothing_fires(memory: RunAlerts) -> None:
    """Dagster stores the end of a run before the tag: a tick between them must not page."""
    undecided = run(1, AWAY, Retry.UNKNOWN)
    assert observe(memory, undecided) == []
    assert memory.is_new("run-1", NOW_MS + 1)
    assert observe(memory, run(1, AWAY, Retry.WILL)) == []
    assert observe(memory, run(2, AWAY, Retry.UNKNOWN), tick=at(61_000)) == ["alert"]


def test_a_missing_retry_fires_unless_another_run_succeeded(memory: RunAlerts) -> None:
    """Dagster's daemon can lose a retry; the next drain does its work."""
    observe(memory, run(1, AWAY, Retry.WILL))
    memory.observe_missing_retries(at(4 * MINUTE_MS))
    assert memory.state.unsent == []
    memory.observe_missing_retries(at(6 * MINUTE_MS))
    (notice,) = memory.state.unsent
    assert (notice.kind, notice.run_id, memory.fail_owed) == ("alert", "run-1", True)
    assert notice.what.endswith("Dagster has not launched the retry that it promised")
    observe(memory, run(2), run(3, AWAY, Retry.WILL), run(4))
    assert (memory.waiting, memory.fail_owed) == ({}, False)


def test_the_memory_of_runs_is_bounded(memory: RunAlerts) -> None:
    """The cursor is read and written at every tick, for years."""
    observe(memory, *(run(n, AWAY if n % 2 else None) for n in range(3 * SEEN)))
    assert len(memory.seen) == SEEN
    assert not memory.is_new(f"run-{3 * SEEN - 1}", NOW_MS)
    assert (len(memory.state.unsent), memory.state.dropped) == (UNSENT, 3 * SEEN - 1 - UNSENT)
    text = msgspec.json.encode(memory)
    assert len(text) < 60_000
    assert msgspec.json.decode(text, type=RunAlerts) == memory
    assert RunAlerts(from_ms=0, looked_ms=0).state.active == {}  # nothing is shared between two memories


@pytest.mark.parametrize(
    ("failure", "todo"),
    [
        (AWAY, "if it fails too: auditexport --outbox eu status, then auditexport --outbox eu doctor"),
        (Failure(error="SetupIncomplete"), "auditexport --outbox eu doctor: it prints the statement"),
        (Failure(error="VerificationFailed"), "auditexport --outbox eu reconcile --repair"),
        (Failure(error="RUN_WORKER_RESTART"), "read the run's log"),
        (Failure(error="SomethingElse", rerun_helps=False), "auditexport --outbox eu doctor"),
    ],
)
def test_each_kind_of_failure_says_what_to_do(memory: RunAlerts, failure: Failure, todo: str) -> None:
    """An alert needs a next step, with the command of its outbox."""
    observe(memory, run(1, failure), tick=at(outbox="eu"))
    (notice,) = memory.state.unsent
    assert todo in notice.todo


def test_the_error_of_a_run_names_the_outbox_too(memory: RunAlerts) -> None:
    """The line of an error can have a command, which an operator copies as well."""
    failure = msgspec.structs.replace(AWAY, line="MySQL is away; `auditexport doctor` looks at both databases")
    observe(memory, run(1, failure), tick=at(outbox="eu"))
    assert "`auditexport --outbox eu doctor` looks" in memory.state.unsent[0].what


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


def backlog(rows: int, lag_s: float, *, capped: bool = False, unknown: int = 0) -> Status:
    now = replace(
        QUIET.backlog, rows=rows, lag_s=lag_s, rows_at_least=capped, unknown_rows=unknown, unknown_versions=("v9",)
    )
    return replace(QUIET, backlog=now)


class Watch:
    """The sensor on numbers, one tick per minute."""

    def __init__(self, **policy: float) -> None:
        self.memory = NumberAlerts()
        self.now_ms = 0
        self.policy = policy

    def sees(self, *statuses: Status | str) -> list[tuple[str, str]]:
        """(kind, about) of the notices of these ticks; a text is MySQL's error."""
        before = len(self.memory.state.unsent)
        for status in statuses:
            tick = at(self.now_ms, **self.policy)
            if isinstance(status, str):
                self.memory.observe_error(status, tick, permanent=False)
            else:
                self.memory.observe(status, Targets(), Drains, tick)
            self.now_ms += MINUTE_MS
        return [(notice.kind, notice.about) for notice in self.memory.state.unsent[before:]]


@pytest.mark.parametrize(
    ("ticks", "notified"),
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
def test_a_backlog_is_stuck_when_late_and_no_smaller_for_long(
    ticks: list[Status], notified: list[tuple[str, str]]
) -> None:
    """The alert for an idle exporter must not fire for a busy one."""
    assert Watch().sees(*ticks) == notified


def test_a_stuck_backlog_is_over_only_when_the_lag_is_within_its_target() -> None:
    """While it shrinks nothing is repeated, and the recovery waits for the target."""
    watch = Watch()
    assert watch.sees(*[backlog(1_000, 400 + n) for n in range(11)]) == [("alert", "lag")]
    assert watch.sees(*[backlog(1_000 - n, 8_000) for n in range(1, 600)]) == []
    assert watch.sees(backlog(10, 20)) == [("recovered", "lag")]


def test_a_warning_repeats_less_often_than_an_error() -> None:
    """Alerts that are active are sent again; a warning can wait longer."""
    policy = {"repeat_hours": 1, "repeat_warning_hours": 3}
    unknown = [backlog(0, 0, unknown=5)] * 400
    assert Watch(**policy).sees(*unknown) == [(kind, "unknown_versions") for kind in ("alert", "still", "still")]
    assert Watch(**policy).sees(*[backlog(9, 400)] * 140) == [(kind, "lag") for kind in ("alert", "still", "still")]


def test_an_unreachable_mysql_resolves_nothing() -> None:
    """Unknown numbers are no recovery."""
    watch = Watch()
    assert watch.sees(backlog(0, 0, unknown=5)) == [("alert", "unknown_versions")]
    assert watch.sees(*["MySQL is away"] * 10) == [("alert", "mysql")]
    assert watch.sees(backlog(0, 0, unknown=5)) == [("recovered", "mysql")]


def test_a_clock_that_is_set_back_fires_nothing() -> None:
    """The step of a clock is no time that passed."""
    watch = Watch()
    watch.sees(backlog(9, 400))
    watch.now_ms -= 24 * HOUR_MS
    assert watch.sees(*[backlog(9, 400)] * 10) == []
    assert watch.sees(backlog(9, 400)) == [("alert", "lag")]


def test_the_worst_of_two_troubles_of_one_name_is_notified() -> None:
    """A batch without an owner must not hide behind a slow one."""
    watch = Watch()
    slow, abandoned = replace(OPEN, batch_id=1, lease_left_s=9.0), replace(OPEN, batch_id=2)
    assert watch.sees(replace(QUIET, open_batches=(slow, abandoned))) == [("alert", "open_batches")]
    (notice,) = watch.memory.state.unsent
    assert (notice.severity, "batch 2" in notice.what) == (Severity.ERROR, True)


@pytest.mark.parametrize(
    ("drains", "status", "reasons"),
    [
        (Drains(), backlog(1, 400), ["no run is at work"]),
        (Drains(starters_off=["eu_sensor"]), backlog(1, 400), ["no run is at work", "eu_sensor are off, so nothing starts"]),
        (Drains(failed_in_a_row=3, last_failure="LeaseLost: x"), backlog(1, 400),
         ["the last 3 runs failed (LeaseLost: x)", "no run is at work"]),
        (Drains(queued=["12345678-9"]), backlog(1, 400), ["run 12345678 waits in the queue"]),
        (Drains(running=["12345678-9"]), backlog(1, 400), ["run 12345678 is at work and has exported nothing lately"]),
        (Drains(running=["12345678-9"]), replace(backlog(1, 400), rows_per_s=49.6),
         ["run 12345678 exports 50 rows/s, and more arrives (is max_rows_per_second set?)"]),
        (Drains(), backlog(1, 400, unknown=7), ["7 rows have unknown versions, which no drain takes"]),
    ],
)  # fmt: skip
def test_the_likely_reasons_name_what_is_at_work(drains: Drains, status: Status, reasons: list[str]) -> None:
    """Each reason has its own fix."""
    text = "; ".join(likely_reasons(status, drains))
    assert all(reason in text for reason in reasons), text


# ── messages and stored memories ─────────────────────────────────────────────────────────────────


def notices(severity: Severity = Severity.ERROR, what: str = "w", todo: str = "t") -> list[Notice]:
    """An alert 90 s after it began, and its recovery."""
    state = AlertState()
    one = Advice(severity=severity, about="dead_letters", what=what, fix=todo)
    state.fire(one, at(90_000, outbox="eu"), since_ms=NOW_MS)
    for _ in range(2):
        state.resolve("dead_letters", "over", at(HOUR_MS, outbox="eu"))
    return state.unsent


def test_a_name_that_an_application_chose_mentions_nobody() -> None:
    """A version named <!channel> would notify a whole company, and Slack refuses long lines."""
    text = notices(what="version <!channel> & <@U1>", todo="x" * 10_000)[0].text
    assert "version &lt;!channel&gt; &amp; &lt;@U1&gt;" in text
    assert len(text) < 2 * LINE
    assert text.splitlines()[0] == "*[ERROR] auditexport eu: dead letters*"
    assert text.splitlines()[2] == "Since: 2027-01-15 08:00:00 UTC (90 s)"


def test_the_body_is_what_slack_takes() -> None:
    """`text` has everything; the fields are for routing."""
    warning, recovery = notices(Severity.WARNING)
    (attachment,) = msgspec.json.decode(msgspec.json.encode(warning.body))["attachments"]
    assert set(warning.body) == {"text", "attachments"}
    assert (attachment["color"], attachment["fallback"]) == ("warning", "[WARNING] auditexport eu: dead letters")
    assert {field["title"]: field["value"] for field in attachment["fields"]} == {
        "kind": "alert",
        "severity": "warning",
        "about": "dead_letters",
        "outbox": "eu",
        "since": "2027-01-15 08:00:00 UTC",
    }
    assert "[RECOVERED] auditexport eu: dead letters" in str(recovery.body)
    assert "'color': 'good'" in str(recovery.body)
    assert "'color': 'danger'" in str(notices()[0].body)


# As the release before this module wrote them.
STORED_RUNS = """{"from_ms":1800000000000,"looked_ms":1800000000000,"board":{"standing":{"audit_log_export":{"severity":"error",
"headline":"audit_log_export failed","since_ms":1800000000001,"told_ms":1800000000000,"times":1,
"causes":["AuditLogUnavailable at plan_batches"],"what":"w","todo":"t","job":"audit_log_export","run_id":"run-1","link":""}},
"unsent":[{"kind":"alert","severity":"error","about":"audit_log_export","outbox":"eu","headline":"audit_log_export failed",
"what":"w","todo":"t","since_ms":1800000000001,"at_ms":1800000000000,"job":"audit_log_export","run_id":"run-1","link":""}],
"dropped":2},"seen":{"run-1":1800000000001,"run-2":1800000000002},"waiting":{"run-2":{"subject":"sweep_exported_rows",
"job":"sweep_exported_rows","ended_ms":1800000000002,"error":"LeaseLost","step":"s","line":"l","link":""}},
"good_ms":{"reconcile_audit_logs":1800000000000},"fail_owed":true}"""
STORED_NUMBERS = """{"board":{"standing":{"lag":{"severity":"error","headline":"the backlog is not shrinking",
"since_ms":1800000000000,"told_ms":1800000000000,"times":1,"causes":["not shrinking"],"what":"w","todo":"t","job":"",
"run_id":"","link":""}},"unsent":[],"dropped":0},"samples":[{"at_ms":1800000000000,"rows":9,"capped":false,"lag_s":400}],
"away_since_ms":1800000000000}"""


def test_a_memory_of_the_release_before_is_read() -> None:
    """An upgrade must send no alert again, lose none that waits, and send the recovery."""
    runs = msgspec.json.decode(STORED_RUNS, type=RunAlerts)
    assert ([notice.run_id for notice in runs.state.unsent], runs.state.dropped, runs.fail_owed) == (["run-1"], 2, True)
    assert observe(runs, run(5, AWAY)) == []
    runs.observe_missing_retries(at(HOUR_MS))
    assert [(notice.about, notice.run_id) for notice in runs.state.unsent[1:]] == [("sweep_exported_rows", "run-2")]
    assert observe(runs, run(6)) == ["recovered"]
    watch = Watch()
    watch.memory = msgspec.json.decode(STORED_NUMBERS, type=NumberAlerts)
    assert watch.sees("MySQL is away", *[backlog(9, 500)] * 20) == []
    assert watch.sees(backlog(0, 0)) == [("recovered", "lag")]
