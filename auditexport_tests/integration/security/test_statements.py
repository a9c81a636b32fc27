"""SQL is never built from data: every module passes statements of ours to a driver.

What belongs here: reading the code for that, and hostile values that go through every verb.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable

import pytest

from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import event
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import prompt_in, urls
from auditexport_tests.unit.test_architecture import PACKAGE

# All but the local stack, which has servers of its own.
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "local"]
# The methods and functions by which SQL reaches a driver, and the keywords that they take it under.
SINKS = {
    *("text", "prepared", "exec_driver_sql", "execute", "executemany", "scalar", "scalars"),
    *("command", "query", "raw_query", "raw_insert", "raw_stream", "query_df", "query_np", "query_arrow"),
    *("insert", "rows"),
}
# Those that take it second, after what it is for.
SECOND = {"rows"}
SQL_KEYWORDS = {"statement", "query", "cmd", "insert_block", "text"}
# Statements by name, as `sql.load` reads them from a file beside the store.
NAMED = {"SQL", "OUTBOX_SQL", "_SQL", "_PIECES", "_MYSQL", "_CLICKHOUSE"}
# Everything else that may be passed, each with the reason why no data is in it.
ALLOWED = {
    ("mysql/session.py", "_FIRST"): "a constant of the module",
    ("mysql/session.py", "_READ"): "a constant of the module",
    ("mysql/session.py", "_set(…)"): "variables of the module's table, and one of three row images",
    ("mysql/session.py", "statement"): "what `_set` made",
    ("mysql/database.py", "statement"): "what `rows` was given, which is checked where it is called",
    ("mysql/statements.py", "statement"): "a `.sql` file with constants, or what `prepared` was given",
    ("mysql/marking.py", "before + text"): "from outbox.sql, with numbered parameters, in MariaDB's SET STATEMENT",
    ("mysql/marking.py", "statement"): "what `over` made of outbox.sql",
    ("mysql/dead_letters.py", "statement"): "what `_statement` made of dead_letters.sql",
    (
        "mysql/dead_letters.py",
        "template.substitute(index=index, conditions=conditions, column=column, direction=direction)",
    ): "a statement of dead_letters.sql, with names and conditions from the table `_CONDITIONS`",
    ("mysql/dead_letters.py", "_statement(…)"): "what `_statement` made of dead_letters.sql",
    ("clickhouse/audit_log.py", "statement"): (
        "audit_log.sql by name, with the pieces of a registered version; or what `rows` was given, which is checked where it is called"
    ),
    (
        "clickhouse/audit_log.py",
        "_request(…)",
    ): "`_post` writes integers into it, through int(); the payloads are data",
    ("clickhouse/audit_log.py", "_sql('contents', version).replace('{payloads:String}', whole)"): (
        "numbered parameters, as many as there are portions"
    ),
    (
        "clickhouse/canary.py",
        "statement",
    ): "audit_log.sql with the types and expressions of our table's columns, as ClickHouse has them",
    ("clickhouse/ttl.py", "statement"): "ttl.sql with parts of the table's TTL clause, as ClickHouse has it",
    ("mysql/backlog.py", "count"): "one of two statements of status.sql, by whether there are dead letters",
    ("mysql/blockers.py", "f'SET SESSION innodb_lock_wait_timeout = {WAIT_S}, lock_wait_timeout = {WAIT_S}'"): (
        "a constant of the module"
    ),
    ("mysql/blockers.py", "statement"): "from blockers.sql, or one that has waited in vain, as the driver had it",
    ("schema.py", "Template(statement).substitute(collation=collation).replace('%', '%%')"): (
        "one of two collations, by the server's family"
    ),
    ("schema.py", "statement"): "schema.sql, or a version's own ddl, with an engine and a setting, both constants",
    ("report/figures.py", "statement"): "audit_log.sql with the table of a registered version",
    ("report/figures.py", "STORE_SQL['candidates_beside_letters']"): "from outbox.sql, when the module is imported",
    ("clickhouse/checks.py", "f'CHECK GRANT {privilege} ON {name}'"): "from the constants of roles.py",
}


def passed(source: str) -> list[str]:
    """Every expression that is passed to a driver as SQL and is not a literal or a named statement."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in SINKS:
            continue
        place = 1 if name in SECOND else 0
        given = [
            *node.args[place : place + 1],
            *(keyword.value for keyword in node.keywords if keyword.arg in SQL_KEYWORDS),
        ]
        found.extend(_shown(expression) for expression in given if not _is_ours(expression))
    return found


def _is_ours(expression: ast.expr) -> bool:
    if isinstance(expression, ast.Constant):
        return True
    if isinstance(expression, ast.Call) and getattr(expression.func, "id", "") == "text":
        return True  # the argument of text() is checked by itself
    return (
        isinstance(expression, ast.Subscript)
        and isinstance(expression.value, ast.Name)
        and expression.value.id in NAMED
    )


def _shown(expression: ast.expr) -> str:
    """The source of an expression; of a call to a function of the same module only its name."""
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name):
        return f"{expression.func.id}(…)"
    return ast.unparse(expression)


def test_what_is_passed_to_a_driver_is_a_statement_of_ours() -> None:
    """A tenant's name could rewrite a statement that is built from values."""
    found = {(str(path.relative_to(PACKAGE)), shown) for path in MODULES for shown in passed(path.read_text())}
    assert found - set(ALLOWED) == set(), "neither a named statement nor on the list"
    assert set(ALLOWED) - found == set(), "on the list and not in the code any more"


@pytest.mark.parametrize(
    "source",
    [
        "connection.execute(text(f'SELECT {name}'))",
        "connection.exec_driver_sql('SELECT * FROM t WHERE x = %s' % name)",
        "client.query('SELECT {}'.format(name))",
        "client.command('SELECT ' + name)",
        "client.query(query=' '.join(['SELECT', name]))",
        "client.raw_insert(table='', insert_block=prefix + payload)",
        "connection.execute(built)",
        "text(SQL['a'] + name)",
    ],
)
def test_a_statement_that_is_built_from_a_value_is_found(source: str) -> None:
    """The negative control: each way to build a statement from a value is found."""
    assert passed(source)
    assert not passed("connection.execute(SQL['mark'], {'name': name}); client.query('SELECT 1')")


# ── and no value is taken for a statement ────────────────────────────────────────────────────────

HOSTILE = (
    "'; DROP TABLE clickhouse_outbox; --",
    "' OR '1'='1",
    '" OR ""="',
    "`clickhouse_outbox`; #",
    "\\'; TRUNCATE audit_logs_raw_v1 --",
    "{pks:String} {inserted_at_ms:Int64}",
    "%s %(pk)s %d %%",
    ":pks :workspace_id",
    "$table ${columns}",
    "[bold]x[/red] :smile:",
    "\x01\n\t\\N",
)


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The output of a command; a value is not broken over lines."""
    run = prompt_in({**urls(stack), "COLUMNS": "400"}, monkeypatch)
    return lambda *words: run(*words).output


def test_hostile_values_are_data_in_the_drain_and_at_the_prompt(stack: Stack, prompt: Callable[..., str]) -> None:
    """Workspaces choose their names, and applications choose the ids of events."""
    good = [event(f"{text[:40]}e", workspace_id=text, description=text) for text in HOSTILE]
    bad = [event(f"{text[:40]}b", workspace_id=text, time=text) for text in HOSTILE]
    pks = stack.put(*good, *bad)
    for text in ("", *HOSTILE):
        stack.put(event("evt"), version=text)
    drain(stack.outbox, stack.log, Limits(), owner="'; --")

    stored = stack.clickhouse("SELECT workspace_id, event_id, description FROM audit_logs_raw_v1")
    assert sorted(stored) == sorted((text, f"{text[:40]}e", text) for text in HOSTILE)
    backlog = stack.outbox.backlog(["audit_log.v1"], count_to=100)
    assert (set(backlog.unknown_versions), backlog.unknown_rows) == ({"", *HOSTILE}, len(HOSTILE) + 1)

    # Requeued and exported again, copies are looked for entry by entry.
    for number, text in enumerate(HOSTILE, start=1):
        preview = json.loads(prompt("requeue", "--workspace", text, "--why", text, "--dry-run", "--json"))
        assert preview["rows"] == 1, text
        event_id = f"{text[:40]}e"
        done = json.loads(prompt("requeue", "--event-id", event_id, "--who", text, "--why", text, "--json"))
        assert done["rows"] == 1, text
        letters = json.loads(prompt("dead-letters", "list", "--workspace", text, "--json"))["letters"]
        assert [(one["workspace_id"], one["event_id"]) for one in letters] == [(text, f"{text[:40]}b")]
        assert not json.loads(prompt("dead-letters", "list", "--version", text, "--json"))["letters"]
        assert not json.loads(prompt("dead-letters", "list", "--reason", text, "--json"))["letters"]
        words = ("--workspace", text, "--who", text, "--why", text)
        assert json.loads(prompt("dead-letters", "discard", *words, "--json"))["changed"] == 1
        prompt("erasures", "add", *words, "--event-id", event_id)
        assert len(json.loads(prompt("erasures", "list", "--json"))["erasures"]) == number
    drain(stack.outbox, stack.log, Limits(), owner="'; --")
    prompt("reconcile")
    outputs = [
        prompt("erasures", "list"),
        prompt("dead-letters", "list", "--state", "any"),
        *(prompt("dead-letters", "show", str(pk)) for pk in pks[len(good) :]),
    ]
    assert all("[bold]x[/red] :smile:" in text for text in (*outputs[:2], outputs[-2]))
    recorded = json.loads(prompt("erasures", "list", "--json"))["erasures"]
    assert [(one["workspace_id"], one["who"], one["why"]) for one in recorded] == [(t, t, t) for t in HOSTILE]
    assert stack.counts()[1] == len(HOSTILE)
    assert stack.pending() == 2 * len(HOSTILE) + 1
