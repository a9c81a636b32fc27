"""Canaries, and the search for them in files, databases and process lists.

What belongs here: the encodings of a canary, and a count of what was read, so that "no hits" differs from "nothing
searched". What does not: which canary is planted where.
"""

from __future__ import annotations

import base64
import re
import secrets
import sqlite3
import threading
import zlib
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# A regular file that a run holds open and that is larger is a mapped library, not what it wrote.
LARGEST_OPEN_FILE_BYTES = 64 * 1024**2


def new_canary() -> str:
    """Letters and digits only, so that no quoting of text or URLs changes it."""
    return "cnry" + secrets.token_hex(8)


def encodings(canary: str) -> dict[str, bytes]:
    """The forms in which a canary can appear; base64 has three, by the bytes before it."""
    plain = canary.encode()
    found = {"plain": plain, "hex": plain.hex().encode(), "UTF-16": canary.encode("utf-16-le")}
    for before in range(3):
        text = base64.b64encode(b"\0" * before + plain)
        # The letters that the canary alone decides.
        found[f"base64 +{before}"] = text[-(-before * 8 // 6) : (before + len(plain)) * 8 // 6]
    return found


@dataclass(slots=True)
class Place:
    """What was read of one place, and what was found there."""

    items: int = 0
    bytes: int = 0
    hits: set[str] = field(default_factory=set)


class Search:
    """Searches for canaries (name → text) and counts by place. Thread-safe."""

    def __init__(self, canaries: dict[str, str]) -> None:
        self._names = {
            form: f"{name} ({how})" for name, text in canaries.items() for how, form in encodings(text).items()
        }
        self._any = re.compile(b"|".join(map(re.escape, self._names)))
        self._lock = threading.Lock()
        self.places: dict[str, Place] = {}

    def look(self, place: str, item: str, *values: bytes) -> None:
        """Reads these bytes, and what they decompress to, as one item of the place."""
        hits: set[str] = set()
        for value in values:
            for data in (value, *_decompressed(value)):
                hits.update(f"{item}: {self._names[form]}" for form in self._any.findall(data))
        with self._lock:
            found = self.places.setdefault(place, Place())
            found.items += 1
            found.bytes += sum(map(len, values))
            found.hits |= hits

    def look_at_files(self, place: str, *directories: Path) -> None:
        """Every file below, as bytes; of SQLite's also every value, because a page's end may cut one in two."""
        self.places.setdefault(place, Place())
        for directory in directories:
            for path in sorted(path for path in directory.rglob("*") if path.is_file()):
                data = path.read_bytes()
                self.look(place, str(path.relative_to(directory)), data)
                if data.startswith(b"SQLite format 3\0"):
                    self._look_at_sqlite(f"{place}: SQLite values", path)

    def _look_at_sqlite(self, place: str, path: Path) -> None:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for row in database.execute(f'SELECT * FROM "{table}"'):
                    self.look(place, f"{path.name}, {table}", *as_bytes(row))

    def hits(self, place: str) -> set[str]:
        return self.places[place].hits if place in self.places else set()

    def all_hits(self) -> list[str]:
        return sorted(f"{place}: {hit}" for place, found in self.places.items() for hit in found.hits)

    def table(self) -> str:
        """One line a place, for people."""
        width = max(map(len, self.places))
        lines = [f"{'place':<{width}}  {'items':>7}  {'bytes':>12}  hits"]
        for place, found in sorted(self.places.items()):
            lines.append(f"{place:<{width}}  {found.items:>7,}  {found.bytes:>12,}  {len(found.hits)}")
        return "\n".join(lines)


def as_bytes(row: Iterable[object]) -> list[bytes]:
    return [value if isinstance(value, bytes) else str(value).encode(errors="replace") for value in row]


def _decompressed(data: bytes) -> list[bytes]:
    """Decompressed by zlib or gzip: Dagster compresses its snapshots."""
    if data[:1] != b"\x78" and data[:2] != b"\x1f\x8b":
        return []
    with suppress(zlib.error):
        return [zlib.decompressobj(wbits=47).decompress(data)]
    return []


class Watch:
    """Searches, until it is left, what exists only while a process runs: command lines of all processes on this
    machine, temporary files, and files without a name that a watched process has open.

    Each search is a sample; `look()` takes one at a moment of the caller's choice.
    """

    EVERY_S = 0.15

    def __init__(self, search: Search, temporary: Path) -> None:
        self._search = search
        self._temporary = temporary
        self._seen: set[object] = set()
        self._done = threading.Event()
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._keep_looking)
        self.pid: int | None = None

    def __enter__(self) -> Watch:
        for place in ("process lists, during", "temporary files, during", "files without a name, during"):
            self._search.places.setdefault(place, Place())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _keep_looking(self) -> None:
        while not self._done.wait(self.EVERY_S):
            self.look()

    def look(self) -> None:
        with self._looking:
            for directory in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):
                    self._once("process lists, during", "a command line", (directory / "cmdline").read_bytes())
            for path in self._temporary.rglob("*"):
                with suppress(OSError):
                    if path.is_file():
                        self._once("temporary files, during", path.name, path.read_bytes())
            for process in self._family():
                self._look_at_open_files(Path(f"/proc/{process.pid}/fd"))

    def _family(self) -> list[psutil.Process]:
        if self.pid is None:
            return []
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _look_at_open_files(self, descriptors: Path) -> None:
        try:
            links = list(descriptors.iterdir())
        except OSError:
            return
        for link in links:
            with suppress(OSError):
                target = str(link.readlink())
                if "(deleted)" in target and link.is_file() and link.stat().st_size < LARGEST_OPEN_FILE_BYTES:
                    self._once("files without a name, during", target, link.read_bytes())

    def _once(self, place: str, item: str, data: bytes) -> None:
        """Searches unchanged data once."""
        key = (place, item, data)
        if data and key not in self._seen:
            self._seen.add(key)
            self._search.look(place, item, data)
