"""ClickHouse: the tables of the payload versions, such as `audit_logs_raw_v1`, behind `core.ports.AuditLog`.

What belongs here: putting a version's SQL together, the settings every INSERT carries, and the one place
where ClickHouse's errors become ours. What does not: the statements (`audit_log.sql`), creating and
checking tables (`stores.setup`), and any decision about what to send.

A payload crosses as the text that the outbox holds; ClickHouse parses it, in the types of `v.input`.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from string import Template
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from auditexport_pipeline.core.batch import PART_ROWS, Batch, Block, Holding, in_parts
from auditexport_pipeline.core.errors import (
    AuditExportError,
    AuditLogUnavailable,
    InsertOutcomeUnknown,
    InvalidConfig,
    LeaseLost,
    SetupIncomplete,
)
from auditexport_pipeline.core.ports import Refusal, StoredEntry
from auditexport_pipeline.core.versions import VERSIONS, top_level_parts
from auditexport_pipeline.stores.statements import load

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

CONNECT_TIMEOUT_S = 10
# The socket waits this much longer than ClickHouse may work: its own answer is worth more than our giving up.
ANSWER_GRACE_S = 15
LOOK_UP_TIMEOUT_S = 60
# What the URL may name beside the server: files, as the driver calls them.
TLS_FILES = ("ca_cert", "client_cert", "client_cert_key")
# And settings of ClickHouse's for replicas, with the values that make sense here; every request carries them. Which to
# choose, and why, is in docs/clickhouse.md.
REPLICA_SETTINGS = {
    "insert_quorum": r"auto|[2-9]|[1-9]\d",
    "insert_quorum_parallel": r"[01]",
    "select_sequential_consistency": r"[01]",
    "load_balancing": r"random|nearest_hostname|hostname_levenshtein_distance|in_order|first_or_random|round_robin",
}

# Every request's: over a Distributed table, all shards answer or nobody does. Which shard a block is on is never worked
# out, for it stays where it is when shards are added.
SHARD_SETTINGS: dict[str, Any] = {"skip_unavailable_shards": 0, "optimize_skip_unused_shards": 0}

# How ClickHouse reads JSON wherever we read or write it: keys keep their dots (stored as %2E), or
# {"a.b": 1} would silently become {"a": {"b": 1}}.
READ_SETTINGS: dict[str, Any] = {"json_type_escape_dots_in_keys": 1}

# What an INSERT carries, each because leaving it to the server's default changes or loses something.
INSERT_SETTINGS: dict[str, Any] = {
    **READ_SETTINGS,
    "async_insert": 0,  # on by default since 26.3: acknowledged before it is durable
    "wait_end_of_query": 1,
    "insert_deduplicate": 1,
    # Into a Distributed table: acknowledged when a shard has the block, not when it is queued on the way there. Any other
    # table takes no notice of it.
    "distributed_foreground_insert": 1,
    # One block and one part: squash until the end, never split.
    "max_insert_block_size": 10_000_000,
    "min_insert_block_size_rows": 10_000_000,
    "min_insert_block_size_bytes": 4 * 1024**3,
    "max_insert_threads": 1,
    # No merge of a block with itself: `core.export.fetch` leaves each event in it once, and merging copied every
    # row, 13 of 27 µs. Parsed by one thread: a block beside it is parsed at the same time, and CPU is 10 % less.
    "optimize_on_insert": 0,
    "input_format_parallel_parsing": 0,
    "input_format_allow_errors_num": 0,
    "input_format_allow_errors_ratio": 0,
    "input_format_skip_unknown_fields": 1,
    "input_format_null_as_default": 0,  # explained at `input` in audit_log_v1.sql
    # Strings stay strings and booleans booleans: by default "2024-01-01T10:00:00Z" inside a meta becomes
    # another text, [true, 1] becomes [1, 1] and [1, "a"] becomes ["1", "a"].
    "input_format_try_infer_dates": 0,
    "input_format_try_infer_datetimes": 0,
    "input_format_json_read_bools_as_strings": 0,
    "input_format_json_read_bools_as_numbers": 0,
    "input_format_json_read_numbers_as_strings": 0,
    # "Description" is not description, for msgspec as for everybody else.
    "input_format_column_name_matching_mode": "match_case",
    # What cannot be kept is refused, loudly: the row becomes a dead letter with a reason.
    "type_json_skip_duplicated_paths": 0,
    "input_format_json_throw_on_bad_escape_sequence": 1,
}
# The same, for settings that are newer than the oldest server we support, or that only save work.
NEWER_INSERT_SETTINGS: dict[str, Any] = {
    # A profile may turn the token off for INSERT … SELECT, which ours is; and servers of early 2026 did so by themselves
    # unless the SELECT was sorted (ClickHouse pull request 99206).
    "deduplicate_insert": "enable",
    "deduplicate_insert_select": "enable_even_for_bad_queries",
    # Allowed by default since 26.3: {"a": 1, "a": {"b": 2}} would be stored with both, a null after it with none.
    "type_json_allow_duplicated_key_with_literal_and_nested_object": 0,
    # Each path of a JSON column beyond it shares one subcolumn, with the same meaning. A wide part opens some
    # ten files a path: 10,000 rows of 3,000 distinct keys in three metas ran into a limit of 20,000 files at
    # the default of 1,024 (and at 512), so that the batch could never be written.
    "max_dynamic_subcolumns_in_json_type_parsing": 128,
    # Skip indexes are built when parts merge, as they are again at every merge; a fresh part is one block, pruned
    # by its only inserted_at. Building them at the INSERT as well took 8 of 35 µs a row.
    "materialize_skip_indexes_on_insert": 0,
}

# A SELECT that carries payloads as a parameter: not in the server's query log.
CONTENT_SETTINGS: dict[str, Any] = {"log_queries": 0}
# Payloads sent for one comparison at a time; a larger one goes alone.
CONTENT_BYTES = 1024**2
# ClickHouse takes 128 KB in one field of a form, in which parameters travel: whatever a character takes, this fits.
PARAMETER_CHARACTERS = 30_000

# Codes that speak of the rows: parsing, ranges, depth, constraints. Such a block is refused for good.
_ROW_ERRORS = {
    *(6, 25, 26, 27, 33, 38, 41, 53, 69, 70, 72, 117, 130, 131, 190, 306, 321, 349, 376, 407),
    *(441, 467, 469, 675, 676, 691),
}
# Codes that no rerun mends: tables, columns, grants, settings, credentials.
_SETUP_ERRORS = {16, 36, 46, 47, 60, 62, 81, 115, 164, 192, 193, 194, 291, 452, 497, 516}
_LEASE_ENDED = 395  # FUNCTION_THROW_IF_VALUE_IS_NON_ZERO: the fence in `insert`
_TIMEOUT_EXCEEDED = 159
# Answers that say that rows may be stored all the same: a quorum that was not seen, a shard or Keeper that was not heard.
_UNKNOWN_OUTCOMES = {_TIMEOUT_EXCEEDED, 209, 210, 279, 319, 999}
_ACCESS_DENIED = 497

_PIECES = load("audit_log.sql")


# The text mirrors of the metas as the table holds them, and as they are computed.
_STORED_MIRRORS = {"meta_text": "meta_text", "targets_meta_text": "targets_meta_text"}
_COMPUTED_MIRRORS = {
    "meta_text": "toJSONString(meta)",
    "targets_meta_text": r"arrayStringConcat(arrayMap(target -> toJSONString(target), `targets.meta`), '\n')",
}


@lru_cache(maxsize=64)
def _sql(name: str, version: str) -> str:
    """A statement for one payload version; both come from the program, never from data."""
    if version not in VERSIONS:
        raise InvalidConfig(f"{version} is not a known payload version")
    pieces, columns = VERSIONS[version].pieces, VERSIONS[version].columns
    select = pieces["select"]
    content = Template(pieces["content"])
    return Template(_PIECES[name]).substitute(
        table=pieces["table"],
        columns=pieces["columns"],
        column_names=", ".join(f"`{column}`" for column in columns),
        input=pieces["input"],
        select=select,
        fingerprint=pieces["fingerprint"],
        content=content.substitute(_STORED_MIRRORS),
        content_of_columns=content.substitute(_COMPUTED_MIRRORS),
        typed_select=", ".join(
            f"CAST({expression.strip()}, '{type_}') AS `{column}`"
            for expression, (column, type_) in zip(top_level_parts(select), columns.items(), strict=True)
        ),
    )


def _bound(statement: str, parameters: Mapping[str, int]) -> bytes:
    """The statement with its `{name:Int64}` parameters given; integers of ours, which need no quoting."""
    for name, value in parameters.items():
        statement = statement.replace(f"{{{name}:Int64}}", str(int(value)))
    return statement.encode()


def _request(statement: bytes, payloads: list[bytes]) -> Generator[bytes, None, None]:
    """What an INSERT sends, in parts: the HTTP client copies each one, and never sends it a second time by itself.

    The list is emptied on the way: the next batch is read while ClickHouse works on what it has.
    """
    yield statement
    payloads.reverse()
    while payloads:
        part = payloads[: -PART_ROWS - 1 : -1]
        del payloads[-PART_ROWS:]
        yield from in_parts(part)


def _portions(payloads: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Consecutive payloads of about `CONTENT_BYTES` together, at least one."""
    start = size = 0
    for index, payload in enumerate(payloads):
        if size and size + len(payload) > CONTENT_BYTES:
            yield payloads[start:index]
            start, size = index, 0
        size += len(payload)
    if start < len(payloads):
        yield payloads[start:]


def connection_arguments(url: str) -> dict[str, Any]:
    """What `clickhouse_connect.get_client` needs, from `http[s]://user:password@host:port/database`.

    Query parameters `ca_cert`, `client_cert`, `client_cert_key` and `verify=false` set up TLS; certificates
    are verified by default. A client's certificate stands in for a password; with one, both are shown. Those of
    `REPLICA_SETTINGS` go along with every request. Raises
    `InvalidConfig`, which repeats nothing of the URL, for anything else: of a password that is not percent-encoded,
    any part can look like a port, a database or an option.
    """
    try:
        parts, port = urlsplit(url), urlsplit(url).port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.path or "#" in url:
        raise InvalidConfig(
            "AUDITEXPORT_CLICKHOUSE_URL must read http[s]://user:password@host:port/database, with the password "
            "percent-encoded (/ is %2F, # is %23, ? is %3F)"
        )
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    arguments: dict[str, Any] = {
        "interface": parts.scheme,
        "host": parts.hostname,
        "port": port or (8443 if parts.scheme == "https" else 8123),
        "username": unquote(parts.username or "default"),
        "password": unquote(parts.password or ""),
        "database": parts.path.strip("/") or "default",
        "verify": options.pop("verify", "true").lower() != "false",
    }
    for name in TLS_FILES:
        if name in options:
            arguments[name] = options.pop(name)
    if "client_cert" in arguments and arguments["password"]:
        arguments["tls_mode"] = "strict"  # or the driver would keep the password to itself
    settings: dict[str, Any] = {name: options.pop(name) for name in REPLICA_SETTINGS if name in options}
    for name, value in settings.items():
        if not re.fullmatch(REPLICA_SETTINGS[name], value):
            raise InvalidConfig(f"AUDITEXPORT_CLICKHOUSE_URL has a {name} that is not one of {REPLICA_SETTINGS[name]}")
    if "insert_quorum" in settings:
        settings.setdefault("insert_quorum_parallel", "0")  # or no look-up could be promised to see the last INSERT
    if settings.get("load_balancing") == "in_order":
        settings["prefer_localhost_replica"] = "0"  # or each server that a balancer chooses would begin with itself
    if settings:
        arguments["settings"] = settings
    if options:
        raise InvalidConfig(
            f"AUDITEXPORT_CLICKHOUSE_URL has an option beside {', '.join((*TLS_FILES, 'verify', *REPLICA_SETTINGS))}; "
            "a ? in its password is written %3F"
        )
    return arguments


@lru_cache(maxsize=256)  # several of each of many outboxes
def _client(url: str, timeout_s: int, pid: int) -> Client:
    import clickhouse_connect

    arguments = connection_arguments(url)
    settings = {**SHARD_SETTINGS, **arguments.pop("settings", {})}
    _check_certificates(arguments)
    return clickhouse_connect.get_client(
        **arguments,
        settings=settings,
        autogenerate_session_id=False,  # a session allows one query at a time; blocks go out together
        connect_timeout=CONNECT_TIMEOUT_S,
        send_receive_timeout=timeout_s,
        client_name="auditexport",
        form_encode_query_params=True,  # parameters can be payloads, and URLs are logged on every way
    )


def _check_certificates(arguments: Mapping[str, Any]) -> None:
    """Loads the files that the URL names, because the driver calls one that it cannot read a connection that failed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = "ca_cert"
    try:
        if arguments.get(name, "certifi") != "certifi":  # a word of the driver's, for the package of that name
            context.load_verify_locations(arguments[name])
        name = "client_cert"
        if name in arguments:
            context.load_cert_chain(arguments[name], arguments.get("client_cert_key"))
    except OSError as error:
        raise InvalidConfig(
            f"AUDITEXPORT_CLICKHOUSE_URL names a {name} that cannot be read as one: {arguments[name]} ({error.strerror})"
        ) from error


@contextmanager
def translated(what: str, *, sending: bool = False) -> Iterator[None]:
    """The one place where ClickHouse's and HTTP's errors become this project's.

    With `sending`, an error without a code means that rows were sent and no answer came; some codes say as much.
    """
    from clickhouse_connect.driver.exceptions import ClickHouseError

    try:
        yield
    except AuditExportError:
        raise
    except (ClickHouseError, OSError) as error:
        code = getattr(error, "code", None)
        name = getattr(error, "name", None) or "no code"
        if code == _LEASE_ENDED:
            raise LeaseLost(
                f"ClickHouse refused {what}: the lease of this run had ended; nothing was written"
            ) from error
        if (refused := _certificate_refused(error)) is not None:
            raise SetupIncomplete(
                f"ClickHouse's certificate was refused at {what} ({refused}); nothing was sent. Let ca_cert in "
                "AUDITEXPORT_CLICKHOUSE_URL name the authority that signed it, and the URL a host name that stands in it"
            ) from error
        if code in _SETUP_ERRORS:
            # All that is repeated of its text: what a parser says can quote a payload, a grant cannot.
            missing = re.search(r"have the grant (.+?)\. \(", str(error)) if code == _ACCESS_DENIED else None
            lacks = f": the user lacks {missing[1]}" if missing else ""
            raise SetupIncomplete(
                f"ClickHouse refuses {what} (code {code}, {name}{lacks}); check AUDITEXPORT_CLICKHOUSE_URL and the grants, "
                "or run `auditexport init`"
            ) from error
        if sending and (code is None or code in _UNKNOWN_OUTCOMES):
            raise InsertOutcomeUnknown(
                f"no answer from ClickHouse to {what} ({name}); it may or may not be written, the next attempt looks first"
            ) from error
        raise AuditLogUnavailable(f"ClickHouse failed at {what} ({name}); run again") from error


def _certificate_refused(error: BaseException | None) -> str | None:
    """Why a certificate was refused, when that is what lies under a request that failed."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        within = [argument for argument in error.args if isinstance(argument, BaseException)]
        reason = getattr(error, "reason", None)
        error = next(
            (
                cause
                for cause in (error.__cause__, reason, *within, error.__context__)
                if isinstance(cause, BaseException)
            ),
            None,
        )
    return None


class ClickHouseAuditLog:
    """`core.ports.AuditLog` over one ClickHouse database named by an `http[s]://` URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        connection_arguments(url)

    def __repr__(self) -> str:
        arguments = connection_arguments(self.url)
        return f"ClickHouseAuditLog({arguments['host']}:{arguments['port']}/{arguments['database']})"

    def client(self, timeout_s: int = LOOK_UP_TIMEOUT_S) -> Client:
        """A client whose requests may take `timeout_s` in ClickHouse; safe to use from several threads."""
        return _client(self.url, timeout_s + ANSWER_GRACE_S, os.getpid())

    @staticmethod
    def _insert_settings(client: Client) -> dict[str, Any]:
        """Those of our settings that this server lists: one that it does not know is refused (code 115)."""
        wanted = {**INSERT_SETTINGS, **NEWER_INSERT_SETTINGS}
        return {name: value for name, value in wanted.items() if name in client.server_settings}

    def deadline_ms(self, within_s: float) -> int:
        with translated("asking for the time"):
            ((now_ms,),) = self.client().query(_PIECES["now_ms"]).result_rows
        return int(now_ms) + int(within_s * 1000)

    def insert(
        self, batch: Batch, block: Block, payloads: list[bytes], *, deadline_ms: int, timeout_s: int
    ) -> Refusal | None:
        """One synchronous INSERT of one block; None when ClickHouse acknowledged it. `payloads` is emptied.

        Durable effect: `block.rows` rows and one part in the version's table, or nothing. Raises
        `InsertOutcomeUnknown` when no answer came, `LeaseLost` when ClickHouse's clock is past the
        deadline, `AuditLogUnavailable` or `SetupIncomplete` when nothing was written.
        """
        what = f"the INSERT of batch {batch.batch_id}, block {block.number} ({block.rows:,} rows)"
        return self._post(
            "insert",
            batch.version,
            payloads,
            what,
            parameters={"inserted_at_ms": block.inserted_at_ms, "deadline_ms": deadline_ms},
            settings={
                "insert_deduplication_token": batch.token(block),
                "max_execution_time": timeout_s,
                # Ten minutes by default, twice a lease; where there is no quorum it says nothing.
                "insert_quorum_timeout": timeout_s * 1000,
            },
            timeout_s=timeout_s,
            sending=True,
        )

    def probe(self, version: str, payloads: list[bytes], *, timeout_s: int) -> Refusal | None:
        return self._post(
            "probe",
            version,
            payloads,
            "parsing rows without writing them",
            parameters={"inserted_at_ms": 0},
            settings={"max_execution_time": timeout_s},
            timeout_s=timeout_s,
            sending=False,
        )

    def _post(
        self,
        name: str,
        version: str,
        payloads: list[bytes],
        what: str,
        *,
        parameters: dict[str, int],
        settings: dict[str, Any],
        timeout_s: int,
        sending: bool,
    ) -> Refusal | None:
        from clickhouse_connect.driver.exceptions import ClickHouseError

        with translated(what, sending=sending):
            try:
                client = self.client(timeout_s)
                # Not `command(data=…)`, which decodes the whole body to look for SQL in it.
                client.raw_insert(
                    table="",
                    insert_block=_request(_bound(_sql(name, version), parameters), payloads),
                    settings={**self._insert_settings(client), **settings},
                )
            except ClickHouseError as error:
                code = getattr(error, "code", None)
                if code in _ROW_ERRORS:
                    return Refusal(code=int(code), name=str(getattr(error, "name", None) or "no name"))
                raise
        return None

    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]:
        if not inserted_at_ms:
            return {}
        found: dict[int, Holding] = {}
        for version in VERSIONS:
            with translated("looking for blocks"):
                result = self.client().query(
                    _sql("holdings", version),
                    parameters={"inserted_at_ms": list(inserted_at_ms)},
                    settings=READ_SETTINGS,
                )
            for at_ms, rows, fingerprint, content, copies in result.result_rows:
                found[at_ms] = Holding(rows=rows, fingerprint=fingerprint, content=content, copies=copies)
        return found

    def entries_at(self, inserted_at_ms: int) -> list[StoredEntry]:
        return self._entries("entries_at", {"inserted_at_ms": inserted_at_ms})

    def entries_of(self, keys: Sequence[tuple[str, str, int, str]]) -> list[StoredEntry]:
        columns = {
            "workspaces": [key[0] for key in keys],
            "buckets": [key[1] for key in keys],
            "times": [key[2] for key in keys],
            "events": [key[3] for key in keys],
        }
        return self._entries("entries_of", columns) if keys else []

    def ids_held(self, ids: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        held: set[tuple[str, str]] = set()
        columns = {"workspaces": [workspace_id for workspace_id, _ in ids], "events": [event_id for _, event_id in ids]}
        for version in VERSIONS if ids else ():
            with translated("looking for events"):
                rows = self.client().query(_sql("ids_held", version), parameters=columns, settings=READ_SETTINGS)
            held.update((row[0], row[1]) for row in rows.result_rows)
        return held

    def _entries(self, name: str, parameters: dict[str, Any]) -> list[StoredEntry]:
        entries: list[StoredEntry] = []
        for version in VERSIONS:
            with translated("reading entries"):
                rows = (
                    self.client().query(_sql(name, version), parameters=parameters, settings=READ_SETTINGS).result_rows
                )
            entries.extend(
                StoredEntry(
                    key=(row[0], row[1], row[2], row[3]), inserted_at_ms=row[4], fingerprint=row[5], content=row[6]
                )
                for row in rows
            )
        return entries

    def contents(self, version: str, payloads: Sequence[bytes], inserted_at_ms: int) -> list[int]:
        found: list[int] = []
        for part in _portions(payloads):
            text = b"\n".join(part).decode()
            pieces = {
                f"payloads_{number}": text[start : start + PARAMETER_CHARACTERS]
                for number, start in enumerate(range(0, len(text), PARAMETER_CHARACTERS))
            }
            whole = ", ".join(["''", *(f"{{{name}:String}}" for name in pieces)])
            with translated("parsing payloads for a comparison"):
                rows = (
                    self.client()
                    .query(
                        _sql("contents", version).replace("{payloads:String}", f"concat({whole})"),
                        parameters={**pieces, "inserted_at_ms": inserted_at_ms},
                        settings={**self._insert_settings(self.client()), **CONTENT_SETTINGS},
                    )
                    .result_rows
                )
            found.extend(row[0] for row in rows)
        return found

    def slots_between(self, from_ms: int, to_ms: int) -> list[int]:
        """Every `inserted_at` that has entries in [from_ms, to_ms), ascending."""
        found: set[int] = set()
        for version in VERSIONS:
            with translated("looking for blocks"):
                rows = self.client().query(
                    _sql("slots_between", version), parameters={"from_ms": from_ms, "to_ms": to_ms}
                )
            found.update(row[0] for row in rows.result_rows)
        return sorted(found)

    def by_workspace(self, from_ms: int, to_ms: int) -> dict[tuple[str, int], int]:
        counts: dict[tuple[str, int], int] = {}
        for version in VERSIONS:
            with translated("counting entries"):
                rows = self.client().query(
                    _sql("by_workspace", version), parameters={"from_ms": from_ms, "to_ms": to_ms}
                )
            for workspace_id, day_ms, entries in rows.result_rows:
                counts[workspace_id, day_ms] = counts.get((workspace_id, day_ms), 0) + entries
        return counts

    def surplus(self, from_ms: int, to_ms: int) -> tuple[int, int, int]:
        """Counted without FINAL, of [from_ms, to_ms) by `inserted_at`: entries, those among them that repeat an event, and
        those of these that repeat it under the same `inserted_at`. Merges take the repetitions away.
        """
        counted = [0, 0, 0]
        for version in VERSIONS:
            with translated("counting repeated events"):
                rows = self.client().query(_sql("surplus", version), parameters={"from_ms": from_ms, "to_ms": to_ms})
            counted = [total + int(found or 0) for total, found in zip(counted, rows.result_rows[0], strict=True)]
        return counted[0], counted[1], counted[2]

    def kept_ms(self) -> int | None:
        with translated("reading the table's TTL"):
            found = self.client().query(_PIECES["ttl"], parameters={"table": next(iter(VERSIONS.values())).table})
        days = re.search(r"TTL .*toIntervalDay\((\d+)\)", " ".join(row[0] for row in found.result_rows))
        return int(days.group(1)) * 86_400_000 if days else None
