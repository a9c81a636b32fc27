"""One run in a process of its own, which can be killed, stopped and woken: a drain, or an operator's verb.

It does what the asset's ops and the maintenance jobs do, with shorter time-outs. Its two mutations show that the suite would
notice a broken exporter.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
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

# Below the bound of the setting, so that the end of a lease is a matter of seconds here.
LEASE_S = 5
OPERATOR_RETRIES = 1
ACTOR = Actor(who="chaos", why="to see what happens")
# Seconds where production waits minutes, and blocks of a few rows.
SHORTENED: tuple[tuple[Any, str, float], ...] = (
    (audit_log, "ANSWER_GRACE_S", 1),
    (clickhouse_connection, "ANSWER_GRACE_S", 1),
    (audit_log, "CONNECT_TIMEOUT_S", 2),
    (clickhouse_connection, "CONNECT_TIMEOUT_S", 2),
    (export, "START_WITHIN_S", LEASE_S),
    (core_settings, "START_WITHIN_S", LEASE_S),
    (claiming, "SMALLEST_BLOCK_ROWS", 5),
    (reading, "SMALLEST_BLOCK_ROWS", 5),
    (claiming, "FIRST_BATCH_ROWS", 10),
    (requeue, "CHUNK_ROWS", 7),
    (sweep, "BATCHES_AT_ONCE", 2),
    (reconcile, "BATCHES_AT_ONCE", 3),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How one run works. `clock` is a file with the seconds by which MySQL's clock is off.

    `verb` is "drain" or an operator's; `arguments` are those of the operator's verb.
    """

    owner: str
    mysql_url: str
    clickhouse_url: str
    clock: Path
    dead_owners: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    prefetch: bool = False
    hand_over: bool = True
    retries: int = OPERATOR_RETRIES
    mutation: str = ""  # "no token, no check" or "mark first"
    verb: str = "drain"
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Result:
    """What a run reports at its end, if it gets there."""

    claimed: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # by class
    codes: Counter[int] = field(default_factory=Counter)  # MySQL's error codes
    refusals: list[str] = field(default_factory=list)  # texts of LeaseLost
    discrepancies: list[str] = field(default_factory=list)
    changed: int = 0  # rows or dead letters, by an operator's verb
    report: reconcile.Report | None = None
    unforeseen: list[str] = field(default_factory=list)  # errors outside the tree, with their stack


class Worker:
    """A run at work. It has a `result` once it has ended by itself."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stopped = False
        self.declared_dead = False
        self.unseen = False  # it died, and no other run knows
        self.killed = False
        self._result: Result | None = None
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
        """SIGSTOP: from now on a zombie, as after a pause of the machine."""
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
        self.result()
        self._process.join(within_s)
        return not self.alive

    def result(self) -> Result | None:
        try:
            if self._result is None and self._ours.poll():
                self._result = self._ours.recv()
        except (EOFError, OSError):
            pass
        return self._result


def _main(run: Run, pipe: Connection) -> None:
    # They log each broken connection; what matters of them reaches us as errors.
    for name in ("clickhouse_connect", "sqlalchemy.pool"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    result = Result()
    try:
        for module, name, value in SHORTENED:
            assert hasattr(module, name), f"{module.__name__} has no {name} any more"
            setattr(module, name, value)
        ClickHouseAuditLog.client.__defaults__ = (3,)
        if run.verb == "drain":
            _drain(run, result)
        else:
            _operate(run, result)
    except BaseException:
        result.unforeseen.append(traceback.format_exc())
    pipe.send(result)
    pipe.close()


class OffsetOutbox(MySQLOutbox):
    """A store with short time-outs, whose sessions see MySQL's clock off by the seconds in a file."""

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


def _step(run: Run, result: Result) -> _Step:
    """Executes a verb as Dagster executes a step: transient errors are retried, a lost lease never."""
    random = Random(run.owner)

    def step(verb: Callable[[], T]) -> T | None:
        for attempt in range(run.retries + 1):
            try:
                return verb()
            except AuditExportError as error:
                result.errors[type(error).__name__] += 1
                if isinstance(error, LeaseLost):
                    result.refusals.append(str(error))
                if code := _code(error):
                    result.codes[code] += 1
                if not isinstance(error, TransientError) or isinstance(error, LeaseLost):
                    return None
                if attempt < run.retries:
                    threading.Event().wait(random.uniform(0.05, 0.5))
            except Exception:
                result.unforeseen.append(traceback.format_exc())
                return None
        return None

    return step


def _operate(run: Run, result: Result) -> None:
    """One verb of an operator, as its job executes it."""
    outbox, log = OffsetOutbox(run.mysql_url, run.clock), ClickHouseAuditLog(run.clickhouse_url)
    upkeep = MySQLMaintenance(outbox)

    def requeue_rows(*, missing_only: bool = False, **rows: Any) -> int:
        return requeue.requeue(outbox, upkeep, log, RowFilter(**rows), ACTOR, missing_only=missing_only).rows

    def sweep_rows(*, days: float) -> int:
        return sweep.sweep(outbox, upkeep, log, sweep.Retention(outbox_days=days, chunk_rows=7), ACTOR).rows

    def retry_letters(*, pks: list[int]) -> int:
        return dead_letters.retry(outbox, DeadLetterFilter(state=None, pks=PkSet.of(pks)), ACTOR).changed

    def discard_letters(*, pks: list[int]) -> int:
        return dead_letters.discard(outbox, DeadLetterFilter(pks=PkSet.of(pks)), ACTOR).changed

    def reconcile_all(*, repair: bool = False) -> int:
        by = ACTOR if repair else None
        result.report = reconcile.reconcile(outbox, upkeep, log, from_ms=0, to_ms=2**62, repair=by)
        return result.report.slots

    verbs: dict[str, Callable[..., int]] = {
        "requeue": requeue_rows,
        "sweep": sweep_rows,
        "retry letters": retry_letters,
        "discard letters": discard_letters,
        "reconcile": reconcile_all,
    }
    result.changed = _step(run, result)(lambda: verbs[run.verb](**run.arguments)) or 0


def _drain(run: Run, result: Result) -> None:
    """Claim, then batch by batch fetch, write and mark, then verify. A batch that fails does not stop the others."""
    limits = Limits(**{"lease_s": 10, **run.limits})  # type: ignore[arg-type]
    object.__setattr__(limits, "lease_s", LEASE_S)
    outbox, log = OffsetOutbox(run.mysql_url, run.clock), ClickHouseAuditLog(run.clickhouse_url)
    writing_log, write = log, export.write
    if run.mutation == "no token, no check":
        Batch.token = lambda batch, block: uuid4().hex  # type: ignore[method-assign]
        audit_log.INSERT_SETTINGS["insert_deduplicate"] = 0
        writing_log = _Blind(run.clickhouse_url)
    if run.mutation == "mark first":
        write = _marked_first
    step = _step(run, result)
    claims = step(lambda: claiming.claim(outbox, owner=run.owner, dead_owners=run.dead_owners, limits=limits))
    if claims is None:
        return
    result.claimed = len(claims)
    pipeline = Pipeline() if run.prefetch else None
    if pipeline:
        pipeline.plan(claims)

    def export_batch(claim: Claim) -> bool:
        fetched = step(lambda: (pipeline or export).fetch(outbox, writing_log, claim, limits))
        if fetched is None:
            return False
        # Only the first attempt has the rows in memory; a retry reads them again.
        in_memory = [fetched.bodies] if run.hand_over else []

        def write_it() -> Receipt:
            bodies = in_memory.pop() if in_memory else {}
            if pipeline:
                return pipeline.write(outbox, writing_log, claim, limits)
            return write(outbox, writing_log, claim, bodies, limits)

        receipt = step(write_it)
        if receipt is None:
            return False
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
                result.discrepancies.append(f"batch {batch_id}: {found}, events {', '.join(found.event_ids)}")


def _code(error: BaseException) -> int:
    """MySQL's code of an error, or 0."""
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, pymysql.err.MySQLError) and cause.args and isinstance(cause.args[0], int):
            return cause.args[0]
        cause = cause.__cause__
    return 0


def _marked_first(outbox: Any, log: Any, claim: Claim, bodies: Any, limits: Limits) -> Receipt:
    """The wrong order: marks the rows, and then sends them to ClickHouse."""
    batch = outbox.begin_write(claim, limits.lease_s)
    batch = outbox.record_written(claim, batch.digest) if batch.exported_at_ms is None else batch
    receipt = Receipt(claim=claim, digest=batch.digest, entries=0, blocks=0, bytes=0, found=0, seconds=0)
    export.mark(outbox, log, receipt, limits)
    for block in batch.blocks:
        payloads = bodies.get(block.digest)
        if payloads:
            deadline_ms = log.deadline_ms(limits.lease_s)
            log.insert(batch, block, payloads, deadline_ms=deadline_ms, timeout_s=limits.insert_timeout_s)
    return receipt
