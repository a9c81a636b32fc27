"""Which runs drain: the job's name, the asset, the pool, and how to find such runs in Dagster's storage.

What belongs here: names, and one look-up. What does not: what a drain does (`defs.assets`), and what starts one
(`defs.automation`).
"""

from collections.abc import Sequence

import dagster as dg

JOB = "audit_log_export"
ASSET = dg.AssetKey("audit_logs_raw_v1")
# One drain at a time, however it is launched: the queue admits one run holding this pool (dagster.yaml).
DRAIN_POOL = "audit_log_export"


def drain_in(instance: dg.DagsterInstance, statuses: Sequence[dg.DagsterRunStatus]) -> str | None:
    """The id of a run in one of these states that drains: our job's, one from the page that names the asset, or any that
    holds the pool.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=list(statuses)), limit=200):
        pools = run.run_op_concurrency.all_pools if run.run_op_concurrency else None
        if run.job_name == JOB or ASSET in (run.asset_selection or ()) or DRAIN_POOL in (pools or ()):
            return run.run_id
    return None
