"""ClickHouse's query log has no payload of a comparison: read from the log of a server that keeps one."""

from __future__ import annotations

from pathlib import Path

import pytest

from auditexport_pipeline.clickhouse import audit_log
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_tests.support.builders import event, run
from auditexport_tests.support.own_clickhouse import OwnClickHouse

QUERY_LOG = "<query_log><database>system</database><table>query_log</table></query_log>"
SECRET = "5d1e-of-a-tenant"


def test_a_comparison_leaves_no_payload_in_the_query_log(
    mysql_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statement's own SETTINGS must keep it out, for proxies drop the settings of a URL. Without them, it is there."""
    with OwnClickHouse(mysql_server, tmp_path, QUERY_LOG).running() as own:
        stack = own.new_stack()
        command = stack.log.client().command
        stack.put(*(event(f"evt_{number}", description=SECRET) for number in range(3)))
        run(stack)
        command(
            "ALTER TABLE audit_logs_raw_v1 UPDATE source = 'altered' WHERE event_id = 'evt_1' SETTINGS mutations_sync = 2"
        )
        for logged in (False, True):
            if logged:
                monkeypatch.setattr(audit_log, "CONTENT_SETTINGS", {})
            report = reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62)
            assert str(report.found) == "1 altered"
            command("SYSTEM FLUSH LOGS")
            assert int(str(command("SELECT count() FROM system.query_log WHERE query LIKE 'SELECT%'"))) > 0
            names = command("SELECT name FROM system.columns WHERE database = 'system' AND table = 'query_log'")
            # The secret is written in two halves, for the log has these statements too; and it has those by which the
            # embedded server hands a request's parameters to its engine.
            where = f"query NOT LIKE 'SET param_%' AND position(toString(§), '{SECRET[:4]}' || '{SECRET[4:]}') > 0"
            found = [
                name
                for name in str(names).split()
                if int(str(command(f"SELECT count() FROM system.query_log WHERE {where.replace('§', name)}"))) > 0
            ]
            assert "query" in found if logged else found == []
