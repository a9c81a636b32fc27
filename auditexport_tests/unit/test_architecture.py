"""The shape of the code: who may import whom, where stores are made, and what every module owes its reader.

Each rule is a function from a module's source to its violations, and has a control: a source that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "auditexport_pipeline"
MODULES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

# What each part may import of this package.
BASIS = {"core", "sql", "roles", "hosts"}
STORES = BASIS | {"mysql", "clickhouse"}
MAY_IMPORT: Mapping[str, set[str]] = {
    "core": {"core"},
    "sql": {"core"},
    "roles": {"core"},
    "hosts": set(),
    "mysql": BASIS | {"mysql"},
    "clickhouse": BASIS | {"clickhouse"},
    "schema": STORES,
    "preflight": STORES,
    "report": STORES | {"report"},
    "outboxes": {"core", "outboxes"},
    "processes": {"processes"},
    "defs": STORES | {"preflight", "report", "outboxes", "processes", "defs"},
    "definitions": STORES | {"report", "outboxes", "defs", "definitions"},
    "component": STORES | {"report", "outboxes", "defs"},
    "local": STORES | {"schema", "preflight", "local"},
    "cli": {*STORES, "schema", "preflight", "report", "outboxes", "processes", "defs", "definitions", "local", "cli"},
}
# What core must not know: frameworks, drivers, the environment, the network and the wall clock.
NOT_IN_CORE = {
    *("dagster", "sqlalchemy", "pymysql", "clickhouse_connect", "pandas"),
    *("os", "socket", "subprocess", "datetime", "http", "urllib"),
}
WALL_CLOCK = {"time.time", "time.time_ns", "time.localtime"}
WAITS_OR_WORKS = re.compile(
    r"time\.(sleep|monotonic|perf_counter)|threading\.(Thread|Timer|Event|Lock|Semaphore|Condition|Barrier)|"
    r"concurrent\.futures\.\w*PoolExecutor|(asyncio|multiprocessing|queue)\b"
)
NEEDLESS_AT_START = {"pandas", "chdb", "clickhouse_connect", "httpx", "prometheus_client", "rich", "matplotlib"}
# The report loads libraries for charts; it is loaded only when a report is made.
MAY_BE_HEAVY = {"local", "processes", "celery_worker", "report"}
REPORT = "auditexport_pipeline.report"
PRIVATE_TO_DAGSTER = re.compile(r"\bdagster\._|\bdagster_shared\b|\bpath_for_shard\b")
STORE_CLASSES = {"MySQLOutbox", "ClickHouseAuditLog"}
CONSTRUCT_STORES = {"defs/resources.py", "local/stack.py", "cli/stores.py"}

Rule = Callable[[str, str], list[str]]


def part_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imports(path: str, source: str, *, at_import_only: bool = False) -> Iterator[str]:
    """Dotted names that a module of the package imports, in any form, relative ones resolved.

    `from a import b` yields `a.b`: b may be a module. With `at_import_only` imports in functions and for type checking are left out.
    """
    package = ["auditexport_pipeline", *path.split("/")[:-1]]
    pending: list[ast.AST] = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif at_import_only and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ):
            continue
        pending.extend(ast.iter_child_nodes(node))


def imports_run_one_way(path: str, source: str) -> list[str]:
    part = part_of(path)
    if part not in MAY_IMPORT:
        return []
    found = []
    for name in imports(path, source):
        root, _, rest = name.partition(".")
        outside = (part == "core" and root in NOT_IN_CORE) or (part in STORES and root == "dagster")
        if outside or (root == "auditexport_pipeline" and rest.split(".")[0] not in MAY_IMPORT[part]):
            found.append(name)
    return found


def core_has_no_wall_clock(path: str, source: str) -> list[str]:
    """Monotonic time and sleeping are fine; what time it is, the databases say."""
    if part_of(path) != "core":
        return []
    used = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return sorted((used | set(imports(path, source))) & WALL_CLOCK)


def core_waits_and_works_beside_itself_in_one_place(path: str, source: str) -> list[str]:
    """`core.threads` can be replaced, so that the simulation runs all of core in its own order and time."""
    if part_of(path) != "core" or path == "core/threads.py":
        return []
    used = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return sorted(name for name in used | set(imports(path, source)) if WAITS_OR_WORKS.match(name))


def nothing_heavy_is_imported_early(path: str, source: str) -> list[str]:
    if part_of(path) in MAY_BE_HEAVY:
        return []
    names = set(imports(path, source, at_import_only=True))
    return sorted(name for name in names if name.split(".")[0] in NEEDLESS_AT_START or name.startswith(REPORT))


def a_module_says_what_it_is(path: str, source: str) -> list[str]:
    return [] if not source or ast.get_docstring(ast.parse(source)) else ["no docstring"]


def stores_are_made_in_three_places(path: str, source: str) -> list[str]:
    """One place decides which databases a run speaks to. Sees other names of the classes, and attributes of modules."""
    if path in CONSTRUCT_STORES:
        return []
    tree = ast.parse(source)
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in STORE_CLASSES
    }
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [
        ast.unparse(function)
        for function in called
        if (isinstance(function, ast.Name) and function.id in names | STORE_CLASSES)
        or (isinstance(function, ast.Attribute) and function.attr in STORE_CLASSES)
    ]


def the_environment_is_not_read_at_import(path: str, source: str) -> list[str]:
    """Configuration belongs to a run, not to the first import of a module."""
    found = []
    pending: list[ast.AST] = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            found.append(ast.unparse(node))
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))
    return found


def one_module_uses_what_dagster_keeps_to_itself(path: str, source: str) -> list[str]:
    """A name that is not public can go with any release: then one file has to be read, which says what each is for."""
    return [] if path == "defs/dagster_internals.py" else PRIVATE_TO_DAGSTER.findall(source)


RULES: Mapping[Rule, list[tuple[str, str]]] = {
    imports_run_one_way: [
        ("core/x.py", "from auditexport_pipeline import defs"),
        ("core/x.py", "import auditexport_pipeline.mysql.outbox"),
        ("core/x.py", "from ..mysql import outbox"),
        ("core/x.py", "from .. import defs"),
        ("core/x.py", "def f():\n    import socket"),
        ("core/x.py", "from os import environ"),
        ("mysql/x.py", "from auditexport_pipeline.clickhouse import audit_log"),
        ("mysql/x.py", "import dagster as dg"),
        ("defs/x.py", "from auditexport_pipeline.cli import main"),
        ("local/x.py", "from ..defs import assets"),
        ("cli/x.py", "from auditexport_pipeline.component import AuditExport"),
    ],
    core_has_no_wall_clock: [
        ("core/x.py", "import time\ntime.time()"),
        ("core/x.py", "from time import time"),
    ],
    core_waits_and_works_beside_itself_in_one_place: [
        ("core/x.py", "import time\ntime.sleep(1)"),
        ("core/x.py", "from time import monotonic"),
        ("core/x.py", "import threading\nthreading.Thread(target=f).start()"),
        ("core/x.py", "from concurrent.futures import ThreadPoolExecutor"),
    ],
    nothing_heavy_is_imported_early: [
        ("cli/x.py", "import pandas as pd"),
        ("core/x.py", "try:\n    from rich.table import Table\nexcept ImportError:\n    pass"),
        ("cli/x.py", "from auditexport_pipeline.report import page"),
    ],
    a_module_says_what_it_is: [("core/x.py", "import json")],
    stores_are_made_in_three_places: [
        ("core/x.py", "MySQLOutbox(url)"),
        ("defs/x.py", "from auditexport_pipeline.mysql.outbox import MySQLOutbox as Store\nStore(url)"),
        ("cli/x.py", "from auditexport_pipeline.clickhouse import audit_log\naudit_log.ClickHouseAuditLog(url)"),
    ],
    one_module_uses_what_dagster_keeps_to_itself: [
        ("defs/x.py", "from dagster._core.events import DagsterEvent"),
        ("cli/x.py", "import dagster._utils"),
    ],
    the_environment_is_not_read_at_import: [
        ("core/x.py", "import os\nLIMIT = os.environ['X']"),
        ("core/x.py", "import os\nclass A:\n    limit = os.getenv('X')"),
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Rule) -> None:
    """A reader who knows these rules knows where a change belongs, and core stays testable without a server."""
    broken = {path: found for path, source in MODULES.items() if (found := rule(path, source))}
    assert broken == {}


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [(rule, path, source) for rule, controls in RULES.items() for path, source in controls],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_rule_finds_what_breaks_it(rule: Rule, path: str, source: str) -> None:
    """A check that cannot fail passes always."""
    assert rule(path, source) != []


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        pending = [*graph[start]]
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending.extend(graph[name])
        reached[start] = seen
    groups = {tuple(sorted(other for other in seen if one in reached[other])) for one, seen in reached.items()}
    return sorted([*group] for group in groups if group)


def imported_modules(base: Path) -> dict[str, set[str]]:
    """For each module, the modules it imports, anywhere in it."""
    sources = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in base.rglob("*.py")
        if "upgrades/child.py" not in str(path)
    }
    graph = {}
    for name, path in sources.items():
        names = imports(str(path.relative_to(base)), path.read_text())
        modules = {found if found in sources else found.rpartition(".")[0] for found in names}
        graph[name] = {found for found in modules if found in sources and found != name}
    return graph


@pytest.mark.parametrize("base", ["auditexport_pipeline", "auditexport_tests"])
def test_no_modules_import_each_other(base: str) -> None:
    """Two modules that import each other can only be read together."""
    assert circles(imported_modules(ROOT / base)) == []


def test_a_circle_is_found() -> None:
    """The control of the rule above."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]


LONGEST_TEST_NAME = 75  # characters; the aim is 70


def test_the_names_of_tests_are_short_sentences() -> None:
    """A name is read in a list of failures, and in guarantees.md."""
    names = {
        name
        for path in (ROOT / "auditexport_tests").rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(names) > 500
    assert {name for name in names if len(name) > LONGEST_TEST_NAME} == set()
