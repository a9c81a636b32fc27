"""The registry of payload versions: how a row's payload becomes an event, and the table of these events.

A package can add a version: its entry point in the group `auditexport_pipeline.versions` names a function that
calls `register_version` (docs/versions.md). `core.event` decodes `audit_log.v1`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from auditexport_pipeline.core import event
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.event import Event, Key, OutboxRow, Undecodable

ENTRY_POINTS = "auditexport_pipeline.versions"
# The statements of a version's `.sql` file; `auditexport init` runs `ddl`.
PIECES = ("table", "columns", "input", "select", "fingerprint", "content", "ddl")
# The sort key of every version's table, and the time by which a block is found.
REQUIRED_COLUMNS = {
    "event_id": "String",
    "time": "Int64",
    "inserted_at": "Int64",
    "workspace_id": "String",
    "bucket": "String",
}
SORT_KEY = ("workspace_id", "bucket", "time", "event_id")
# The outbox's column is varchar(64).
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_TABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLACEHOLDERS = {"ddl": ("$engine", "$table_settings"), "select": ("{inserted_at_ms:Int64}",)}
Shape = TypeVar("Shape", bound=msgspec.Struct)


def statements_of(text: str, source: str) -> dict[str, str]:
    """The statements of a `.sql` file by name, without comments; raises `InvalidConfig` for a repeated name.

    A statement begins with a line `-- name: some_name`.
    """
    statements: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("-- name: "):
            name = line.removeprefix("-- name: ").strip()
            if name in statements:
                raise InvalidConfig(f"{source} holds two statements named {name}")
            statements[name] = ""
        elif name and not line.lstrip().startswith("--"):
            statements[name] += line + "\n"
    return {name: statement.strip() for name, statement in statements.items()}


def columns_in(expression: str) -> set[str]:
    """The columns that an expression names: its words, without functions and quoted text."""
    return set(re.findall(r"\b[A-Za-z_]\w*\b(?!\s*\()", re.sub("'[^']*'", "", expression)))


def top_level_parts(columns: str) -> Iterator[str]:
    """The parts of a list of columns or expressions, separated by commas outside parentheses and quotes."""
    part, depth, quoted = "", 0, False
    for letter in columns:
        quoted ^= letter == "'"
        if not quoted:
            depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0 and not quoted:
            yield part
            part = ""
        else:
            part += letter
    yield part


def plain_type(kind: str) -> str:
    """A type without blanks and without LowCardinality, which changes only the storage of values."""
    return re.sub(r"LowCardinality\((\w+)\)", r"\1", kind.replace(" ", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadVersion:
    """One payload version: its `name` in the outbox, `decode`, which returns a row's event or the reason, and a `.sql`
    file.

    The file has the statements `PIECES`. Raises `InvalidConfig`, with version and piece, if they cannot be used. The
    table on the server (partition, sort key, window) is checked by `doctor` and before each drain.
    """

    name: str
    decode: Callable[[OutboxRow], Event | Undecodable]
    sql: Path
    pieces: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for piece, why in self._faults():
            raise InvalidConfig(f"payload version {self.name!r}: {piece}: {why}")

    def _faults(self) -> Iterator[tuple[str, str]]:
        """Reads the pieces and yields each fault with its piece. A later check relies on the earlier ones."""
        if not _NAME.fullmatch(self.name):
            yield "name", "it must have 64 characters at most: letters, digits, _, - and dots, a letter first"
        if not callable(self.decode):
            yield "decode", "it must be a function of an outbox row"
        try:
            pieces = statements_of(self.sql.read_text(encoding="utf-8"), str(self.sql))
        except (OSError, UnicodeDecodeError) as error:
            yield "sql", f"{self.sql} cannot be read ({type(error).__name__})"
            return
        for piece in (*PIECES, *pieces):
            if piece not in PIECES:
                yield piece, f"there is no such piece; choose from {', '.join(PIECES)}"
            if not pieces.get(piece):
                yield piece, f"{self.sql} has no statement of this name"
            for placeholder in _PLACEHOLDERS.get(piece, ()):
                if placeholder not in pieces[piece]:
                    yield piece, f"it must contain {placeholder}"
        object.__setattr__(self, "pieces", pieces)
        if not _TABLE.fullmatch(self.table):
            yield "table", "it must be the name of one table, without its database"
        for name, kind in REQUIRED_COLUMNS.items():
            if plain_type(self.columns.get(name, "")) != kind:
                yield "columns", f"they must include {name} {kind}"
        for piece in ("columns", "input"):
            if "'" in pieces[piece]:
                yield piece, "it must contain no quotes, because it is put between quotes"
        count = len(list(top_level_parts(pieces["select"])))
        if count != len(self.columns):
            yield "select", f"it has {count} expressions for {len(self.columns)} columns"
        if not re.search(rf"CREATE TABLE IF NOT EXISTS {self.table}\b", " ".join(pieces["ddl"].split())):
            yield "ddl", f"it must begin with CREATE TABLE IF NOT EXISTS {self.table}"

    @property
    def table(self) -> str:
        return self.pieces["table"]

    @property
    def columns(self) -> dict[str, str]:
        """The columns that an INSERT fills, in order: name to type."""
        parts = (part.strip().split(maxsplit=1) for part in top_level_parts(self.pieces["columns"]))
        return {part[0].strip("`"): part[1].strip() for part in parts if len(part) == 2}


def decoder(
    shape: type[Shape],
    *,
    key: Callable[[Shape], Key],
    content: Callable[[Shape], Sequence[str]],
) -> Callable[[OutboxRow], Event | Undecodable]:
    r"""A `decode` for payloads of one msgspec shape. It checks the types, and both ids against the row's columns.

    `key` is the event's sort key: workspace_id, bucket, time in epoch milliseconds, event_id. `content` are the texts
    of the fingerprint: `xxHash64(concat(a, '\0', b, …))` of the stored columns is the same in ClickHouse.
    """
    reader = msgspec.json.Decoder(shape)

    def decode(row: OutboxRow) -> Event | Undecodable:
        try:
            payload = reader.decode(row.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return event.undecodable(row.payload, error)
        place = key(payload)
        mismatch = event.other_identity(row, event_id=place[3], workspace_id=place[0])
        if mismatch is not None:
            return mismatch
        try:
            return Event(place, xxhash.xxh64_intdigest("\0".join(content(payload)).encode()))
        except UnicodeEncodeError:
            return Undecodable(reason="lone_surrogate", detail="text that has no UTF-8")

    return decode


def _register(found: EntryPoint) -> None:
    try:
        found.load()()
    except Exception as error:
        raise InvalidConfig(
            f"the entry point {found.name} ({found.value}) of the group {ENTRY_POINTS} does not register its payload "
            f"version ({type(error).__name__}: {error}); fix or uninstall that package"
        ) from error


class _Versions(Mapping[str, PayloadVersion]):
    """Every version by name, `audit_log.v1` first. Installed packages register theirs at the first access."""

    def __init__(self) -> None:
        self._known: dict[str, PayloadVersion] = {}
        self._loaded = False
        self._lock = threading.RLock()

    def add(self, version: PayloadVersion) -> None:
        with self._lock:
            for other in self._known.values():
                if version.name == other.name:
                    raise InvalidConfig(f"payload version {version.name!r} is registered already")
                if version.table == other.table:
                    raise InvalidConfig(
                        f"payload version {version.name!r}: table: {version.table} is {other.name}'s; each has its own"
                    )
            self._known[version.name] = version

    def _all(self) -> dict[str, PayloadVersion]:
        with self._lock:
            if not self._loaded:
                self._loaded = True  # a package that reads versions while it registers one sees those so far
                before = dict(self._known)
                try:
                    for found in sorted(entry_points(group=ENTRY_POINTS), key=lambda one: one.name):
                        _register(found)
                except BaseException:  # also one that stops a thread: a part of the versions must not count as all
                    self._known, self._loaded = before, False
                    raise
            return self._known

    def __getitem__(self, name: str) -> PayloadVersion:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._all()))

    def __len__(self) -> int:
        return len(self._all())


VERSIONS = _Versions()


def register_version(version: PayloadVersion) -> None:
    """Registers a version in this process, for drains, verification, reconciliation, `init` and `doctor`.

    Raises `InvalidConfig` for a name or a table that another version has.
    """
    VERSIONS.add(version)


register_version(
    PayloadVersion(
        name="audit_log.v1",
        decode=event.decode_audit_log_v1,
        sql=Path(__file__).parents[1] / "clickhouse" / "audit_log_v1.sql",
    )
)
