"""Reasons for which entries may be gone from ClickHouse: the table's TTL, and recorded erasures.

What does not belong here: finding out what is gone (`core.compare`), and reading a TTL clause (`clickhouse.ttl`).

Both rules are narrow, because the sweep deletes the last copy of an entry that is gone for one of these reasons:

* ClickHouse evaluates the TTL. Where it cannot, the TTL is unknown, and an entry counts as not past it, until an
  operator declares how long the table keeps an entry. A declaration is valid as long as the TTL clause is the same.
* An erasure explains the entries that it names, if they had been exported, or were pending, when it was recorded. Of entries
  whose rows are gone from the outbox, it explains at most as many as it can name, and none while ClickHouse still holds entries
  that it names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Maintenance
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import VERSIONS

LONGEST_TTL_DAYS = 36_500
TTL_UNKNOWN_TODO = (
    "To do: `auditexport doctor` shows the TTL. If it keeps an entry DAYS days after inserted_at, say so once: "
    "`auditexport sweep --ttl-days DAYS`; otherwise `auditexport reconcile --repair`"
)

# Every reason why a difference is no discrepancy, in the words of the reports and of `--json`.
ERASED = "erased on record"
EXPIRED = "past the TTL"
UNPROVABLE = "gone since an erasure, unprovable"  # gone from the outbox too
MERGED = "merged into another copy"  # of the same event
REPLACED = "replaced by a requeued row of the same event"  # that row is gone from the outbox
COPIES = "copies of a requeue"  # until they merge
RENEWED = "exported again as new"  # nothing proved that they were the same events
PENDING = "requeued and pending"
OTHERS = "written by others"
BEFORE_US = "before the first batch"


@dataclass(slots=True, kw_only=True)
class SentEvent:
    """An event that was sent to ClickHouse: the rows that it was exported from, and when."""

    version: str
    key: Key
    inserted_at_ms: int
    pks: list[int] = field(default_factory=list)
    again_ms: int | None = None  # the last export of the rows, if that was a requeue


class _Declared(msgspec.Struct, frozen=True):
    """The selection of an action with the verb `ttl`: the clauses by payload version, and how long they keep an entry."""

    ttl: dict[str, str] = {}
    days: float = 0.0


class Excuses:
    """The TTLs and the recorded erasures of one moment."""

    def __init__(self, upkeep: Maintenance, log: AuditLog, *, ttl_days: float | None = None) -> None:
        """`ttl_days` is a declaration that is not recorded, for a dry run."""
        self._upkeep = upkeep
        self._log = log
        self.now_ms = upkeep.now_ms()
        self._erasures = upkeep.erasures()
        self._of_workspace: defaultdict[str, list[int]] = defaultdict(list)
        for index, recorded in enumerate(self._erasures):
            self._of_workspace[recorded.erasure.workspace_id].append(index)
        self._past: dict[tuple[str, int, int], bool | None] = {}
        self._carried_out: dict[int, bool] = {}
        self._named: set[int] = set()  # erasures of one event that explained the entry of a row
        # By erasure: the entries without a row that it explained, by `inserted_at`.
        self._explained: defaultdict[int, dict[int, int]] = defaultdict(dict)
        self._declared = _declaration(upkeep) if ttl_days is None else _Declared(ttl=clauses(log), days=ttl_days)
        present = clauses(log) if self._declared.ttl else {}
        self._declared_versions = {name for name, clause in present.items() if self._declared.ttl.get(name) == clause}

    def explain(self, gone: Sequence[SentEvent], *, by_key: bool) -> list[tuple[str, bool]]:
        """For each of these events, which have no entry: ERASED, EXPIRED or "", and whether an unknown TTL may explain it.

        With `by_key`, a TTL that depends on more than `inserted_at` is evaluated for each key.
        """
        reasons = [(ERASED if self._is_erased(one) else "", False) for one in gone]
        left: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for index, one in enumerate(gone):
            if not reasons[index][0]:
                left[one.version, one.inserted_at_ms].append(index)
        for version in {version for version, _ in left}:
            self._evaluate(version, [at_ms for name, at_ms in left if name == version])
        for (version, at_ms), indexes in left.items():
            past = dict.fromkeys(indexes, self._past[version, at_ms, 0])
            if by_key and self._past[version, at_ms, 0] is None:
                of_keys = self._log.past_ttl_of(version, at_ms, [gone[index].key for index in indexes])
                past = {index: of_keys[gone[index].key] for index in indexes}
            for index, value in past.items():
                known = self._or_declared(version, at_ms, value)
                reasons[index] = (EXPIRED if known else "", known is None)
        return reasons

    # ── the TTL ──────────────────────────────────────────────────────────────────────────────────

    def past(self, version: str, times: Collection[int], *, ahead_ms: int = 0) -> dict[int, bool | None]:
        """Whether entries with these `inserted_at`s are past the TTL, `ahead_ms` from now; None where that is unknown."""
        self._evaluate(version, times, ahead_ms)
        return {
            at_ms: self._or_declared(version, at_ms - ahead_ms, self._past[version, at_ms, ahead_ms]) for at_ms in times
        }

    def kept_ms(self) -> int | None:
        """The longest time that an entry is kept; None: for ever, or unknown."""
        kept_ms = self._log.kept_ms()
        return int(self._declared.days * DAY_MS) if kept_ms is None and self._declared_versions else kept_ms

    def _evaluate(self, version: str, times: Collection[int], ahead_ms: int = 0) -> None:
        new = [at_ms for at_ms in times if (version, at_ms, ahead_ms) not in self._past]
        if new:
            past = self._log.past_ttl(version, new, ahead_s=ahead_ms // 1000)
            self._past.update({(version, at_ms, ahead_ms): value for at_ms, value in past.items()})

    def _or_declared(self, version: str, inserted_at_ms: int, past: bool | None) -> bool | None:
        if past is not None or version not in self._declared_versions:
            return past
        return inserted_at_ms + self._declared.days * DAY_MS <= self.now_ms

    # ── erasures ─────────────────────────────────────────────────────────────────────────────────

    def _is_erased(self, gone: SentEvent) -> bool:
        """Whether an erasure names the entry, and the entry or its rows existed when the erasure was recorded."""
        sent_ms = gone.inserted_at_ms if gone.again_ms is None else gone.again_ms
        for index in self._of_workspace.get(gone.key[0], ()):
            recorded = self._erasures[index]
            if not recorded.erasure.covers(gone.key):
                continue
            if sent_ms <= recorded.at_ms or (
                gone.again_ms is None and self._were_pending(gone.pks, recorded.newest_pk, recorded.at_ms)
            ):
                if recorded.erasure.event_id:
                    self._named.add(index)
                return True
        return False

    def _were_pending(self, pks: Sequence[int], newest_pk: int, at_ms: int) -> bool:
        """Whether these rows were in the outbox at that time, when `newest_pk` was its highest pk."""
        if any(pk > newest_pk for pk in pks):
            return False
        times = self._upkeep.times(PkSet.of(sorted(pks)))
        return all(pk in times and times[pk][0] <= at_ms for pk in pks)

    def erased_without_rows(
        self, inserted_at_ms: int, lost: int, lost_by_workspace: Mapping[str, int] | None = None
    ) -> int:
        """Of `lost` entries of one `inserted_at` whose rows are gone from the outbox: how many the erasures explain.

        With `lost_by_workspace`, an erasure explains losses of its own workspace only.
        """
        left = dict(lost_by_workspace) if lost_by_workspace is not None else None
        erased = 0
        for index, recorded in enumerate(self._erasures):
            workspace_id, event_id = recorded.erasure.workspace_id, recorded.erasure.event_id
            most = lost - erased if left is None else min(lost - erased, left.get(workspace_id, 0))
            if event_id:  # one entry, under one `inserted_at`
                elsewhere = sum(count for at_ms, count in self._explained[index].items() if at_ms != inserted_at_ms)
                most = min(most, 0 if index in self._named else 1 - elsewhere)
            if most <= 0 or inserted_at_ms > recorded.at_ms or not self._is_carried_out(index):
                continue
            self._explained[index][inserted_at_ms] = most
            erased += most
            if left is not None:
                left[workspace_id] -= most
        return erased

    def _is_carried_out(self, index: int) -> bool:
        if index not in self._carried_out:
            recorded = self._erasures[index]
            self._carried_out[index] = self._log.named_by(recorded.erasure, recorded.at_ms) == 0
        return self._carried_out[index]


def clauses(log: AuditLog) -> dict[str, str]:
    """The TTL clauses by payload version, without versions that have none."""
    return {version: clause for version in VERSIONS if (clause := log.ttl(version))}


def declare_ttl(upkeep: Maintenance, log: AuditLog, by: Actor, days: float) -> int:
    """Records how long the tables' present TTL clause keeps an entry after its `inserted_at`; returns the action's id.

    It is used only where ClickHouse cannot evaluate the TTL. Raises `InvalidConfig` for a number of days out of bounds.
    """
    if not 0 < days <= LONGEST_TTL_DAYS:
        raise InvalidConfig(f"ttl_days is {days:g}; it must be above 0, and {LONGEST_TTL_DAYS:,} at most")
    return upkeep.record_action("ttl", by, {"ttl": clauses(log), "days": float(days)})


def _declaration(upkeep: Maintenance) -> _Declared:
    for action in upkeep.last_actions("ttl", 1):
        try:
            return msgspec.json.decode(action.selection, type=_Declared)
        except msgspec.DecodeError:
            break
    return _Declared()
