"""What ClickHouse's query log keeps of a comparison: the log of a server that keeps one, not what a gate thinks of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from auditexport_pipeline.clickhouse import audit_log
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import fresh_stack
from auditexport_tests.integration.dagster.conftest import event
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.engines import local_clickhouse

CONFIG = "<clickhouse><query_log><database>system</database><table>query_log</table></query_log></clickhouse>"
SECRET = "5d1e-said-to-nobody"


@pytest.mark.parametrize("told", [True, False])
def test_a_comparison_leaves_no_payload_in_the_query_log(
    mysql_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """The statement's own SETTINGS have to keep it out, for proxies take settings off a URL. Untold, it is there."""
    if not told:
        monkeypatch.setattr(audit_log, "CONTENT_SETTINGS", {})
    config = tmp_path / "config.xml"
    config.write_text(CONFIG)
    with (
        local_clickhouse(tmp_path / "clickhouse", config=config) as server,
        fresh_stack(mysql_server, server.url.removesuffix("default")) as stack,
    ):
        ask = stack.log.client().command
        stack.put(*(event(f"evt_{number}", description=SECRET) for number in range(3)))
        drain(stack.outbox, stack.log, Limits(), owner="run_1")
        ask(
            "ALTER TABLE audit_logs_raw_v1 UPDATE source = 'altered' WHERE event_id = 'evt_1' SETTINGS mutations_sync = 2"
        )
        report = reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62)
        assert str(report.found) == "1 altered"
        ask("SYSTEM FLUSH LOGS")
        assert int(str(ask("SELECT count() FROM system.query_log WHERE query LIKE 'SELECT%'"))) > 0
        names = ask("SELECT name FROM system.columns WHERE database = 'system' AND table = 'query_log'")
        # Spelled in two halves, for the log keeps these statements, too.
        # And it keeps those by which the embedded server hands a request's parameters to its engine.
        looks = f"query NOT LIKE 'SET param_%' AND position(toString(§), '{SECRET[:4]}' || '{SECRET[4:]}') > 0"
        found = [
            name
            for name in str(names).split()
            if int(str(ask(f"SELECT count() FROM system.query_log WHERE {looks.replace('§', name)}"))) > 0
        ]
    assert ("query" in found) is not told
    assert not told or found == []
