"""One run in a process of its own, which can be killed, and stopped and woken: a drain, or an operator's verb.

What belongs here: what the asset's ops and the upkeep jobs do, with time-outs short enough for a test, and the two
mutations that show that the suite would notice. What does not: when it is killed (`actions`), and what must hold
afterwards.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import clickhouse_connect  # noqa: F401 - imported once, in the process that all runs are forked from
import pymysql
import sqlalchemy as sa
import sqlalchemy.dialects.mysql.pymysql

from auditexport_pipeline.clickhouse import audit_log
from auditexport_pipeline.clickhouse import connection as clickhouse_connection
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming, export, reading, reconcile, requeue, sweep, verify
from auditexport_pipeline.core import settings as core_settings
from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.batch import Batch, Claim, Receipt
from auditexport_pipeline.core.dead_letters import DeadLetterFilter
from auditexport_pipeline.core.errors import AuditExportError, LeaseLost, TransientError
from auditexport_pipeline.core.pipeline import Pipeline
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Holding
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql import connection as mysql
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.session import MARK_LOCK_WAIT_S

T = TypeVar("T")

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])

# Below the bound of the setting, so that waiting for the end of a lease is a matter of seconds here.
LEASE_S = 5
INSERT_TIMEOUT_S = 1
UPKEEP_RETRIES = 1
BY = Actor(who="chaos", why="to see what happens")
# What a refused zombie is told; one line of it, whoever refuses.
REFUSED = re.compile(r"is refused and changed nothing|came late and changed nothing|nothing was written|; run again$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How one run works. `clock` is a file with the seconds by which MySQL's clock is off.

    `verb` is "drain" or one of `UPKEEP`, and `arguments` is what that one is about.
    """

    owner: str
    mysql_url: str
    clickhouse_url: str
    clock: Path
    dead_owners: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    prefetch: bool = False
    hand_over: bool = True
    retries: int = 2
    mutation: str = ""  # "no token, no look" or "mark first"
    verb: str = "drain"
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Told:
    """What a run says at its end, if it lives to it."""

    claimed: int = 0
    adopted: int = 0
    found: int = 0  # blocks that an earlier attempt had written
    errors: Counter[str] = field(default_factory=Counter)  # by class
    codes: Counter[int] = field(default_factory=Counter)  # MySQL's, where it answered with one
    refusals: list[str] = field(default_factory=list)  # what LeaseLost said
    discrepancies: list[str] = field(default_factory=list)
    changed: int = 0  # by an operator's verb: rows or letters
    report: reconcile.Report | None = None
    unforeseen: list[str] = field(default_factory=list)  # errors outside the tree, with their stack


class Worker:
    """A run under way. `told` is there once it has ended by itself."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stopped = False
        self.declared_dead = False
        self.unseen = False  # it died, and no other run is told
        self.killed = False
        self._told: Told | None = None
        self._ours, theirs = _PROCESSES.Pipe(duplex=False)
        self._process = _PROCESSES.Process(target=_main, args=(run, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self.killed = True
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """SIGSTOP: from now on a zombie, as a paused machine makes one."""
        self._signal(signal.SIGSTOP)
        self.stopped = True

    def wake(self) -> None:
        self._signal(signal.SIGCONT)
        self.stopped = False

    def _signal(self, number: signal.Signals) -> None:
        if self.alive and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def wait(self, within_s: float) -> bool:
        """Whether it ended in time."""
        self.told()
        self._process.join(within_s)
        return not self.alive

    def told(self) -> Told | None:
        try:
            if self._told is None and self._ours.poll():
                self._told = self._ours.recv()
        except (EOFError, OSError):
            pass
        return self._told


def _main(run: Run, pipe: Connection) -> None:
    # They tell of every broken connection by themselves; what matters of them reaches us as errors.
    for name in ("clickhouse_connect", "sqlalchemy.pool"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    told = Told()
    try:
        shorten_time_outs()
        if run.verb == "drain":
            _drain(run, told)
        else:
            _upkeep(run, told)
    except BaseException:
        told.unforeseen.append(traceback.format_exc())
    pipe.send(told)
    pipe.close()


def shorten_time_outs() -> None:
    """Seconds where production waits minutes, and blocks of a few rows."""
    shorter: tuple[tuple[tuple[ModuleType, ...], str, float], ...] = (
        ((audit_log, clickhouse_connection), "ANSWER_GRACE_S", 1),
        ((audit_log, clickhouse_connection), "CONNECT_TIMEOUT_S", 2),
        ((export, core_settings), "START_WITHIN_S", LEASE_S),
        ((claiming, reading), "SMALLEST_BLOCK_ROWS", 5),
        ((claiming,), "FIRST_BATCH_ROWS", 10),
        ((requeue,), "CHUNK_ROWS", 7),
        ((sweep,), "BATCHES_AT_ONCE", 2),
        ((reconcile,), "BATCHES_AT_ONCE", 3),
    )
    for modules, name, value in shorter:
        for module in modules:
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, value)
    ClickHouseAuditLog.client.__defaults__ = (3,)


def limits_of(settings: dict[str, int]) -> Limits:
    chosen = Limits(**{"lease_s": 10, "insert_timeout_s": INSERT_TIMEOUT_S, **settings})  # type: ignore[arg-type]
    object.__setattr__(chosen, "lease_s", LEASE_S)
    return chosen


class OffsetOutbox(MySQLOutbox):
    """A store that waits for nothing for long, and whose connections see the server's clock stepped by what the file says."""

    def __init__(self, url: str, clock: Path) -> None:
        timeouts = {"connect_timeout": "2", "read_timeout": "3", "write_timeout": "3"}
        super().__init__(sa.make_url(url).update_query_dict(timeouts).render_as_string(hide_password=False))
        self.clock = clock
        sa.event.listen(self.engine, "begin", self._step)

    @property
    def engine(self) -> sa.Engine:
        return mysql.engine_for(self.url, os.getpid(), MARK_LOCK_WAIT_S)

    def _step(self, connection: sa.Connection) -> None:
        offset_s = float(self.clock.read_text() or 0)
        if offset_s:
            connection.exec_driver_sql(f"SET SESSION timestamp = {time.time() + offset_s:.3f}")


class _Blind(ClickHouseAuditLog):
    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]:
        return {}


class _Step(Protocol):
    def __call__(self, verb: Callable[[], T]) -> T | None: ...


def _step(run: Run, told: Told) -> _Step:
    """Does things as Dagster does a step: transient errors again, a lost lease never, and one line for each failure."""
    random = Random(run.owner)

    def step(verb: Callable[[], T]) -> T | None:
        for attempt in range(run.retries + 1):
            try:
                return verb()
            except AuditExportError as error:
                told.errors[type(error).__name__] += 1
                if isinstance(error, LeaseLost):
                    told.refusals.append(str(error))
                code = _code(error)
                if code:
                    told.codes[code] += 1
                if not isinstance(error, TransientError) or isinstance(error, LeaseLost):
                    return None
                if attempt < run.retries:
                    threading.Event().wait(random.uniform(0.05, 0.5))
            except Exception:
                told.unforeseen.append(traceback.format_exc())
                return None
        return None

    return step


def _upkeep(run: Run, told: Told) -> None:
    """One verb of an operator, as its job does it."""
    outbox = OffsetOutbox(run.mysql_url, run.clock)
    upkeep = MySQLMaintenance(outbox)
    log = ClickHouseAuditLog(run.clickhouse_url)
    asked = run.arguments

    def requeue_rows() -> int:
        missing_only = bool(asked.get("missing_only"))
        wanted = RowFilter(**{name: value for name, value in asked.items() if name != "missing_only"})
        return requeue.requeue(outbox, upkeep, log, wanted, BY, missing_only=missing_only).rows

    def sweep_rows() -> int:
        return sweep.sweep(outbox, upkeep, log, sweep.Retention(outbox_days=asked["days"], chunk_rows=7), BY).rows

    def retry_letters() -> int:
        return dead_letters.retry(outbox, DeadLetterFilter(state=None, pks=PkSet.of(asked["pks"])), BY).changed

    def discard_letters() -> int:
        return dead_letters.discard(outbox, DeadLetterFilter(pks=PkSet.of(asked["pks"])), BY).changed

    def reconcile_all() -> int:
        repair = BY if asked.get("repair") else None
        told.report = reconcile.reconcile(outbox, upkeep, log, from_ms=0, to_ms=2**62, repair=repair)
        return told.report.slots

    verbs: dict[str, Callable[[], int]] = {
        "requeue": requeue_rows,
        "sweep": sweep_rows,
        "retry letters": retry_letters,
        "discard letters": discard_letters,
        "reconcile": reconcile_all,
    }
    told.changed = _step(run, told)(verbs[run.verb]) or 0


def _drain(run: Run, told: Told) -> None:
    """Claim, then batch by batch fetch, write and mark, then verify; a batch that fails leaves the others alone."""
    limits = limits_of(run.limits)
    outbox = OffsetOutbox(run.mysql_url, run.clock)
    log = ClickHouseAuditLog(run.clickhouse_url)
    writing_log = log
    write = export.write
    if run.mutation == "no token, no look":
        Batch.token = lambda batch, block: uuid4().hex  # type: ignore[method-assign]
        audit_log.INSERT_SETTINGS["insert_deduplicate"] = 0
        writing_log = _Blind(run.clickhouse_url)
    if run.mutation == "mark first":
        write = _marked_first
    step = _step(run, told)
    pipeline = Pipeline() if run.prefetch else None
    claims = step(lambda: claiming.claim(outbox, owner=run.owner, dead_owners=run.dead_owners, limits=limits))
    if claims is None:
        return
    told.claimed = len(claims)
    told.adopted = sum(claim.adopted for claim in claims)
    if pipeline:
        pipeline.plan(claims)

    def export_batch(claim: Claim) -> bool:
        fetched = step(
            lambda: (
                pipeline.fetch(outbox, writing_log, claim, limits)
                if pipeline
                else export.fetch(outbox, writing_log, claim, limits)
            )
        )
        if fetched is None:
            return False
        kept = [fetched.bodies] if run.hand_over else []

        def write_it() -> Receipt:
            bodies = kept.pop() if kept else {}
            if pipeline:
                return pipeline.write(outbox, writing_log, claim, limits)
            return write(outbox, writing_log, claim, bodies, limits)

        receipt = step(write_it)
        if receipt is None:
            return False
        told.found += receipt.found
        return step(lambda: (pipeline or export).mark(outbox, log, receipt, limits)) is not None

    try:
        done = [export_batch(claim) for claim in claims]
    finally:
        if pipeline:
            pipeline.close()
    if all(done):
        verified = step(lambda: verify.verify(outbox, log, outbox.unverified(200)))
        for batch_id, found in (verified or {}).items():
            if found:
                told.discrepancies.append(f"batch {batch_id}: {found}, events {', '.join(found.event_ids)}")


def _code(error: BaseException) -> int:
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, pymysql.err.MySQLError) and cause.args and isinstance(cause.args[0], int):
            return cause.args[0]
        cause = cause.__cause__
    return 0


def _marked_first(outbox: Any, log: Any, claim: Claim, bodies: Any, limits: Limits) -> Receipt:
    """The wrong order: the rows are marked, and then ClickHouse is given them."""
    batch = outbox.begin_write(claim, limits.lease_s)
    batch = outbox.record_written(claim, batch.digest) if batch.exported_at_ms is None else batch
    receipt = Receipt(claim=claim, digest=batch.digest, entries=0, blocks=0, bytes=0, found=0, seconds=0)
    export.mark(outbox, log, receipt, limits)
    for block in batch.blocks:
        deadline_ms = log.deadline_ms(limits.lease_s)
        payloads = bodies.get(block.digest)
        if payloads:
            log.insert(batch, block, payloads, deadline_ms=deadline_ms, timeout_s=limits.insert_timeout_s)
    return receipt
