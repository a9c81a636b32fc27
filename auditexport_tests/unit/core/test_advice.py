"""Advice: each kind of trouble with its severity, numbers and fix, and nothing just within the target."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from auditexport_pipeline.core.advice import Severity, advice, needs_operator, verdict
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.ports import Discrepancy
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.core.status import LastReconcile, OpenBatchStatus, Status

NOW_MS = 1_800_000_000_000
HOUR_MS = 3_600_000
QUIET = Status(at_ms=NOW_MS)
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

SCHEDULED = re.compile(r"\b((?:reconcile|sweep)_schedule|outbox_backlog_sensor)")


def behind(rows: int, lag_s: float, *owners: str) -> Backlog:
    return replace(QUIET.backlog, rows=rows, lag_s=lag_s, leasing_owners=owners, open_batches=len(owners))


# Trouble, the same just within the target, its severity and name, parts of its sentence, and the beginning of its fix.
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
    "a batch that no run adopts": (
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
    "entries that ClickHouse lost": (
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
        ("exporting began 2 days ago, and no reconciliation has run",),
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
def test_each_trouble_has_its_numbers_and_its_fix(name: str) -> None:
    """One sentence has the numbers, one line has the command; without trouble there is no advice."""
    trouble, control, severity, about, words, todo = TROUBLES[name]
    (one,) = advice(trouble, Targets())
    assert (one.severity, one.about) == (severity, about)
    assert all(word in one.what for word in words), one.what
    assert one.todo.startswith(todo)
    # With several outboxes, a command without the name changes the rows of another one.
    (named,) = advice(trouble, Targets(), "eu")
    assert named.todo == re.sub(r"\bauditexport (?!to )", "auditexport --outbox eu ", SCHEDULED.sub(r"eu_\1", one.todo))
    assert needs_operator([one])
    assert verdict(trouble, [one]).startswith("needs an operator: 1 ")
    assert advice(control, Targets()) == []
    assert verdict(control, []).startswith("healthy")


def test_the_worst_comes_first_and_a_note_needs_nobody() -> None:
    """The first line is about evidence that is at stake."""
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
    """A version can be any text, and a terminal obeys control characters."""
    hostile = replace(
        QUIET,
        backlog=replace(QUIET.backlog, unknown_rows=1, unknown_versions=("a",), unknown_by_version={"\x1b[2J\nv": 1}),
    )
    (one,) = advice(hostile, Targets())
    assert one.what.endswith(r"no drain takes: \x1b[2J\x0av 1")
