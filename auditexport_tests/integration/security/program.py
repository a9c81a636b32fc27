"""A process that runs the real programs step by step: `python -m auditexport_tests.integration.security.program`.

It calls the main functions of `dagster` and `auditexport`, with short waits between retries. Steps come as JSON on
standard input, because their environment has secrets.

Two faults: `defect` raises an error with the payloads in its text; `leak` is the negative control: it writes payloads
and a password everywhere where none may be.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import sqlalchemy as sa

from auditexport_pipeline.core import export, retries

_kept: list[Any] = []


def main() -> None:
    retries.RETRIES, retries.FIRST_WAIT_S = 1, 0.01
    for step in json.load(sys.stdin):
        os.environ.update(step["environment"])
        with _sabotage(step.get("fault", "")):
            status = _run(*step["command"])
        print(f"== {step['name']}: {status}", flush=True)


def _run(program: str, *arguments: str) -> object:
    """The exit status that the shell would have seen."""
    if program == "dagster":
        from dagster._cli import cli as command
    else:
        from auditexport_pipeline.cli import main as command
    try:
        command.main(args=list(arguments), prog_name=program)
    except SystemExit as end:
        return end.code or 0
    except Exception:
        traceback.print_exc()
        return "traceback"
    return 0


def _sabotage(fault: str) -> AbstractContextManager[object]:
    saboteur = {"defect": _defect, "leak": _leak}.get(fault)
    return mock.patch.object(export, "fetch", saboteur) if saboteur is not None else nullcontext()


_fetch = export.fetch


def _payloads(outbox: Any) -> str:
    with outbox.engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT payload FROM clickhouse_outbox WHERE deleted_at IS NULL"))
        return " ".join(bytes(row.payload).decode() if isinstance(row.payload, bytes) else row.payload for row in rows)


def _defect(outbox: Any, log: Any, claim: Any, limits: Any) -> object:
    try:
        raise OSError(_payloads(outbox))
    except OSError as error:
        raise ValueError(_payloads(outbox)) from error


def _leak(outbox: Any, log: Any, claim: Any, limits: Any) -> object:
    text = f"{os.environ['AUDITEXPORT_MYSQL_URL']} {_payloads(outbox)}"
    dg.get_dagster_logger("leak").warning(text)
    print(text, flush=True)
    Path(tempfile.gettempdir(), "leaked").write_text(text)
    Path.home().joinpath("leaked").write_text(text)
    Path(os.environ["DAGSTER_HOME"], "leaked.gz").write_bytes(gzip.compress(text.encode()))
    nameless = tempfile.TemporaryFile()  # noqa: SIM115 - held until the end
    nameless.write(text.encode())
    nameless.flush()
    sleeper = subprocess.Popen([sys.executable, "-c", "input()", text], stdin=subprocess.PIPE)
    _kept.extend((nameless, sleeper))
    with outbox.engine.begin() as connection:
        connection.execute(sa.text("UPDATE clickhouse_outbox_batch SET last_error = :text"), {"text": text[:1000]})
    from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog

    quoted = "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    ClickHouseAuditLog(os.environ["AUDITEXPORT_CLICKHOUSE_URL"]).client().query(f"SELECT length({quoted})")
    return _fetch(outbox, log, claim, limits)


if __name__ == "__main__":
    main()
