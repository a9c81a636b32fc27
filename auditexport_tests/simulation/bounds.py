"""Bounds on what the exporter costs others and itself: waits for its locks, statements and requests, payloads in memory.

Waits. While a process is alive and not paused, no transaction waits for its locks for longer than it waits itself for one lock
(`MARK_WAITS_S` where it marks rows, `WAITS_S` in all other transactions), and `SLACK_S` for its statements: each takes a
millisecond here, and so does each statement of others in between. A process that is paused within a transaction is not judged for
that time: its locks end with its connection, which is the server's matter.

Work. A drain sends a bounded number of statements and requests for each plan, each batch that it claims, each attempt to write one,
each new cut, each chunk of marks, and for its lease threads. What an error of a connection, or the end of the process, takes back is
at most a plan of the largest size. Nothing is sent for each row. Without work it sends a few statements. The constants are the largest
of some thousand histories, and a third more.

Memory. A drain holds payloads of `BATCHES_IN_MEMORY` batches, of one more that is compared before its rows are marked, and of two
that Python has not freed yet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from auditexport_pipeline.core.pks import PkSet
from auditexport_tests.simulation.application import OUTBOX
from auditexport_tests.simulation.truth import Truth
from auditexport_tests.simulation.world import LEDGER, Run, World

# As promised, not as the exporter has them: a control changes those.
MARK_WAITS_S, WAITS_S, SLACK_S = 1.0, 5.0, 1.0
DRAINS = ("run", "quiet")
BATCHES_IN_MEMORY = 2
# Three verbs at a time renew a lease of 45 s three times, by four statements.
RENEWALS_PER_S = 3 * 4 / 15
PLAN_STATEMENTS = 100
CHUNK_STATEMENTS = 8
IDLE_STATEMENTS, IDLE_REQUESTS = 23, 3


class Bounds:
    """Compares one history with the bounds."""

    def __init__(self, world: World, truth: Truth) -> None:
        self.world = world
        self.truth = truth
        self.attempts: Counter[str] = Counter()
        self.cuts: Counter[str] = Counter()
        self.plans: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self.claimed: defaultdict[str, list[int]] = defaultdict(list)  # rows of each batch
        for commit in truth.commits:
            self.changes[commit.who] += len(commit.changes)
            for change in commit.changes:
                if change.table == LEDGER and not change.key and change.before is not None and change.after is not None:
                    self.plans[commit.who] += change.after["epoch"] != change.before["epoch"]
                elif change.table == LEDGER and change.after is not None:
                    before = change.before or {"attempts": 0, "digest": "", "claim_key": ""}
                    self.attempts[commit.who] += change.after["attempts"] > before["attempts"]
                    self.cuts[commit.who] += change.after["digest"] != before["digest"]
                    if change.after["claim_key"] != before["claim_key"]:
                        self.claimed[commit.who].append(change.after["claimed_rows"])

    def broken(self) -> Iterator[str]:
        """A sentence for each bound that was exceeded."""
        yield from self._waits()
        most_bytes = (BATCHES_IN_MEMORY + 3) * self._largest_batch_bytes()
        for run in self.world.runs:
            for what, number, most in self._work(run):
                if number > most:
                    yield f"{run.owner} sent {number} {what}, and its work explains {most:.0f}"
            held = self.world.mysql.meters[run.owner].most
            if _kind(run.owner) in DRAINS and held > most_bytes and not self.world.forgot:
                yield f"{run.owner} held {held} bytes of payloads, and may hold {most_bytes}"

    def _waits(self) -> Iterator[str]:
        exporters = {run.owner for run in self.world.runs}
        for wait in self.world.mysql.waits:
            if wait.blocker not in exporters:
                continue
            marks = wait.table == OUTBOX and _kind(wait.blocker) in DRAINS
            if wait.seconds > (MARK_WAITS_S if marks else WAITS_S) + SLACK_S:
                yield f"{wait.who} waited {wait.seconds:.1f} s for a lock of {wait.blocker} on {wait.table}"

    def _work(self, run: Run) -> Iterator[tuple[str, int, float]]:
        owner, kind = run.owner, _kind(run.owner)
        statements, requests = self.world.mysql.asked[owner], self.world.clickhouse.asked[owner]
        batches = len(self.truth.lives)
        if kind in DRAINS:
            plans, attempts = self.plans[owner], self.attempts[owner]
            taken_back = self.world.mysql.failed[owner] + (run.process.dead or run.error is not None)
            units = plans + attempts + self.cuts[owner] + taken_back
            life_s = (run.ended_s if run.ended else self.world.scheduler.now_s) - run.began_s
            most = (
                40 + 20 * units + 10 * len(self.claimed[owner]) + PLAN_STATEMENTS * taken_back + RENEWALS_PER_S * life_s
            )
            # Rows under pks that began again are compared and marked up to three times.
            chunks = sum(rows // run.mark_rows for rows in self.claimed[owner])
            yield "statements", statements, most + CHUNK_STATEMENTS * chunks * (3 if self.world.book.past else 1)
            yield "requests", requests, 15 + 8 * (units + attempts)
            if kind == "quiet":
                yield "plans", plans, 3 + 2 * attempts
                if run.ended and not attempts and not self.changes[owner] > plans:
                    yield "statements without work", statements, IDLE_STATEMENTS
                    yield "requests without work", requests, IDLE_REQUESTS
        elif kind == "requeue":
            yield "statements", statements, 20 + 2 * batches + self.changes[owner]
        elif kind == "reconcile":
            yield "statements", statements, 50 + 10 * batches + self.changes[owner]
            yield "requests", requests, 10 + 15 * batches
        elif kind == "sweep":
            yield "statements", statements, 20 + 5 * self.changes[owner]
        elif kind in ("retry", "discard"):
            yield "statements", statements, 20 + 6 * self.changes[owner]

    def _largest_batch_bytes(self) -> int:
        """Of the payloads that a batch claimed, as they were then or became until its seal."""
        return max((self._bytes_of(batch_id) for batch_id in self.truth.lives), default=0)

    def _bytes_of(self, batch_id: int) -> int:
        life = self.truth.lives[batch_id]
        if not life.versions:  # a failover lost it, and only a dead letter is left
            return 0
        first, sealed = life.versions[0], life.when("sealed") or life.versions[-1]
        if first.row is None:
            return 0
        return sum(
            max((len(row["payload"]) for row in self.truth.during(pk, first.commit, sealed.commit) if row), default=0)
            for pk in PkSet.parse(first.row["pks"])
        )


def _kind(process: str) -> str:
    return process.split()[0]
