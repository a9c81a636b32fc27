"""The IO manager between `fetch_batch` and `write_clickhouse`: its storage is the outbox.

What belongs here: handing the bytes of a batch to the next step of the same process. What does not:
reading them again, which `core.export.write` does against the seal wherever they are not here.

Nothing is pickled and nothing audited is ever at rest in Dagster: in another process, or on a retry,
`write_clickhouse` simply gets no bytes. Nor does it for a batch that is worked on ahead (`defs.ahead`):
there the thread that read them sends them.
"""

import dagster as dg

from auditexport_pipeline.core.export import Bodies


class OutboxIOManager(dg.IOManager):
    """Keeps the bodies of one fetched batch in memory; a second batch replaces the first."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], Bodies] = {}

    def handle_output(self, context: dg.OutputContext, obj: Bodies) -> None:
        self._kept = {tuple(context.get_identifier()): obj}

    def load_input(self, context: dg.InputContext) -> Bodies:
        assert context.upstream_output is not None
        return self._kept.pop(tuple(context.upstream_output.get_identifier()), {})


@dg.io_manager(
    config_schema={}, description="Hands a fetched batch over in memory; elsewhere the outbox is read again."
)
def outbox_io_manager() -> OutboxIOManager:
    return OutboxIOManager()
