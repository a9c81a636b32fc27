"""`auditexport metrics`: the numbers for Prometheus, printed once, kept in a file, or served.

What belongs here: the text format and the three ways to hand it out. What does not: what is measured (`core.metrics`) and
how it is read (`mysql.status`, `mysql.totals`).

Prometheus takes what is served; the node exporter's textfile collector takes the file. Both are told when MySQL does not
answer: `auditexport_up` is 0 then, and the rest is absent rather than old.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import until_stopped
from auditexport_pipeline.cli.stores import Chosen, chosen, every
from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig
from auditexport_pipeline.core.metrics import Metric, Read, Totals, metrics_of

if TYPE_CHECKING:
    from auditexport_pipeline.core.targets import Targets
    from auditexport_pipeline.mysql.outbox import MySQLOutbox

# Several Prometheus servers, and a person with curl, share one look.
CACHE_S = 5.0
# Below Prometheus' scrape_timeout of 10 s: a MySQL that hangs is answered with `auditexport_up 0`, not with silence.
ANSWER_WITHIN_S = 8.0
# A client that connects and says nothing.
CLIENT_TIMEOUT_S = 10.0
SHORTEST_EVERY_S = 1.0
_LABEL_NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"


@main.command()
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write here, atomically: a name ending in .prom.",
)
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(SHORTEST_EVERY_S),
    help="With --file: again every so many seconds, until stopped.",
)
@click.option("--listen", help="Serve /metrics and /healthz at HOST:PORT, such as 127.0.0.1:9469, until stopped.")
@click.option(
    "--all", "of_all", is_flag=True, help='Every outbox of AUDITEXPORT_OUTBOXES, each under a label outbox="…".'
)
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="On every sample; may be given again.")
def metrics(
    path: Path | None, every_s: float | None, listen: str | None, of_all: bool, labels: tuple[str, ...]
) -> None:
    """Metrics in Prometheus' text format: printed once, kept in a file for the node exporter, or served.

    Reads AUDITEXPORT_MYSQL_URL as a user that may only read, and AUDITEXPORT_TARGET_…; ClickHouse is not asked. An
    outbox of the file AUDITEXPORT_OUTBOXES has its name as the label outbox.

    Exit status: 0 MySQL answered, or it was stopped; 1 MySQL did not answer, of one outbox at least (its auditexport_up is
    0); 2 the call is wrong.
    """
    if path is not None and listen is not None:
        raise click.UsageError("--file and --listen are two ways to do the same; give one of them")
    if every_s is not None and path is None:
        raise click.UsageError("--every needs --file")
    if path is not None and path.suffix != ".prom":
        raise click.UsageError("--file must end in .prom: the node exporter reads no other")
    given = _labels(labels)
    if not of_all:
        chosen().outbox()  # a wrong setup of the only outbox ends here
    if "outbox" in given and (of_all or chosen().name):
        raise click.UsageError("--label outbox=… is the outbox's own name here; take another label")
    readers = [_reader(which, given) for which in (every() if of_all else [chosen()])]
    reader = readers[0] if len(readers) == 1 else Readers(readers)
    if listen is not None:
        _serve(reader, *_address(listen))
    elif path is not None:
        _keep(reader, path, every_s)
    else:
        click.echo(reader.exposition().decode(), nl=False)
        _leave(reader)


def _reader(which: Chosen, labels: Mapping[str, str]) -> Reader:
    return Reader(which.outbox, which.targets(), {**labels, **({"outbox": which.name} if which.name else {})})


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    import re

    labels = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not re.fullmatch(_LABEL_NAME, name) or name.startswith("__"):
            raise click.UsageError(f"--label {one!r} must read NAME=VALUE, and a name is letters, digits and _")
        labels[name] = value
    return labels


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise click.UsageError(f"--listen {text!r} must read HOST:PORT, such as 127.0.0.1:9469")
    return host, int(port)


def _leave(reader: Reader | Readers) -> None:
    if reader.trouble:
        click.echo(f"auditexport: {reader.trouble}", err=True)
        sys.exit(BAD_OUTCOME)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


class Reader:
    """One look at a time, however many ask: whoever comes while one is under way waits for it and shares it."""

    def __init__(self, mysql: Callable[[], MySQLOutbox], targets: Targets, labels: Mapping[str, str]) -> None:
        # Opened at each look: an outbox whose variable or URL is wrong is one that does not answer.
        self._mysql = mysql
        self._targets = targets
        self._labels = labels
        self.outbox_name = labels.get("outbox", "")
        self._known: Totals | None = None
        self._lock = threading.Lock()
        self._look: threading.Thread | None = None
        self._metrics: list[Metric] = []
        self._at_s = -CACHE_S
        self.trouble = ""

    def exposition(self, accept: str = "", *, within_s: float | None = None) -> bytes:
        """The metrics in the format that is asked for; `auditexport_up 0` when MySQL does not answer in time."""
        return _encoder(accept)[0](_Registry(self.labelled(within_s)))  # type: ignore[no-any-return]

    def labelled(self, within_s: float | None) -> list[Metric]:
        """The metrics of one look, each sample with this reader's labels."""
        return [
            replace(metric, samples=tuple(({**self._labels, **labels}, value) for labels, value in metric.samples))
            for metric in self._read(within_s)
        ]

    def _read(self, within_s: float | None) -> list[Metric]:
        with self._lock:
            if self._look is None or not self._look.is_alive():
                if time.monotonic() - self._at_s < CACHE_S:
                    return self._metrics
                self._look = threading.Thread(target=self._ask, name="auditexport-metrics", daemon=True)
                self._look.start()
            look = self._look
        look.join(within_s)
        if look.is_alive():
            self.trouble = f"MySQL did not answer within {within_s:g} s"
            return metrics_of(None, self._targets, at_s=time.time())
        return self._metrics

    def _ask(self) -> None:
        from auditexport_pipeline.mysql.status import read_status
        from auditexport_pipeline.mysql.totals import last_verified_at_ms, read_totals

        began_s = time.monotonic()
        try:
            mysql = self._mysql()
            status = read_status(mysql)
            known, totals = read_totals(mysql, self._known)
            verified_at_ms = last_verified_at_ms(mysql)
            self._known = known
            read = Read(
                status=status,
                totals=totals,
                last_verified_at_ms=verified_at_ms,
                seconds=time.monotonic() - began_s,
            )
            self._metrics = metrics_of(read, self._targets, at_s=time.time())
            self.trouble = ""
        except AuditExportError as error:
            self._metrics = metrics_of(None, self._targets, at_s=time.time())
            self.trouble = str(error)
        except Exception as error:
            # Its text may quote anything; a thread that died would leave old numbers standing.
            self._metrics = metrics_of(None, self._targets, at_s=time.time())
            self.trouble = f"{type(error).__name__}: a defect of this program, or of its surroundings"
        self._at_s = time.monotonic()


class Readers:
    """Several outboxes as one: they are asked at the same time, and each metric has the samples of all of them."""

    def __init__(self, readers: list[Reader]) -> None:
        self._readers = readers

    @property
    def trouble(self) -> str:
        return "; ".join(f"outbox {reader.outbox_name}: {reader.trouble}" for reader in self._readers if reader.trouble)

    def exposition(self, accept: str = "", *, within_s: float | None = None) -> bytes:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(max_workers=len(self._readers)) as threads:
            found = list(threads.map(lambda reader: reader.labelled(within_s), self._readers))
        together = [
            replace(first, samples=tuple(sample for metric in (first, *others) for sample in metric.samples))
            for first, *others in zip(*found, strict=True)
        ]
        return _encoder(accept)[0](_Registry(together))  # type: ignore[no-any-return]


class _Registry:
    """What prometheus-client collects from."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        from prometheus_client.core import Metric as Family

        for metric in self._metrics:
            family: Family
            if metric.counter:
                family = CounterMetricFamily(metric.name.removesuffix("_total"), metric.meaning)
            else:
                family = GaugeMetricFamily(metric.name, metric.meaning)
            for labels, value in metric.samples:
                family.add_sample(metric.name, dict(labels), value)
            yield family


def _encoder(accept: str) -> Any:
    from prometheus_client.exposition import choose_encoder

    return choose_encoder(accept)


# ── handing out ──────────────────────────────────────────────────────────────────────────────────


def _keep(reader: Reader | Readers, path: Path, every_s: float | None) -> None:
    if not path.parent.is_dir():
        raise InvalidConfig(
            f"{path.parent} is no directory; --file names a file in the node exporter's textfile directory"
        )
    if every_s is None:
        _write(path, reader.exposition())
        _leave(reader)
        return
    said = ""
    with until_stopped(signal.SIGTERM, signal.SIGINT) as waited:
        while True:
            _write(path, reader.exposition(within_s=ANSWER_WITHIN_S))
            said = _say(reader.trouble, said)
            if not waited(every_s):
                return


def _write(path: Path, text: bytes) -> None:
    """A reader sees the old file or the new one, never half of one."""
    # The collector reads *.prom only, so not this one.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InvalidConfig(f"{path} cannot be written ({error.strerror})") from error


def _say(trouble: str, said: str) -> str:
    """Trouble is told once, and its end: a line a minute would fill a log."""
    if trouble != said:
        click.echo(f"auditexport: {trouble or 'MySQL answers again'}", err=True)
    return trouble


def _serve(reader: Reader | Readers, host: str, port: int) -> None:
    server = server_for(reader, host, port)
    thread = threading.Thread(target=server.serve_forever, name="auditexport-metrics-server", daemon=True)
    with until_stopped(signal.SIGTERM, signal.SIGINT) as waited:
        thread.start()
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"serving http://{shown}:{server.server_port}/metrics", err=True)
        waited(None)
    server.shutdown()
    server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def server_for(reader: Reader | Readers, host: str, port: int) -> ThreadingHTTPServer:
    """A server of /metrics and /healthz, bound and not yet serving. Raises `InvalidConfig` where it cannot be bound."""
    import socket

    class Handler(BaseHTTPRequestHandler):
        server_version = "auditexport"
        sys_version = ""
        timeout = CLIENT_TIMEOUT_S

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            kind = "text/plain; charset=utf-8"
            if path == "/metrics":
                accept = self.headers.get("Accept", "")
                text, status, kind = reader.exposition(accept, within_s=ANSWER_WITHIN_S), 200, _encoder(accept)[1]
            elif path == "/healthz":
                # This process is well, whatever MySQL is: restarting it would not help MySQL.
                text, status = b"ok\n", 200
            elif path == "/":
                text, status = b"auditexport: /metrics and /healthz\n", 200
            else:
                text, status = b"not found: /metrics and /healthz are\n", 404
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if body:
                self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """A scrape every few seconds is no news."""

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that went away is no news either."""

    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise InvalidConfig(f"--listen {host}:{port} cannot be bound ({error.strerror})") from error
