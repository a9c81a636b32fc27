"""`auditexport metrics`: the numbers for Prometheus, printed, written to a file, or served.

prometheus-client writes the text and the file and answers requests; the collector here reads MySQL. When MySQL does not
answer, `auditexport_up` is 0 and the other numbers are absent rather than old.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import click

from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import until_stopped
from auditexport_pipeline.cli.stores import chosen, every
from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig
from auditexport_pipeline.core.metrics import NAMES, Reading, Totals, samples

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    from auditexport_pipeline.core.settings import Targets
    from auditexport_pipeline.mysql.outbox import MySQLOutbox

    Family = CounterMetricFamily | GaugeMetricFamily

# Several Prometheus servers, and a person with curl, share one reading.
CACHE_S = 5.0
# Below Prometheus' scrape_timeout of 10 s: when MySQL hangs, the answer is `auditexport_up 0`, not silence.
ANSWER_WITHIN_S = 8.0
# A client that connects and sends nothing is cut off after this long.
CLIENT_TIMEOUT_S = 10.0
SHORTEST_EVERY_S = 1.0
_LABEL = re.compile(r"((?!__)[a-zA-Z_][a-zA-Z0-9_]*)=(.*)", re.DOTALL)


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
    """Metrics in Prometheus' text format: printed, written to a file for the node exporter, or served.

    Reads MySQL only, with SELECT. An outbox of the file AUDITEXPORT_OUTBOXES has its name as the label outbox.

    Exit status: 0 MySQL answered, or the command was stopped; 1 MySQL did not answer, for at least one outbox (its
    auditexport_up is 0); 2 the call is wrong.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    if path is not None and listen is not None:
        raise click.UsageError("--file and --listen are two ways to do the same; give one of them")
    if every_s is not None and path is None:
        raise click.UsageError("--every needs --file")
    if path is not None and path.suffix != ".prom":
        raise click.UsageError("--file must end in .prom: the node exporter reads no other")
    given = _labels(labels)
    outboxes = every() if of_all else [chosen()]
    if not of_all:
        outboxes[0].outbox()  # a wrong setup of the only outbox ends here
    if "outbox" in given and (of_all or outboxes[0].name):
        raise click.UsageError("--label outbox=… is the outbox's own name here; take another label")
    collector = OutboxCollector(
        [
            OutboxReader(
                open_outbox=which.outbox,
                targets=which.targets(),
                labels={**given, **({"outbox": which.name} if which.name else {})},
            )
            for which in outboxes
        ],
        within_s=None if listen is None and every_s is None else ANSWER_WITHIN_S,
    )
    registry = CollectorRegistry()
    registry.register(collector)
    if listen is not None:
        _serve(registry, *_address(listen))
    elif path is not None and every_s is not None:
        _write_every(every_s, path, registry, collector)
    else:
        if path is not None:
            _write(path, registry)
        else:
            click.echo(generate_latest(registry).decode(), nl=False)
        if collector.error:
            click.echo(f"auditexport: {collector.error}", err=True)
            sys.exit(BAD_OUTCOME)


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for one in given:
        found = _LABEL.fullmatch(one)
        if not found:
            raise click.UsageError(f"--label {one!r} must read NAME=VALUE, and a name is letters, digits and _")
        labels[found[1]] = found[2]
    return labels


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise click.UsageError(f"--listen {text!r} must read HOST:PORT, such as 127.0.0.1:9469")
    return host, int(port)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True, eq=False)
class OutboxReader:
    """Reads one outbox, one reading at a time. A request during a reading, or within CACHE_S after it, gets that reading."""

    # Called for every reading: a URL that has become wrong gives `auditexport_up 0`.
    open_outbox: Callable[[], MySQLOutbox]
    targets: Targets
    labels: Mapping[str, str] = field(default_factory=dict)
    result: tuple[Reading | None, str] = (None, "")  # of the last reading that ended, and its error
    _known: Totals | None = None
    _thread: threading.Thread | None = None
    _ended_s: float = 0.0  # by the monotonic clock
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> threading.Thread:
        """The reading to wait for, in a thread: a call to a MySQL that hangs cannot be ended."""
        with self._lock:
            thread = self._thread
            if thread is None or (not thread.is_alive() and time.monotonic() - self._ended_s >= CACHE_S):
                self._thread = thread = threading.Thread(target=self._run, name="auditexport-metrics", daemon=True)
                thread.start()
            return thread

    def _run(self) -> None:
        try:
            self.result = self._read(), ""
        except AuditExportError as error:
            self.result = None, str(error)
        except Exception as error:
            # The error's own text may quote anything.
            self.result = None, f"{type(error).__name__}: a defect of this program or its environment"
        self._ended_s = time.monotonic()

    def _read(self) -> Reading:
        from auditexport_pipeline.mysql.status import read_status
        from auditexport_pipeline.mysql.totals import last_verified_at_ms, read_totals

        began_s = time.monotonic()
        outbox = self.open_outbox()
        status = read_status(outbox)
        self._known, totals = read_totals(outbox, self._known)
        return Reading(
            status=status,
            totals=totals,
            last_verified_at_ms=last_verified_at_ms(outbox),
            at_s=time.time(),
            seconds=time.monotonic() - began_s,
        )


class OutboxCollector:
    """The metrics of one or several outboxes for prometheus-client. The readers have the same label names."""

    def __init__(self, readers: Sequence[OutboxReader], *, within_s: float | None = None) -> None:
        self._readers = readers
        self._within_s = within_s
        self.error = ""  # of the last collection

    def describe(self) -> Iterable[Family]:
        """Every family without samples: prometheus-client learns the names without asking MySQL."""
        return self._families().values()

    def collect(self) -> Iterable[Family]:
        """Every family, with `auditexport_up 0` for an outbox that fails or that does not answer within `within_s`."""
        families = self._families()
        until_s = None if self._within_s is None else time.monotonic() + self._within_s
        # All readings begin before the first wait: an outbox that does not answer delays no other.
        begun = [(reader, reader.begin()) for reader in self._readers]
        errors = []
        for reader, thread in begun:
            thread.join(None if until_s is None else max(0.0, until_s - time.monotonic()))
            reading, error = reader.result
            if thread.is_alive():
                reading, error = None, f"MySQL did not answer within {self._within_s:g} s"
            if error:
                name = reader.labels.get("outbox")
                errors.append(f"outbox {name}: {error}" if name else error)
            for metric, own, value in samples(reading, reader.targets, now_s=time.time()):
                families[metric].add_metric((*reader.labels.values(), *own), value)
        self.error = "; ".join(errors)
        return families.values()

    def _families(self) -> dict[str, Family]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        made: dict[str, Family] = {}
        for name, meaning, own in NAMES:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            made[name] = kind(name, meaning, labels=(*self._readers[0].labels, *own))
        return made


# ── writing and serving ──────────────────────────────────────────────────────────────────────────


def _write_every(every_s: float, path: Path, registry: CollectorRegistry, collector: OutboxCollector) -> None:
    shown = ""
    with until_stopped(signal.SIGTERM, signal.SIGINT) as wait:
        while True:
            _write(path, registry)
            if collector.error != shown:  # only changes: a line each time would fill a log
                shown = collector.error
                click.echo(f"auditexport: {shown or 'MySQL answers again'}", err=True)
            if not wait(every_s):
                return


def _write(path: Path, registry: CollectorRegistry) -> None:
    from prometheus_client import write_to_textfile

    umask = os.umask(0o022)  # the node exporter reads the file as another user
    try:
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise InvalidConfig(
            f"{path} cannot be written ({error.strerror}); --file names a file in the node exporter's textfile directory"
        ) from error
    finally:
        os.umask(umask)


def _serve(registry: CollectorRegistry, host: str, port: int) -> None:
    with server_for(registry, host, port) as server, until_stopped(signal.SIGTERM, signal.SIGINT) as wait:
        threading.Thread(target=server.serve_forever, name="auditexport-metrics-server", daemon=True).start()
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"serving http://{shown}:{server.server_port}/metrics", err=True)
        wait(None)
        server.shutdown()


def server_for(registry: CollectorRegistry, host: str, port: int) -> ThreadingHTTPServer:
    """A server of /metrics and /healthz, bound and not yet serving. Raises `InvalidConfig` if it cannot be bound.

    `prometheus_client.start_http_server` answers every path with metrics, waits without end for a client that sends
    nothing, and prints a traceback when a client disconnects.
    """
    import socket

    from prometheus_client import MetricsHandler

    class Handler(MetricsHandler):
        server_version, sys_version = "auditexport", ""
        timeout = CLIENT_TIMEOUT_S

        def do_GET(self) -> None:  # noqa: N802
            path = self.path.partition("?")[0]
            if path == "/metrics":
                super().do_GET()
            elif path == "/healthz":
                # About this process, not MySQL: a restart of it does not help MySQL.
                self.do_HEAD()
                self.wfile.write(b"ok\n")
            else:
                self.send_error(404, explain="/metrics and /healthz are here")

        def do_HEAD(self) -> None:  # noqa: N802
            self.send_response(200 if self.path.partition("?")[0] in ("/metrics", "/healthz") else 404)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, request: object, client_address: object) -> None:
            """Prints nothing for a client that disconnects."""

    Handler.registry = registry
    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise InvalidConfig(f"--listen {host}:{port} cannot be bound ({error.strerror})") from error
