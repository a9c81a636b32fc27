"""Random rows for our five tables and random parameters for our statements: few values, so that they meet, and their boundaries."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.dead_letters import DeadLetterFilter, LetterState
from auditexport_pipeline.core.pks import PkSet
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.contract.sides import (
    ACTIONS,
    COLUMNS,
    ERASURES,
    LEDGER,
    LETTERS,
    OUTBOX,
    START_MS,
    Tables,
)

# Texts that differ by case, by an accent, and by spaces at the end, which `utf8mb4_bin` ignores.
VERSIONS = ("audit_log.v1", "audit_log.v9", "audit_log.v1 ", "AUDIT_LOG.v1", "audit_log.vé", "", "audit_log.v1\t")
WORKSPACES = ("w1", "w2", "w1 ", "W1", "wé")
EVENTS = ("e1", "e2", "e3", "e1 ", "E1", "é")
REASONS = ("not_json", "no_id", "not_json ", "")
OWNERS = ("run 1", "run 2", "RUN 1")
PROCESSES = ("", "host:1:2-3", "host:4:5-6")
KEYS = ("1-ab", "2-cd", "", "ff-ef", "FF-ef", "2-")
EPOCHS = (1, 2, 0, 255, 4096)
VERBS = ("requeue", "sweep", "compact", "REQUEUE")
DIGESTS = ("d1", "d2", "")
ERRORS = ("", "view v failed", "VIEW v", "viewless", "in ClickHouse: 1 missing", "view 100%_\\")
DEFINITIONS = ("definition 1", "definition 2", "definition 1 ")
LETTER_STATES = tuple(state.value for state in LetterState)
# A state of a later release too.
LEDGER_STATES = (*(state.value for state in State), "paused")
COUNTS = ("", '{"unmarked":2}', '{"dead":1}', '{"dead":1,"unmarked":3}', "{}")
# As MySQL's JSON type writes them: it sorts the keys and puts a space after each colon and comma. MariaDB keeps the text.
TIMES = (START_MS, START_MS - 1, "1700000000123", "12abc", "abc", "", None, -5, 1.5, True, "-7", " 8", {"a": 1}, [1])
PAYLOADS = ("{}", "[]", "7", '"é"', *(json.dumps({"time": time}) for time in TIMES), json.dumps({"a": {"time": 1}}))
MOST_PK = 40
DAY_MS = 86_400_000


def moment_ms(choices: Choices) -> int:
    """Often one of a few, so that rows have the same; around the present, and around the bounds of statements."""
    return START_MS + choices.one_of((0, 1, -1, -1000, -1001, -5000, 1000, 60_000, 60_001, -DAY_MS, DAY_MS))


def stamp_ms(choices: Choices) -> int:
    return choices.one_of((START_MS - 5000, START_MS - 4999, START_MS, START_MS - DAY_MS))


def maybe(choices: Choices, value: Callable[[Choices], Any]) -> Any:
    return value(choices) if choices.below(2) else None


def pk_set(choices: Choices) -> PkSet:
    """One run to many, empty never."""
    runs = []
    at = 1 + choices.below(5)
    for _ in range(1 + choices.below(12)):
        runs.append((at, at + choices.below(3)))
        at = runs[-1][1] + 2 + choices.below(4)
    return PkSet(tuple(runs))


def random_tables(choices: Choices) -> Tables:
    """A few dozen rows; a letter is often of the row under its pk, and sometimes of another row that had the pk before."""
    outbox = {pk: _outbox_row(choices, pk) for pk in _keys(choices, MOST_PK, 30)}
    if choices.chance(100):  # beyond what a signed number holds
        outbox[2**63 + 1] = _outbox_row(choices, 2**63 + 1)
    letters = {pk: _letter(choices, pk, outbox.get(pk)) for pk in _keys(choices, MOST_PK, 20)}
    batches = {batch_id: _batch(choices, batch_id) for batch_id in _keys(choices, 25, 20)}
    if not choices.chance(50):
        batches[0] = _batch(choices, 0) | {
            "state": "head",
            "pks": "",
            "manifest": "[]",
            "first_pk": None,
            "last_pk": None,
        }
    actions = {key: _action(choices, key) for key in _keys(choices, 12, 10)}
    erasures = {key: _erasure(choices, key) for key in _keys(choices, 8, 6)}
    found = {OUTBOX: outbox, LEDGER: batches, LETTERS: letters, ACTIONS: actions, ERASURES: erasures}
    return {
        table: [tuple(row[column] for column in COLUMNS[table]) for _, row in sorted(rows.items())]
        for table, rows in found.items()
    }


def _keys(choices: Choices, highest: int, rows: int) -> list[int]:
    """About so many different keys, in ascending order, with gaps."""
    count = choices.below(rows + 1)
    return sorted({1 + choices.below(highest) for _ in range(count)})


def _outbox_row(choices: Choices, pk: int) -> dict[str, Any]:
    created = (
        START_MS,
        1262304000000,
        1262304000001,
        1262303999999,
        START_MS + 60_000,
        START_MS + 60_001,
        0,
        -1,
        -(2**63),
    )
    return {
        "pk": pk,
        "version": VERSIONS[0] if choices.below(2) == 0 else choices.one_of(VERSIONS),
        "workspace_id": choices.one_of(WORKSPACES),
        "event_id": choices.one_of(EVENTS),
        "payload": choices.one_of(PAYLOADS),
        "created_at": choices.one_of(created) if choices.below(3) == 2 else START_MS - 1000 * choices.below(5),
        "deleted_at": None
        if choices.below(2) == 0
        else choices.one_of((START_MS - 5000, START_MS - 4999, START_MS, 0, 1, 2**64 - 1)),
    }


def _letter(choices: Choices, pk: int, row: dict[str, Any] | None) -> dict[str, Any]:
    own = row is not None and choices.below(4) > 0
    ids = row if own and row is not None else _outbox_row(choices, pk)
    return {
        "pk": pk,
        "state": choices.one_of(LETTER_STATES),
        **{name: ids[name] for name in ("version", "workspace_id", "event_id")},
        "reason": choices.one_of(REASONS),
        "json_path": choices.one_of(DEFINITIONS),
        "detail": choices.one_of(("", "a text", "a number", "A TEXT", "a text ")),
        "batch_id": choices.below(5),
        "created_at_ms": moment_ms(choices),
        "updated_at_ms": moment_ms(choices),
        "action_id": maybe(choices, lambda choices: 1 + choices.below(5)),
    }


def _batch(choices: Choices, batch_id: int) -> dict[str, Any]:
    pks = pk_set(choices) if choices.below(5) else PkSet()
    return {
        "batch_id": batch_id,
        "epoch": choices.one_of(EPOCHS),
        "generation": choices.below(3),
        "version": choices.one_of(VERSIONS),
        "state": choices.one_of(LEDGER_STATES),
        "owner": choices.one_of(OWNERS),
        "lease_until_ms": moment_ms(choices) if choices.below(3) else 0,
        "claimed_rows": choices.below(9),
        "row_count": len(pks),
        "entry_count": choices.below(3),
        "bytes": choices.below(1000),
        "first_pk": pks.first if pks else None,
        "last_pk": pks.last if pks else None,
        "pks": str(pks),
        "manifest": manifest(moment_ms(choices)),
        "counts": choices.one_of(COUNTS),
        "digest": choices.one_of(DIGESTS),
        "previous_digest": None,
        "inserted_at_ms": moment_ms(choices) if choices.below(4) else 0,
        "oldest_event_ms": maybe(choices, moment_ms),
        "newest_event_ms": maybe(choices, moment_ms),
        "attempts": choices.below(3),
        "inserts_until_ms": moment_ms(choices),
        "last_error": choices.one_of(ERRORS),
        "claimed_at_ms": moment_ms(choices),
        "sealed_at_ms": maybe(choices, moment_ms),
        "written_at_ms": maybe(choices, moment_ms),
        "exported_at_ms": maybe(choices, stamp_ms),
        "verified_at_ms": maybe(choices, moment_ms),
        "observed": maybe(choices, lambda choices: "[]"),
        "swept_at_ms": maybe(choices, moment_ms),
        "swept_rows": choices.below(3),
        "claim_key": choices.one_of(KEYS),
        "process": choices.one_of(PROCESSES),
    }


def manifest(at_ms: int) -> str:
    return f'[{{"n":0,"at":{at_ms},"pks":"1-2"}}]'


def _action(choices: Choices, action_id: int) -> dict[str, Any]:
    return {
        "action_id": action_id,
        "at_ms": moment_ms(choices),
        "verb": choices.one_of(VERBS),
        "who": "somebody",
        "why": "because",
        "selection": '{"newest_pk":5}',
        "row_count": choices.below(5),
    }


def _erasure(choices: Choices, erasure_id: int) -> dict[str, Any]:
    return {
        "erasure_id": erasure_id,
        "action_id": 1 + choices.below(12),
        "workspace_id": choices.one_of(WORKSPACES),
        "event_id": choices.one_of(("", *EVENTS)),
        "from_ms": maybe(choices, moment_ms),
        "to_ms": maybe(choices, moment_ms),
    }


# ── parameters ───────────────────────────────────────────────────────────────────────────────────


def _pk(choices: Choices) -> int:
    return choices.one_of((1, 0, MOST_PK, 2**64 - 1, 2**63 + 1)) if choices.chance(150) else 1 + choices.below(MOST_PK)


def _small(choices: Choices) -> int:
    return choices.below(12)


def _exact(options: tuple[str, ...]) -> Callable[[Choices], list[bytes]]:
    return lambda choices: [choices.one_of(options).encode() for _ in range(1 + choices.below(3))]


def _some(options: tuple[str, ...]) -> Callable[[Choices], list[str]]:
    return lambda choices: [choices.one_of(options) for _ in range(1 + choices.below(3))]


def _one(options: tuple[Any, ...]) -> Callable[[Choices], Any]:
    return lambda choices: choices.one_of(options)


def _ids(choices: Choices) -> list[int]:
    return [choices.below(26) for _ in range(1 + choices.below(6))]


_PARAMETERS: dict[str, Callable[[Choices], Any]] = {
    **dict.fromkeys(("pk", "first_pk", "last_pk", "from_pk"), _pk),
    "pks": lambda choices: list(pk_set(choices)),
    "version": _one(VERSIONS),
    "versions": _some(VERSIONS),
    "exact_versions": _exact(VERSIONS),
    **dict.fromkeys(
        ("after_id", "before_id", "to_id", "batch_id", "epoch", "rows", "entries", "bytes", "generation", "action_id"),
        _small,
    ),
    "batch_ids": _ids,
    "event_ids": _exact(EVENTS),
    "any_event": _one((0, 1)),
    "event_id": _one(EVENTS),
    "row_limit": _one((100, 1, 3, 0, 10)),
    **dict.fromkeys(("looked_at", "searched"), _one((100, 2))),
    "most_bytes": _one((100, 5, 0)),
    **dict.fromkeys(
        (
            "from_ms",
            "to_ms",
            "before_ms",
            "last_ms",
            "first_ms",
            "since_ms",
            "until_ms",
            "now_ms",
            "oldest_ms",
            "newest_ms",
        ),
        moment_ms,
    ),
    "inserted_at_ms": moment_ms,
    **dict.fromkeys(("stamp_ms", "exported_at_ms"), stamp_ms),
    **dict.fromkeys(("lease_ms", "wait_ms"), _one((0, 1, 60_000))),
    "age_s": _one((0, 1, 5, 100_000)),
    "claim_key": _one(KEYS),
    "owner": _one(OWNERS),
    "process": _one(PROCESSES),
    "manifest": lambda choices: manifest(moment_ms(choices)),
    "in_manifest": lambda choices: f'%"at":{moment_ms(choices)},%',
    "counts": _one(COUNTS),
    "digest": _one(DIGESTS),
    "error": _one(ERRORS),
    "note": lambda choices: maybe(choices, _one(ERRORS)),
    "observed": lambda choices: "[]",
    "workspace_id": _one(WORKSPACES),
    "reason": _one(REASONS),
    "json_path": _one(DEFINITIONS),
    "definition": _one(DEFINITIONS),
    "detail": _one(("", "a text")),
    "states": _some(LETTER_STATES),
    "verb": _one(VERBS),
    "who": _one(("somebody",)),
    "why": _one(("because",)),
    "selection": _one(("{}",)),
}
# Parameters that a caller may leave out: NULL.
_OPTIONAL = {
    "marked_between": ("workspace_id", "from_event_ms", "to_event_ms"),
    "rows_between": ("version",),
    "rows_in": ("version",),
    "cut": ("generation", "oldest_ms", "newest_ms", "note", "first_pk", "last_pk"),
    "add_erasure": ("from_ms", "to_ms"),
}
_EVENT_MS = _one((START_MS, START_MS - 1, 0, 8, 1, 13, -6))
_BATCH_STATES = _one(LEDGER_STATES)


def parameter(statement: str, name: str, choices: Choices) -> Any:
    """A value for a parameter of this statement. Raises `KeyError` for a name that is new."""
    if name in _OPTIONAL.get(statement, ()) and choices.below(3) == 2:
        return None
    if name in ("from_event_ms", "to_event_ms"):
        return _EVENT_MS(choices)
    if name == "state":
        return choices.one_of(LETTER_STATES) if statement in ("add", "change") else _BATCH_STATES(choices)
    if name == "pks" and statement in ("add_batch", "cut"):  # the ledger's text
        return str(pk_set(choices))
    return _PARAMETERS[name](choices)


def letter_filter(choices: Choices) -> DeadLetterFilter:
    """Any conditions, or none."""
    return DeadLetterFilter(
        state=maybe(choices, lambda choices: LetterState(choices.one_of(LETTER_STATES))),
        workspace_id=maybe(choices, _one(WORKSPACES)),
        reason=maybe(choices, _one(REASONS[:3])),
        version=maybe(choices, _one(VERSIONS[:5])),
        older_than_s=maybe(choices, _one((0, 1, 100_000))),
        pks=maybe(choices, pk_set),
    )
