"""The preflight: before anything is claimed, it checks all that can keep a setup from exporting exactly once.

This module decides when checks run, and has those of the clocks and of the ledger's records. The checks of each
database are in its `checks` and `table_checks`. Nothing is created or changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.catalogue import Catalogue as ClickHouse
from auditexport_pipeline.clickhouse.checks import clickhouse_checks
from auditexport_pipeline.clickhouse.table_checks import table_checks as clickhouse_checks_of_every_run
from auditexport_pipeline.core.advice import Severity, advice
from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig, SetupIncomplete
from auditexport_pipeline.core.findings import Check, Checking, CheckResult, Finding, all_findings, carry_out, warning
from auditexport_pipeline.core.settings import RETENTION_DAYS, Targets
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.mysql.catalogue import Catalogue as MySQL
from auditexport_pipeline.mysql.checks import mysql_checks, mysql_checks_of_every_run
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.status import read_status
from auditexport_pipeline.roles import Role
from auditexport_pipeline.sql import load

_MYSQL = load("mysql/checks.sql")
_CLICKHOUSE = load("clickhouse/checks.sql")
# Full checks without a fatal finding are cached for this many seconds. Every run checks what a failover, a restart or one
# statement can change at any moment: read-only, binlog_format, engine, window, the ledger's head.
CLEAN_FOR_S = 300.0
# Clocks with NTP agree to milliseconds.
SKEW_MS = 60_000
_BREAKS = {
    ("views", Severity.ERROR): "no INSERT that this view fails on is stored, and every run with such rows fails",
    ("views", Severity.WARNING): "the export goes on; the view's target lacks these entries",
    (
        "cleared",
        Severity.WARNING,
    ): "the same events are exported again by each drain; ClickHouse merges the copies, and readers "
    "of the raw table see them until then",
}

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

    A database that does not answer is a finding too; the other one is checked all the same.
    """
    mysql = _answers("MySQL", lambda: _mysql(outbox, role))
    clickhouse = _answers("ClickHouse", lambda: _clickhouse(log, role, retention_days))
    results = [*mysql, *clickhouse]
    if not any(result.about.endswith(" connection") for result in results):
        results.append(Check("clocks", _clocks(outbox, log, host_ms)).carry_out())
    with suppress(AuditExportError):  # a ledger that is missing, or that our user may not read, is a finding above
        results.extend(_of_ledger(outbox))
    return results


def check(
    outbox: MySQLOutbox, log: ClickHouseAuditLog, *, role: Role = Role.EXPORTER, retention_days: int = RETENTION_DAYS
) -> list[Finding]:
    """The findings of `examine`, empty when nothing is wrong."""
    return all_findings(examine(outbox, log, role=role, retention_days=retention_days))


def refuse_unless_ready(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> None:
    """Raises `SetupIncomplete` with every fatal finding; called before anything is claimed.

    A database that does not answer raises its own error, which a rerun can fix. After checks without a fatal finding,
    this process only checks what can change at any moment, for the next `CLEAN_FOR_S` seconds.
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
    with log.connection.translated("checking the table"):
        db = ClickHouse(log.connection, log.url, Role.EXPORTER, RETENTION_DAYS)
        yield from carry_out(clickhouse_checks_of_every_run(db, fully=False))


def _mysql(outbox: MySQLOutbox, role: Role) -> list[CheckResult]:
    with outbox.transaction("checking MySQL") as connection:
        return carry_out(mysql_checks(MySQL(connection, outbox.url, role)))


def _clickhouse(log: ClickHouseAuditLog, role: Role, retention_days: int) -> list[CheckResult]:
    with log.connection.translated("checking ClickHouse"):
        log.connection.read_settings_again()
        return carry_out(clickhouse_checks(ClickHouse(log.connection.lenient(), log.url, role, retention_days)))


def _answers(server: str, carry_out_all: Callable[[], list[CheckResult]]) -> list[CheckResult]:
    try:
        return carry_out_all()
    except InvalidConfig:
        raise
    except AuditExportError as error:
        variable = f"AUDITEXPORT_{server.upper()}_URL"
        finding = Finding(
            what=str(error),
            breaks="nothing can be exported",
            fix=f"from this host, with the user of {variable}, connect to the server yourself; start it, let it through the firewall, "
            f"or correct {variable}",
        )
        seen = "no answer" if error.__cause__ else "refused"
        return [CheckResult(about=f"{server} connection", seen=seen, findings=(finding,))]


def _of_ledger(outbox: MySQLOutbox) -> Iterator[CheckResult]:
    """Materialized views that failed within the last day, and marks that are cleared again and again, as in `core.advice`."""
    advised = advice(read_status(outbox), Targets())
    for name, about, clean in (
        ("materialized views", "views", "none failed in the last day"),
        ("cleared marks", "cleared", "none that keep being cleared"),
    ):
        findings = tuple(
            warning(what=one.what, breaks=_BREAKS[about, one.severity], fix=one.fix)
            for one in advised
            if one.about == about
        )
        yield CheckResult(about=name, seen="see below" if findings else clean, findings=findings)


def _clocks(outbox: MySQLOutbox, log: ClickHouseAuditLog, host_ms: Callable[[], float]) -> Checking:
    """The clocks of both servers and of this host agree, without the time that the answers take."""

    def ahead_ms(read: Callable[[], object]) -> float:
        """How far the server's clock is ahead of this host's, in the middle of the request."""
        before_ms = host_ms()
        now_ms = int(str(read()))
        return now_ms - (before_ms + host_ms()) / 2

    with outbox.transaction("reading the time") as connection:
        connection.exec_driver_sql(_MYSQL["now"])
        mysql_ms = ahead_ms(lambda: connection.exec_driver_sql(_MYSQL["now"]).scalar_one())
    with log.connection.translated("reading the time"):
        client = log.connection.lenient()
        client.listed()
        clickhouse_ms = ahead_ms(lambda: client.query(_CLICKHOUSE["now"])[0][0])
    apart_ms = mysql_ms - clickhouse_ms
    if abs(apart_ms) > SKEW_MS:
        drops = apart_ms < -DAY_MS
        yield Finding(
            what=f"MySQL's clock is {abs(apart_ms) / 1000:,.0f} s {'ahead of' if apart_ms > 0 else 'behind'} ClickHouse's",
            breaks="entries have MySQL's time and expire by ClickHouse's: months and retention shift by as much"
            + (", and entries can be dropped before they are verified" if drops else "")
            + "; leases and deadlines each use one clock and are not affected",
            fix="set both by NTP (`chronyc tracking` shows the error of each host)",
            fatal=drops,
        )
    if max(abs(mysql_ms), abs(clickhouse_ms)) > SKEW_MS and abs(mysql_ms) + abs(clickhouse_ms) > abs(apart_ms) + 1000:
        yield warning(
            what=f"this host's clock is {abs(mysql_ms) / 1000:,.0f} s {'behind' if mysql_ms > 0 else 'ahead of'} MySQL's",
            breaks="its log lines and Dagster's times do not match the databases', and certificates may look expired; the export "
            "does not depend on it",
            fix="set it by NTP (`chronyc makestep`)",
        )
    return f"MySQL {mysql_ms / 1000:+.2f} s, ClickHouse {clickhouse_ms / 1000:+.2f} s from this host"
