"""Excuses: which entries may be gone from ClickHouse, because of the table's TTL or a recorded erasure.

What belongs here: which entries, or how many, an excuse covers. What does not: finding out what is gone
(`core.compare`), and reading a TTL clause (`clickhouse.ttl`).

Both rules are narrow, because the sweep deletes the last copy of an excused entry:

* ClickHouse evaluates the TTL. Where it cannot, the TTL is unknown, and an entry counts as not past it, until an
  operator declares how long the table keeps an entry. A declaration is valid as long as the TTL clause is the same.
* An erasure explains the entries that it names, if they had been exported, or were pending, when it was recorded. Of entries
  whose rows are gone from the outbox, it explains at most as many as it can name, and none while ClickHouse still holds entries
  that it names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import msgspec

from auditexport_pipeline.core.actions import Actor, RecordedErasure
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


class _Declared(msgspec.Struct, frozen=True):
    """The selection of an action with the verb `ttl`: the clauses by payload version, and how long they keep an entry."""

    ttl: dict[str, str] = {}
    days: float = 0.0


class Excuses:
    """The excuses at one moment. Reads recorded erasures and declarations at once, and TTLs when they are needed."""

    def __init__(self, upkeep: Maintenance, log: AuditLog, *, ttl_days: float | None = None) -> None:
        """`ttl_days` is a declaration that is not recorded, for a dry run."""
        self._upkeep = upkeep
        self._log = log
        self.now_ms = upkeep.now_ms()
        self.erasures = upkeep.erasures()
        self._by_workspace: defaultdict[str, list[int]] = defaultdict(list)
        for index, recorded in enumerate(self.erasures):
            self._by_workspace[recorded.erasure.workspace_id].append(index)
        self._clauses: dict[str, str] = {}
        self._past: dict[tuple[str, int], bool | None] = {}
        self._carried_out: dict[int, bool] = {}
        self._named: set[int] = set()  # erasures of one event that explained the entry of a row
        self._taken: defaultdict[int, dict[int, int]] = defaultdict(
            dict
        )  # per erasure: entries without a row, by `inserted_at`
        self._declared = _declaration(upkeep) if ttl_days is None else _Declared(ttl=clauses(log), days=ttl_days)

    # ── the TTL ──────────────────────────────────────────────────────────────────────────────────

    def past(self, version: str, times: Collection[int]) -> dict[int, bool | None]:
        """Whether entries with these `inserted_at`s are past the TTL; None where that is unknown."""
        self._look(version, times)
        return {at_ms: self._or_declared(version, at_ms, self._past[version, at_ms]) for at_ms in times}

    def past_of(self, version: str, inserted_at_ms: int, keys: Sequence[Key]) -> dict[Key, bool | None]:
        """As `past`, for entries whose keys are known: a TTL may count from the event's time."""
        if not keys:
            return {}
        self._look(version, [inserted_at_ms])
        whole = self._past[version, inserted_at_ms]
        if whole is not None:
            return dict.fromkeys(keys, whole)
        past = self._log.past_ttl_of(version, inserted_at_ms, keys)
        return {key: self._or_declared(version, inserted_at_ms, past[key]) for key in keys}

    def past_soon(self, version: str, times: Collection[int], ahead_ms: int) -> dict[int, bool | None]:
        """As `past`, `ahead_ms` from now."""
        past = self._log.past_ttl(version, list(times), ahead_s=ahead_ms // 1000)
        return {at_ms: self._or_declared(version, at_ms - ahead_ms, past[at_ms]) for at_ms in times}

    def kept_ms(self) -> int | None:
        """The longest time that an entry is kept; None: for ever, or unknown."""
        kept_ms = self._log.kept_ms()
        if kept_ms is None and any(self._declared_for(version) for version in VERSIONS):
            return int(self._declared.days * DAY_MS)
        return kept_ms

    def _look(self, version: str, times: Collection[int]) -> None:
        unseen = [at_ms for at_ms in times if (version, at_ms) not in self._past]
        if unseen:
            found = self._log.past_ttl(version, unseen)
            self._past.update({(version, at_ms): past for at_ms, past in found.items()})

    def _or_declared(self, version: str, inserted_at_ms: int, past: bool | None) -> bool | None:
        if past is not None or not self._declared_for(version):
            return past
        return inserted_at_ms + self._declared.days * DAY_MS <= self.now_ms

    def _declared_for(self, version: str) -> bool:
        if not self._declared.ttl.get(version):
            return False
        if version not in self._clauses:
            self._clauses[version] = self._log.ttl(version)
        return self._declared.ttl[version] == self._clauses[version]

    # ── erasures ─────────────────────────────────────────────────────────────────────────────────

    def erased(self, key: Key, pks: Sequence[int], *, inserted_at_ms: int, again_ms: int | None) -> bool:
        """Whether an erasure names the entry of these rows, and the entry existed when the erasure was recorded.

        `again_ms` is the last export of the rows, if that was a requeue.
        """
        for index in self._by_workspace.get(key[0], ()):
            recorded = self.erasures[index]
            if not recorded.erasure.covers(key):
                continue
            sent_ms = inserted_at_ms if again_ms is None else again_ms
            if sent_ms <= recorded.at_ms or (again_ms is None and self._waited(recorded, pks)):
                if recorded.erasure.event_id:
                    self._named.add(index)
                return True
        return False

    def _waited(self, recorded: RecordedErasure, pks: Sequence[int]) -> bool:
        """Whether these rows were in the outbox when the erasure was recorded, and were exported later."""
        if any(pk > recorded.newest_pk for pk in pks):
            return False
        times = self._upkeep.times(PkSet.of(sorted(pks)))
        return all(pk in times and times[pk][0] <= recorded.at_ms for pk in pks)

    def erased_unseen(self, inserted_at_ms: int, lost: int, lost_by_workspace: Mapping[str, int] | None = None) -> int:
        """Of `lost` entries of one `inserted_at` whose rows are gone from the outbox: how many recorded erasures explain.

        With `lost_by_workspace`, an erasure explains losses of its own workspace only.
        """
        left = dict(lost_by_workspace) if lost_by_workspace is not None else None
        erased = 0
        for index, recorded in enumerate(self.erasures):
            if erased >= lost:
                break
            workspace_id, event_id = recorded.erasure.workspace_id, recorded.erasure.event_id
            most = lost - erased if left is None else min(lost - erased, left.get(workspace_id, 0))
            if event_id:  # one entry, under one `inserted_at`
                elsewhere = sum(taken for at_ms, taken in self._taken[index].items() if at_ms != inserted_at_ms)
                most = min(most, 0 if index in self._named else 1 - elsewhere)
            if most <= 0 or inserted_at_ms > recorded.at_ms or not self._was_carried_out(index):
                continue
            self._taken[index][inserted_at_ms] = most
            erased += most
            if left is not None:
                left[workspace_id] -= most
        return erased

    def _was_carried_out(self, index: int) -> bool:
        if index not in self._carried_out:
            recorded = self.erasures[index]
            self._carried_out[index] = self._log.named_by(recorded.erasure, recorded.at_ms) == 0
        return self._carried_out[index]


def clauses(log: AuditLog) -> dict[str, str]:
    """The TTL clauses by payload version, without versions that have none."""
    found = {version: log.ttl(version) for version in VERSIONS}
    return {version: text for version, text in found.items() if text}


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
