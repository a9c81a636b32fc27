"""Eight outboxes of one file on one server: names, drains, a fair share of the queue, and one whose server is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from auditexport_pipeline.cli import BAD_CALL
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.definitions import build_defs
from auditexport_pipeline.local.processes import Child
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.integration.dagster.conftest import ROOT, Exporter, events
from auditexport_tests.support.prompts import prompt_in
from auditexport_tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

NAMES = tuple(f"shard_{number}" for number in range(1, 9))
ENDLESS, OTHERS = NAMES[0], NAMES[1:]
ROWS = 12
# Far more than the few batches that a test has time for, five rows each.
ENDLESS_ROWS = 2_000
WITHIN_S = 420.0


@pytest.fixture
def shards(mysql_server: str, clickhouse_server: str) -> Iterator[dict[str, Stack]]:
    """Eight outboxes on one MySQL server and one ClickHouse, each in databases of its own."""
    with ExitStack() as stacks:
        yield {name: stacks.enter_context(fresh_stack(mysql_server, clickhouse_server)) for name in NAMES}


@pytest.fixture
def environment(
    shards: dict[str, Stack], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """What the code server and the CLI are started with: the file, and the URLs that it names."""
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            "mysql_url_env": f"{name.upper()}_MYSQL_URL",
            "clickhouse_url_env": f"{name.upper()}_CLICKHOUSE_URL",
            "sensor_rows": 1,
            "group_name": "odd" if number % 2 else "even",
            **({"drain": {"batch_rows": 5, "max_batches": 1}} if name == ENDLESS else {}),
        }
        for number, name in enumerate(NAMES, 1)
    ]
    file = tmp_path / "outboxes.yaml"
    file.write_text(yaml.safe_dump({"outboxes": entries}))
    set_to = {"AUDITEXPORT_OUTBOXES": str(file)}
    for name, shard in shards.items():
        set_to[f"{name.upper()}_MYSQL_URL"] = shard.mysql_url
        set_to[f"{name.upper()}_CLICKHOUSE_URL"] = shard.clickhouse_url
    for variable in ("AUDITEXPORT_MYSQL_URL", "AUDITEXPORT_CLICKHOUSE_URL"):
        monkeypatch.delenv(variable)
    for variable, value in set_to.items():
        monkeypatch.setenv(variable, value)
    return set_to


def test_all_of_them_drain_to_exactly_once_and_no_two_names_clash(
    environment: dict[str, str], exporter: Exporter, shards: dict[str, Stack]
) -> None:
    """One code location, and each outbox in its own tables, whatever else runs beside it."""
    defs = build_defs()
    dg.Definitions.validate_loadable(defs)
    repository = defs.get_repository_def()
    jobs = [job.name for job in repository.get_all_jobs() if not job.name.startswith("__")]
    assert len(jobs) == len(set(jobs)) == 7 * len(NAMES)
    graph = repository.asset_graph
    assert len(graph.get_all_asset_keys()) == 2 * len(NAMES)
    assert graph.get(dg.AssetKey([NAMES[1], "audit_logs_raw_v1"])).group_name == "even"
    ids = [(sensor.name) for sensor in repository.sensor_defs] + [each.name for each in repository.schedule_defs]
    assert len(ids) == len(set(ids)) == (3 + 5) * len(NAMES)
    for number, (name, shard) in enumerate(shards.items(), 1):
        shard.put(*events(10 * number, name))
    for name in NAMES:
        done = defs.resolve_job_def(f"{name}_audit_log_export").execute_in_process(instance=exporter.instance)
        assert done.success
    for number, (name, shard) in enumerate(shards.items(), 1):
        assert (name, shard.counts(), shard.pending()) == (name, (10 * number, 10 * number), 0)
        ((strangers,),) = shard.clickhouse(
            "SELECT count() FROM audit_logs_raw_v1 WHERE NOT startsWith(event_id, {own:String})", own=f"{name}_"
        )
        assert strangers == 0


def test_an_owner_that_dagster_refuses_is_named_by_its_entry(environment: dict[str, str]) -> None:
    """Dagster's own message names the asset, and not the file it comes from."""
    file = Path(environment["AUDITEXPORT_OUTBOXES"])
    content = yaml.safe_load(file.read_text())
    content["outboxes"][2]["owners"] = ["nobody in particular"]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidConfig, match=f"outboxes.yaml: outbox {NAMES[2]}: "):
        build_defs()


@pytest.fixture
def daemon(environment: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The daemon with all sensors on, and the last outbox's server away. Of three slots, two are for drains."""
    configured = yaml.safe_load((home / "dagster.yaml").read_text())
    configured["concurrency"]["runs"] = {  # as in operations.md
        "max_concurrent_runs": 3,
        "tag_concurrency_limits": [{"key": "auditexport/kind", "value": "drain", "limit": 2}],
    }
    (home / "dagster.yaml").write_text(yaml.safe_dump(configured))
    monkeypatch.setenv(f"{NAMES[-1].upper()}_MYSQL_URL", "mysql+pymysql://u:s3cret@127.0.0.1:1/nowhere")
    workspace = ["-w", str(ROOT / "workspace.yaml")]
    start = [sys.executable, "-m", "dagster", "sensor", "start", "--start-all", *workspace]
    subprocess.run(start, capture_output=True, timeout=120, check=True)
    command = [sys.executable, "-m", "dagster._daemon", "run", *workspace]
    child = Child("the daemon", command, log=home.parent / "daemon.log", stop_signal=signal.SIGINT)
    try:
        yield
    finally:
        child.stop()


@pytest.mark.timeout(600)
def test_an_endless_backlog_takes_one_slot_and_a_server_that_is_away_none(
    shards: dict[str, Stack], exporter: Exporter, daemon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots, eight outboxes: each that has rows gets its turn, however much one of them has."""
    shards[ENDLESS].put(*events(ENDLESS_ROWS, ENDLESS))
    healthy = OTHERS[:-1]
    # The endless one is at work before the others have anything.
    wait_until(lambda: shards[ENDLESS].pending() < ENDLESS_ROWS, what="the first drain", within_s=WITHIN_S, every_s=0.5)
    for name in healthy:
        shards[name].put(*events(ROWS, name))
    wait_until(
        lambda: not any(shards[name].pending() for name in healthy),
        what="the other outboxes to drain",
        within_s=WITHIN_S,
        every_s=0.5,
    )
    assert shards[ENDLESS].pending() > 0
    for name in healthy:
        assert (name, shards[name].counts()) == (name, (ROWS, ROWS))
    entries, distinct = shards[ENDLESS].counts()
    assert entries == distinct > 0

    records = exporter.instance.get_run_records()
    assert {record.dagster_run.tags["auditexport/outbox"] for record in records} == {ENDLESS, *healthy}
    # Never two runs of one outbox at once, and never more than the slots that drains have.
    spans = [
        (record.start_time, record.end_time or float("inf"), record.dagster_run.job_name)
        for record in records
        if record.start_time
    ]
    for start, _, job in spans:
        beside = [other for begun, ended, other in spans if begun <= start < ended]
        assert len(beside) <= 2
        assert beside.count(job) == 1

    # The sensor of the one whose server is away fails, and no other does.
    states = {state.instigator_name: state for state in exporter.instance.all_instigator_state()}
    for name in NAMES:
        state = states[f"{name}_outbox_backlog_sensor"]
        ticks = exporter.instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=20)
        failed = [tick for tick in ticks if tick.status is dg._core.scheduler.instigation.TickStatus.FAILURE]
        assert bool(failed) == (name == NAMES[-1]), [tick.error for tick in failed]
    prompt = prompt_in({"COLUMNS": "160"}, monkeypatch)
    shown = prompt("status", "--all", status=BAD_CALL).output.splitlines()
    lines = {line.split()[0]: line for line in shown[1 : len(NAMES) + 1]}
    assert set(lines) == set(NAMES)
    assert "not known" in lines[NAMES[-1]]
    assert not any("not known" in lines[name] for name in NAMES[:-1])
    assert os.environ[f"{NAMES[-1].upper()}_MYSQL_URL"] not in "\n".join(shown)
