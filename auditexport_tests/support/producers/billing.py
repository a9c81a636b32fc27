"""`billing_event.v1`: invoices, in a table of their own. What docs/versions.md tells how to write.

What belongs here: the shape, its place and its fingerprint. What does not: SQL, which stands beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from auditexport_pipeline import PayloadVersion, decoder, register_version

Required = Annotated[str, msgspec.Meta(min_length=1)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Line(msgspec.Struct, gc=False):
    sku: str
    quantity: Int64


class _Billing(msgspec.Struct, gc=False):
    event_id: Required
    time: Int64
    workspace_id: Required
    invoice_id: Required
    amount_cents: Int64
    currency: Required
    lines: list[_Line]
    note: str | None = None


def _content(event: _Billing) -> tuple[str, ...]:
    return (
        event.event_id,
        str(event.time),
        event.workspace_id,
        event.invoice_id,
        str(event.amount_cents),
        event.currency,
        event.note or "",
        "\1".join([line.sku for line in event.lines]),
        "\1".join([str(line.quantity) for line in event.lines]),
    )


BILLING = PayloadVersion(
    name="billing_event.v1",
    decode=decoder(
        _Billing,
        key=lambda event: (event.workspace_id, "billing", event.time, event.event_id),
        content=_content,
    ),
    sql=Path(__file__).with_name("billing_event_v1.sql"),
)


def register() -> None:
    """What the entry point of the group `auditexport_pipeline.versions` names."""
    register_version(BILLING)
