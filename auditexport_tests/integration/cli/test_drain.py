"""`auditexport drain`: killed, interrupted, and beside other drains, every event is exported exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from auditexport_pipeline import processes
from auditexport_pipeline.core import claiming, export, retries
from auditexport_pipeline.core.batch import Batch, Claim
from auditexport_pipeline.core.drain import Drain, Drained
from auditexport_pipeline.core.errors import OutboxUnavailable
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Outbox
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.defs.report import run_metadata
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.prompts import Prompt, at_a_terminal, prompt_in, started, urls
from auditexport_tests.support.waiting import wait_until

# Slow enough to be met in the middle: a batch takes half a second.
SLOWLY = ("--batch-rows", "50", "--max-rows-per-second", "100")


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    return prompt_in(urls(stack), monkeypatch)


def exported(stack: Stack) -> int:
    """Batches that are exported, verified or not."""
    rows = stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox_batch WHERE state IN ('exported', 'verified')")
    return int(str(rows[0].n))


def states(stack: Stack) -> set[str]:
    return {
        str(row.state) for row in stack.sql("SELECT DISTINCT state FROM clickhouse_outbox_batch WHERE batch_id > 0")
    }


def is_exactly_once(stack: Stack, events: int) -> None:
    assert stack.counts() == (events, events)
    assert stack.pending() == 0
    assert states(stack) == {"verified"}


def test_a_drain_empties_the_backlog_and_once_is_one_plan(prompt: Prompt, stack: Stack) -> None:
    """A plan is bounded, a backlog is not. The totals have the names of a run's metadata, for the same dashboards."""
    seed_outbox(stack.mysql_url, seed=2, events=100, malformed=3, unknown=2, writers=1)
    once = json.loads(prompt("drain", "--batch-rows", "10", "--max-batches", "2", "--once", "--json").output)
    assert (once["rounds"], once["batches"], once["backlog_rows"]) == (1, 2, 103 - 20)
    run = run_metadata(stack.outbox.batches([1, 2]), {}, stack.outbox.backlog(tuple(VERSIONS), count_to=1_000), {}, 1.0)
    shared = set(run) - {"per_batch", "dead_letters_by_reason", "oldest_event", "newest_event"}
    assert shared <= set(once)
    sums = ("rows", "entries", "batches", "bytes", "dead_letters", "unknown_rows", "dead_letters_standing")
    assert {name: once[name] for name in sums} == {name: run[name] for name in sums}
    shown = prompt("drain", "--batch-rows", "10", "--max-batches", "2").output
    for text in ("83 rows pending", "in 9 batches", "0 rows still pending"):
        assert text in shown
    assert "exported 0 rows in 0 batches" in prompt("drain").output
    assert stack.counts() == (100, 100)


def test_every_limit_is_an_option_and_a_wrong_value_is_refused(prompt: Prompt, stack: Stack) -> None:
    """The launchpad and the CLI have the same settings and bounds."""
    shown = " ".join(prompt("drain", "--help").output.split())
    for name, limit in Limits.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert str(limit.description).split(":")[0].split(";")[0].split(",")[0][:40] in shown
    seed_outbox(stack.mysql_url, seed=3, events=10, writers=1)
    assert "--batch-rows" in prompt("drain", "--batch-rows", "0", status=2).output
    assert "--insert-timeout-s" in prompt("drain", "--insert-timeout-s", "3601", status=2).output
    assert "--versions" in prompt("drain", "--versions", "audit_log.v99", status=2).output
    assert (stack.pending(), states(stack)) == (10, set())


def test_a_setup_that_is_not_ready_claims_nothing(prompt: Prompt, stack: Stack) -> None:
    """The same preflight as that of a run, before any row is claimed."""
    seed_outbox(stack.mysql_url, seed=4, events=10, writers=1)
    stack.log.client().command("ALTER TABLE audit_logs_raw_v1 MODIFY SETTING non_replicated_deduplication_window = 0")
    refused = prompt("drain", status=2).output
    assert "nothing was claimed" in refused
    assert (stack.pending(), states(stack)) == (10, set())


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_is_exactly_once(stack: Stack, prompt: Prompt) -> None:
    """A killed drain needs no repair: start it again, and every event is in ClickHouse once."""
    seed_outbox(stack.mysql_url, seed=5, events=400, malformed=4, writers=1)
    with started(stack, "drain", *SLOWLY) as process:
        wait_until(lambda: exported(stack) >= 2, what="two batches")
        process.kill()
        process.wait()
    left = stack.outbox.backlog(tuple(VERSIONS), count_to=1_000)
    assert left.open_batches >= 1
    assert left.leasing_owners, "its lease has not ended: the next drain must not have to wait for it"
    # On this machine the process is known to be dead, so its batches are taken up at once.
    values = json.loads(prompt("drain", "--json").output)
    assert values["adopted_batches"] == left.open_batches
    assert values["open_batches"] == 0
    assert stack.counts() == (400, 400)
    assert stack.pending() == 4  # the dead letters
    assert states(stack) == {"verified"}


def test_ctrl_c_finishes_the_current_batch_and_gives_the_others_back(stack: Stack, prompt: Prompt) -> None:
    """A stop takes one batch, and the others are free for the next drain."""
    seed_outbox(stack.mysql_url, seed=6, events=400, writers=1)
    with started(stack, "drain", *SLOWLY) as process:
        wait_until(lambda: exported(stack) >= 1, what="a batch")
        assert any(owner.startswith(f"{processes._host()}:{process.pid}:") for owner in leasing(stack))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, output + errors
    assert "stopping after the batch at hand" in errors
    assert "were given back, the next drain goes on from here" in output
    assert leasing(stack) == (), "what was given back is held by nobody"
    assert 0 < stack.pending() < 400
    assert "verified" in states(stack), "what was exported is verified all the same"
    prompt("drain")
    is_exactly_once(stack, 400)


def leasing(stack: Stack) -> tuple[str, ...]:
    return stack.outbox.backlog(tuple(VERSIONS), count_to=10).leasing_owners


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_the_batches_to_their_lease(stack: Stack, prompt: Prompt) -> None:
    """When something hangs, the way out must not hang too."""
    seed_outbox(stack.mysql_url, seed=7, events=400, writers=1)
    with started(stack, "drain", "--batch-rows", "400", "--max-rows-per-second", "10") as process:
        wait_until(lambda: "written" in states(stack), what="a batch that is being marked")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "stopping after the batch at hand" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "left to their lease" in errors
    assert leasing(stack) != ()
    assert json.loads(prompt("drain", "--json").output)["adopted_batches"] == 1
    is_exactly_once(stack, 400)


@pytest.mark.slow
def test_two_drains_at_once_share_the_work(stack: Stack) -> None:
    """A Dagster run may be at work during a drain by hand; the ledger gives each batch to one of them."""
    seed_outbox(stack.mysql_url, seed=8, events=600, writers=1)
    small = ("--batch-rows", "50", "--max-batches", "2", "--max-rows-per-second", "100", "--json")
    with started(stack, "drain", *small) as one, started(stack, "drain", *small) as other:
        totals = [json.loads(process.communicate(timeout=120)[0]) for process in (one, other)]
    assert sum(drained["rows"] for drained in totals) == 600
    assert all(drained["rows"] for drained in totals), "one of them did all of it"
    is_exactly_once(stack, 600)


def test_another_owner_at_work_is_named(stack: Stack, prompt: Prompt) -> None:
    """It explains why a drain ends while rows are still pending."""
    seed_outbox(stack.mysql_url, seed=9, events=20, writers=1)
    claiming.claim(stack.outbox, owner="run-1", dead_owners=(), limits=Limits())
    shown = prompt("drain", status=3).output
    assert "run-1 is at work as well" in shown
    assert "20 rows still pending" in shown


def test_a_loss_during_the_drain_is_exit_status_1(stack: Stack) -> None:
    """An acknowledgement is no proof: the drain verifies what ClickHouse has."""
    seed_outbox(stack.mysql_url, seed=10, events=200, writers=1)
    with started(stack, "drain", *SLOWLY, "--json") as process:
        wait_until(lambda: exported(stack) >= 1, what="a batch")
        process.send_signal(signal.SIGSTOP)  # it verifies at the end of its plan, and that must come after
        ((event_id,),) = stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1 ORDER BY inserted_at LIMIT 1")
        stack.log.client().command(
            f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = '{event_id}'", settings={"mutations_sync": 2}
        )
        process.send_signal(signal.SIGCONT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, output + errors
    assert json.loads(output)["discrepant"] == {"1": "1 missing"}
    assert "batch 1 is not in ClickHouse as it was sealed: 1 missing" in errors


def test_a_batch_with_altered_rows_stops_and_the_others_go_on(stack: Stack, prompt: Prompt) -> None:
    """One altered row is not exported, and does not delay other events."""
    seed_outbox(stack.mysql_url, seed=11, events=40, writers=1)
    claims = claiming.claim(stack.outbox, owner="run-1", dead_owners=(), limits=Limits(batch_rows=20))
    export.fetch(stack.outbox, stack.log, claims[0], Limits())
    stack.outbox.begin_write(claims[0], 300)
    first = stack.outbox.batches([1])[0].pks.first
    stack.sql("UPDATE clickhouse_outbox SET payload = JSON_SET(payload, '$.description', 'x') WHERE pk = :pk", pk=first)
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 1 WHERE batch_id > 0")
    values = json.loads(prompt("drain", "--json", status=1).output.splitlines()[-1])
    assert list(values["altered"]) == ["1"]
    assert values["rows"] == 20
    # After the lease the next drain resolves it.
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 1, inserts_until_ms = 1 WHERE state = 'stopped'")
    prompt("drain")
    is_exactly_once(stack, 40)


@pytest.mark.slow
def test_lingering_exports_what_arrives(stack: Stack) -> None:
    """As in a run: the drain stays, and exports within a second of the commit."""
    with started(stack, "drain", "--linger-s", "600", "--linger-poll-ms", "50", "--json") as process:
        for wanted in (10, 20):
            seed_outbox(stack.mysql_url, seed=wanted, events=10, writers=1)
            wait_until(
                lambda wanted=wanted: stack.counts() == (wanted, wanted) and not stack.pending(), what="ten more"
            )  # type: ignore[misc]
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert json.loads(output)["rows"] == 20
    is_exactly_once(stack, 20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="terminals of other systems differ")
def test_a_terminal_shows_a_bar_with_rows_and_pace(stack: Stack) -> None:
    """A person who waits wants to know how long."""
    seed_outbox(stack.mysql_url, seed=12, events=200, writers=1)
    with at_a_terminal(stack, "drain", *SLOWLY) as terminal:
        terminal.wait_for("exported 200 rows")
        assert terminal.exit_status() == 0
    assert "━" in terminal.shown
    assert "/200 rows" in terminal.shown
    assert "rows/s" in terminal.shown
    is_exactly_once(stack, 200)


# ── the rounds themselves ────────────────────────────────────────────────────────────────────────


class Recorder:
    """A `core.drain.Listener` that records troubles, and can act at a claim."""

    def __init__(self, at_claim: Any = lambda claims: None) -> None:
        self.troubles: list[str] = []
        self._at_claim = at_claim

    def claimed(self, claims: Sequence[Claim]) -> None:
        self._at_claim(claims)

    def exported(self, batch: Batch) -> None:
        pass

    def verified(self, outcome: dict[int, Discrepancy]) -> None:
        pass

    def trouble(self, what: str) -> None:
        self.troubles.append(what)


def rounds(stack: Stack, outbox: Outbox, log: AuditLog, listener: Recorder) -> Drained:
    work = Drain(outbox, log, owner="me", limits=Limits(batch_rows=20), listener=listener)
    return work.until_empty(lambda: stack.outbox.backlog(tuple(VERSIONS), count_to=1))


def test_a_batch_that_another_run_took_over_is_left_to_it(stack: Stack) -> None:
    """The drain that lost a batch changes nothing of it, and does not fail."""
    seed_outbox(stack.mysql_url, seed=13, events=60, writers=1)

    def take_over(claims: Sequence[Claim]) -> None:
        if claims:
            claiming.claim(stack.outbox, owner="other", dead_owners=("me",), limits=Limits())

    listener = Recorder(take_over)
    done = rounds(stack, stack.outbox, stack.log, listener)
    assert (done.rows, sorted(done.lost)) == (0, [1, 2, 3])
    assert all("is held by plan" in what for what in listener.troubles)
    assert stack.counts() == (0, 0)


class Faltering:
    """A real outbox whose `record_written` fails some times, before it changes anything, as in a failover."""

    def __init__(self, real: Outbox, times: int) -> None:
        self._real = real
        self._left = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def record_written(self, claim: Claim, digest: str) -> Batch:
        if self._left:
            self._left -= 1
            raise OutboxUnavailable("MySQL failed while testing; run again")
        return self._real.record_written(claim, digest)


def test_a_drain_waits_for_a_failover_and_continues(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart of a database needs no operator, and no row is written twice."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    seed_outbox(stack.mysql_url, seed=14, events=60, writers=1)
    listener = Recorder()
    done = rounds(stack, Faltering(stack.outbox, 2), stack.log, listener)
    assert done.rows == 60
    assert len(listener.troubles) == 2
    is_exactly_once(stack, 60)
    seed_outbox(stack.mysql_url, seed=15, events=20, writers=1)
    with pytest.raises(OutboxUnavailable):
        rounds(stack, Faltering(stack.outbox, 100), stack.log, Recorder())


def test_an_owner_is_dead_only_when_this_kernel_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a living drain lost its batches, both drains would waste their work."""
    me = processes.this_process()
    assert me.startswith(f"{processes._host()}:{os.getpid()}:")
    gone = subprocess.run(
        [sys.executable, "-c", "from auditexport_pipeline import processes; print(processes.this_process())"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.strip()
    host, pid, rest = me.rsplit(":", 2)
    boot, start = rest.split("-")
    given_again = f"{host}:{pid}:{boot}-{int(start, 16) + 1:x}"
    elsewhere = [
        f"other:{pid}:{rest}",
        f"{host}:{pid}:ffffff-{start}",
        "3f6c1a52-7d0b-4a52-9c0e-2f4b5c6d7e8f",
        "ada",
        "",
    ]
    assert processes.dead([me, gone, given_again, *elsewhere]) == {gone, given_again}
    monkeypatch.setattr(processes, "_boot", lambda: "")
    assert processes.dead([gone, given_again]) == set()
    assert processes.this_process() != me
