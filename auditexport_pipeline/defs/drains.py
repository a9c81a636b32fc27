"""Which runs drain an outbox, and how to find such runs in Dagster's storage.

What belongs here: one look-up. What does not: what a drain does (`defs.assets`), and what starts one
(`defs.automation`).
"""

from collections.abc import Sequence

import dagster as dg

from auditexport_pipeline.defs.names import Names


def drain_in(instance: dg.DagsterInstance, names: Names, statuses: Sequence[dg.DagsterRunStatus]) -> str | None:
    """The id of a run in one of these states that drains this outbox: our job's, one from the page that names the asset,
    or any that holds the pool.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=list(statuses)), limit=200):
        pools = run.run_op_concurrency.all_pools if run.run_op_concurrency else None
        if run.job_name == names.job or names.asset in (run.asset_selection or ()) or names.pool in (pools or ()):
            return run.run_id
    return None
