"""The retry of dead letters from the launchpad; `test_checks` has the check."""

from __future__ import annotations

import dagster as dg
import pytest

from auditexport_pipeline.definitions import defs
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, event


def test_dead_letters_are_retried_from_the_launchpad(exporter: Exporter, stack: Stack) -> None:
    """On call may have the Dagster UI and no shell."""
    stack.put(event("evt_1", "ws_a", time="soon"), event("evt_2", "ws_b", time="soon"))
    exporter.drain()

    def retry(**config: object) -> dg.ExecuteInProcessResult:
        return defs.resolve_job_def("retry_dead_letters").execute_in_process(
            instance=exporter.instance,
            run_config={"ops": {"retry_letters": {"config": {"why": "the writer is fixed", **config}}}},
        )

    with pytest.raises(dg.DagsterInvalidConfigError, match="no filter is given"):
        retry(dry_run=False)
    retry(workspace_id="ws_a")
    assert stack.sql("SELECT action_id FROM clickhouse_outbox_action") == []
    done = retry(workspace_id="ws_a", dry_run=False)
    (action,) = stack.sql("SELECT verb, who, why, row_count FROM clickhouse_outbox_action")
    assert tuple(action) == ("retry", f"Dagster run {done.run_id}", "the writer is fixed", 1)
    states = stack.sql("SELECT workspace_id, state FROM clickhouse_outbox_dead_letter ORDER BY workspace_id")
    assert [tuple(row) for row in states] == [("ws_a", "retried"), ("ws_b", "open")]
