"""Runs inside the old release: one JSON request a line on standard input, one JSON answer a line on standard output.

Imports of `auditexport_pipeline` and `auditexport_tests` are the old release's here; nothing of the new one is used.
"""

import json
import sys
import traceback

from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.stores import preflight, setup
from auditexport_pipeline.stores.audit_log import ClickHouseAuditLog
from auditexport_pipeline.stores.outbox import MySQLOutbox
from auditexport_tests.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain

claiming.SMALLEST_BLOCK_ROWS = 10
# 7233b52 sends this setting to every server; ClickHouse before 26.9 refuses it, and whoever ran 7233b52 ran 26.9.


def answer(**values):
    print(json.dumps(values), flush=True)


def wait_for_word():
    answer(paused=True)
    sys.stdin.readline()


def drained(request):
    """One drain, which ends at its crash point, or pauses there until the next line comes."""
    outbox, log = MySQLOutbox(request["mysql_url"]), ClickHouseAuditLog(request["clickhouse_url"])
    point = CrashPoint(request["crash_at"], wait_for_word if request.get("pause") else None)
    try:
        claims = drain(
            CrashingOutbox(outbox, point),
            CrashingAuditLog(log, point),
            Limits(**request["limits"]),
            owner=request["owner"],
            dead_owners=request.get("dead_owners", ()),
        )
    except Crash:
        return {"crashed": True}
    except AuditExportError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        outbox.engine.dispose()
        log.client().close_connections()
    return {"claimed": len(claims), "reached": point.reached}


def created(request):
    outbox, log = MySQLOutbox(request["mysql_url"]), ClickHouseAuditLog(request["clickhouse_url"])
    return {"created": setup.create(outbox, log, with_outbox=True)}


def checked(request):
    outbox, log = MySQLOutbox(request["mysql_url"]), ClickHouseAuditLog(request["clickhouse_url"])
    return {"fatal": [str(finding) for finding in preflight.check(outbox, log) if finding.fatal]}


VERBS = {"drain": drained, "create": created, "check": checked}

for line in sys.stdin:
    request = json.loads(line)
    try:
        answer(**VERBS[request.pop("verb")](request))
    except Exception:
        answer(unforeseen=traceback.format_exc())
