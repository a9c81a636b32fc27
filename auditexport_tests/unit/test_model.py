"""The arithmetic of `benchmarks/model.py`; its figures are the benchmarks' and `docs/scale.md`'s."""

from __future__ import annotations

from dataclasses import replace

import pytest

from auditexport_pipeline.core.settings import Limits
from auditexport_tests.benchmarks import model
from auditexport_tests.benchmarks.model import FAR, FULL, HERE, Costs, Plan, Site, drain

COSTS = Costs()


def rate(site: Site | None = None, costs: Costs = COSTS, workers: int = 0, **limits: int) -> float:
    return drain(site or Site(), Plan(limits=Limits(**limits), workers=workers, dagster=False), costs).events_s


def test_no_machine_gives_more_than_its_cores() -> None:
    """Where the CPU is used up, faster stages change nothing."""
    small = Site(mysql_cores=0.5)
    assert drain(small, Plan(), COSTS).cpu["MySQL"] == pytest.approx(1)
    assert rate(small, mark_connections=4) == pytest.approx(rate(small), rel=0.01)
    assert rate(replace(HERE, exporter_cores=1)) < rate(HERE) < rate(replace(HERE, exporter_cores=4))


def test_distance_costs_and_large_batches_and_workers_help() -> None:
    """A setting that works the wrong way is an error of the model, not a finding."""
    sites = [Site(mysql_ms=ms, clickhouse_ms=ms) for ms in model.ROUND_TRIPS_MS]
    assert sorted((rate(site) for site in sites), reverse=True) == [rate(site) for site in sites]
    for site in sites:
        sizes = [rate(site, batch_rows=rows) for rows in (1_000, 10_000, 100_000)]
        workers = [rate(site, workers=count) for count in (1, 2, 4, 8)]
        assert sizes == sorted(sizes)
        assert workers == sorted(workers)
        assert rate(site) > workers[0]


def test_it_is_near_what_was_measured_where_cores_have_room() -> None:
    """With a control: without round trips the far measurements are missed by far."""
    trips = {name: 0.0 for name in Costs.__dataclass_fields__ if name.endswith("_trips")}
    roomy = 0
    for _, measured, site, plan in model.measured():
        outcome = drain(site, plan, COSTS)
        if max(outcome.cpu.values()) > FULL:
            continue
        roomy += 1
        assert outcome.events_s == pytest.approx(measured, rel=0.31)
        if site == FAR and plan.limits.batch_rows == 1_000:
            assert drain(site, plan, replace(COSTS, **trips)).events_s > 3 * measured
    assert roomy == 10


def test_a_fleet_carries_its_rate_with_room_to_spare() -> None:
    """Users buy machines by this table."""
    for target in (100_000, 1_000_000):
        fleet = model.fleet(target, COSTS)
        one = drain(Site(), Plan(limits=Limits(mark_connections=4)), COSTS).events_s
        assert fleet["outboxes, each with a MySQL"] * one * FULL >= target


def test_a_year_is_the_sum_of_its_batches_runs_and_ticks() -> None:
    """Batches outweigh runs, and purges keep Dagster's storage flat."""
    assert (model.runs_a_day(2_000), model.runs_a_day(17_280)) == (96, 270)
    idle = model.year(0, 0)["Dagster a year"]
    assert model.year(1, 1)["Dagster a year"] - idle == pytest.approx(365 * model.RUN_BYTES / 1e9)
    busy = model.year(17_280, 270)
    assert busy["ledger at 400 days"] == pytest.approx(17_280 * 400 * model.BATCH_BYTES / 1e9)
    assert busy["with its purges"] < busy["Dagster a year"] / 5
    assert model.year(17_280, 270, stays=True)["Dagster a year"] < busy["Dagster a year"] / 20
