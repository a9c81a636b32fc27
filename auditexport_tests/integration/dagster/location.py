"""Jobs that a child process or a re-execution finds by module and name, which is how Dagster rebuilds a job."""

import dagster as dg

from auditexport_pipeline.definitions import build_defs

CANARY = "canary-7f3a9c"


def the_export_job() -> dg.JobDefinition:
    return build_defs().resolve_job_def("audit_log_export")


@dg.op
def careless(context: dg.OpExecutionContext) -> str:
    context.log.info(f"the payload is {CANARY}")
    return CANARY


@dg.job
def leaking_job() -> None:
    """Does what an export must never do, for the negative control of the search for payloads."""
    careless()
