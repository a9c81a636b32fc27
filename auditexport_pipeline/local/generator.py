"""Realistic outbox rows from a seed, and writers that insert them as applications do.

The events are those of an API-key product. Writers roll back some transactions and commit others late. The caller creates
the outbox. A library of fake data would be slower, and would give other rows after an upgrade.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from itertools import accumulate, cycle, islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

Event = dict[str, object]

VERSION = "audit_log.v1"
UNKNOWN_VERSION = "audit_log.v99"
PLATFORM_BUCKET = "unkey_mutations"
WORKSPACES = 40
# The n-th workspace has 1/n of the first one's events.
SKEW = list(accumulate(1 / rank for rank in range(1, WORKSPACES + 1)))

# 2026-01-05 09:00 UTC. A fixed start, so that the same seed gives the same rows on every day.
START_MS = 1_767_603_600_000

# `seed_outbox` covers the hour before now.
SPAN_MS = 3_600_000

# Applications commit one or a few rows. The large sizes are there because a million small commits take long.
TRANSACTION_ROWS = (1, 2, 5, 20, 100, 400, 700, 1400, 2100)
# One transaction in 25 is rolled back; one in 8 commits after the next one.
ROLLED_BACK_ONE_IN = 25
LATE_ONE_IN = 8

RECONNECT_AFTER_S = 0.5


class Kind(NamedTuple):
    """One event name with the types of its targets and its description."""

    event: str
    targets: tuple[str, ...]
    description: str


def _kinds(table: str) -> list[Kind]:
    """Reads one kind per line: weight, event, targets, description. Returns each kind as often as its weight says.

    `{}` in a description stands for the first target.
    """
    kinds = []
    for line in table.strip().splitlines():
        weight, event, targets, description = line.split(maxsplit=3)
        kinds += [Kind(event, tuple(targets.split(",")) if targets != "-" else (), description)] * int(weight)
    return kinds


KINDS = _kinds("""
    240 key.create                                key,api                              Created key {}
    150 key.update                                key                                  Updated key {}
     90 key.delete                                key,api                              Deleted key {}
     20 key.reroll                                key,key                              Rerolled key {}
     12 api.create                                api,keyAuth                          Created API {}
     14 api.update                                api                                  Changed the settings of API {}
      4 api.delete                                api                                  Deleted API {}
     10 ratelimit.create                          ratelimitNamespace                   Created namespace {}
      8 ratelimit.update                          ratelimitNamespace                   Renamed namespace {}
     60 ratelimit.set_override                    ratelimitNamespace,ratelimitOverride Set override for {}
     15 ratelimit.delete_override                 ratelimitOverride                    Deleted override {}
     12 role.create                               role                                 Created role {}
      6 role.update                               role                                 Updated role {}
      3 role.delete                               role                                 Deleted role {}
     14 permission.create                         permission                           Created permission {}
      3 permission.delete                         permission                           Deleted permission {}
     45 authorization.connect_role_and_key        role,key                             Connected role {} to a key
     12 authorization.disconnect_role_and_key     role,key                             Disconnected role {} from a key
     50 authorization.connect_permission_and_key  permission,key                       Connected permission {} to a key
     18 authorization.connect_role_and_permission role,permission,permission           Connected role {} and its permissions
     30 identity.create                           identity                             Created identity {}
     12 identity.update                           identity,ratelimitOverride           Updated identity {}
      4 identity.delete                           identity                             Deleted identity {}
      4 workspace.update                          workspace                            Changed the name to {}
      2 workspace.opt_in                          -                                    Opted in to a beta
      5 invite.create                             user                                 Invited {}
      3 invite.accept                             user,workspace                       {} accepted an invitation
      3 billing.plan_change                       workspace                            Changed plan to {}
      3 billing.invoice_paid                      -                                    Invoice paid
      3 webhook.update                            webhook                              Updated webhook {}
     20 secret.decrypt                            key                                  Decrypted key {}
      1 auditLogBucket.create                     auditLogBucket                       Created bucket {}
""")
# What a tenant logs about its own users, in buckets of its own.
TENANT_KINDS = _kinds("""
    40 user.login        user               {} logged in
     8 user.login_failed user               Wrong password for {}
    60 document.viewed   document           Viewed {}
    12 document.shared   document,user,user Shared {}
    10 invoice.paid      invoice            Paid {}
     2 export.requested  -                  Asked for an export
""")
TARGET_TYPES = sorted({target for kind in (*KINDS, *TENANT_KINDS) for target in kind.targets})
TENANT_BUCKETS = ("billing", "customer_portal", "ledger", "prod-eu", "documents", "Zahlungsverkehr-Süd")
TENANT_ONE_IN = 9


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split("|")]


PEOPLE = _names("""
    Ada Lovelace | José Ñuñez | Zoë Müller-Lüdenscheidt | Søren Kierkegaard | Łukasz Żółć | İbrahim Yıldız | Nguyễn Thị Hương |
    Ольга Петрова | Ελένη Παπαδοπούλου | 王小明 | 山田 太郎 | 김민준 | محمد بن علي | דניאל כהן | प्रिया शर्मा | สมชาย ใจดี |
    Rene\u0301 Combining | O'Brien "Bob" \\ Slash | 👩‍🔧 Ops 🚀 | Grace Hopper
""")
THINGS = _names("""
    production | staging | mobile app | email.outbound | checkout-v2 | Großkunden | 支付服务 | платежи | 決済API | 🔑 root |
    api.*.create_key | documents:read | Contrato nº 7.pdf | line one\nline two | tab\tseparated | 100% <b>legit</b> & 'quoted' |
    premium_* | admin
""")
USER_AGENTS = """
Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36
Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/141.0.0.0 Safari/537.36 Edg/141.0.0.0
Mozilla/5.0 (X11; Linux x86_64; rv:144.0) Gecko/20100101 Firefox/144.0
Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.6 Mobile/15E148 Safari/604.1
unkey-go/2.1.0 (linux; amd64)
@unkey/api@2.0.0
python-httpx/0.28.1
axios/1.12.2
Go-http-client/2.0
curl/8.14.1
Terraform/1.13.3 (+https://www.terraform.io) terraform-provider-unkey/0.4.0
""".strip().splitlines()

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_encode = msgspec.json.encode


def _id(prefix: str, random: Random, length: int = 16) -> str:
    return prefix + "".join(random.choices(_ALPHABET, k=length))


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
        {"url": f"https://app.example.com/{_id('', random, 8)}?q=a%20b&c=d", "method": "POST", "status": 200},
        {"permissions": [{"id": _id("perm_", random), "name": "documents:read"} for _ in range(2)]},
        {"reason": f"{word}: asked for by a customer; approved by two people, limited to a day"},
    )
    return random.choice(shapes)


def _thing(kind: str, random: Random, meta: Event) -> Event:
    """An actor or a target. Some fields are missing and some are null; both mean absent."""
    thing: Event = {"type": kind, "id": _id(f"{kind.lower()}_", random)}
    name = random.choice(PEOPLE if kind in {"user", "identity"} else THINGS)
    _fill(thing, random, (("name", name, 0.85), ("meta", meta, 0.12)))
    return thing


def _fill(event: Event, random: Random, fields: Iterable[tuple[str, object, float]]) -> None:
    """Sets each field (name, value, probability). One in fourteen is null; the others stay absent."""
    for name, value, probability in fields:
        chance = random.random()
        if chance < probability:
            event[name] = value
        elif chance < probability + 0.07:
            event[name] = None


class _Workspace:
    """One tenant's actors and targets."""

    def __init__(self, seed: int, rank: int) -> None:
        random = Random(f"{seed}:workspace:{rank}")
        self.id = _id("ws_", random)
        self.buckets = random.sample(TENANT_BUCKETS, 2)
        meta: Event = {"roles": ["admin", "billing"], "mfa": True}
        self.actors = [_thing(kind, random, meta) for kind in ("user",) * 9 + ("key",) * 6]
        self.actors.append({"type": "system", "id": "system", "name": "Unkey"})
        self.targets = {kind: [_thing(kind, random, _meta(random)) for _ in range(12)] for kind in TARGET_TYPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRow:
    """One row of `clickhouse_outbox` as its writer inserts it: the database sets pk and `deleted_at`."""

    version: str
    workspace_id: str
    event_id: str
    payload: str
    created_at_ms: int


class Generator:
    """Rows of version `audit_log.v1`, the same for the same arguments on each machine.

    Workspaces depend on `seed` alone. Each `stream` of a seed gives other events about the same workspaces, for several
    writers. Times begin at `start_ms`, advance by `step_ms` on average and stop at `end_ms`. Payloads have 600 bytes on
    average; with `payload_bytes` they are padded to that size.
    """

    def __init__(
        self,
        seed: int,
        *,
        stream: int = 0,
        start_ms: int = START_MS,
        step_ms: float = 20.0,
        end_ms: int | None = None,
        payload_bytes: int | None = None,
    ) -> None:
        self._seed = seed
        self._random = Random(f"{seed}:stream:{stream}")
        self._at_ms, self._step_ms, self._end_ms = float(start_ms), step_ms, end_ms
        self._payload_bytes = payload_bytes
        self._workspaces: dict[int, _Workspace] = {}
        shared = Random(f"{seed}:shared")
        self._metas = [_meta(shared) for _ in range(400)]
        self._ips = [".".join(str(shared.randrange(1, 255)) for _ in range(4)) for _ in range(200)]
        self._ips += [str(IPv6Address(0x2A02 << 112 | shared.getrandbits(96))) for _ in range(56)]
        self._words = [_id("key_", shared, 8) for _ in range(400)]
        self._request: tuple[_Workspace, Event, str] | None = None

    def events(self, n: int) -> Iterator[OutboxRow]:
        """The next n rows, all decodable."""
        return (self.event() for _ in range(n))

    def event(self, at_ms: int | None = None) -> OutboxRow:
        """One decodable row, with the time `at_ms` if given."""
        return self._row(self._padded, at_ms)

    def malformed(self, kinds: Iterable[str]) -> Iterator[OutboxRow]:
        """One row for each name of `MALFORMED_KINDS`: the json column takes it, `audit_log.v1` does not."""
        return (self._row(MALFORMED_KINDS[kind]) for kind in kinds)

    def unknown_version(self, n: int) -> Iterator[OutboxRow]:
        """Rows of a version without a decoder, in another shape."""
        return (
            self._row(lambda event: {"v": 99, "envelope": {"id": event["event_id"]}}, version=UNKNOWN_VERSION)
            for _ in range(n)
        )

    def _row(self, payload: Callable[[Event], object], at_ms: int | None = None, version: str = VERSION) -> OutboxRow:
        if at_ms is None:
            self._at_ms += self._random.random() * 2 * self._step_ms
            at_ms = int(self._at_ms) if self._end_ms is None else min(int(self._at_ms), self._end_ms)
        event = self._next(at_ms)
        return OutboxRow(
            version=version,
            workspace_id=str(event["workspace_id"]),
            event_id=str(event["event_id"]),
            payload=_encode(payload(event)).decode(),
            created_at_ms=at_ms + int(self._random.random() ** 2 * 40),
        )

    def _next(self, at_ms: int) -> Event:
        random = self._random
        chance, choice = random.random, random.choice
        # One request of an application often writes several events.
        if self._request is None or chance() < 0.7:
            (rank,) = random.choices(range(WORKSPACES), cum_weights=SKEW)
            if rank not in self._workspaces:
                self._workspaces[rank] = _Workspace(self._seed, rank)
            workspace = self._workspaces[rank]
            self._request = workspace, choice(workspace.actors), _id("req_", random, 14)
        workspace, actor, request_id = self._request
        tenant = chance() * TENANT_ONE_IN < 1
        kind = choice(TENANT_KINDS if tenant else KINDS)
        targets = [choice(workspace.targets[target]) for target in kind.targets]
        if targets and chance() < 0.06:
            targets += [choice(workspace.targets[kind.targets[-1]]) for _ in range(choice((4, 5)) - len(targets))]
        event: Event = {
            "event_id": _id("evt_", random, 22),
            "time": at_ms,
            "workspace_id": workspace.id,
            "bucket": workspace.buckets[chance() < 0.2] if tenant else PLATFORM_BUCKET,
            "source": "customer" if tenant else "platform" if chance() < 0.99 else "",
            "event": kind.event,
            "description": kind.description.format((targets[0].get("name") or targets[0]["id"]) if targets else ""),
            "actor": actor,
        }
        if targets or chance() < 0.5:
            event["targets"] = targets
        by_people = 0 if actor["type"] == "system" else 0.93
        _fill(
            event,
            random,
            (
                ("remote_ip", choice(self._ips), by_people),
                ("user_agent", choice(USER_AGENTS), by_people),
                ("meta", {**choice(self._metas), "requestId": request_id}, 0.45),
                ("correlation_id", request_id, 0.6),
            ),
        )
        return event

    def _padded(self, event: Event) -> Event:
        """The event in a payload of `payload_bytes`, if those are given and it is smaller."""
        if self._payload_bytes is None:
            return event
        event["meta"] = {"diff": ""}
        padding_bytes = max(0, self._payload_bytes - len(_encode(event)))
        # Different words for each event, so that they compress as text does.
        words = self._random.choices(self._words, k=1 + padding_bytes // len(self._words[0]))
        event["meta"] = {"diff": " ".join(words)[:padding_bytes]}
        return event


def _without(name: str) -> Callable[[Event], object]:
    return lambda event: {field: value for field, value in event.items() if field != name}


# By name, what makes a sound event malformed. Each result is valid JSON, and not an `audit_log.v1`.
MALFORMED_KINDS: dict[str, Callable[[Event], object]] = {
    "array_not_object": lambda event: [event],
    "string_not_object": lambda event: f"see {event['event_id']}",
    "null_not_object": lambda event: None,
    "empty_object": lambda event: {},
    "no_event_id": _without("event_id"),
    "no_time": _without("time"),
    "no_workspace_id": _without("workspace_id"),
    "no_event": _without("event"),
    "event_is_null": lambda event: {**event, "event": None},
    "event_is_number": lambda event: {**event, "event": 7},
    "time_is_string": lambda event: {**event, "time": str(event["time"])},
    "time_has_fraction": lambda event: {**event, "time": START_MS + 0.5},
    "time_beyond_int64": lambda event: {**event, "time": 2**64 - 1},
    "actor_is_string": lambda event: {**event, "actor": "user_2abc"},
    "meta_is_list": lambda event: {**event, "meta": ["a", "list"]},
    "targets_is_object": lambda event: {**event, "targets": {"type": "key", "id": "key_1"}},
    "target_id_is_number": lambda event: {**event, "targets": [{"type": "key", "id": 12}]},
    "other_workspace_id": lambda event: {**event, "workspace_id": f"{event['workspace_id']}_other"},
    "other_event_id": lambda event: {**event, "event_id": f"{event['event_id']}_other"},
}


@dataclass(slots=True, kw_only=True)
class Seeded:
    """What `seed_outbox` committed, and the event ids that it rolled back."""

    events: int
    malformed: dict[str, int]
    unknown: int
    late_transactions: int = 0
    workspace_ids: set[str] = field(default_factory=set)
    rolled_back_event_ids: set[str] = field(default_factory=set)

    @property
    def rows(self) -> int:
        """Rows that are in the table."""
        return self.events + sum(self.malformed.values()) + self.unknown


def seed_outbox(
    engine_url: str,
    *,
    seed: int,
    events: int,
    malformed: int = 0,
    unknown: int = 0,
    writers: int = 4,
    payload_bytes: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Seeded:
    """Fills the existing table `clickhouse_outbox` of that database, as `writers` applications at once.

    Sizes of transactions vary; some are rolled back, some commit after later ones. The same arguments commit the same event
    ids; pks and times differ. `created_at` covers the last hour. `progress` gets the number of committed rows after each
    commit, one call at a time, from a writer's thread.
    """
    end_ms = time.time_ns() // 1_000_000
    kinds = list(islice(cycle(MALFORMED_KINDS), malformed))
    seeded = Seeded(events=events, malformed=dict(Counter(kinds)), unknown=unknown)
    lock, stop = threading.Lock(), threading.Event()
    committed_rows = 0

    def commit(connection: Connection, rows: list[OutboxRow], *, late: bool) -> None:
        nonlocal committed_rows
        connection.commit()
        with lock:
            committed_rows += len(rows)
            seeded.late_transactions += late
            seeded.workspace_ids.update(row.workspace_id for row in rows)
            progress(committed_rows)

    def write(writer: int) -> None:
        """One application, on two connections: a transaction can stay open while the next one commits."""
        counts = [len(range(writer, count, writers)) for count in (events, malformed, unknown)]
        total = sum(counts)
        if not total:
            return
        generator = Generator(
            seed,
            stream=writer,
            start_ms=end_ms - SPAN_MS,
            step_ms=SPAN_MS / total,
            end_ms=end_ms,
            payload_bytes=payload_bytes,
        )
        random = Random(f"{seed}:writer:{writer}")
        sources = (
            generator.events(counts[0]),
            generator.malformed(kinds[writer::writers]),
            generator.unknown_version(counts[2]),
        )
        order = random.sample(sources, total, counts=counts)
        rows = (next(source) for source in order if not stop.is_set())
        # A small outbox gets small transactions rather than few.
        sizes = [size for size in TRANSACTION_ROWS if size <= max(1, total // 10)]
        open_rows: list[OutboxRow] = []
        with engine.connect() as steady, engine.connect() as late:
            while chunk := list(islice(rows, random.choice(sizes))):
                if random.random() * ROLLED_BACK_ONE_IN < 1:
                    undone = list(generator.events(random.choice(sizes)))
                    _insert(steady, undone)
                    steady.rollback()
                    seeded.rolled_back_event_ids.update(row.event_id for row in undone)
                if not open_rows and random.random() * LATE_ONE_IN < 1:
                    _insert(late, chunk)
                    open_rows = chunk
                    continue
                _insert(steady, chunk)
                commit(steady, chunk, late=False)
                if open_rows:
                    commit(late, open_rows, late=True)
                    open_rows = []
            if open_rows:
                commit(late, open_rows, late=False)

    engine = _engine(engine_url, connections=2 * writers)
    try:
        with ThreadPoolExecutor(writers, thread_name_prefix="outbox-writer") as pool:
            try:
                for done in as_completed([pool.submit(write, writer) for writer in range(writers)]):
                    done.result()
            finally:
                stop.set()  # leaving the pool waits for its threads: after an error or Ctrl-C they have to end soon
    finally:
        engine.dispose()
    return seeded


def trickle(engine_url: str, *, seed: int, events_per_s: float, stop: threading.Event) -> int:
    """Commits small transactions in real time until `stop` is set; returns the number of committed rows.

    When the database goes away, the transaction is lost and the next one follows, as in an application. Events of two calls
    differ, also with one seed, so that a restart writes no duplicates.
    """
    from sqlalchemy.exc import OperationalError

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
            except OperationalError:
                due = time.monotonic() + RECONNECT_AFTER_S
    finally:
        engine.dispose()


def _engine(url: str, *, connections: int) -> Engine:
    from pymysql.converters import conversions
    from sqlalchemy import create_engine

    return create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=connections,
        max_overflow=0,
        # `_Payload.quoted` relies on the backslash as escape character, so the SQL mode is stated.
        connect_args={"conv": {**conversions, _Payload: _Payload.quoted}, "sql_mode": "TRADITIONAL"},
    )


class _Payload(NamedTuple):
    """A payload as a bound value. `quoted` is 15 times faster than the driver is on text that is not ASCII."""

    text: str

    def quoted(self, _conversions: object) -> str:
        # JSON text holds no control characters: only the backslash and the quote need an escape.
        return "'" + self.text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# Index used: appends to the primary key and to drainer_pending_idx. Locks: its own new rows. The pks of a statement are
# reserved when it starts, so a transaction can commit after others with higher pks.
INSERT = (
    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) VALUES (%s, %s, %s, %s, %s)"
)


def _insert(connection: Connection, rows: list[OutboxRow]) -> None:
    # The driver makes multi-row statements of at most 1 MB each, below every max_allowed_packet.
    connection.exec_driver_sql(
        INSERT,
        [(row.version, row.workspace_id, row.event_id, _Payload(row.payload), row.created_at_ms) for row in rows],
    )
