"""Which runs drain an outbox, and how to find such runs in Dagster's storage.

What belongs here: look-ups. What does not: what a drain does (`defs.assets`), what starts one (`defs.automation`), and
who is told of one that failed (`defs.alerts`).
"""

import itertools
from collections.abc import Sequence

import dagster as dg

from auditexport_pipeline.defs.names import Names

# What "Materialize" on the page runs.
IMPLICIT_JOB = "__ASSET_JOB"
# More failures in a row than these change nothing: a wait stops growing before, and so does the reader's patience.
FAILURES_LOOKED_AT = 8


def failed_in_a_row(instance: dg.DagsterInstance, names: Names) -> list[dg.RunRecord]:
    """The last runs of our job that failed, newest first, up to the last one that did not; the page's own runs are left to
    whoever launched them.
    """
    records = instance.get_run_records(
        dg.RunsFilter(job_name=names.job, statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]),
        limit=FAILURES_LOOKED_AT,
    )
    return list(itertools.takewhile(lambda record: record.dagster_run.status == dg.DagsterRunStatus.FAILURE, records))


def drain_in(instance: dg.DagsterInstance, names: Names, statuses: Sequence[dg.DagsterRunStatus]) -> str | None:
    """The id of a run in one of these states that drains this outbox: our job's, one from the page that names the asset,
    or any that holds the pool.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=list(statuses)), limit=200):
        pools = run.run_op_concurrency.all_pools if run.run_op_concurrency else None
        if run.job_name == names.job or names.asset in (run.asset_selection or ()) or names.pool in (pools or ()):
            return run.run_id
    return None
