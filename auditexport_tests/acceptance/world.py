"""Two databases as an application and an auditor see them, and the programs of the product as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pymysql

BIN = Path(sys.executable).parent
# A process of these tests takes a second or two; one that takes this long hangs.
TIMEOUT_S = 120.0


def event(event_id: str, workspace_id: str = "ws_1", **fields: Any) -> str:
    """The payload of an `audit_log.v1` event."""
    return json.dumps(
        {
            "event_id": event_id,
            "time": 1_700_000_000_000,
            "workspace_id": workspace_id,
            "bucket": "unkey_mutations",
            "source": "platform",
            "event": "key.create",
            "description": f"created {event_id}",
            "actor": {"type": "user", "id": "user_1"},
            **fields,
        }
    )


@dataclass(kw_only=True)
class World:
    """One MySQL database, one ClickHouse database, and what talks to them."""

    mysql_url: str
    clickhouse_url: str
    home: Path

    # ── the application's and the auditor's side ─────────────────────────────────────────────────

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """A connection of the application's, which commits when the block ends."""
        parts = urlsplit(self.mysql_url)
        connection = pymysql.connect(
            host=parts.hostname or "127.0.0.1",
            port=parts.port or 3306,
            user=parts.username or "root",
            password=parts.password or "",
            database=parts.path.lstrip("/"),
        )
        try:
            yield connection
            connection.commit()
        finally:
            connection.close()

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self.connection() as connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return list(cursor.fetchall())

    def put(
        self, *event_ids: str, version: str = "audit_log.v1", payload: str = "", workspace_id: str = "ws_1"
    ) -> None:
        """One transaction of the application's: an outbox row for each event."""
        with self.connection() as connection, connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
                "VALUES (%s, %s, %s, %s, UNIX_TIMESTAMP(NOW(3)) * 1000)",
                [(version, workspace_id, one, payload or event(one, workspace_id)) for one in event_ids],
            )

    def clickhouse(self, query: str) -> list[list[Any]]:
        """Rows of a query, over plain HTTP."""
        parts = urlsplit(self.clickhouse_url)
        url = f"http://{parts.hostname}:{parts.port}/?database={parts.path.lstrip('/')}&default_format=JSONCompact"
        with urllib.request.urlopen(urllib.request.Request(url, data=query.encode()), timeout=30) as answer:
            text = answer.read()
        rows: list[list[Any]] = json.loads(text)["data"] if text.strip() else []
        return rows

    def entries(self) -> list[str]:
        """The event ids in ClickHouse, in order, duplicates included: no FINAL."""
        return [row[0] for row in self.clickhouse("SELECT event_id FROM audit_logs_raw_v1 ORDER BY event_id")]

    def stamps(self) -> dict[str, set[int]]:
        """Each event's `inserted_at`s."""
        found: dict[str, set[int]] = {}
        for event_id, at_ms in self.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1"):
            found.setdefault(event_id, set()).add(int(at_ms))
        return found

    def pending(self) -> int:
        return int(self.sql("SELECT COUNT(*) FROM clickhouse_outbox WHERE deleted_at IS NULL")[0][0])

    # ── the product's side ───────────────────────────────────────────────────────────────────────

    def environment(self, **changes: str) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("AUDITEXPORT_")},
            "AUDITEXPORT_MYSQL_URL": self.mysql_url,
            "AUDITEXPORT_CLICKHOUSE_URL": self.clickhouse_url,
            "DAGSTER_HOME": str(self.home),
            "NO_COLOR": "1",
            "COLUMNS": "200",
            **changes,
        }

    def start(self, *words: str, **changes: str) -> subprocess.Popen[str]:
        """A program of the product's, still running; `changes` are variables."""
        return subprocess.Popen(
            [str(BIN / words[0]), *words[1:]],
            env=self.environment(**changes),
            cwd=self.home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *words: str, status: int = 0, **changes: str) -> str:
        """What `auditexport WORDS` prints; fails the test when it ends with another status, or with a traceback."""
        with self.start("auditexport", *words, **changes) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == status, f"auditexport {' '.join(words)}: status {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return out

    def json(self, *words: str, status: int = 0, **changes: str) -> dict[str, Any]:
        """The one JSON object of `auditexport WORDS --json`."""
        found: dict[str, Any] = json.loads(self.run(*words, "--json", status=status, **changes))
        return found

    def materialize(self, **changes: str) -> str:
        """What Dagster prints while it materializes the asset; fails the test when the run fails."""
        words = "dagster asset materialize -m auditexport_pipeline.definitions --select audit_logs_raw_v1"
        with self.start(*words.split(), **changes) as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, out + err
        return out + err
