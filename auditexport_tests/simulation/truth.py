"""Whether the numbers that runs report are true, by the log of commits of the simulated MySQL and the blocks that ClickHouse got.

Nothing here asks the core. What is knowable when several runs act at once:

* A batch is exported by one commit, of one process. So a run that reports at its end has counted exactly the batches whose
  commit it made: the batches, rows, entries, bytes, dead letters and folded rows are those of their commits.
* A row counts as marked by a batch if it ever got the stamp of the batch and, at least, if it has the stamp when the batch is
  recorded as exported: the two differ only for rows that other hands changed in between.
* Rows that others deleted or marked are bounded by those that were gone, or had another mark, at any time between the claim and
  the export, because nothing shows when the run looked.
* An operator's verb has changed exactly the rows that its own commits changed, if it ended without an error.
* What ClickHouse got for a row was the row's committed payload at some moment between the claim and the seal of its batch.

Numbers of a run that began before a failover with lost commits are not judged: the server has forgotten what the run did.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from auditexport_pipeline.core.dead_letters import Acted
from auditexport_pipeline.core.drain import Drained
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.requeue import Requeue
from auditexport_pipeline.core.sweep import Sweep
from auditexport_tests.simulation.application import OUTBOX
from auditexport_tests.simulation.clickhouse_server import Received
from auditexport_tests.simulation.mysql_server import Commit, Row
from auditexport_tests.simulation.payloads import read_entry
from auditexport_tests.simulation.world import LEDGER, LETTERS, Run, World

OPEN_STATES = ("claimed", "sealed", "written", "stopped")


@dataclass(frozen=True, slots=True)
class Content:
    """What a pk held from one commit on; no row, if `row` is None."""

    commit: int
    row: Row | None
    who: str


@dataclass(slots=True)
class Life:
    """One batch: its versions in the ledger, each with its commit and the process that made it."""

    versions: list[Content] = field(default_factory=list)
    letters: dict[int, str] = field(default_factory=dict)  # by pk: the state that its letter got from this batch

    @property
    def exported(self) -> Content | None:
        """The commit that recorded it as exported."""
        before = ""
        for version in self.versions:
            state = version.row["state"] if version.row is not None else ""
            if state == "exported" and before in OPEN_STATES:
                return version
            before = state
        return None

    def when(self, *states: str) -> Content | None:
        return next((one for one in self.versions if one.row is not None and one.row["state"] in states), None)


class Truth:
    """What both servers did in a history, from their logs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.commits: list[Commit] = world.mysql.commits
        self.rows: defaultdict[int, list[Content]] = defaultdict(list)
        self.lives: defaultdict[int, Life] = defaultdict(Life)
        self.unmarked: Counter[str] = Counter()  # rows whose marks a process cleared
        self.deleted: Counter[str] = Counter()
        self.letters: Counter[tuple[str, str]] = Counter()  # by process and state
        self.plans: Counter[str] = Counter()
        for number, commit in enumerate(self.commits):
            if not commit.lost:
                self._read(number, commit)
        self.received: defaultdict[int, list[Received]] = defaultdict(list)
        for block in world.clickhouse.received:
            if block.token.startswith("auditexport-"):
                self.received[int(block.token.split("-")[1])].append(block)

    def _read(self, number: int, commit: Commit) -> None:
        for change in commit.changes:
            before, after = change.before, change.after
            if change.table == OUTBOX:
                self.rows[change.key].append(Content(number, after, commit.who))
                if before is not None and before["deleted_at"] is not None:
                    self.unmarked[commit.who] += after is not None and after["deleted_at"] is None
                self.deleted[commit.who] += before is not None and after is None
            elif change.table == LETTERS and after is not None:
                if before is None or before["state"] != after["state"]:
                    self.letters[commit.who, after["state"]] += 1
                if before != after and after["state"] in ("open", "held"):
                    self.lives[after["batch_id"]].letters[change.key] = after["state"]
            elif change.table == LEDGER and change.key == 0:
                self.plans[commit.who] += before is not None and before["epoch"] != after["epoch"]  # type: ignore[index]
            elif change.table == LEDGER:
                self.lives[change.key].versions.append(Content(number, after, commit.who))

    # ── rows over time ───────────────────────────────────────────────────────────────────────────

    def at(self, pk: int, commit: int) -> Row | None:
        """The row as it was after this commit."""
        found = None
        for content in self.rows[pk]:
            if content.commit > commit:
                break
            found = content.row
        return found

    def during(self, pk: int, first: int, last: int) -> list[Row | None]:
        """What the row was after the first of these commits and after each one up to the last."""
        return [self.at(pk, first), *(one.row for one in self.rows[pk] if first < one.commit <= last)]

    # ── the numbers ──────────────────────────────────────────────────────────────────────────────

    def lies(self) -> Iterator[str]:
        """A sentence for each number that is not true."""
        yield from self._wrong_payloads()
        for run in self.world.runs:
            if run.error is not None or run.process.dead or not run.ended or run.began_s <= self.world.forgot_s:
                continue
            if run.done is not None and run.settled:
                yield from (f"{run.owner} reports {line}" for line in self._of_drain(run, run.done))
            elif isinstance(run.result, Requeue):
                yield from (f"{run.owner} reports {line}" for line in self._of_requeue(run, run.result))
            elif run.report is not None:
                repaired = run.report.repaired or Requeue()
                yield from (f"{run.owner} reports {line}" for line in self._of_requeue(run, repaired))
            elif isinstance(run.result, Sweep):
                yield from (f"{run.owner} reports {line}" for line in self._of_sweep(run, run.result))
            elif isinstance(run.result, Acted):
                yield from (f"{run.owner} reports {line}" for line in self._of_letters(run, run.result))

    def _of_drain(self, run: Run, done: Drained) -> Iterator[str]:
        own = {
            batch_id: exported
            for batch_id, life in self.lives.items()
            if (exported := life.exported) is not None and exported.who == run.owner
        }
        least, most = Counter[str](), Counter[str]()
        for batch_id, exported in own.items():
            for name, (low, high) in self._numbers_of(batch_id, exported).items():
                least[name] += low
                most[name] += high
        for name in ("batches", "rows", "entries", "bytes", "dead_letters", "folded_rows"):
            yield from _outside(name, getattr(done, name), least[name], most[name])
        for name in ("deleted_by_others_rows", "marked_by_others_rows"):
            yield from _outside(name, getattr(done, name), 0, most[name])
        yield from _outside("adopted", done.adopted, most["adopted"], most["adopted"])
        plans = self.plans[run.owner]
        yield from _outside("rounds", done.rounds, 0, plans)
        for batch_id in done.lost:
            if batch_id in own:
                yield f"batch {batch_id} as lost, and has exported it"
            elif not self._was_taken(run, batch_id):
                yield f"batch {batch_id} as lost, and no other run has taken it"
        if len(set(done.lost)) < len(done.lost):
            yield f"lost batches twice: {done.lost}"
        if sound := [batch_id for batch_id in sorted(done.altered) if not self._was_altered(batch_id)]:
            yield f"as altered {sound}, and their rows are as they were claimed"
        for what in ("waiting", "unmarked", "released"):
            if wrong := own.keys() & set(getattr(done, what)):
                yield f"batches {sorted(wrong)} as {what}, and has exported them"

    def _numbers_of(self, batch_id: int, exported: Content) -> dict[str, tuple[int, int]]:
        """Each number of one exported batch: the least and the most that it can be."""
        life, row, end = self.lives[batch_id], exported.row, exported.commit
        assert row is not None
        pks, stamp = PkSet.parse(row["pks"]), row["exported_at_ms"]
        first = life.versions[0]
        assert first.row is not None
        claimed = PkSet.parse(first.row["pks"])
        ever = standing = 0
        for pk in pks:
            marked = [
                one.row is not None and one.row["deleted_at"] == stamp for one in self.rows[pk] if one.commit <= end
            ]
            ever += any(marked)
            standing += bool(marked) and marked[-1]
        gone = elsewhere = 0
        for pk in claimed:
            then = self.at(pk, first.commit)
            seen = self.during(pk, first.commit, end)
            gone += any(one is None or then is None or one["event_id"] != then["event_id"] for one in seen)
            elsewhere += any(one is not None and one["deleted_at"] not in (None, stamp) for one in seen)
        blocks = [block for block in json.loads(row["manifest"]) if not block.get("given_back")]
        sent = [self._sent(batch_id, block["digest"]) for block in blocks]
        entries = sum(map(len, sent))
        size = sum(map(len, (payload for block in sent for payload in block)))
        # A block that went out under a cut that a failover has lost.
        most = 2**63 if self.world.forgot and not all(sent) else 0
        dead = sum(state == "open" for state in life.letters.values())
        before_last = next(
            (
                one.row
                for one, then in zip(life.versions, life.versions[1:], strict=False)
                if _adopts(one, then, exported.who)
            ),
            None,
        )
        folded = self._folded(pks, life)
        # Of one that was deleted, nothing shows any more into which row it was folded, and that this row left the batch.
        unsent = pks - PkSet.union(PkSet.parse(block["pks"]) for block in blocks)
        orphans = sum(self.at(pk, end) is None for pk in unsent)
        return {
            "batches": (1, 1),
            "rows": (standing, ever),
            "entries": (entries, most or entries),
            "bytes": (size, most or size),
            "dead_letters": (dead, dead),
            "folded_rows": (folded, max(folded, orphans)),
            "deleted_by_others_rows": (0, gone),
            "marked_by_others_rows": (0, elsewhere),
            "adopted": (adopted := int(before_last is not None), adopted),
        }

    def _sent(self, batch_id: int, digest: str) -> tuple[bytes, ...]:
        """The payloads of a block of a batch, as ClickHouse stored them."""
        return next((block.payloads for block in self.received[batch_id] if f"-{digest}-" in block.token), ())

    def _folded(self, pks: PkSet, life: Life) -> int:
        """Rows of a batch beyond the first of each event, by the payloads at the seal."""
        sealed = life.when("sealed")
        if sealed is None:
            return 0
        keys = set()
        for pk in pks:
            row = self.at(pk, sealed.commit) or next(
                (one.row for one in reversed(self.rows[pk]) if one.row is not None and one.commit < sealed.commit), None
            )
            if row is not None:
                entry = read_entry(_meant(row["payload"]).encode(), 0)
                keys.add(entry.key if entry is not None else pk)
        return len(pks) - len(keys)

    def _was_altered(self, batch_id: int) -> bool:
        """Whether a row of the batch was changed or deleted since it was claimed."""
        first = self.lives[batch_id].versions[0]
        assert first.row is not None
        seen = (self.during(pk, first.commit, len(self.commits)) for pk in PkSet.parse(first.row["pks"]))
        return any(len({row["payload"] if row is not None else None for row in rows}) > 1 for rows in seen)

    def _was_taken(self, run: Run, batch_id: int) -> bool:
        """Whether another process has claimed the batch after this run had it."""
        had = False
        for version in self.lives[batch_id].versions:
            if version.row is None:
                continue
            had = had or version.row["owner"] == run.owner
            if had and version.row["owner"] != run.owner:
                return True
        return False

    def _of_requeue(self, run: Run, done: Requeue) -> Iterator[str]:
        cleared = self.unmarked[run.owner]
        if cleared > done.rows:
            yield f"{done.rows} rows, and has cleared {cleared} marks"
        if done.no_batch + sum(done.by_batch.values()) != done.rows:
            yield f"{done.rows} rows, and by batch {done.by_batch} and {done.no_batch}"
        yield from self._of_action(done.action_id, cleared)

    def _of_action(self, action_id: int | None, rows: int) -> Iterator[str]:
        if action_id is None:
            if rows:
                yield f"no action, and has changed {rows} rows"
            return
        counted = self.world.mysql.tables["clickhouse_outbox_action"].rows[action_id]["row_count"]
        yield from _outside(f"in action {action_id} rows", counted, rows, rows)

    def _of_sweep(self, run: Run, done: Sweep) -> Iterator[str]:
        deleted, closed = self.deleted[run.owner], self.letters[run.owner, "gone"]
        yield from _outside("rows", done.rows, deleted, deleted)
        yield from _outside("rows by batch", sum(done.by_batch.values()), deleted, deleted)
        yield from _outside("letters closed", done.letters_closed, closed, closed)

    def _of_letters(self, run: Run, done: Acted) -> Iterator[str]:
        state = "retried" if run.owner.startswith("retry") else "discarded"
        changed, gone = self.letters[run.owner, state], self.letters[run.owner, "gone"]
        yield from _outside("letters changed", done.changed, changed, changed)
        yield from _outside("letters gone", done.gone, gone, gone)

    # ── payloads ─────────────────────────────────────────────────────────────────────────────────

    def _wrong_payloads(self) -> Iterator[str]:
        for batch_id, blocks in self.received.items():
            life = self.lives[batch_id]
            sealed = life.when("sealed")
            if sealed is None and self.world.forgot:
                continue
            if sealed is None:
                yield f"ClickHouse got blocks of batch {batch_id}, which was never sealed"
                continue
            first = life.versions[0]
            assert first.row is not None
            seen = {
                _meant(row["payload"])
                for pk in PkSet.parse(first.row["pks"])
                for row in self.during(pk, first.commit, sealed.commit)
                if row is not None
            }
            own = [block for block in blocks if not self.world.forgot or block.token.split("-")[3] in str(sealed.row)]
            wrong = sum(_meant(payload) not in seen for block in own for payload in block.payloads)
            if wrong:
                yield f"ClickHouse got {wrong} payloads of batch {batch_id} that were not committed between claim and seal"


def _meant(payload: str | bytes) -> str:
    """The JSON with each key once: of a repeated key the last value counts, and such a payload goes out in that form."""
    try:
        return json.dumps(json.loads(payload))
    except ValueError:
        return str(payload)


def _adopts(before: Content, after: Content, who: str) -> bool:
    """Whether this process took the batch from another owner here."""
    return (
        before.row is not None
        and after.row is not None
        and after.who == who
        and before.row["owner"] != who == after.row["owner"]
    )


def _outside(name: str, reported: int, least: int, most: int) -> Iterator[str]:
    if not least <= reported <= most:
        yield f"{name} {reported}, and true is {least if least == most else f'{least} to {most}'}"
