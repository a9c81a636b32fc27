"""Realistic outbox rows from a seed, and writers that put them into an outbox the way applications do.

What belongs here: the vocabulary of an API-key product's audit log, broken and unknown rows on request, and
writers that roll back and commit out of pk order. What does not: tables (the caller has created the outbox)
and decoding or judging payloads (`core.event`).
"""

from __future__ import annotations

import threading
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv6Address
from itertools import accumulate, islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

Event = dict[str, object]

VERSION = "audit_log.v1"
UNKNOWN_VERSION = "audit_log.v99"
PLATFORM_BUCKET = "unkey_mutations"

# 2026-01-05 09:00 UTC: a fixed beginning, so that the same seed gives the same rows on every day.
START_MS = 1_767_603_600_000

# Applications commit one or a few rows; the large ones are there because a million small commits take long.
TRANSACTION_ROWS = (1, 2, 5, 20, 100, 400, 700, 1400, 2100)
# One transaction in so many is rolled back; one in so many is held open while later ones commit.
ROLLED_BACK_ONE_IN = 25
LATE_ONE_IN = 8
LATE_BY_TRANSACTIONS = (1, 2, 4)

# What a writer outlives, as an application would: refused, gone away, lost, lock wait, deadlock.
TRANSIENT_CODES = frozenset({2003, 2006, 2013, 1205, 1213, 1053})
RECONNECT_AFTER_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRow:
    """One row of `clickhouse_outbox` as its writer gives it: pk and `deleted_at` are the database's."""

    version: str
    workspace_id: str
    event_id: str
    payload: str
    created_at_ms: int


class Kind(NamedTuple):
    """One event name: how often, what its description says, and the types of its targets."""

    event: str
    weight: int
    description: str
    targets: tuple[str, ...]


KINDS = (
    Kind("key.create", 240, "Created key {}", ("key", "api")),
    Kind("key.update", 150, "Updated key {}", ("key",)),
    Kind("key.delete", 90, "Deleted key {}", ("key", "api")),
    Kind("key.reroll", 20, "Rerolled key {}", ("key", "key")),
    Kind("api.create", 12, "Created API {}", ("api", "keyAuth")),
    Kind("api.update", 14, "Changed the settings of API {}", ("api",)),
    Kind("api.delete", 4, "Deleted API {}", ("api",)),
    Kind("ratelimit.create", 10, "Created namespace {}", ("ratelimitNamespace",)),
    Kind("ratelimit.update", 8, "Renamed namespace {}", ("ratelimitNamespace",)),
    Kind("ratelimit.set_override", 60, "Set override for {}", ("ratelimitNamespace", "ratelimitOverride")),
    Kind("ratelimit.delete_override", 15, "Deleted override {}", ("ratelimitOverride",)),
    Kind("role.create", 12, "Created role {}", ("role",)),
    Kind("role.update", 6, "Updated role {}", ("role",)),
    Kind("role.delete", 3, "Deleted role {}", ("role",)),
    Kind("permission.create", 14, "Created permission {}", ("permission",)),
    Kind("permission.delete", 3, "Deleted permission {}", ("permission",)),
    Kind("authorization.connect_role_and_key", 45, "Connected role {} to a key", ("role", "key")),
    Kind("authorization.disconnect_role_and_key", 12, "Disconnected role {} from a key", ("role", "key")),
    Kind(
        "authorization.connect_permission_and_key",
        50,
        "Connected permission {} to a key",
        ("permission", "key"),
    ),
    Kind(
        "authorization.connect_role_and_permission",
        18,
        "Connected role {} and its permissions",
        ("role", "permission", "permission"),
    ),
    Kind("identity.create", 30, "Created identity {}", ("identity",)),
    Kind("identity.update", 12, "Updated identity {}", ("identity", "ratelimitOverride")),
    Kind("identity.delete", 4, "Deleted identity {}", ("identity",)),
    Kind("workspace.update", 4, "Changed the name to {}", ("workspace",)),
    Kind("workspace.opt_in", 2, "Opted in to a beta", ()),
    Kind("invite.create", 5, "Invited {}", ("user",)),
    Kind("invite.accept", 3, "{} accepted an invitation", ("user", "workspace")),
    Kind("billing.plan_change", 3, "Changed plan to {}", ("workspace",)),
    Kind("billing.invoice_paid", 3, "Invoice paid", ()),
    Kind("webhook.update", 3, "Updated webhook {}", ("webhook",)),
    Kind("secret.decrypt", 20, "Decrypted key {}", ("key",)),
    Kind("auditLogBucket.create", 1, "Created bucket {}", ("auditLogBucket",)),
)
# What a tenant logs about its own users, in buckets of its own.
TENANT_KINDS = (
    Kind("user.login", 40, "{} logged in", ("user",)),
    Kind("user.login_failed", 8, "Wrong password for {}", ("user",)),
    Kind("document.viewed", 60, "Viewed {}", ("document",)),
    Kind("document.shared", 12, "Shared {}", ("document", "user", "user")),
    Kind("invoice.paid", 10, "Paid {}", ("invoice",)),
    Kind("export.requested", 2, "Asked for an export", ()),
)
TARGET_TYPES = sorted({target for kind in (*KINDS, *TENANT_KINDS) for target in kind.targets})
TENANT_BUCKETS = ("billing", "customer_portal", "ledger", "prod-eu", "documents", "Zahlungsverkehr-Süd")
TENANT_ONE_IN = 9

PEOPLE = (
    "Ada Lovelace",
    "José Ñuñez",
    "Zoë Müller-Lüdenscheidt",
    "Søren Kierkegaard",
    "Łukasz Żółć",
    "İbrahim Yıldız",
    "Nguyễn Thị Hương",
    "Ольга Петрова",
    "Ελένη Παπαδοπούλου",
    "王小明",
    "山田 太郎",
    "김민준",
    "محمد بن علي",
    "דניאל כהן",
    "प्रिया शर्मा",
    "สมชาย ใจดี",
    "Rene\u0301 Combining",
    'O\'Brien "Bob" \\ Slash',
    "👩‍🔧 Ops 🚀",
    "Grace Hopper",
)
THINGS = (
    "production",
    "staging",
    "mobile app",
    "email.outbound",
    "checkout-v2",
    "Großkunden",
    "支付服务",
    "платежи",
    "決済API",
    "🔑 root",
    "api.*.create_key",
    "documents:read",
    "Contrato nº 7.pdf",
    "line one\nline two",
    "tab\tseparated",
    "100% <b>legit</b> & 'quoted'",
    "premium_*",
    "admin",
)
USER_AGENTS = (
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/142.0.0.0 Safari/537.36",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/141.0.0.0 "
    "Safari/537.36 Edg/141.0.0.0",
    "Mozilla/5.0 (X11; Linux x86_64; rv:144.0) Gecko/20100101 Firefox/144.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) "
    "Version/18.6 Mobile/15E148 Safari/604.1",
    "unkey-go/2.1.0 (linux; amd64)",
    "@unkey/api@2.0.0",
    "python-httpx/0.28.1",
    "axios/1.12.2",
    "Go-http-client/2.0",
    "curl/8.14.1",
    "Terraform/1.13.3 (+https://www.terraform.io) terraform-provider-unkey/0.4.0",
)

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PAIRS = tuple(first + second for first in _ALPHABET for second in _ALPHABET)
_encode = msgspec.json.encode


def _id(prefix: str, random: Random, pairs: int = 8) -> str:
    draw = random.random
    return prefix + "".join([_PAIRS[int(draw() * 3844)] for _ in range(pairs)])


class _Workspace:
    """One tenant's people, keys and things: what its events can be about."""

    def __init__(self, seed: int, rank: int) -> None:
        random = Random(f"{seed}:workspace:{rank}")
        self.id = _id("ws_", random)
        self.buckets = random.sample(TENANT_BUCKETS, 2)
        people = random.sample(PEOPLE, 6)
        self.actors: list[Event] = [
            *(_optional({"type": "user", "id": _id("user_2", random)}, "name", name) for name in people),
            *(_optional({"type": "key", "id": _id("key_", random)}, "name", random.choice(THINGS)) for _ in range(4)),
        ]
        for actor in random.sample(self.actors, 3):
            actor["meta"] = random.choice(
                [None, {}, {"roles": ["admin", "billing"], "mfa": True}, {"sso": {"provider": "okta"}}]
            )
        # Some leave a field out, some say null: both mean absent.
        self.actors[0].pop("name", None)
        self.actors[1]["name"] = None
        self.system: Event = {"type": "system", "id": "system", "name": "Unkey"}
        self.targets = {kind: [_target(kind, random) for _ in range(12)] for kind in TARGET_TYPES}


def _optional(value: Event, field: str, content: object) -> Event:
    value[field] = content
    return value


def _target(kind: str, random: Random) -> Event:
    target: Event = {"type": kind, "id": _id(f"{kind.lower()}_", random)}
    if random.random() < 0.85:
        target["name"] = random.choice(PEOPLE if kind in {"user", "identity"} else THINGS)
    else:
        target["name"] = None
    chance = random.random()
    if chance < 0.12:
        target["meta"] = _meta(random)
    elif chance < 0.2:
        target["meta"] = None
    return target


def _meta(random: Random) -> Event:
    """One of the shapes that metas have in the wild: flat, nested, mixed, empty, with nulls."""
    limit, word = random.choice((10, 100, 5000)), random.choice(THINGS)
    shapes: tuple[Event, ...] = (
        {},
        {"name": word, "ownerId": _id("user_", random), "enabled": random.random() < 0.9},
        {"ratelimit": {"type": "fast", "limit": limit, "duration": 60_000, "async": True}},
        {"before": {"name": word, "remaining": limit}, "after": {"name": word, "remaining": None}},
        {"roles": random.sample(THINGS, 3), "count": 3},
        {"plan": "pro", "price": round(random.random() * 500, 2), "currency": "EUR", "seats": limit},
        {"list": [1, "two", 3.5, None, True, {"deep": [[], {}]}], "empty": ""},
        {"a": {"b": {"c": {"d": {"e": word}}}}, "größe": limit, "ключ": "значение", "🔥": 1},
        {"expires": START_MS + limit, "big": 9_007_199_254_740_993, "negative": -limit},
        {"url": f"https://app.example.com/{_id('', random, 4)}?q=a%20b&c=d", "method": "POST", "status": 200},
        {"permissions": [{"id": _id("perm_", random), "name": "documents:read"} for _ in range(2)]},
        {"reason": f"{word}: asked for by a customer; approved by two people, limited to a day"},
    )
    return random.choice(shapes)


class Generator:
    """Rows of version `audit_log.v1`, the same for the same arguments on every machine.

    Workspaces are skewed as tenants are (the n-th has 1/n of the first one's events) and depend on `seed`
    alone; `stream` gives several writers of one seed different events about the same workspaces.
    Times begin at `start_ms`, advance by `step_ms` on average and stay at `end_ms`. `payload_bytes` None leaves payloads as
    they are, 600 bytes on average; a number cuts or pads them to that size, down to about 230 bytes.
    """

    def __init__(
        self,
        seed: int,
        workspaces: int = 40,
        *,
        stream: int = 0,
        start_ms: int = START_MS,
        step_ms: float = 20.0,
        end_ms: int | None = None,
        payload_bytes: int | None = None,
    ) -> None:
        self._seed = seed
        self._end_ms = end_ms
        self._random = Random(f"{seed}:stream:{stream}")
        self._step_ms = step_ms
        self._payload_bytes = payload_bytes
        self._at_ms = float(start_ms)
        self._workspaces: dict[int, _Workspace] = {}
        self._ranks = list(accumulate(1 / rank for rank in range(1, workspaces + 1)))
        self._kinds = list(accumulate(kind.weight for kind in KINDS))
        self._tenant_kinds = list(accumulate(kind.weight for kind in TENANT_KINDS))
        shared = Random(f"{seed}:shared")
        self._metas = [_meta(shared) for _ in range(400)]
        self._ips = [".".join(str(shared.randrange(1, 255)) for _ in range(4)) for _ in range(200)]
        self._ips += [str(IPv6Address(0x2A02 << 112 | shared.getrandbits(96))) for _ in range(56)]
        self._request: tuple[_Workspace, Event, str] | None = None

    def events(self, n: int) -> Iterator[OutboxRow]:
        """The next n rows, every one of them decodable."""
        for _ in range(n):
            yield self.event()

    def event(self, at_ms: int | None = None) -> OutboxRow:
        """One decodable row, of the time `at_ms` if given."""
        event, created_at_ms = self._next(at_ms)
        return _row(VERSION, event, event if self._payload_bytes is None else self._fit(event), created_at_ms)

    def malformed(self, n: int, *, first: int = 0) -> Iterator[OutboxRow]:
        """Rows that the json column takes and `audit_log.v1` does not.

        The i-th is of the (first + i)-th kind of `MALFORMED_KINDS`, round and round. Its columns are sound.
        """
        kinds = tuple(MALFORMED_KINDS.values())
        for index in range(first, first + n):
            event, created_at_ms = self._next(None)
            yield _row(VERSION, event, kinds[index % len(kinds)](dict(event)), created_at_ms)

    def unknown_version(self, n: int) -> Iterator[OutboxRow]:
        """Rows of a version that nobody here knows, in a shape of their own."""
        for _ in range(n):
            event, created_at_ms = self._next(None)
            yield _row(UNKNOWN_VERSION, event, {"v": 99, "envelope": {"id": event["event_id"]}}, created_at_ms)

    def _next(self, at_ms: int | None) -> tuple[Event, int]:
        draw = self._random.random
        if at_ms is None:
            self._at_ms += draw() * 2 * self._step_ms
            at_ms = int(self._at_ms) if self._end_ms is None else min(int(self._at_ms), self._end_ms)
        # One request of an application often writes several events.
        if self._request is None or draw() < 0.7:
            self._request = self._new_request()
        workspace, actor, correlation_id = self._request
        if draw() * TENANT_ONE_IN < 1:
            kind = TENANT_KINDS[bisect(self._tenant_kinds, draw() * self._tenant_kinds[-1])]
            bucket = workspace.buckets[0 if draw() < 0.8 else 1]
            source = "customer"
        else:
            kind = KINDS[bisect(self._kinds, draw() * self._kinds[-1])]
            bucket, source = PLATFORM_BUCKET, "platform" if draw() < 0.99 else ""
        targets = [workspace.targets[target][int(draw() * 12)] for target in kind.targets]
        if targets and draw() < 0.06:
            more = workspace.targets[kind.targets[-1]]
            targets += [more[int(draw() * 12)] for _ in range(4 + int(draw() * 2) - len(targets))]
        subject = (targets[0]["name"] or targets[0]["id"]) if targets else ""
        event: Event = {
            "event_id": _id("evt_", self._random, 11),
            "time": at_ms,
            "workspace_id": workspace.id,
            "bucket": bucket,
            "source": source,
            "event": kind.event,
            "description": kind.description.format(subject),
            "actor": actor,
        }
        if actor["type"] != "system":
            event["remote_ip"] = self._ips[int(draw() * 256)]
            event["user_agent"] = USER_AGENTS[int(draw() * len(USER_AGENTS))]
        chance = draw()
        if chance < 0.45:
            event["meta"] = {**self._metas[int(draw() * 400)], "requestId": correlation_id}
        elif chance < 0.52:
            event["meta"] = None
        if targets or chance < 0.5:
            event["targets"] = targets
        if chance < 0.6:
            event["correlation_id"] = correlation_id
        elif chance < 0.66:
            event["correlation_id"] = event["remote_ip"] = event["user_agent"] = None
        return event, at_ms + int(draw() * draw() * 40)

    def _new_request(self) -> tuple[_Workspace, Event, str]:
        draw = self._random.random
        rank = bisect(self._ranks, draw() * self._ranks[-1])
        workspace = self._workspaces.get(rank)
        if workspace is None:
            workspace = self._workspaces[rank] = _Workspace(self._seed, rank)
        actors = workspace.actors
        actor = workspace.system if draw() < 0.06 else actors[int(draw() * len(actors))]
        return workspace, actor, _id("req_", self._random, 7)

    def _fit(self, event: Event) -> Event:
        """The event cut or padded towards the asked size; the required fields stay."""
        target = self._payload_bytes or 0
        size = len(_encode(event))
        for field in ("meta", "targets", "user_agent", "correlation_id", "remote_ip"):
            if size <= target:
                break
            event.pop(field, None)
            size = len(_encode(event))
        meta = event.get("meta")
        # A pad needs `"meta":{"diff":""},` around it, or less where a meta is there already.
        room = target - size - (10 if isinstance(meta, dict) else 19)
        if room > 0:
            offset = int(self._random.random() * (len(self._filler) - room))
            padded: Event = dict(meta) if isinstance(meta, dict) else {}
            padded["diff"] = self._filler[offset : offset + room]
            event["meta"] = padded
        return event

    @cached_property
    def _filler(self) -> str:
        # Words with numbers among them: it compresses about as text does, not as one repeated letter would.
        random = Random(f"{self._seed}:filler")
        words = [f"{random.choice(KINDS).event} {_id('key_', random, 4)} was" for _ in range(4_000)]
        text = " ".join(words)
        return text * (1 + 2 * (self._payload_bytes or 0) // len(text))


def _row(version: str, event: Event, payload: object, created_at_ms: int) -> OutboxRow:
    return OutboxRow(
        version=version,
        workspace_id=str(event["workspace_id"]),
        event_id=str(event["event_id"]),
        payload=_encode(payload).decode(),
        created_at_ms=created_at_ms,
    )


def _without(field: str) -> Callable[[Event], object]:
    return lambda event: {name: value for name, value in event.items() if name != field}


def _with(field: str, value: object) -> Callable[[Event], object]:
    return lambda event: {**event, field: value}


# Name of the fault → what it makes of a sound event. Every result is valid JSON and no `audit_log.v1`.
MALFORMED_KINDS: dict[str, Callable[[Event], object]] = {
    "array_not_object": lambda event: [event],
    "string_not_object": lambda event: f"see {event['event_id']}",
    "null_not_object": lambda event: None,
    "empty_object": lambda event: {},
    "no_event_id": _without("event_id"),
    "no_time": _without("time"),
    "no_workspace_id": _without("workspace_id"),
    "no_event": _without("event"),
    "event_is_null": _with("event", None),
    "event_is_number": _with("event", 7),
    "time_is_string": lambda event: {**event, "time": str(event["time"])},
    "time_has_fraction": _with("time", START_MS + 0.5),
    "time_beyond_int64": _with("time", 2**64 - 1),
    "actor_is_string": _with("actor", "user_2abc"),
    "meta_is_list": _with("meta", ["a", "list"]),
    "targets_is_object": _with("targets", {"type": "key", "id": "key_1"}),
    "target_id_is_number": _with("targets", [{"type": "key", "id": 12}]),
    "other_workspace_id": lambda event: {**event, "workspace_id": f"{event['workspace_id']}_other"},
    "other_event_id": lambda event: {**event, "event_id": f"{event['event_id']}_other"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """What `seed_outbox` committed, and the ids of what it rolled back."""

    events: int
    malformed: dict[str, int]
    unknown: int
    workspaces: int
    transactions: int
    late_transactions: int
    rolled_back_event_ids: tuple[str, ...]
    first_created_at_ms: int
    last_created_at_ms: int
    seconds: float

    @property
    def rows(self) -> int:
        """Rows that are in the table."""
        return self.events + sum(self.malformed.values()) + self.unknown


# Index used: appends to the primary key and to drainer_pending_idx. Locks: its own new rows; the pks of a
# statement are reserved when it starts, which is why a transaction can commit after others with higher pks.
INSERT = (
    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) VALUES (%s, %s, %s, %s, %s)"
)


def seed_outbox(
    engine_url: str,
    *,
    seed: int,
    events: int,
    malformed: int = 0,
    unknown: int = 0,
    writers: int = 4,
    workspaces: int = 40,
    payload_bytes: int | None = None,
    end_ms: int | None = None,
    span_ms: int = 3_600_000,
    progress: Callable[[int], None] | None = None,
) -> Seeded:
    """Fills the existing table `clickhouse_outbox` of that database, as `writers` applications at once.

    Sizes of transactions vary; some are rolled back, some commit after later ones. The committed event ids
    are the same for the same arguments (their pks are not, their times follow `end_ms`), so a second call
    with the same seed writes them again. `created_at` covers the `span_ms` before `end_ms` (default: now).
    `progress` gets the number of rows committed so far after each commit, one call at a time, from a
    writer's thread.
    """
    began = time.perf_counter()
    end_ms = time.time_ns() // 1_000_000 if end_ms is None else end_ms
    tally = _Tally(progress)
    engine = _engine(engine_url, connections=2 * writers)
    offset = 0
    todo: list[_Writer] = []
    for index in range(writers):
        mine = _share(events, writers, index)
        broken = _share(malformed, writers, index)
        strange = _share(unknown, writers, index)
        generator = Generator(
            seed,
            workspaces,
            stream=index,
            start_ms=end_ms - span_ms,
            step_ms=span_ms / max(1, mine + broken + strange),
            end_ms=end_ms,
            payload_bytes=payload_bytes,
        )
        todo.append(_Writer(generator, Random(f"{seed}:writer:{index}"), mine, broken, strange, offset, tally))
        offset += broken
    try:
        with ThreadPoolExecutor(writers, thread_name_prefix="outbox-writer") as pool:
            try:
                for done in [pool.submit(writer.run, engine) for writer in todo]:
                    done.result()
            except BaseException:
                # Leaving the pool waits for its threads: after Ctrl-C they are to end soon.
                tally.stopped.set()
                raise
    finally:
        engine.dispose()
    names = tuple(MALFORMED_KINDS)
    return Seeded(
        events=events,
        malformed=dict(Counter(names[index % len(names)] for index in range(malformed))),
        unknown=unknown,
        workspaces=len(tally.workspaces),
        transactions=tally.transactions,
        late_transactions=tally.late,
        rolled_back_event_ids=tuple(tally.rolled_back),
        first_created_at_ms=tally.first_ms,
        last_created_at_ms=tally.last_ms,
        seconds=time.perf_counter() - began,
    )


def trickle(engine_url: str, *, seed: int, events_per_s: float, stop: threading.Event) -> int:
    """Commits small transactions in real time until `stop` is set; returns the number of rows committed.

    An application whose database goes away loses its transaction and goes on: so does this, other errors
    are raised. Events of two calls differ, also with one seed, so that restarting it writes no duplicates.
    """
    from sqlalchemy.exc import DBAPIError

    generator = Generator(seed, stream=time.time_ns())
    random = Random(seed)
    engine = _engine(engine_url, connections=1)
    committed = 0
    due = time.monotonic()
    try:
        while True:
            rows = random.choice((1, 1, 1, 2, 3, 5))
            due += rows * 2 * random.random() / events_per_s
            if stop.wait(max(0.0, due - time.monotonic())):
                return committed
            now_ms = time.time_ns() // 1_000_000
            try:
                with engine.begin() as connection:
                    _insert(connection, [generator.event(now_ms) for _ in range(rows)])
                committed += rows
            except DBAPIError as error:
                if not (error.orig and error.orig.args and error.orig.args[0] in TRANSIENT_CODES):
                    raise
                if stop.wait(RECONNECT_AFTER_S):
                    return committed
                due = time.monotonic()
    finally:
        engine.dispose()


class _Tally:
    """What all writers did together. `stopped` tells the others that one has failed."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self._lock = threading.Lock()
        self._progress = progress
        self._rows = 0
        self.stopped = threading.Event()
        self.transactions = self.late = self.first_ms = self.last_ms = 0
        self.workspaces: set[str] = set()
        self.rolled_back: list[str] = []

    def committed(self, rows: list[OutboxRow], *, late: bool) -> None:
        first = min(row.created_at_ms for row in rows)
        last = max(row.created_at_ms for row in rows)
        with self._lock:
            self._rows += len(rows)
            self.transactions += 1
            self.late += late
            self.first_ms = min(self.first_ms, first) if self.first_ms else first
            self.last_ms = max(self.last_ms, last)
            self.workspaces.update([row.workspace_id for row in rows])
            if self._progress is not None:
                self._progress(self._rows)

    def undone(self, rows: list[OutboxRow]) -> None:
        with self._lock:
            self.rolled_back += [row.event_id for row in rows]


class _Writer:
    """One application: two connections, so that one transaction can stay open while others commit."""

    def __init__(
        self,
        generator: Generator,
        random: Random,
        events: int,
        malformed: int,
        unknown: int,
        first_malformed: int,
        tally: _Tally,
    ) -> None:
        self._generator = generator
        self._random = random
        self._tally = tally
        self._left = [events, malformed, unknown]
        self._sources = (
            generator.events(events),
            generator.malformed(malformed, first=first_malformed),
            generator.unknown_version(unknown),
        )
        # A small outbox gets small transactions rather than few.
        self._transaction_rows = [rows for rows in TRANSACTION_ROWS if rows <= max(1, sum(self._left) // 10)]

    def run(self, engine: Engine) -> None:
        try:
            with ExitStack() as stack:
                steady = stack.enter_context(engine.connect())
                late = stack.enter_context(engine.connect())
                self._run(steady, late)
        except BaseException:
            self._tally.stopped.set()
            raise

    def _run(self, steady: Connection, late: Connection) -> None:
        rows = self._rows()
        held: list[OutboxRow] = []
        overtaken_by = release_after = 0
        while chunk := list(islice(rows, self._random.choice(self._transaction_rows))):
            if self._tally.stopped.is_set():
                return
            if self._random.random() * ROLLED_BACK_ONE_IN < 1:
                undone = list(self._generator.events(self._random.choice(self._transaction_rows)))
                _insert(steady, undone)
                steady.rollback()
                self._tally.undone(undone)
            if not held and self._random.random() * LATE_ONE_IN < 1:
                _insert(late, chunk)
                held, overtaken_by, release_after = chunk, 0, self._random.choice(LATE_BY_TRANSACTIONS)
                continue
            _insert(steady, chunk)
            steady.commit()
            self._tally.committed(chunk, late=False)
            overtaken_by += 1
            if held and overtaken_by >= release_after:
                late.commit()
                self._tally.committed(held, late=True)
                held = []
        if held:
            late.commit()
            self._tally.committed(held, late=overtaken_by > 0)

    def _rows(self) -> Iterator[OutboxRow]:
        """Sound, malformed and unknown rows, mixed evenly."""
        left = self._left
        while total := sum(left):
            source = bisect(list(accumulate(left)), int(self._random.random() * total))
            left[source] -= 1
            yield next(self._sources[source])


def _share(total: int, writers: int, index: int) -> int:
    return total // writers + (index < total % writers)


def _engine(url: str, *, connections: int) -> Engine:
    from pymysql.converters import conversions
    from sqlalchemy import create_engine

    return create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=connections,
        max_overflow=0,
        # `_Payload.quoted` is right where a backslash escapes: the mode is stated, so that it always does.
        connect_args={"conv": {**conversions, _Payload: _Payload.quoted}, "sql_mode": "TRADITIONAL"},
    )


class _Payload:
    """A payload as a bound value, quoted 15 times faster than the driver quotes text that is not ASCII.

    JSON text holds no control characters, so the backslash and the quote are all there is to escape.
    """

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def quoted(self, _conversions: object) -> str:
        text = self.text.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{text}'"


def _insert(connection: Connection, rows: list[OutboxRow]) -> None:
    # The driver makes multi-row statements of at most 1 MB of these, below every max_allowed_packet.
    connection.exec_driver_sql(
        INSERT,
        [(row.version, row.workspace_id, row.event_id, _Payload(row.payload), row.created_at_ms) for row in rows],
    )
