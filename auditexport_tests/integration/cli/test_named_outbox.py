"""With several outboxes, every command that the CLI or a report shows names the outbox that it is about."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from auditexport_pipeline.cli import main
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import events
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import Prompt, prompt_in

NAMED = "auditexport --outbox eu "
WITHOUT_NAME = re.compile(rf"auditexport (?:{'|'.join(main.commands)})\b")


@pytest.fixture
def prompt(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """Two outboxes, of which `eu` has a dead letter, a lost entry and a row of an unknown version."""
    entries = [
        {"name": name, "mysql_url_env": f"{name.upper()}_MYSQL", "clickhouse_url_env": f"{name.upper()}_CLICKHOUSE"}
        for name in ("eu", "us")
    ]
    path = tmp_path / "outboxes.yaml"
    path.write_text(yaml.safe_dump({"outboxes": entries}))
    stack.put(*events(3), ("ws_1", "evt_dead", "[]"))
    drain(stack.outbox, stack.log, Limits(), owner="one")
    stack.put(("ws_1", "evt_unknown", "{}"), version="audit_log.v99")
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_1'", settings={"mutations_sync": 2}
    )
    environment = {"EU_MYSQL": stack.mysql_url, "EU_CLICKHOUSE": stack.clickhouse_url, "COLUMNS": "200"}
    return prompt_in({**environment, "AUDITEXPORT_OUTBOXES": str(path), "AUDITEXPORT_OUTBOX": "eu"}, monkeypatch)


def test_every_command_that_is_shown_names_its_outbox(prompt: Prompt, stack: Stack, tmp_path: Path) -> None:
    """An operator copies the command at night, and without the name it is refused or repairs another outbox."""
    page = tmp_path / "page.html"
    shown = {"reconcile": prompt("reconcile", "--report", str(page), status=1).output}
    shown["page of reconcile"] = page.read_text()
    shown["status"] = prompt("status", "--report", str(page), status=1).output
    shown["page of status"] = page.read_text()
    shown["status --json"] = json.dumps(json.loads(prompt("status", "--json", status=1).output)["todo"])
    stack.sql("DROP TABLE clickhouse_outbox_dead_letter")
    shown["doctor"] = prompt("doctor", status=1).output
    shown["doctor --json"] = prompt("doctor", "--json", status=1).output
    shown["drain"] = prompt("drain", status=2).output
    for name, text in shown.items():
        assert not WITHOUT_NAME.search(text), (name, WITHOUT_NAME.findall(text))
        assert NAMED in text, name
