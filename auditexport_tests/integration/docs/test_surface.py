"""What other people rely on by name changes on purpose only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from auditexport_pipeline.cli import main
from auditexport_pipeline.definitions import defs
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, empty_home, event, events, exporter, home
from auditexport_tests.support import surface
from auditexport_tests.support.prompts import urls

__all__ = ["empty_home", "exporter", "home"]
SNAPSHOT = Path(__file__).with_name("surface.txt")


def test_the_public_surface_is_as_it_was_written_down(
    stack: Stack, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that changes breaks a user's dashboard, script or code location.

    To change it on purpose, run this with AUDITEXPORT_TEST_RENEW_SURFACE=1, and say in CHANGELOG.md what is new.
    """
    found = "\n".join(_surface(stack, exporter, monkeypatch)) + "\n"
    if os.environ.get("AUDITEXPORT_TEST_RENEW_SURFACE"):
        SNAPSHOT.write_text(found)
    assert found == SNAPSHOT.read_text()


def _surface(stack: Stack, exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for variable, url in urls(stack).items():
        monkeypatch.setenv(variable, url)
    stack.put(*events(4), event("evt_bad", event=None), ("ws_1", "evt_unknown", "{}"))
    stack.sql("UPDATE clickhouse_outbox SET version = 'unknown.v1' WHERE event_id = 'evt_unknown'")
    drained = exporter.drain()
    reported = [*surface.metadata(drained.all_events)]
    shown: list[str] = []

    def show(*words: str) -> None:
        printed = CliRunner().invoke(main, [*words, "--json"], catch_exceptions=False).stdout
        called = surface.without_numbers(" ".join(words))
        shown.extend(f"{called}: {key}" for key in surface.json_keys(printed))

    letter = stack.sql("SELECT pk FROM clickhouse_outbox_dead_letter")[0].pk
    show("dead-letters", "list")
    show("dead-letters", "show", str(letter))
    show("batches", "list")
    show("batches", "show", "1")
    show("doctor")
    show("status")
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_1' SETTINGS mutations_sync = 2")
    show("reconcile")
    show("reconcile", "--repair", "--why", "a loss")
    show("requeue", "--event-id", "evt_2", "--why", "again", "--dry-run")
    show("requeue", "--event-id", "evt_2", "--why", "again")
    show("drain")
    show("erasures", "add", "--workspace", "ws_2", "--who", "an auditor", "--why", "asked for")
    show("erasures", "list")
    show("sweep", "--outbox-days", "0", "--dry-run")
    show("init")
    jobs: dict[str, dict[str, object]] = {
        "audit_log_checks": {},
        "reconcile_audit_logs": {},
        "sweep_exported_rows": {},
        "requeue_events": {"requeue_rows": {"config": {"event_ids": ["evt_2"], "why": "again"}}},
        "retry_dead_letters": {"retry_letters": {"config": {"pks": [letter], "why": "again"}}},
    }
    for job, ops in jobs.items():
        done = defs.resolve_job_def(job).execute_in_process(
            instance=exporter.instance, raise_on_error=False, run_config={"ops": ops} if ops else {}
        )
        reported += [f"{job}: {line}" for line in surface.metadata(done.all_events)]
    mysql = stack.sql(
        "SELECT table_name AS of_table, column_name AS named FROM information_schema.columns WHERE table_schema = DATABASE()"
    )
    clickhouse = stack.clickhouse("SELECT table, name, type FROM system.columns WHERE database = currentDatabase()")
    sections = {
        "what the package exports": surface.exports(),
        "variables": surface.variables(),
        "commands": surface.commands(),
        "--json": shown,
        "Dagster": surface.definitions(),
        "metadata of a run": reported,
        "component": surface.component(),
        "metrics": surface.metrics(CliRunner().invoke(main, ["metrics"]).stdout),
        "MySQL": (f"{row.of_table}.{row.named}" for row in mysql),
        "ClickHouse": (f"{table}.{name}: {kind}" for table, name, kind in clickhouse),
    }
    return [line for title, lines in sections.items() for line in surface.section(title, lines)]
