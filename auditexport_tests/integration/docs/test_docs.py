"""README, CONTRIBUTING and the pages of `auditexport_pipeline/docs` name what exists, and all that a reader needs."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import click
import pytest

from auditexport_pipeline.cli import BAD_OUTCOME, main
from auditexport_pipeline.core import errors
from auditexport_pipeline.core.alerts import Policy
from auditexport_pipeline.core.settings import Limits, Settings, Targets, Variables, format_bounds
from auditexport_pipeline.definitions import defs
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import event, events, run
from auditexport_tests.support.prompts import prompt_in, urls

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "auditexport_pipeline"
TESTS = ROOT / "auditexport_tests"
DOCS = PACKAGE / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "adr").glob("*.md"))]
RUNBOOK = DOCS / "runbook.md"

_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _code(page: Path) -> Iterator[str]:
    """Each line of each code block, and each code span, as written; a span over two lines is one line."""
    text = page.read_text()
    for fence in _FENCE.findall(text):
        yield from fence.splitlines()[1:-1]
    text = _FENCE.sub("", text)
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.strip()
    prose = "\n".join(line if not line.startswith("    ") else "" for line in text.splitlines())
    for span in _SPAN.findall(prose):
        yield " ".join(span.split())


def _anchors(page: Path) -> set[str]:
    """The anchors that the page's headings get where it is shown."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ── links ────────────────────────────────────────────────────────────────────────────────────────


def _broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in _anchors(there)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_anchor_of_a_page_resolves(page: Path) -> None:
    """An operator who reads the runbook at night has no time for a dead link."""
    assert not _broken_links(page, page.read_text())


def test_a_broken_link_is_found() -> None:
    """The check above reads what is there."""
    text = "[a](runbook.md#lag-is-above-its-target) [b](runbook.md#nowhere) [c](nothing.md)"
    assert _broken_links(DOCS / "operations.md", text) == ["runbook.md#nowhere", "nothing.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_ours_that_a_page_names_exists(page: Path) -> None:
    """`core/verify.py` is a promise that there is something to read."""
    for code in _code(page):
        if re.fullmatch(r"(?:\w+/)+[\w.*-]+\.(?:py|sql|md|yaml|service|example)", code):
            places = [place for base in (ROOT, PACKAGE, TESTS, PACKAGE / "deploy") for place in base.glob(code)]
            assert places, f"{page.name} names {code}"


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Command:
    """One command line as a page prints it."""

    page: str
    line: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


@lru_cache
def _trees() -> dict[str, click.Command]:
    from dagster._cli import create_dagster_cli
    from dagster._daemon.cli import create_dagster_daemon_cli
    from dagster_webserver.cli import dagster_webserver

    return {
        "auditexport": main,
        "dagster": create_dagster_cli(),
        "dagster-daemon": create_dagster_daemon_cli(),
        "dagster-webserver": dagster_webserver,
    }


def _commands() -> list[Command]:
    return [
        Command(page.name, line)
        for page in PAGES
        for line in dict.fromkeys(_code(page))
        if re.match(r"(?:auditexport|dagster|dagster-daemon|dagster-webserver) ", line)
    ]


def _unknown_to(tree: click.Command, words: list[str]) -> list[str]:
    """What of these words neither is a subcommand nor an option of the command that they lead to."""
    command, unknown, at = tree, [], 0
    context = click.Context(command)
    while isinstance(command, click.Group) and at < len(words) and not words[at].startswith("-"):
        found = command.get_command(context, words[at])
        if found is None:
            return [words[at]]
        # `list | show | retry` names several: each must exist, and the last one is gone on with.
        siblings = [command.get_command(context, word) for word in words[at + 1 :] if word != "|"]
        if "|" in words[at + 1 : at + 2]:
            names = [word for word in words[at:] if word != "|"]
            return [name for name, sibling in zip(names[1:], siblings, strict=True) if sibling is None]
        command, at = found, at + 1
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help", "-h"}
    unknown += [word for word in words[at:] if word.startswith("-") and word not in options]
    return unknown


def _words(line: str) -> list[str]:
    line = line.split(" # ")[0].split("  #")[0]
    line = re.sub(r"[\[\]]", "", line)  # what may be left out is still an option
    return shlex.split(line)[1:]


@pytest.mark.parametrize("command", _commands(), ids=str)
def test_every_command_and_option_of_a_page_exists(command: Command) -> None:
    """A reader types it as it is printed."""
    assert not _unknown_to(_trees()[command.line.split()[0]], _words(command.line))


def test_a_command_or_an_option_that_does_not_exist_is_found() -> None:
    """The check above can fail: at the command, below it, and at the option."""
    assert _unknown_to(main, _words("auditexport frobnicate")) == ["frobnicate"]
    assert _unknown_to(main, _words("auditexport dead-letters burn --all")) == ["burn"]
    assert _unknown_to(main, _words("auditexport sweep [--outbox-days 30] [--now]")) == ["--now"]
    assert _unknown_to(main, _words("auditexport dead-letters list | show | burn")) == ["burn"]
    assert not _unknown_to(main, _words("auditexport dead-letters list | show | retry"))


def test_every_command_of_ours_is_on_a_page() -> None:
    """A command that no page mentions is not found."""
    text = "\n".join(page.read_text() for page in PAGES)
    for name, command in main.commands.items():
        assert f"auditexport {name}" in text or f"make {name}" in text, f"no page names `auditexport {name}`"
        if isinstance(command, click.Group):
            for sub in command.commands:
                assert re.search(rf"auditexport {name} [^`\n]*\b{sub}\b", text), f"no page names `{name} {sub}`"


def test_every_make_target_of_a_page_exists() -> None:
    """`make` is the first command that a new reader types."""
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    named = {match for page in PAGES for code in _code(page) for match in re.findall(r"^make ([\w-]+)", code)}
    assert {"demo", "test"} <= named
    assert named <= targets


# ── commands and statements that are carried out ─────────────────────────────────────────────────


def _runnable() -> list[str]:
    """The runbook's own commands, as printed: those with options, and those that need none. `--watch` would never end."""
    lines = [line.split("  #")[0].strip() for line in dict.fromkeys(_code(RUNBOOK)) if line.startswith("auditexport ")]
    alone = ("status", "doctor", "drain", "batches", "erasures", "metrics")
    return [line for line in lines if "--watch" not in line and ("--" in line or line.split()[1] in alone)]


@pytest.fixture(scope="module")
def exported(module_stack: Stack) -> Stack:
    """Ten events exported and verified, and row 4711 a dead letter."""
    module_stack.put(*events(10))
    workspace_id, event_id, payload = event("evt_4711", event=17)
    module_stack.sql(
        "INSERT INTO clickhouse_outbox (pk, version, workspace_id, event_id, payload, created_at) "
        "VALUES (4711, 'audit_log.v1', :workspace_id, :event_id, :payload, 1760000000000)",
        workspace_id=workspace_id,
        event_id=event_id,
        payload=payload,
    )
    run(module_stack)
    return module_stack


def test_every_command_of_the_runbook_runs(exported: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an export with a dead letter, none of them is a wrong call."""
    auditexport = prompt_in(urls(exported), monkeypatch)
    lines = _runnable()
    assert len(lines) >= 12
    for line in lines:
        done = auditexport(*_words(line), status=None)
        assert done.exit_code in (0, BAD_OUTCOME), f"{line}: {done.output}"


# BACKUP is left out: it needs a disk for backups, and the embedded ClickHouse has none.
_STATEMENT = re.compile(r"(?:SELECT|ALTER TABLE|DELETE FROM|OPTIMIZE TABLE|SHOW ENGINE) ")


def _statements() -> list[tuple[str, str]]:
    """Each SQL statement of the pages, with the page's name: of a block, all its lines are one."""
    found = []
    for page in PAGES:
        text = _FENCE.sub("", page.read_text())
        spans = [" ".join(span.split()) for span in _SPAN.findall(re.sub(r"^    .*$", "", text, flags=re.MULTILINE))]
        blocks = [" ".join(block.split()) for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)]
        found += [(page.name, code) for code in dict.fromkeys([*spans, *blocks]) if _STATEMENT.match(code)]
    return found


@pytest.mark.parametrize(("page", "statement"), _statements())
def test_every_statement_of_the_pages_runs(exported: Stack, page: str, statement: str) -> None:
    """A statement that an operator pastes at night has been run before."""
    if re.search(r"audit_logs_raw_v1|\bsystem\.", statement):
        exported.log.client().command(statement)
    else:
        exported.sql(statement)


# ── variables, settings, errors, checks, tests ───────────────────────────────────────────────────


def test_every_variable_is_documented_and_every_documented_variable_exists() -> None:
    """A variable without a page is not found; a page about a variable that is gone misleads."""
    name = re.compile(r"\bAUDITEXPORT_[A-Z][A-Z_]*[A-Z]\b")
    sources = [*PACKAGE.rglob("*.py"), TESTS / "conftest.py", Path(__file__).with_name("test_surface.py")]
    used = {found for path in sources for found in name.findall(path.read_text())}
    used |= set(map(Variables.given_as, Variables.model_fields))
    documented = {found for page in PAGES for found in name.findall(page.read_text())}
    assert {"AUDITEXPORT_MYSQL_URL", "AUDITEXPORT_TEST_MYSQL_URL"} <= used
    assert used == documented


def test_every_setting_of_a_drain_is_in_the_table_of_knobs() -> None:
    """It is the one place where operators look for a limit."""
    table = (DOCS / "operations.md").read_text().split("\n## Scaling\n")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in _SPAN.findall(row)}
    assert named == set(Limits.model_fields)


def test_the_table_of_variables_is_the_model() -> None:
    """Operators set a variable by its line: name, default, unit or form, bounds, and what it is for."""
    text = (DOCS / "operations.md").read_text().split("\n## Settings\n")[1].split("\n### ")[0]
    expected = []
    for name, field in Variables.model_fields.items():
        value = ", ".join(filter(None, (field.title, format_bounds(field))))
        expected.append(f"| `{Variables.given_as(name)}` | {field.default} | {value} | {field.description} |")
    assert re.findall(r"^\| `.*$", text, re.MULTILINE) == expected


@pytest.mark.parametrize(("page", "settings"), [("operations.md", Targets), ("alerts.md", Policy)])
def test_the_tables_of_targets_and_alerts_have_the_defaults(page: str, settings: type[Settings]) -> None:
    """Operators look the numbers up there."""
    text = (DOCS / page).read_text()
    for name, field in settings.model_fields.items():
        assert f"| `{name}` | {field.default:g} |" in text


def test_every_job_sensor_and_schedule_is_on_a_page() -> None:
    """A job that no page mentions is found by accident."""
    text = "\n".join(page.read_text() for page in PAGES)
    jobs = {job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__")}
    automation = {found.name for found in (*(defs.sensors or ()), *(defs.schedules or ()))}
    assert "audit_log_export" in jobs
    assert "sweep_schedule" in automation
    assert not {name for name in jobs | automation if f"`{name}`" not in text}


def test_every_alert_rule_leads_to_a_section_of_the_runbook() -> None:
    """The alert at night has a link to what to do."""
    rules = (PACKAGE / "deploy" / "prometheus-rules.yml").read_text()
    anchors = re.findall(r"runbook: auditexport_pipeline/docs/runbook\.md#(\S+)", rules)
    assert len(anchors) == len(re.findall(r"- alert: ", rules)) > 5
    assert set(anchors) <= _anchors(RUNBOOK)


def test_every_error_has_a_section_in_the_runbook() -> None:
    """A failed run prints the name of its error; the name must lead to a section."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    roots = {errors.AuditExportError, errors.TransientError, errors.PermanentError}
    raised = {kind.__name__ for kind in kinds if kind not in roots}
    assert len(raised) > 5
    assert not {name for name in raised if name.lower() not in _anchors(RUNBOOK)}


# How `core.advice` names what a finding is about.
_ADVISED = r'(?:_error\(|_warning\(|of_severity\(|Severity\.NOTE,)\s*"(\w+)"'


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ({key.name for check in defs.asset_checks or () for key in check.check_keys}, "recent_exports_reconcile"),
        (set(re.findall(_ADVISED, (PACKAGE / "core" / "advice.py").read_text())), "lag"),
    ],
    ids=["asset checks", "findings of status"],
)
def test_every_check_and_finding_is_in_the_runbooks_table(names: set[str], known: str) -> None:
    """The name of a failed check or of a finding leads to its section."""
    assert known in names
    first_table = RUNBOOK.read_text().split("\n## ")[0]
    assert not {name for name in names if f"`{name}`" not in first_table}


@lru_cache
def _tests_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_a_promise_names_exists() -> None:
    """A promise whose test was renamed or removed is no longer tested."""
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (DOCS / "guarantees.md").read_text())
    assert len(named) > 30
    missing = [f"{path}::{name}" for path, name in named if name not in _tests_of(TESTS / path)]
    assert not missing


def test_every_promise_names_a_test() -> None:
    """The list beneath each quoted promise names its tests."""
    sections = (DOCS / "guarantees.md").read_text().split("\n## ")[1:]
    assert sum("\n> " in section for section in sections) >= 6
    for section in sections:
        assert "::test_" in section, section.splitlines()[0]


def test_the_pages_ship_with_the_package() -> None:
    """An installed package has the runbook and the files of the deployment."""
    shipped = (ROOT / "pyproject.toml").read_text()
    pages = ("docs/*.md", "docs/adr/*.md", "docs/images/*.png")
    deploy = ("*.json", "*.yaml", "*.yml", "systemd/*", "container/*", "kubernetes/*")
    for pattern in (*pages, *(f"deploy/{files}" for files in deploy)):
        assert f'"{pattern}"' in shipped
        assert list(PACKAGE.glob(pattern)) or pattern.endswith(".png"), pattern
