"""Every error this project raises, in one tree split by one question: can a rerun change this?

What does not belong here: expected outcomes (an undecodable row, an empty outbox), which are values, and driver exceptions,
which each store translates in exactly one place.

    AuditExportError
    ├── TransientError             yes: wait and run again, nothing has to be repaired
    │   ├── OutboxUnavailable          MySQL: down, deadlock, lock wait, failover
    │   │   ├── RowsLocked                 somebody holds rows locked that are to be marked
    │   │   │   └── OutboxLocked               somebody holds the whole outbox locked
    │   │   ├── BatchLocked                somebody holds a batch's row of the ledger locked; the other batches go on
    │   │   └── RowsSwapped                rows under a batch's pks are other events than it sealed
    │   ├── BatchUnmarked              ClickHouse has a batch whose rows could not be marked yet
    │   ├── AuditLogUnavailable        ClickHouse: down, slow, read-only, out of space
    │   ├── InsertOutcomeUnknown       an INSERT was sent and no answer came; the next attempt looks first
    │   ├── ForeignAnswer              not ClickHouse answered but a proxy, a cache or a maintenance page
    │   ├── SettingsOutdated           ClickHouse does not know a setting; its list is read again, nothing was written
    │   ├── BatchWaits                 a block is too large for ClickHouse; it is split once no INSERT of it can be at work
    │   ├── LeaseLost                  another run has adopted the batch; this run is refused
    │   ├── BrokerUnavailable          Celery's broker or its result store is down, or refuses us
    │   └── LocalServerFailed          a server of the local stack did not start
    └── PermanentError             no: somebody has to change something first
        ├── InvalidConfig              a setting is out of its bounds
        ├── SetupIncomplete            a table, column, grant or setting is missing or wrong
        │   └── WrongAddress               not ClickHouse answers at this address, but a redirect or a login
        │   └── TableRefuses               the ClickHouse table refuses every row of a batch, although they parse
        ├── BatchAltered               rows of a sealed batch are no longer as they were sealed
        ├── MarkRefused                a trigger or a CHECK undoes or refuses the mark of an exported row
        ├── InsertRefused              a sealed row no longer decodes
        ├── VerificationFailed         ClickHouse does not hold what it acknowledged
        ├── IncompleteRun              fewer batches arrived at the end of a run than were planned
        └── LocalServerMissing         no server binary on this machine

A message says what happened, to which thing (ids and counts, never payload text), and what to do.
"""

from __future__ import annotations


class AuditExportError(Exception):
    """The root of all errors that this project raises on purpose."""


class TransientError(AuditExportError):
    """A rerun can succeed although nobody changes anything."""


class OutboxUnavailable(TransientError):
    """MySQL could not be reached, or ended our statement: connection, deadlock, lock wait, failover."""


class RowsLocked(OutboxUnavailable):
    """Somebody holds rows locked that are to be marked."""


class OutboxLocked(RowsLocked):
    """Somebody holds the whole outbox locked, as LOCK TABLES and ALTER TABLE do, so that no row of it can be marked."""


class BatchLocked(OutboxUnavailable):
    """Somebody holds a batch's row of the ledger locked: this batch has to wait, the others can go on."""

    wait_s = 0.0


class RowsSwapped(OutboxUnavailable):
    """Rows under the pks of a written batch are not the events that it sealed, or some of these are gone."""


class BatchUnmarked(TransientError):
    """ClickHouse has a batch and its rows are not marked; the ledger holds them, so they are not sent again."""


class AuditLogUnavailable(TransientError):
    """ClickHouse could not be reached, or refused temporarily: connection, overload, read-only, disk."""


class InsertOutcomeUnknown(AuditLogUnavailable):
    """An INSERT was sent and its answer never came: it may or may not have been written."""


class ForeignAnswer(AuditLogUnavailable):
    """The answer is not from ClickHouse, which may or may not have received the request; `status` is the answer's (HTTP)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class SettingsOutdated(AuditLogUnavailable):
    """ClickHouse does not know a setting that it listed: a load balancer has servers of several versions. Nothing was written."""


class BatchWaits(InsertOutcomeUnknown):
    """A batch has to wait while the others go on: for `wait_s` seconds, or, if that is 0, until somebody raises a limit."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class LeaseLost(TransientError):
    """Another run holds the batch now; every effect of this run on it is refused."""


class BrokerUnavailable(TransientError):
    """A step could not be sent to Celery's workers, or its result not be read: the broker does not answer, or refuses us."""


class LocalServerFailed(TransientError):
    """A server of the local stack did not start or ended on its own."""


class PermanentError(AuditExportError):
    """A rerun gives the same result until somebody changes something."""


class InvalidConfig(PermanentError):
    """A setting is outside its bounds or contradicts another; the message names the field."""


class SetupIncomplete(PermanentError):
    """A table, column, grant or engine setting is missing or not what exactly-once needs."""


class WrongAddress(SetupIncomplete):
    """Not ClickHouse answers at this address, and that will not change, as for a redirect; `status` is the answer's (HTTP)."""

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
    """ClickHouse does not hold a batch that it acknowledged."""


class IncompleteRun(PermanentError):
    """Fewer batches reached the end of the run than it had planned."""


class LocalServerMissing(PermanentError):
    """No server binary was found; the message says in one line how to get it."""
