"""Roles: each does its work with exactly the grants of `roles.py`, on both databases, and is refused the rest.

The MySQL user is a real one. The embedded ClickHouse has one user only, so it is restarted with each role's grants.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.requeue import requeue
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.roles import CLICKHOUSE_GRANTS, MYSQL_GRANTS, Role
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.faults import content
from auditexport_tests.support.own_clickhouse import OwnClickHouse

Grants = Mapping[str, tuple[str, ...]]
# The embedded server reads the data of an INSERT from a file descriptor, where a server has input().
EMBEDDED = "GRANT READ ON FILE"


_numbers = itertools.count(1)


class CLI:
    """`auditexport …` as one role, and the stores that it would open."""

    def __init__(self, mysql_url: str, clickhouse_url: str) -> None:
        self._environment = {"AUDITEXPORT_MYSQL_URL": mysql_url, "AUDITEXPORT_CLICKHOUSE_URL": clickhouse_url}
        self.outbox = MySQLOutbox(mysql_url)
        self.log = ClickHouseAuditLog(clickhouse_url)

    def __call__(self, *words: str, status: int = 0) -> Result:
        done = CliRunner().invoke(main, list(words), env={**self._environment, "COLUMNS": "300"})
        assert done.exit_code == status, f"{words}: {done.output}"
        return done

    def refused(self, missing: str, *words: str) -> None:
        """The verb ends with status 2 and one line, which names the missing grant."""
        line = self(*words, status=2).output.strip()
        assert "\n" not in line
        assert re.search(missing, line), line


class Ground:
    """Both databases with something in each state, and users with the grants of one role."""

    def __init__(self, own: OwnClickHouse) -> None:
        self.stack = own.new_stack()
        self.database = str(sa.make_url(self.stack.mysql_url).database)
        self._own = own

    @contextmanager
    def as_role(self, role: Role, *, clickhouse: Grants | None = None, profile: str = "") -> Iterator[CLI]:
        """With users that have the grants of this role and no other; in ClickHouse those of `clickhouse`, if given.

        ClickHouse has no other user meanwhile: root works there before or after.
        """
        user = f"{role.value}_{next(_numbers)}"
        self.stack.sql(f"CREATE USER '{user}'@'127.0.0.1' IDENTIFIED BY 'role'")
        for table, privileges in MYSQL_GRANTS[role].items():
            self.stack.sql(f"GRANT {', '.join(privileges)} ON `{self.database}`.{table} TO '{user}'@'127.0.0.1'")
        grants = self.statements(CLICKHOUSE_GRANTS[role] if clickhouse is None else clickhouse)
        self._own.restart(grants=[*grants, EMBEDDED], profile=profile)
        url = sa.make_url(self.stack.mysql_url).set(username=user, password="role")
        prompt = CLI(url.render_as_string(hide_password=False), self.stack.clickhouse_url)
        try:
            yield prompt
        finally:
            prompt.outbox.disconnect()
            self.stack.sql(f"DROP USER '{user}'@'127.0.0.1'")

    def statements(self, grants: Grants) -> list[str]:
        """The statements of a ClickHouse administrator, without the user."""
        return [
            f"GRANT {', '.join(privileges)} ON {table if '.' in table else f'{self.database}.{table}'}"
            for table, privileges in grants.items()
        ]

    def drain(self) -> None:
        drain(self.stack.outbox, self.stack.log, Limits(), owner="root")

    def lose(self) -> str:
        """Deletes one entry from ClickHouse; returns its event's id."""
        ((event_id,),) = self.stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1 ORDER BY time LIMIT 1")
        self.stack.log.client().command(
            f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = '{event_id}'", settings={"mutations_sync": 2}
        )
        return str(event_id)


@pytest.fixture(scope="module")
def own(mysql_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnClickHouse]:
    with OwnClickHouse(mysql_server, tmp_path_factory.mktemp("own")).running() as own:
        yield own


@pytest.fixture
def ground(own: OwnClickHouse) -> Ground:
    """Forty exported events and three open dead letters."""
    ground = Ground(own)
    seed_outbox(ground.stack.mysql_url, seed=3, events=40, malformed=3, writers=1)
    ground.drain()
    return ground


def test_the_exporter_drains_and_may_do_nothing_else(ground: Ground) -> None:
    """The user that runs all day has the fewest grants: not even a bug can delete a row. It exports requeued rows too."""
    stack = ground.stack
    requeue(stack.outbox, stack.upkeep, stack.log, RowFilter(from_pk=1, to_pk=5), Actor(who="me", why="again"))
    seed_outbox(stack.mysql_url, seed=4, events=60, malformed=2, writers=1)
    with ground.as_role(Role.EXPORTER) as prompt:
        prompt("doctor")
        preflight.forget()
        preflight.refuse_unless_ready(prompt.outbox, prompt.log)
        assert json.loads(prompt("drain", "--json").output)["dead_letters"] == 2
        assert "may not read clickhouse_outbox_action" in prompt("status", status=1).output
        assert prompt.outbox.backlog(tuple(VERSIONS), count_to=100).rows == 0
        assert "lacks DELETE on clickhouse_outbox" in prompt("doctor", "--role", "sweeper", status=1).output
        prompt.refused("SELECT command denied .*clickhouse_outbox_", "sweep", "--outbox-days", "0")
        prompt.refused(
            "command denied .*clickhouse_outbox_(erasure|action)",
            *("requeue", "--from-pk", "1", "--to-pk", "90", "--why", "no"),
        )
        ((events,),) = prompt.log.rows("counting", "SELECT uniqExact(workspace_id, event_id) FROM audit_logs_raw_v1")
        assert events == 100
    assert {row[0] for row in stack.sql("SELECT DISTINCT state FROM clickhouse_outbox_batch WHERE batch_id > 0")} == {
        "verified"
    }


def test_the_operator_repairs_and_records_and_cannot_sweep(ground: Ground) -> None:
    """An operator on call does all of this with one user, and nothing of it deletes rows."""
    stack = ground.stack
    letters = [int(str(row[0])) for row in stack.sql("SELECT pk FROM clickhouse_outbox_dead_letter ORDER BY pk")]
    lost = ground.lose()
    with ground.as_role(Role.OPERATOR) as prompt:
        prompt("doctor", "--role", "operator")
        assert json.loads(prompt("dead-letters", "list", "--json").output)["counts"]["letters"] == 3
        prompt("dead-letters", "show", str(letters[0]), "--payload")
        prompt("dead-letters", "retry", "--pk", str(letters[0]), "--why", "fixed")
        prompt("dead-letters", "discard", "--pk", str(letters[1]), "--why", "a test")
        assert f"events: {lost}" in prompt("reconcile", "--repair", status=1).output
        prompt("requeue", "--batch", "1", "--why", "look", "--dry-run")
        prompt("requeue", "--batch", "1", "--why", "what is missing", "--missing-only")
        prompt("requeue", "--from-pk", "1", "--to-pk", "9", "--why", "again")
        prompt("erasures", "add", "--workspace", "ws_1", "--event-id", "evt_1", "--why", "request 7")
        assert "request 7" in prompt("erasures", "list").output
        assert "lacks DELETE on clickhouse_outbox" in prompt("doctor", "--role", "sweeper", status=1).output
        assert "lacks INSERT on clickhouse_outbox_batch" in prompt("doctor", "--role", "exporter", status=1).output


def test_the_sweeper_deletes_what_is_due_and_compacts_and_cannot_requeue(ground: Ground) -> None:
    """The only role that may delete has no other work."""
    stack = ground.stack
    stack.sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - 500 * 86400000 WHERE batch_id > 0")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = deleted_at - 500 * 86400000")
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = (SELECT MIN(pk) FROM clickhouse_outbox_dead_letter)")
    before = content(stack)
    with ground.as_role(Role.SWEEPER) as prompt:
        prompt("doctor", "--role", "sweeper")
        assert json.loads(prompt("sweep", "--outbox-days", "0", "--dry-run", "--json").output)["rows"] == 40
        assert content(stack) == before
        prompt.refused(
            r"UPDATE command denied .*clickhouse_outbox", "requeue", "--from-pk", "1", "--to-pk", "90", "--why", "no"
        )
        swept = json.loads(prompt("sweep", "--outbox-days", "0", "--json").output)
        assert (swept["rows"], swept["dead_letters_closed"], swept["compacted_batches"]) == (40, 1, 1)
        lacking = prompt("doctor", "--role", "operator", status=1).output
        assert "lacks UPDATE (deleted_at) on clickhouse_outbox" in lacking
        prompt.refused(
            "INSERT command denied .*clickhouse_outbox_erasure", "erasures", "add", "--workspace", "w", "--why", "x"
        )


def test_the_reader_sees_everything_and_changes_nothing(ground: Ground, tmp_path: Path) -> None:
    """An auditor or a dashboard needs no trust to read."""
    stack = ground.stack
    lost = ground.lose()
    seed_outbox(stack.mysql_url, seed=9, events=10, writers=1)
    for claim in claiming.claim(stack.outbox, owner="root", dead_owners=(), limits=Limits()):  # exported, not verified
        fetched = export.fetch(stack.outbox, stack.log, claim, Limits())
        export.mark(
            stack.outbox, stack.log, export.write(stack.outbox, stack.log, claim, fetched.bodies, Limits()), Limits()
        )
    seed_outbox(stack.mysql_url, seed=5, events=7, writers=1)
    letter = str(stack.sql("SELECT MIN(pk) AS pk FROM clickhouse_outbox_dead_letter")[0].pk)
    before = content(stack)
    with ground.as_role(Role.READER) as prompt:
        prompt("doctor", "--role", "reader")
        assert prompt.outbox.backlog(tuple(VERSIONS), count_to=100).rows == 7
        prompt("status", status=1)
        prompt("batches", "list")
        prompt("batches", "show", "1")
        prompt("dead-letters", "list")
        prompt("dead-letters", "show", letter)
        prompt("erasures", "list")
        assert "auditexport_up 1.0" in prompt("metrics").output
        report = json.loads(prompt("reconcile", "--dry-run", "--json", status=1).output)
        assert (report["missing"], report["event_ids"]) == (1, [lost])
        assert "would requeue 1 row;" in prompt("reconcile", "--dry-run", "--repair", status=1).output
        for words in (("status",), ("reconcile", "--dry-run")):
            page = tmp_path / f"{words[0]}.html"
            prompt(*words, "--report", str(page), status=1)
            assert "<svg" in page.read_text()
        assert json.loads(prompt("requeue", "--batch", "1", "--why", "x", "--dry-run", "--json").output)["rows"] == 40
        prompt("requeue", "--batch", "1", "--why", "x", "--dry-run", "--missing-only")
        prompt("sweep", "--outbox-days", "0", "--dry-run", status=1)
        prompt("dead-letters", "retry", "--all", "--dry-run")
        assert prompt.log.client().query("SELECT count() FROM audit_logs").result_rows == [(49,)]
        for missing, words in (
            ("INSERT.*clickhouse_outbox_action", ("requeue", "--batch", "1", "--why", "x")),
            ("UPDATE.*clickhouse_outbox_batch", ("sweep", "--outbox-days", "0")),
            ("command denied .*clickhouse_outbox_(action|dead_letter)", ("dead-letters", "retry", "--all")),
            ("UPDATE.*clickhouse_outbox_batch", ("reconcile", "--repair")),
            ("INSERT.*clickhouse_outbox_action", ("erasures", "add", "--workspace", "ws_1", "--why", "x")),
        ):
            prompt.refused(missing, *words)
        assert "lacks DELETE on clickhouse_outbox" in prompt("doctor", "--role", "sweeper", status=1).output
        lacking = prompt("doctor", status=1).output
        assert "lacks UPDATE (deleted_at) on clickhouse_outbox" in lacking
        assert f"lacks INSERT on {ground.database}.audit_logs_raw_v1 in ClickHouse" in lacking
    assert content(stack) == before


def test_the_owner_creates_and_may_not_touch_what_is_in_the_tables(ground: Ground) -> None:
    """The deployment's user runs once a release, and then its password is unused and unwatched."""
    stack = ground.stack
    for table in MYSQL_GRANTS[Role.OWNER]:
        if table != "clickhouse_outbox":
            stack.sql(f"DROP TABLE {table}")
    client = stack.log.client()
    client.command("DROP VIEW audit_logs SYNC")
    client.command("DROP TABLE audit_logs_raw_v1 SYNC")
    with ground.as_role(Role.OWNER) as prompt:
        prompt("doctor", "--role", "owner")
        assert "audit_logs_raw_v1, audit_logs" in prompt("init").output
        assert "nothing to create" in prompt("init").output
        prompt("doctor", "--role", "owner")
        assert "lacks UPDATE (deleted_at) on clickhouse_outbox" in prompt("doctor", status=1).output


def _read(grant: str) -> tuple[str, tuple[str, ...]]:
    privileges, table = grant.removeprefix("GRANT ").split(" ON ")
    return table, tuple(privileges.split(", "))


@pytest.mark.slow
def test_each_clickhouse_grant_that_a_role_lacks_is_named(ground: Ground) -> None:
    """A user without grants gets a list of what is missing, and with that list nothing is missing."""
    printed: dict[Role, list[str]] = {}
    with ground.as_role(Role.READER, clickhouse={"*.*": ("SHOW DATABASES",)}) as prompt:
        for role in Role:
            found = [finding.fix for finding in preflight.check(ground.stack.outbox, prompt.log, role=role)]
            assert [fix for fix in found if fix.startswith("GRANT")] == [
                f"{statement} TO default" for statement in ground.statements(CLICKHOUSE_GRANTS[role])
            ]
            printed[role] = [fix.removesuffix(" TO default") for fix in found if fix.startswith("GRANT")]
    for role, grants in printed.items():
        with ground.as_role(role, clickhouse=dict([_read(grant) for grant in grants])) as prompt:
            assert preflight.check(ground.stack.outbox, prompt.log, role=role) == []


def test_a_clickhouse_grant_that_is_missing_is_named_by_the_verb(ground: Ground) -> None:
    """Without doctor, the error of the run says the same."""
    seed_outbox(ground.stack.mysql_url, seed=6, events=5, writers=1)
    with ground.as_role(Role.EXPORTER, clickhouse=CLICKHOUSE_GRANTS[Role.READER]) as prompt:
        with pytest.raises(SetupIncomplete, match=r"lacks INSERT\(.* ON \w+\.audit_logs_raw_v1"):
            drain(prompt.outbox, prompt.log, Limits(), owner="exporter")
        preflight.forget()
        with pytest.raises(SetupIncomplete, match=r"lacks INSERT on .*audit_logs_raw_v1 in ClickHouse"):
            preflight.refuse_unless_ready(prompt.outbox, prompt.log)


def test_a_read_only_profile_stops_roles_that_write_and_not_the_reader(ground: Ground) -> None:
    """New users often get such a profile; it allows settings and no rows."""
    with ground.as_role(Role.READER, profile="<readonly>2</readonly>") as prompt:
        prompt("doctor", "--role", "reader")
        prompt("reconcile", "--dry-run")
        (found,) = preflight.check(ground.stack.outbox, prompt.log)
        assert "readonly = 2" in found.what
        assert found.fatal


def test_the_readme_prints_the_exporters_grants() -> None:
    """It is what people copy, and `roles.py` is what is tested above."""
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    printed = re.findall(r"^    GRANT (.+) ON (app|audit|\*)\.(\S+) TO '?auditexport", readme, re.MULTILINE)
    assert [(table, privileges) for privileges, database, table in printed if database == "app"] == [
        (table, ", ".join(privileges)) for table, privileges in MYSQL_GRANTS[Role.EXPORTER].items()
    ]
    assert [("*.*" if database == "*" else table, privileges) for privileges, database, table in printed[3:]] == [
        (table, ", ".join(privileges)) for table, privileges in CLICKHOUSE_GRANTS[Role.EXPORTER].items()
    ]
