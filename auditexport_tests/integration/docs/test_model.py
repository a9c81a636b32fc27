"""The model of a drain on other machines: it agrees with what was measured, within the error it states, and can be wrong.

What belongs here: the simulation, its constants against real counts, and its tables. What does not: measuring speed
(`benchmarks`), and no time is asserted: the figures are those of the benchmarks' page.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import pytest

from auditexport_pipeline.core.limits import Limits
from auditexport_tests.benchmarks import growth, model
from auditexport_tests.benchmarks.model import (
    FULL,
    HERE,
    MEASURED,
    RTTS_MS,
    STATED_ERROR,
    Costs,
    Growth,
    Machine,
    Outcome,
    Plan,
    Simulation,
    Site,
    Store,
    Wait,
    Work,
    simulate,
)
from auditexport_tests.benchmarks.stages import Stages
from auditexport_tests.conftest import Stack

Line: TypeAlias = tuple[str, float, Site, Plan, bool]
COSTS = Costs()
README = Path(model.__file__).with_name("README.md").read_text()
PAGE = Path(__file__).resolve().parents[3] / "auditexport_pipeline" / "docs" / "scale.md"


def rate(site: Site = HERE, costs: Costs = COSTS, **plan: Any) -> float:
    return simulate(site, Plan(events=1_000_000, **plan), costs).events_s


# ── the simulation ───────────────────────────────────────────────────────────────────────────────


def test_works_share_a_machines_cores_and_threads_of_python_share_one() -> None:
    """Everything that the model says rests on who has to wait for whom."""

    def working(machine: Machine, group: object = None, width: float = 1.0) -> model.Process:
        yield Work(machine, 1.0, width=width, group=group)

    def seconds(cores: float, *works: dict[str, Any]) -> float:
        simulation, machine = Simulation(), Machine(cores)
        for work in works:
            simulation.start(working(machine, **work))
        ended = simulation.run()
        assert machine.busy_s == pytest.approx(len(works))
        return ended

    assert seconds(2, {}, {}) == pytest.approx(1.0)
    assert seconds(1, {}, {}) == pytest.approx(2.0)
    assert seconds(8, {"group": "a"}, {"group": "a"}) == pytest.approx(2.0)
    assert seconds(8, {"group": "a"}, {"group": "b"}) == pytest.approx(1.0)
    assert seconds(8, {"width": 4}) == pytest.approx(0.25)
    assert seconds(2, {"width": 0.5}, {"width": 4}) == pytest.approx(2.0)


def test_a_wait_uses_no_core_and_what_nobody_brings_is_an_error() -> None:
    """A simulation that hangs quietly would look like a fast one that did nothing."""

    def waiting() -> model.Process:
        yield Wait(3.0)

    def taking() -> model.Process:
        yield Store()

    simulation = Simulation()
    simulation.start(waiting())
    assert simulation.run() == pytest.approx(3.0)
    simulation.start(taking())
    with pytest.raises(RuntimeError, match="wait for what nobody brings"):
        simulation.run()


def test_no_work_is_lost_or_done_twice() -> None:
    """CPU seconds are the events' costs, wherever they were spent and however long it took."""
    plan = Plan(events=1_000_000, dagster=False)
    only_events = replace(COSTS, trip_exporter_ms=0, trip_mysql_ms=0, insert_clickhouse_ms=0)
    outcome = simulate(Site(), plan, only_events)
    spent = {name: share * outcome.seconds for name, share in outcome.cpu.items()}
    assert spent["exporter"] * 8 == pytest.approx(COSTS.exporter_us(), rel=0.01)
    # What is left of merges and purges after the last event does not hold it up.
    assert spent["MySQL"] * 8 == pytest.approx(COSTS.mysql_us(), rel=0.01)
    assert spent["ClickHouse"] * 16 == pytest.approx(COSTS.clickhouse_us(), rel=0.01)


def test_batches_are_cut_as_the_plan_of_a_run_cuts_them() -> None:
    """Small ones first: without that the model would start later than the program does."""
    assert Plan(events=1_000_000).batches() == [25_000, 37_500, 56_250, 84_375, *[100_000] * 7, 96_875]
    assert Plan(events=60_000, limits=Limits(batch_rows=1_000)).batches() == [1_000] * 60


# ── how it must move ─────────────────────────────────────────────────────────────────────────────


def test_further_away_is_never_faster_and_larger_batches_are_never_slower() -> None:
    """The two knobs that everybody turns first."""
    table = model.by_batch_and_distance(COSTS)
    assert list(table.columns) == [f"{rtt:g} ms" for rtt in RTTS_MS]
    assert (table.diff(axis=1).iloc[:, 1:] <= 0).all().all()
    assert (table.diff(axis=0).iloc[1:] >= 0).all().all()


def test_more_workers_are_never_slower_and_hide_distance() -> None:
    """What somebody who thinks of Celery looks up."""
    table = model.by_workers_and_distance(COSTS).filter(like=" ms")
    workers = table.loc[["1 worker", "2 workers", "4 workers", "8 workers"]]
    assert (workers.diff().iloc[1:] >= 0).all().all()
    gain = workers.loc["4 workers"] / workers.loc["1 worker"]
    assert gain["50 ms"] > 2.5
    ahead = table.loc["working ahead, 2, as shipped"]
    assert (ahead > workers.loc["1 worker"]).all()
    assert (ahead >= table.loc["working ahead, 1 in memory"]).all()


def test_a_batch_that_is_read_twice_takes_longer_and_further_away_more_so() -> None:
    """A worker in another process never has the rows, and a model that lets it have them promises too much."""
    for rtt_ms, at_least in ((0.2, 1.05), (20.0, 1.2)):
        site = Site(mysql_rtt_ms=rtt_ms, clickhouse_rtt_ms=rtt_ms)
        assert rate(site, workers=1, hands_over=True) > at_least * rate(site, workers=1)
        assert rate(site, hands_over=True) == rate(site)


def test_slower_databases_are_never_faster_and_the_one_that_is_waited_for_matters_most() -> None:
    """Service times go in one by one, and each has its own wall."""
    table = model.by_service_time(COSTS)
    assert (table.diff().iloc[1:] <= 0).all().all()
    assert (table.diff(axis=1).iloc[:, 1:] <= 0).all().all()
    slow = COSTS.served(mysql=2, clickhouse=3)
    assert slow.mysql_us() == pytest.approx(2 * COSTS.mysql_us())
    assert slow.clickhouse_us() == pytest.approx(3 * COSTS.clickhouse_us())
    assert slow.exporter_us() == COSTS.exporter_us()
    assert slow.write_clickhouse_trips == COSTS.write_clickhouse_trips


def test_more_cores_connections_and_outboxes_never_make_it_slower() -> None:
    """A wall that moves the wrong way is an error of the model, not a finding."""
    by_cores = [rate(replace(HERE, exporter_cores=cores)) for cores in (1, 2, 4, 8)]
    assert by_cores == sorted(by_cores)
    by_connections = [rate(Site(), limits=Limits(mark_connections=connections)) for connections in (1, 2, 4)]
    assert by_connections == sorted(by_connections)
    site, plan = Site(exporter_cores=64, clickhouse_cores=64), Plan(events=1_000_000)
    by_outboxes = [simulate(site, plan, COSTS, outboxes=n, a_clickhouse=n).events_s for n in (1, 2, 4, 8)]
    assert by_outboxes == sorted(by_outboxes)
    assert by_outboxes[-1] == pytest.approx(8 * by_outboxes[0], rel=0.05)


def test_one_clickhouse_is_a_wall_for_many_outboxes() -> None:
    """Where machines are shared, adding outboxes stops helping, at what its cores can take."""
    plan = Plan(events=1_000_000)
    crowded = Site(exporter_cores=64, clickhouse_cores=4)
    together = [simulate(crowded, plan, COSTS, outboxes=n, a_clickhouse=n) for n in (2, 8)]
    most = 4 / COSTS.clickhouse_us() * 1e6
    assert together[1].events_s <= most * 1.05
    assert together[1].cpu["ClickHouse"] > 0.9
    assert simulate(crowded, plan, COSTS, outboxes=8, a_clickhouse=1).events_s > 2 * together[1].events_s


def test_what_moves_a_wall_moves_it_on_to_the_next() -> None:
    """Three walls in the order in which a deployment meets them."""
    ladder = model.ladder(COSTS)
    assert list(ladder["waits for"][:3]) == ["mark", "write", "fetch"]
    assert list(ladder["events/s"]) == sorted(ladder["events/s"])


def test_a_fleet_carries_its_rate_with_room_to_spare() -> None:
    """The table of machines is read by somebody who buys them."""
    for target in model.SIZES:
        fleet = model.fleet(target, COSTS)
        assert fleet["they could do, events/s"] >= target * 1.2
    name = "outboxes, each with a MySQL"
    near = model.fleet(1_000_000, COSTS)
    assert near[name] > 9 * model.fleet(100_000, COSTS)[name]
    assert model.fleet(1_000_000, COSTS, 20.0)[name] > near[name]


# ── against what was measured ────────────────────────────────────────────────────────────────────


def _modelled(line: Line, costs: Costs = COSTS) -> Outcome:
    _, _, site, plan, nine = line
    return simulate(site, plan, model.mysql_9(costs) if nine else costs)


ROOMY = [line for line in MEASURED if max(_modelled(line).cpu.values()) <= FULL]


@pytest.mark.parametrize("line", ROOMY, ids=lambda line: line[0].strip())
def test_the_model_is_within_the_error_that_it_states(line: Line) -> None:
    """Every measurement of a machine that was not full."""
    assert abs(_modelled(line).events_s / line[1] - 1) <= STATED_ERROR


def test_the_error_is_one_that_a_wrong_model_exceeds() -> None:
    """Negative controls: without marking, without overlap or without round trips, the figures are not these."""
    measured = {name: line for line in MEASURED if (name := line[0])}
    drain = measured["speed: a drain of a million, MariaDB"]
    assert abs(_modelled(drain).events_s / drain[1] - 1) <= STATED_ERROR
    assert _modelled(drain, replace(COSTS, mark_mysql_us=0)).events_s > drain[1] * (1 + STATED_ERROR)
    assert rate(workers=1) < drain[1] * (1 - STATED_ERROR)
    far = measured["1,000 a batch, 20 and 50 ms away, 1 worker"]
    few_trips = replace(COSTS, fetch_trips=2, write_trips=2, mark_trips=2, claim_trips=1, verify_trips=1)
    assert _modelled(far, few_trips).events_s > far[1] * (1 + STATED_ERROR)
    assert len(ROOMY) >= 10


def test_where_machines_are_full_the_model_promises_too_much_and_the_page_says_so() -> None:
    """It knows no price of crowding; whoever reads the table is told which lines those are, and how much it is."""
    table = model.validation(COSTS)
    full = table[table["full"] > FULL]
    assert len(full) + len(ROOMY) == len(MEASURED)
    assert full["off by"].max() > STATED_ERROR
    assert f"by {full['off by'].max() * 100:.0f} % at worst" in PAGE.read_text()
    roomy = table[table["full"] <= FULL]["off by"].abs().max()
    assert f"Within {roomy * 100:.0f} % where cores are less than {FULL * 100:.0f} % full" in PAGE.read_text()


def test_the_constants_and_measurements_are_those_of_the_benchmarks_page() -> None:
    """Whoever measures again changes the page, and is told that the model is to be looked at."""
    stages = dict(re.findall(r"^\| (claim|fetch|write|mark|verify)[^|]*\| (.+) \|$", README, re.MULTILINE))
    for stage, cells in stages.items():
        for server, cell in zip(("exporter", "mysql", "clickhouse"), cells.split("|"), strict=True):
            if cell.strip():
                assert getattr(COSTS, f"{stage}_{server}_us") == float(cell)
    assert set(stages) == {"claim", "fetch", "write", "mark", "verify"}
    assert "| auditexport, the drain in it | 31,450 " in README
    assert "| 23,999 | 2.83 |" in README
    assert f"| {COSTS.mysql_us():.0f} / " not in README  # of three, separated otherwise
    assert f"16 / {COSTS.mysql_us():.0f} / {COSTS.clickhouse_us():.0f} |" in README


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1_000, 6_000])
def test_a_batch_makes_the_round_trips_that_the_model_counts(stack: Stack, rows: int) -> None:
    """Far from the databases, round trips are all there is: a statement more in a loop has to be seen here."""
    trips = growth.round_trips(cast("Any", stack), rows)
    chunks = -(-rows // Limits().mark_rows)
    assert trips["MySQL"]["fetch"] == pytest.approx(COSTS.fetch_trips + rows / COSTS.fetch_rows_a_trip, rel=0.25)
    assert trips["MySQL"]["write"] == pytest.approx(COSTS.write_trips, rel=0.25)
    assert trips["ClickHouse"]["write"] == COSTS.write_clickhouse_trips
    assert trips["MySQL"]["mark"] == pytest.approx(COSTS.mark_trips + COSTS.mark_trips_a_chunk * (chunks - 1), rel=0.35)
    assert trips["MySQL"]["claim"] == pytest.approx(COSTS.claim_trips, rel=0.35)
    assert trips["MySQL"]["verify"] == pytest.approx(COSTS.verify_trips, rel=0.25)
    again = growth.round_trips(cast("Any", stack), rows, hands_over=False)["MySQL"]["write"] - trips["MySQL"]["write"]
    assert again == pytest.approx(COSTS.reread_trips + rows / COSTS.fetch_rows_a_trip, rel=0.25)


# ── what it reads and prints ─────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_it_reads_what_stages_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of another machine go in by the file that the benchmark wrote there."""
    stages = object.__new__(Stages)
    stages.lines = {
        "claim": [1.0, 0.2, 1.8, 0.0],
        "fetch: read, decode, seal": [30.0, 20.0, 3.8, 0.0],
        "write": [40.0, 1.0, 0.2, 28.6],
        "mark": [40.0, 0.8, 36.8, 0.0],
        "verify": [2.0, 0.0, 0.0, 2.4],
        "mark, by one connection: NULL becomes a stamp": [40.0, 0.0, 36.0, 0.0],
    }
    costs = Costs.of_stages(f"a machine\n{stages.table()}\n")
    assert (costs.fetch_exporter_us, costs.mark_mysql_us, costs.write_clickhouse_us) == (20.0, 36.8, 28.6)
    assert rate(costs=costs) < rate()
    printed = tmp_path / "stages.txt"
    printed.write_text(stages.table())
    model.main(["--stages", str(printed)])
    assert "exporter 22.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not what `stages` prints"):
        Costs.of_stages("claim 1 2 3 4")


@pytest.mark.slow
def test_the_page_has_the_tables_that_the_model_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """A table that is copied by hand is the one that nobody renews."""
    model.main([])
    printed = capsys.readouterr().out
    shown = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(shown) == 9
    for table in shown:
        assert table.strip("\n") in printed


def test_a_run_ends_after_max_batches_and_each_of_them_leaves_something() -> None:
    """A busy outbox has more runs than the schedule, and its batches outweigh them."""
    assert model.runs_a_day(2_000) == 96
    assert model.runs_a_day(17_280) == 270
    assert model.fleet(100_000, COSTS)["runs a day"] == pytest.approx(3 * 450, rel=0.01)
    growth_ = Growth()
    for way in model.WAYS.values():
        assert way.stays or way.batches / way.runs <= 180
        assert way.batches >= way.runs
    table = model.yearly(growth_)["Dagster a year"]
    busy = model.WAYS["20,000 events/s in batches of 100,000"]
    runs_gb = 365 * (busy.runs * growth_.run_bytes + model.TICKS_A_DAY * growth_.tick_bytes) / 1e9
    assert table["20,000 events/s in batches of 100,000"] > 3 * runs_gb


def test_retention_is_what_keeps_storage_flat() -> None:
    """Without purges Dagster's grows with the years; with them it is what the window holds. The ledger only shrinks."""
    table = model.yearly(Growth())
    assert (table["with its purges"] < table["Dagster a year"] / 5).all()
    assert (table["and a year more"] < table["ledger at 400 days"]).all()
    assert (table["and a year more"] > 0).all()
