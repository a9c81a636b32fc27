"""Controls of the simulation: the exporter with one rule taken away. Each must soon break a promise in some history.

A control changes the text of a copy of the package, so that what is tested is the code and not a stand-in for it.
`python -m auditexport_tests.simulation.controls` prints the table.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Histories within which a control must be found.
MOST_HISTORIES = 2_000
_CHILD = """
import json, sys
from auditexport_tests.simulation.many import first_broken
print(json.dumps(first_broken(int(sys.argv[1]), int(sys.argv[2]))))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A rule, and the texts that take it away: by file, what stands there and what takes its place."""

    rule: str
    changes: tuple[tuple[str, str, str], ...]
    seed: int  # of the first history that missed the rule, when the table was last printed


def _control(rule: str, *changes: tuple[str, str, str], seed: int) -> Control:
    return Control(rule=rule, changes=changes, seed=seed)


_NO_TOKEN = (
    "core/batch.py",
    "-{block.digest}-{block.number}",
    "-{block.digest}-{self.attempts}-{self.inserts_until_ms}",
)
_NO_LOOK_FIRST = ("core/export.py", "if batch.attempts > 1:", "if False:")
_NO_HOLDER = ("mysql/outbox.py", "return (row.epoch, row.claim_key) == (claim.epoch, claim.key)", "return True")
_NO_STATE = ("mysql/outbox.py", "if row.state not in tuple(map(str, states)):", "if False:")
_NO_CUT = ("mysql/outbox.py", "if cut_digest is not None and row.digest != cut_digest:", "if False:")
CONTROLS = (
    _control("a block has one token at every attempt", _NO_TOKEN, seed=12),
    _control("a later attempt looks first, and a block has one token", _NO_TOKEN, _NO_LOOK_FIRST, seed=6),
    _control("MySQL refuses a run that does not hold the batch", _NO_HOLDER, seed=27),
    _control("MySQL refuses a step that the batch is past", _NO_STATE, seed=149),
    _control("MySQL refuses an attempt with an earlier cut", _NO_CUT, seed=160),
    _control("MySQL has a fence: holder, step and cut", _NO_HOLDER, _NO_STATE, _NO_CUT, seed=27),
    _control(
        "ClickHouse refuses an INSERT after its deadline",
        ("core/export.py", "deadline_ms=deadline_ms,", "deadline_ms=2**62,"),
        seed=1,
    ),
    _control(
        "nothing is split while an INSERT of it can be at work",
        ("core/attempt.py", "return self.until_ms - self._log.deadline_ms(0)", "return -1"),
        seed=178,
    ),
    _control(
        "a stopped batch waits until no INSERT of it can be at work",
        (
            "core/export.py",
            "self._writing.outbox.stop(batch.claim, str(error), wait_ms=wait_ms)",
            "self._writing.outbox.stop(batch.claim, str(error), wait_ms=0)",
        ),
        (
            "core/export.py",
            "if batch.state is State.STOPPED and (left_ms := batch.inserts_until_ms - log.deadline_ms(0)) >= 0:",
            "if (left_ms := -1) >= 0:",
        ),
        seed=916,
    ),
    _control(
        "rows are marked after ClickHouse has them",
        (
            "core/export.py",
            "    return record_written(outbox, send(outbox, log, claim, batch, bodies, limits))",
            "    batch = outbox.record_written(claim, batch.digest) if batch.state is State.SEALED else batch\n    return record_written(outbox, send(outbox, log, claim, batch, bodies, limits))",
        ),
        seed=1,
    ),
    _control(
        "a small batch is marked after ClickHouse has it",
        (
            "core/small.py",
            "            sent = export.send(",
            "            if deadline_ms is not None:\n"
            '                early = Sent(claim=claim, batch=begun.batch, found=0, note="", seconds=0.0)\n'
            "                batch = self._record_and_look(early)\n"
            "                export.send(outbox, log, claim, begun.batch, begun.bodies, limits, deadline_ms=deadline_ms)\n"
            "                return batch\n"
            "            sent = export.send(",
        ),
        seed=35,
    ),
    _control(
        "the ledger has the deadline of a small batch before it is sent",
        (
            "core/small.py",
            "until_ms = deadline_ms + limits.insert_timeout_s * 1000 if deadline_ms is not None else 0",
            "until_ms = 0",
        ),
        seed=35,
    ),
    _control(
        "a batch marks only the rows that it sealed",
        ("mysql/outbox.py", "if total.ids != ids:", "if False:"),
        seed=44,
    ),
    _control(
        "rows that are read again must be those that were sealed",
        ("core/cuts.py", "if str(digest) != block.digest:", "if False:"),
        seed=36,
    ),
    _control(
        "a plan claims no row of an open batch",
        ("core/claiming.py", "free = page - self._in_batches", "free = page"),
        seed=6,
    ),
    _control(
        "a plan that adopts a batch takes it from its owner",
        (
            "mysql/outbox.sql",
            "SET epoch = :epoch, claim_key = :claim_key, owner = :owner, process",
            "SET owner = :owner, process",
        ),
        seed=6,
    ),
    _control(
        "an inserted_at is never used again",
        (
            "mysql/outbox.py",
            "max(last.now_ms, self._last_ms + 1)",
            "last.now_ms",
        ),
        seed=119,
    ),
    _control(
        "entries of the first export do not prove a requeue",
        (
            "core/attempt.py",
            "if not is_requeue(block) and block.inserted_at_ms in held}",
            "if block.inserted_at_ms in held}",
        ),
        (
            "core/export.py",
            "block for block in to_send if batch.is_requeue(block) or block.inserted_at_ms not in holdings",
            "block for block in to_send if block.inserted_at_ms not in holdings",
        ),
        seed=22,
    ),
    _control(
        "a requeue that cannot be proven does not put a split off",
        ("core/export.py", "        to_send += self._attempt.split_what_is_due()\n", ""),
        seed=59,
    ),
    _control(
        "a busy server is not a row that is too large",
        ("core/attempt.py", "return STRIKES_OF_A_USUAL_ROW if usual_row", "return STRIKES[kind] if usual_row"),
        seed=355,
    ),
    _control(
        "a late verification knows erasures and the TTL",
        ("core/verify.py", "and excuses is None and upkeep is not None:", "and False:"),
        seed=379,
    ),
    _control("a later attempt looks first", _NO_LOOK_FIRST, seed=77),
    _control(
        "a receipt is of the cut that the ledger has",
        (
            "core/export.py",
            "batch.exported_at_ms is None or receipt.digest != batch.digest",
            "batch.exported_at_ms is None",
        ),
        _NO_CUT,
        seed=160,
    ),
    _control(
        "a row repeats an event, and not a pk",
        (
            "core/origins.py",
            "next((at_ms for at_ms in candidate_times if (keys[pk], at_ms) in held), None)",
            "next(iter(candidate_times), None)",
        ),
        seed=210,
    ),
    _control(
        "an erasure explains what it names",
        ("core/actions.py", "and (self.to_ms is None or at_ms < self.to_ms)", ""),
        ("core/actions.py", "and (self.from_ms is None or at_ms >= self.from_ms)", ""),
        ("core/actions.py", 'and self.event_id in ("", event_id)', ""),
        seed=223,
    ),
    _control(
        "an erasure explains nothing that came later",
        ("core/excuses.py", "if sent_ms <= recorded.at_ms or (", "if True or ("),
        seed=51,
    ),
    _control(
        "an unknown TTL explains nothing",
        (
            "core/excuses.py",
            '(EXPIRED if known else "", known is None)',
            '("" if known is False else EXPIRED, known is None)',
        ),
        seed=133,
    ),
    _control(
        "a plan leaves out the rows of dead letters",
        (
            "mysql/outbox.sql",
            "letter.state IN ('open', 'discarded', 'held')\n  LEFT JOIN",
            "letter.state IN ('never')\n  LEFT JOIN",
        ),
        seed=4,
    ),
    # The numbers that runs report, and what they cost.
    _control(
        "rows that others marked or deleted do not count as exported",
        (
            "core/batch.py",
            "return 0 if self.state in OPEN else self.rows - self.counts.unmarked",
            "return 0 if self.state in OPEN else self.rows",
        ),
        seed=44,
    ),
    _control(
        "only batches of other owners count as adopted",
        ("core/claiming.py", "                    if batch.owner != owner:", "                    if True:"),
        seed=22,
    ),
    _control(
        "a held row is no dead letter",
        ("core/cuts.py", "dead=batch.counts.dead + len(dead) - held", "dead=batch.counts.dead + len(dead)"),
        seed=15,
    ),
    _control(
        "an action counts the rows that it changed",
        (
            "mysql/maintenance.py",
            "actions.count_rows(connection, action_id, rows)",
            "actions.count_rows(connection, action_id, 0)",
        ),
        seed=2,
    ),
    _control(
        "a sweep counts the rows that it deleted",
        ("core/sweep.py", "rows += self.upkeep.delete(", "rows = self.upkeep.delete("),
        seed=607,
    ),
    _control(
        "a retry counts the letters that it changed",
        (
            "mysql/dead_letters.py",
            "                    changed += len(pending)",
            "                    changed += len(locked)",
        ),
        seed=61,
    ),
    _control(
        "a server without memory says nothing about a row",
        ("core/split.py", "if answer.kind in LIMITS_OF_A_BLOCK:  # a busy", "if False:  # a busy"),
        seed=115,
    ),
    _control(
        "the ledger says what is still wrong after a repair",
        ("core/reconcile.py", "differs = bool(wrong) and complete", "differs = False"),
        seed=744,
    ),
    _control(
        "a reconciliation counts the entries of every block",
        ("core/reconcile.py", "line.stored += holding.rows", "line.stored = holding.rows"),
        seed=6,
    ),
    _control(
        "a mark waits for a lock of the application for a second",
        ("mysql/session.py", "MARK_LOCK_WAIT_S = 1", "MARK_LOCK_WAIT_S = 30"),
        seed=146,
    ),
    _control(
        "a lease is renewed three times",
        ("core/lease.py", "RENEWALS_PER_LEASE = 3", "RENEWALS_PER_LEASE = 300"),
        seed=12,
    ),
    _control(
        "the rows of two batches are in memory",
        ("core/pipeline.py", "BATCHES_IN_MEMORY = 2", "BATCHES_IN_MEMORY = 9"),
        seed=187,
    ),
    _control(
        "a claim from before a failover is refused",
        (
            "mysql/outbox.py",
            "return (row.epoch, row.claim_key) == (claim.epoch, claim.key)",
            "return bool(row.epoch == claim.epoch)",
        ),
        seed=27,
    ),
)


def mutated(control: Control, directory: Path) -> None:
    """Copies the packages there, and takes the rule away."""
    for package in ("auditexport_pipeline", "auditexport_tests"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text, instead in control.changes:
        path = directory / "auditexport_pipeline" / file
        source = path.read_text()
        if source.count(text) != 1:
            raise ValueError(f"{file} has {source.count(text)} times, and not once: {text}")
        path.write_text(source.replace(text, instead))


def found(control: Control, first: int = 1, most: int = MOST_HISTORIES) -> tuple[int, str] | None:
    """After how many histories a promise was broken, and which; None if none was."""
    with tempfile.TemporaryDirectory() as directory:
        mutated(control, Path(directory))
        environment = {**os.environ, "PYTHONPATH": directory, "PYTHONHASHSEED": "0"}
        child = [sys.executable, "-c", _CHILD, str(first), str(most)]
        done = subprocess.run(child, cwd=directory, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        answer = json.loads(done.stdout)
    return (answer[0], answer[1]) if answer else None


def main() -> None:
    print(f"{'taken away':62} {'histories':>9}  the first promise that was broken", flush=True)
    for control in CONTROLS:
        answer = found(control)
        histories, violation = answer or (0, "NONE")
        print(f"{control.rule:62} {histories or MOST_HISTORIES:9,}  {violation[:110]}", flush=True)


if __name__ == "__main__":
    main()
