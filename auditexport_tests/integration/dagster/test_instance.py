"""Purging old runs from a real instance's storage."""

from __future__ import annotations

import time
from pathlib import Path

import dagster as dg
import pytest

from auditexport_pipeline.definitions import defs
from auditexport_pipeline.defs import jobs
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ASSET, Exporter, events

DAY_S = 86_400


def purge(exporter: Exporter, **config: object) -> int:
    """Runs `purge_old_runs`; how many runs it says that it purged."""
    result = defs.resolve_job_def("purge_old_runs").execute_in_process(
        instance=exporter.instance, run_config={"ops": {"purge_runs": {"config": config}}}
    )
    (output,) = [event for event in result.all_events if event.is_successful_output]
    return int(str(output.step_output_data.metadata["runs"].value))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The purge looks from forty days on: everything that exists is old."""
    real = time.time
    monkeypatch.setattr(jobs.time, "time", lambda: real() + 40 * DAY_S)


@pytest.mark.slow
@pytest.mark.usefixtures("later")
def test_old_runs_go_and_the_latest_materialization_stays(exporter: Exporter, stack: Stack, scratch: Path) -> None:
    """Without a purge, a run per minute fills the disk. Purging too much removes the latest materialization."""
    stack.put(*events(1))
    old = [exporter.drain().run_id for _ in range(3)]
    latest = exporter.drain().run_id
    page = exporter.put_run("__ASSET_JOB", "FAILURE", frozenset([ASSET])).run_id
    unfinished = exporter.put_run("audit_log_export", "STARTED").run_id
    theirs = exporter.put_run("__ASSET_JOB", "SUCCESS", frozenset([dg.AssetKey("theirs")])).run_id
    foreign = exporter.put_run("somebody_elses_job", "SUCCESS").run_id

    assert purge(exporter, dry_run=True) == 4
    assert all(exporter.instance.has_run(run_id) for run_id in (*old, page))
    assert purge(exporter) == 5  # the dry run of a moment ago among them
    assert not any(exporter.instance.has_run(run_id) for run_id in (*old, page))
    assert all(exporter.instance.has_run(run_id) for run_id in (latest, unfinished, theirs, foreign))
    materialization = exporter.instance.get_latest_materialization_event(ASSET)
    assert materialization is not None
    assert materialization.run_id == latest
    left = {path.name.split(".")[0] for path in (scratch / "history" / "runs").glob("*.db")}
    assert not left & set(old)
    assert latest in left


@pytest.mark.usefixtures("later")
def test_a_purge_is_bounded_and_goes_through_more_than_a_page(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first purge of an old instance must not run for hours, and the next ones must get to the end."""
    monkeypatch.setattr(jobs, "_PAGE_RUNS", 2)
    for _ in range(7):
        exporter.put_run("audit_log_export", "SUCCESS")
    assert purge(exporter, max_runs=3) == 3
    assert purge(exporter) == 5  # four of them, and the purge before
    assert exporter.instance.get_runs_count(dg.RunsFilter(job_name="audit_log_export")) == 0


def test_what_is_young_stays(exporter: Exporter) -> None:
    """The negative control: by the real clock nothing here is a month old."""
    exporter.put_run("audit_log_export", "SUCCESS")
    assert purge(exporter) == 0
    with pytest.raises(dg.DagsterInvalidConfigError, match="run_days is 0"):
        purge(exporter, run_days=0.0)
