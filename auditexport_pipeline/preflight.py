"""The preflight: what stands between a setup and exactly-once, asked before anything is claimed.

What belongs here: when to look, whose clock to hold against whose, and what a run remembers of the last look. What
does not: what is asked (`mysql.checks`, `clickhouse.checks`), and creating anything.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.checks import look_at_clickhouse, look_at_the_table
from auditexport_pipeline.clickhouse.connection import translated as clickhouse_errors
from auditexport_pipeline.clickhouse.version_checks import look_at_other_versions
from auditexport_pipeline.core.batch import VIEW_BARS
from auditexport_pipeline.core.claiming import LOOK_FOR_WHO_CLEARS
from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig, SetupIncomplete
from auditexport_pipeline.core.findings import Finding, Look, all_findings
from auditexport_pipeline.core.limits import RETENTION_DAYS
from auditexport_pipeline.core.status import newest_of_each_view
from auditexport_pipeline.mysql.checks import look_at_mysql, look_at_what_changes
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.status import SQL as STATUS_SQL
from auditexport_pipeline.mysql.status import cleared_often, read_open_batches, view_failures
from auditexport_pipeline.roles import Role
from auditexport_pipeline.sql import load

_MYSQL = load("mysql/checks.sql")
_CLICKHOUSE = load("clickhouse/checks.sql")
# For so long a clean look is not repeated in full. What a failover, a restart or one statement of somebody turns
# bad at any moment (read-only, binlog_format, engine, window, the ledger's head) is asked by every run all the same.
CLEAN_FOR_S = 300.0
# Clocks that are kept agree to milliseconds; a minute is one that nobody keeps.
SKEW_MS = 60_000
DAY_MS = 86_400_000

_clean_until_s: dict[tuple[int, str, str], float] = {}
_remembering = threading.Lock()


def examine(
    outbox: MySQLOutbox,
    log: ClickHouseAuditLog,
    *,
    role: Role = Role.EXPORTER,
    retention_days: int = RETENTION_DAYS,
    host_ms: Callable[[], float] = lambda: time.time() * 1000,
) -> list[Look]:
    """Everything that is looked at for `role`, in order, each with its findings; reads only.

    A database that does not answer is a finding too, and does not keep the other from being looked at.
    """
    looks: list[Look] = []
    answers = [_answers(looks, "MySQL", lambda: _mysql(outbox, role))]
    answers.append(_answers(looks, "ClickHouse", lambda: _clickhouse(log, role, retention_days)))
    if all(answers):
        looks.append(_clocks(outbox, log, host_ms))
    with suppress(AuditExportError):  # without the ledger, or without a grant on it, the looks above have said so
        looks.append(_views(outbox))
        looks.append(_cleared(outbox))
    return looks


def check(
    outbox: MySQLOutbox, log: ClickHouseAuditLog, *, role: Role = Role.EXPORTER, retention_days: int = RETENTION_DAYS
) -> list[Finding]:
    """The findings of `examine`, empty when nothing is wrong."""
    return all_findings(examine(outbox, log, role=role, retention_days=retention_days))


def refuse_unless_ready(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> None:
    """Raises `SetupIncomplete` with every fatal finding; called before anything is claimed.

    A database that does not answer is no finding here but its own error, which a rerun can mend. After a look
    without a fatal finding, this process asks only what can have changed for the next `CLEAN_FOR_S` seconds.
    """
    key = (os.getpid(), outbox.url, log.url)
    with _remembering:
        clean = time.monotonic() < _clean_until_s.get(key, 0.0)
    looks = [*_what_changes(outbox, log)] if clean else [*_everything(outbox, log)]
    fatal = [finding for finding in all_findings(looks) if finding.fatal]
    with _remembering:
        if fatal:
            _clean_until_s.pop(key, None)
        elif not clean:
            _clean_until_s[key] = time.monotonic() + CLEAN_FOR_S
    if fatal:
        raise SetupIncomplete("nothing was claimed. " + " — ".join(map(str, fatal)))


def forget() -> None:
    """The next run looks at everything again."""
    with _remembering:
        _clean_until_s.clear()


def _everything(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> Iterator[Look]:
    yield from _mysql(outbox, Role.EXPORTER)
    yield from _clickhouse(log, Role.EXPORTER, RETENTION_DAYS)
    yield _clocks(outbox, log, lambda: time.time() * 1000)


def _what_changes(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> Iterator[Look]:
    with outbox.transaction("checking MySQL's settings") as connection:
        yield from look_at_what_changes(connection, Role.EXPORTER)
    with clickhouse_errors("checking the table"):
        yield from look_at_the_table(log.connection, log.url, Role.EXPORTER, RETENTION_DAYS, fully=False)
        yield from look_at_other_versions(log.connection, log.url, Role.EXPORTER, fully=False)


def _mysql(outbox: MySQLOutbox, role: Role) -> list[Look]:
    with outbox.transaction("checking MySQL") as connection:
        return list(look_at_mysql(connection, outbox.url, role))


def _clickhouse(log: ClickHouseAuditLog, role: Role, retention_days: int) -> list[Look]:
    with clickhouse_errors("checking ClickHouse"):
        log.connection.read_settings_again()
        return list(look_at_clickhouse(log.connection.lenient(), log.url, role, retention_days))


def _answers(looks: list[Look], server: str, look: Callable[[], list[Look]]) -> bool:
    variable = f"AUDITEXPORT_{server.upper()}_URL"
    try:
        looks.extend(look())
    except InvalidConfig:
        raise
    except AuditExportError as error:
        finding = Finding(
            what=str(error),
            breaks="nothing can be exported",
            fix=f"from this host, with the user of {variable}, connect to the server yourself; start it, open the way, "
            f"or mend {variable}",
        )
        looks.append(
            Look(about=f"{server} connection", seen="no answer" if error.__cause__ else "refused", findings=(finding,))
        )
        return False
    return True


def _views(outbox: MySQLOutbox) -> Look:
    """The materialized views that failed within the last day, or that keep a batch out, as the ledger remembers."""
    with outbox.transaction("reading the ledger") as connection:
        now_ms = int(connection.execute(STATUS_SQL["now_ms"]).scalar_one())
        failures = view_failures(connection, now_ms)
        barred = [one for one in read_open_batches(connection, now_ms) if one.last_error.startswith(VIEW_BARS)]
    seen = f"failed on {len(failures):,} batches of the last day" if failures else "none failed in the last day"
    return Look(
        about="materialized views",
        seen=f"{len(barred):,} batches are kept out by one" if barred else seen,
        findings=(
            *(
                Finding(
                    what=f"batch {one.batch_id}: {one.last_error}",
                    breaks="no INSERT that this view fails on is stored, and every run with such rows fails",
                    fix="fix or drop the view; the next run sends the rows",
                    fatal=False,
                )
                for one in barred[:1]
            ),
            *(
                Finding(
                    what=f"batch {batch_id}: {note}",
                    breaks="the export goes on; whoever reads the view's target misses these entries",
                    fix="fix or drop the view, then fill its target as runbook.md says under A view fails",
                    fatal=False,
                )
                for batch_id, note in newest_of_each_view(failures).items()
            ),
        ),
    )


def _cleared(outbox: MySQLOutbox) -> Look:
    """Whether somebody keeps clearing marks, as an event or a job of the application can."""
    with outbox.transaction("asking for the time") as connection:
        now_ms = int(connection.execute(STATUS_SQL["now_ms"]).scalar_one())
    often = cleared_often(outbox, now_ms)
    finding = (
        ()
        if often is None
        else (
            Finding(
                what=str(often),
                breaks="the same events are exported again by each drain; ClickHouse merges the copies, and readers of the raw "
                "table see them until then",
                fix=LOOK_FOR_WHO_CLEARS,
                fatal=False,
            ),
        )
    )
    return Look(
        about="cleared marks",
        seen="cleared again and again" if often else "none that keep being cleared",
        findings=finding,
    )


def _clocks(outbox: MySQLOutbox, log: ClickHouseAuditLog, host_ms: Callable[[], float]) -> Look:
    """Each server's clock at a known moment of this host's, so that the time a question takes is not skew."""
    with outbox.transaction("asking for the time") as connection:
        connection.exec_driver_sql(_MYSQL["now"])
        before_ms = host_ms()
        now_ms = connection.exec_driver_sql(_MYSQL["now"]).scalar_one()
        mysql_ms = int(now_ms) - (before_ms + host_ms()) / 2
    with clickhouse_errors("asking for the time"):
        client = log.connection.lenient()
        client.listed()
        before_ms = host_ms()
        ((now_ms,),) = client.query(_CLICKHOUSE["now"]).result_rows
        clickhouse_ms = int(now_ms) - (before_ms + host_ms()) / 2
    apart_ms = mysql_ms - clickhouse_ms
    findings = []
    if abs(apart_ms) > SKEW_MS:
        findings.append(
            Finding(
                what=f"MySQL's clock is {abs(apart_ms) / 1000:,.0f} s {'ahead of' if apart_ms > 0 else 'behind'} ClickHouse's",
                breaks="entries are stamped by MySQL and expire by ClickHouse: months and retention shift by as much"
                + (", and entries can be dropped before they are verified" if apart_ms < -DAY_MS else "")
                + "; leases and deadlines each keep to one clock and hold",
                fix="set both by NTP (`chronyc tracking` on each host says how far off it is)",
                fatal=apart_ms < -DAY_MS,
            )
        )
    if max(abs(mysql_ms), abs(clickhouse_ms)) > SKEW_MS and abs(mysql_ms) + abs(clickhouse_ms) > abs(apart_ms) + 1000:
        findings.append(
            Finding(
                what=f"this host's clock is {abs(mysql_ms) / 1000:,.0f} s {'behind' if mysql_ms > 0 else 'ahead of'} MySQL's",
                breaks="its log lines and Dagster's times do not match the databases', and certificates may look expired; "
                "nothing that is exported depends on it",
                fix="set it by NTP (`chronyc makestep`)",
                fatal=False,
            )
        )
    seen = f"MySQL {mysql_ms / 1000:+.2f} s, ClickHouse {clickhouse_ms / 1000:+.2f} s from this host"
    return Look(about="clocks", seen=seen, findings=tuple(findings))
