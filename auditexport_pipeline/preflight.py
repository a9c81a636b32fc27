"""The preflight: everything that can keep a setup from exporting exactly once, checked before anything is claimed.

When checks are carried out, the clocks, and what the ledger remembers. What each database is asked is in its `checks` and
`table_checks`. Nothing is created or changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.catalogue import Catalogue as ClickHouse
from auditexport_pipeline.clickhouse.checks import clickhouse_checks
from auditexport_pipeline.clickhouse.connection import translated as clickhouse_errors
from auditexport_pipeline.clickhouse.table_checks import table_checks as clickhouse_checks_of_every_run
from auditexport_pipeline.core.batch import VIEW_BARS
from auditexport_pipeline.core.claiming import LOOK_FOR_WHO_CLEARS
from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig, SetupIncomplete
from auditexport_pipeline.core.findings import Check, Checking, CheckResult, Finding, all_findings, carry_out, warning
from auditexport_pipeline.core.settings import RETENTION_DAYS
from auditexport_pipeline.core.status import newest_of_each_view
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.mysql.catalogue import Catalogue as MySQL
from auditexport_pipeline.mysql.checks import mysql_checks, mysql_checks_of_every_run
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.status import SQL as STATUS_SQL
from auditexport_pipeline.mysql.status import cleared_often, read_open_batches, view_failures
from auditexport_pipeline.roles import Role
from auditexport_pipeline.sql import load

_MYSQL = load("mysql/checks.sql")
_CLICKHOUSE = load("clickhouse/checks.sql")
# Full checks without a fatal finding are cached for so long. What a failover, a restart or one statement of somebody
# can change at any moment (read-only, binlog_format, engine, window, the ledger's head) is checked by every run.
CLEAN_FOR_S = 300.0
# Clocks that are kept agree to milliseconds; a minute is one that nobody keeps.
SKEW_MS = 60_000

# By process and URLs. Threads share it: each access is one operation of the dictionary.
_clean_until_s: dict[tuple[int, str, str], float] = {}


def _host_ms() -> float:
    return time.time() * 1000


def examine(
    outbox: MySQLOutbox,
    log: ClickHouseAuditLog,
    *,
    role: Role = Role.EXPORTER,
    retention_days: int = RETENTION_DAYS,
    host_ms: Callable[[], float] = _host_ms,
) -> list[CheckResult]:
    """The results of all checks for `role`, in order; reads only.

    A database that does not answer is a finding too, and does not keep the other one from being checked.
    """
    results: list[CheckResult] = []
    answers = [
        _answers(results, "MySQL", lambda: _mysql(outbox, role)),
        _answers(results, "ClickHouse", lambda: _clickhouse(log, role, retention_days)),
    ]
    if all(answers):
        results.append(Check("clocks", _clocks(outbox, log, host_ms)).carry_out())
    with suppress(AuditExportError):  # a ledger that is missing, or that our user may not read, is a finding above
        results.append(Check("materialized views", _views(outbox)).carry_out())
        results.append(Check("cleared marks", _cleared(outbox)).carry_out())
    return results


def check(
    outbox: MySQLOutbox, log: ClickHouseAuditLog, *, role: Role = Role.EXPORTER, retention_days: int = RETENTION_DAYS
) -> list[Finding]:
    """The findings of `examine`, empty when nothing is wrong."""
    return all_findings(examine(outbox, log, role=role, retention_days=retention_days))


def refuse_unless_ready(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> None:
    """Raises `SetupIncomplete` with every fatal finding; called before anything is claimed.

    A database that does not answer is no finding here but its own error, which a rerun can fix. After checks
    without a fatal finding, this process checks only what can have changed for the next `CLEAN_FOR_S` seconds.
    """
    key = (os.getpid(), outbox.url, log.url)
    clean = time.monotonic() < _clean_until_s.get(key, 0.0)
    results = _of_every_run(outbox, log) if clean else _everything(outbox, log)
    fatal = [finding for finding in all_findings(results) if finding.fatal]
    if not fatal and not clean:
        _clean_until_s[key] = time.monotonic() + CLEAN_FOR_S
    if fatal:
        _clean_until_s.pop(key, None)
        raise SetupIncomplete("nothing was claimed. " + " — ".join(map(str, fatal)))


def forget() -> None:
    """The next run checks everything again."""
    _clean_until_s.clear()


def _everything(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> Iterator[CheckResult]:
    yield from _mysql(outbox, Role.EXPORTER)
    yield from _clickhouse(log, Role.EXPORTER, RETENTION_DAYS)
    yield Check("clocks", _clocks(outbox, log, _host_ms)).carry_out()


def _of_every_run(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> Iterator[CheckResult]:
    with outbox.transaction("checking MySQL's settings") as connection:
        yield from carry_out(mysql_checks_of_every_run(MySQL(connection, outbox.url, Role.EXPORTER)))
    with clickhouse_errors("checking the table"):
        db = ClickHouse(log.connection, log.url, Role.EXPORTER, RETENTION_DAYS)
        yield from carry_out(clickhouse_checks_of_every_run(db, fully=False))


def _mysql(outbox: MySQLOutbox, role: Role) -> list[CheckResult]:
    with outbox.transaction("checking MySQL") as connection:
        return carry_out(mysql_checks(MySQL(connection, outbox.url, role)))


def _clickhouse(log: ClickHouseAuditLog, role: Role, retention_days: int) -> list[CheckResult]:
    with clickhouse_errors("checking ClickHouse"):
        log.connection.read_settings_again()
        return carry_out(clickhouse_checks(ClickHouse(log.connection.lenient(), log.url, role, retention_days)))


def _answers(results: list[CheckResult], server: str, carry_out_all: Callable[[], list[CheckResult]]) -> bool:
    variable = f"AUDITEXPORT_{server.upper()}_URL"
    try:
        results.extend(carry_out_all())
    except InvalidConfig:
        raise
    except AuditExportError as error:
        finding = Finding(
            what=str(error),
            breaks="nothing can be exported",
            fix=f"from this host, with the user of {variable}, connect to the server yourself; start it, let it through the firewall, "
            f"or correct {variable}",
        )
        seen = "no answer" if error.__cause__ else "refused"
        results.append(CheckResult(about=f"{server} connection", seen=seen, findings=(finding,)))
        return False
    return True


def _views(outbox: MySQLOutbox) -> Checking:
    """No materialized view failed within the last day, and none keeps a batch out, as the ledger remembers."""
    with outbox.transaction("reading the ledger") as connection:
        now_ms = int(connection.execute(STATUS_SQL["now_ms"]).scalar_one())
        failures = view_failures(connection, now_ms)
        barred = [one for one in read_open_batches(connection, now_ms) if one.last_error.startswith(VIEW_BARS)]
    for batch in barred[:1]:
        yield warning(
            what=f"batch {batch.batch_id}: {batch.last_error}",
            breaks="no INSERT that this view fails on is stored, and every run with such rows fails",
            fix="fix or drop the view; the next run sends the rows",
        )
    for batch_id, note in newest_of_each_view(failures).items():
        yield warning(
            what=f"batch {batch_id}: {note}",
            breaks="the export goes on; the view's target lacks these entries",
            fix="fix or drop the view, then fill its target as runbook.md says under A view fails",
        )
    if barred:
        return f"{len(barred):,} {'batch is' if len(barred) == 1 else 'batches are'} kept out by one"
    if failures:
        return f"failed on {len(failures):,} {'batch' if len(failures) == 1 else 'batches'} of the last day"
    return "none failed in the last day"


def _cleared(outbox: MySQLOutbox) -> Checking:
    """Nobody keeps clearing marks, as an event or a job of the application can."""
    with outbox.transaction("asking for the time") as connection:
        now_ms = int(connection.execute(STATUS_SQL["now_ms"]).scalar_one())
    often = cleared_often(outbox, now_ms)
    if often is None:
        return "none that keep being cleared"
    yield warning(
        what=str(often),
        breaks="the same events are exported again by each drain; ClickHouse merges the copies, and readers of the raw table see "
        "them until then",
        fix=LOOK_FOR_WHO_CLEARS,
    )
    return "cleared again and again"


def _clocks(outbox: MySQLOutbox, log: ClickHouseAuditLog, host_ms: Callable[[], float]) -> Checking:
    """The clocks of both servers and of this host agree. The time that a question takes is not skew."""

    def ahead_ms(ask: Callable[[], object]) -> float:
        """How far the server's clock is ahead of this host's, in the middle of the question."""
        before_ms = host_ms()
        now_ms = int(str(ask()))
        return now_ms - (before_ms + host_ms()) / 2

    with outbox.transaction("asking for the time") as connection:
        connection.exec_driver_sql(_MYSQL["now"])
        mysql_ms = ahead_ms(lambda: connection.exec_driver_sql(_MYSQL["now"]).scalar_one())
    with clickhouse_errors("asking for the time"):
        client = log.connection.lenient()
        client.listed()
        clickhouse_ms = ahead_ms(lambda: client.query(_CLICKHOUSE["now"]).result_rows[0][0])
    apart_ms = mysql_ms - clickhouse_ms
    if abs(apart_ms) > SKEW_MS:
        drops = apart_ms < -DAY_MS
        yield Finding(
            what=f"MySQL's clock is {abs(apart_ms) / 1000:,.0f} s {'ahead of' if apart_ms > 0 else 'behind'} ClickHouse's",
            breaks="entries are stamped by MySQL and expire by ClickHouse: months and retention shift by as much"
            + (", and entries can be dropped before they are verified" if drops else "")
            + "; leases and deadlines each use one clock and are not affected",
            fix="set both by NTP (`chronyc tracking` on each host says how far off it is)",
            fatal=drops,
        )
    if max(abs(mysql_ms), abs(clickhouse_ms)) > SKEW_MS and abs(mysql_ms) + abs(clickhouse_ms) > abs(apart_ms) + 1000:
        yield warning(
            what=f"this host's clock is {abs(mysql_ms) / 1000:,.0f} s {'behind' if mysql_ms > 0 else 'ahead of'} MySQL's",
            breaks="its log lines and Dagster's times do not match the databases', and certificates may look expired; nothing that "
            "is exported depends on it",
            fix="set it by NTP (`chronyc makestep`)",
        )
    return f"MySQL {mysql_ms / 1000:+.2f} s, ClickHouse {clickhouse_ms / 1000:+.2f} s from this host"
