"""Every error of this project, in one tree that answers one question: can a rerun change this?

What does not belong here: expected outcomes (an undecodable row, an empty outbox), which are values, and driver
exceptions, which each store translates in exactly one place.

    AuditExportError
    ├── TransientError             yes: run again, nothing has to be repaired
    │   ├── OutboxUnavailable
    │   │   ├── RowsLocked
    │   │   │   └── OutboxLocked
    │   │   ├── BatchLocked
    │   │   └── RowsSwapped
    │   ├── AuditLogUnavailable
    │   │   ├── InsertOutcomeUnknown
    │   │   │   └── BatchWaits
    │   │   ├── ForeignAnswer
    │   │   └── SettingsOutdated
    │   └── BatchUnmarked · LeaseLost · BrokerUnavailable · LocalServerFailed
    └── PermanentError             no: somebody has to change something first
        ├── SetupIncomplete
        │   ├── WrongAddress
        │   └── TableRefuses
        ├── InvalidConfig · BatchAltered · MarkRefused · InsertRefused · VerificationFailed
        └── IncompleteRun · LocalServerMissing

A message says what happened, to which thing (ids and counts, never payload text), and what to do.
"""

from __future__ import annotations


class AuditExportError(Exception):
    """The root of all errors that this project raises on purpose."""


class TransientError(AuditExportError):
    """A rerun can succeed although nothing is changed."""


class OutboxUnavailable(TransientError):
    """MySQL could not be reached, or ended our statement: connection, deadlock, lock wait, failover."""


class RowsLocked(OutboxUnavailable):
    """Rows that are to be marked are locked."""


class OutboxLocked(RowsLocked):
    """The whole outbox is locked, as by LOCK TABLES or ALTER TABLE, so no row of it can be marked."""


class BatchLocked(OutboxUnavailable):
    """A batch's row of the ledger is locked: this batch has to wait, the others can go on."""

    wait_s = 0.0


class RowsSwapped(OutboxUnavailable):
    """Rows under the pks of a written batch are not the sealed events, or some sealed events are gone."""


class BatchUnmarked(TransientError):
    """ClickHouse has a batch and its rows are not marked; the ledger holds them, so they are not sent again."""


class AuditLogUnavailable(TransientError):
    """ClickHouse could not be reached, or refused temporarily: connection, overload, read-only, disk."""


class InsertOutcomeUnknown(AuditLogUnavailable):
    """An INSERT was sent and no answer came: the block may be written. The next attempt asks ClickHouse first."""


class ForeignAnswer(AuditLogUnavailable):
    """A proxy or a cache answered; ClickHouse may have the request. `status` is the answer's (HTTP)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class SettingsOutdated(AuditLogUnavailable):
    """ClickHouse does not know a setting that it listed, as behind a load balancer. Nothing was written."""


class BatchWaits(InsertOutcomeUnknown):
    """A batch has to wait while the others go on: for `wait_s` seconds, or, if that is 0, until a limit is raised."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class LeaseLost(TransientError):
    """Another run has adopted the batch; every effect of this run on it is refused."""


class BrokerUnavailable(TransientError):
    """Celery's broker does not answer or refuses us: a step could not be sent, or its result not be read."""


class LocalServerFailed(TransientError):
    """A server of the local stack did not start, or ended by itself."""


class PermanentError(AuditExportError):
    """A rerun gives the same result until somebody changes something."""


class InvalidConfig(PermanentError):
    """A setting is outside its bounds or contradicts another; the message names the field."""


class SetupIncomplete(PermanentError):
    """A table, column, grant or engine setting is missing, or prevents exactly-once."""


class WrongAddress(SetupIncomplete):
    """At this address answers a redirect or a login, and no ClickHouse; `status` is the answer's (HTTP)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TableRefuses(SetupIncomplete):
    """The ClickHouse table refuses every row of a batch although all of them parse: its definition is wrong."""

    wait_s = 0.0


class BatchAltered(PermanentError):
    """Rows of a sealed batch were changed or removed before ClickHouse had them."""


class MarkRefused(PermanentError):
    """Rows of the outbox do not keep their mark, or MySQL refuses it, because of a trigger or a CHECK."""


class InsertRefused(PermanentError):
    """A row of a sealed batch no longer decodes, as after a change of the program; nothing was written."""


class VerificationFailed(PermanentError):
    """ClickHouse does not have a batch that it acknowledged."""


class IncompleteRun(PermanentError):
    """Fewer batches reached the end of a run than were planned."""


class LocalServerMissing(PermanentError):
    """No server binary was found; the message says how to install one."""
