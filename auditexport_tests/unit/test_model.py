"""The arithmetic of `benchmarks/model.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from auditexport_pipeline.core.settings import Limits
from auditexport_tests.benchmarks import model
from auditexport_tests.benchmarks.model import FAR, FULL, HERE, Costs, Plan, Site, drain

COSTS = Costs()


def rate(site: Site, workers: int = 0, **limits: int) -> float:
    return drain(site, Plan(limits=Limits(**limits), workers=workers, dagster=False), COSTS).events_s


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


def test_cores_distance_batches_and_workers_work_in_the_right_direction() -> None:
    """A setting that works the wrong way is an error of the model, not a finding."""
    small = Site(mysql_cores=0.5)
    assert rate(small, mark_connections=4) == pytest.approx(rate(small), rel=0.01), "its CPU is used up"
    assert rate(replace(HERE, exporter_cores=1)) < rate(HERE) < rate(replace(HERE, exporter_cores=4))
    sites = [Site(mysql_ms=ms, clickhouse_ms=ms) for ms in model.ROUND_TRIPS_MS]
    assert sorted((rate(site) for site in sites), reverse=True) == [rate(site) for site in sites]
    for site in sites:
        sizes = [rate(site, batch_rows=rows) for rows in (1_000, 10_000, 100_000)]
        workers = [rate(site, workers=count) for count in (1, 2, 4, 8)]
        assert sizes == sorted(sizes)
        assert workers == sorted(workers)
        assert rate(site) > workers[0]


def test_a_fleet_carries_its_rate_with_room_to_spare() -> None:
    """Somebody buys machines by this table."""
    one = drain(Site(), Plan(limits=Limits(mark_connections=4)), COSTS).events_s
    for target in (100_000, 1_000_000):
        assert model.fleet(target, COSTS)["outboxes, each with a MySQL"] * one * FULL >= target
