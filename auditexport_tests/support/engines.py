"""Older ClickHouse engines for the tests: which are pinned, where they are, and how each is installed.

An engine is a chDB package in a virtual environment of its own, for two of them do not fit into one. Run as
`python -m auditexport_tests.support.engines 25.8`, this installs one (0.9 GB, once). The variable
AUDITEXPORT_TEST_CLICKHOUSE_ENGINE then chooses it for a test run; `make test CLICKHOUSE=25.8` does both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from auditexport_pipeline.local.clickhouse import LocalClickHouse

VARIABLE = "AUDITEXPORT_TEST_CLICKHOUSE_ENGINE"
# The newest is a dependency of the project, in constraints.txt. chdb 4.0.2 works with pandas 2 only.
NEWEST = "26.9"
PACKAGES = {
    "25.8": ("chdb==4.0.2", "pandas==2.3.3", "python-dateutil==2.9.0.post0", "pytz==2025.2"),
    "26.1": ("chdb-core==26.1.0",),
    "26.3": ("chdb-core==26.3.0",),
    "26.5": ("chdb-core==26.5.0",),
}
# What the server in front of the engine imports; versions as in the project's own environment. With uvicorn's own parser
# and loop every answer takes 40 ms longer.
BESIDE = ("httptools", "lz4", "starlette", "uvicorn", "uvloop", "zstandard")
PROJECT = Path(__file__).resolve().parents[2]
DIRECTORY = PROJECT / ".auditexport" / "engines"


def chosen() -> str:
    """The engine of this test run: a key of `PACKAGES`, or `NEWEST`."""
    return os.environ.get(VARIABLE) or NEWEST


def interpreter(engine: str) -> Path | None:
    """The Python that has `engine`; None stands for this one. Fails the run when the engine is not installed."""
    if engine == NEWEST:
        return None
    if engine not in PACKAGES:
        raise pytest.UsageError(f"{VARIABLE} is {engine}: one of {', '.join((*PACKAGES, NEWEST))} is")
    if not _ready(engine).exists():
        raise pytest.UsageError(
            f"engine {engine} is not installed: run `{sys.executable} -m auditexport_tests.support.engines {engine}`"
        )
    return _python(engine)


def local_clickhouse(directory: Path, **options: Any) -> LocalClickHouse:
    """The embedded ClickHouse on the engine of this test run; without a password, for proxies and gates of the tests stand
    before it and ask for their own.
    """
    options = {"python": interpreter(chosen()), "password": "", **options}
    return LocalClickHouse(directory, **{name: option for name, option in options.items() if option is not None})


def install(engine: str) -> None:
    """Makes the virtual environment of `engine`; does nothing when it is complete."""
    ready = _ready(engine)
    if engine == NEWEST or ready.exists():
        return
    print(f"installing the ClickHouse {engine} engine (once)", flush=True)
    venv.create(DIRECTORY / engine, with_pip=True, clear=True)
    constraints = DIRECTORY / engine / "constraints.txt"
    constraints.write_text(_constraints(PACKAGES[engine]))
    pip = [_python(engine), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", constraints, *PACKAGES[engine], *BESIDE], check=True)
    ready.touch()


def _python(engine: str) -> Path:
    return DIRECTORY / engine / "bin" / "python"


def _ready(engine: str) -> Path:
    """A file that changes its name with the pinned versions, so that a new pin installs anew."""
    return DIRECTORY / engine / ("ready-" + re.sub(r"[^\w.]+", "-", "-".join(PACKAGES.get(engine, ("",))[:1] + BESIDE)))


def _constraints(packages: tuple[str, ...]) -> str:
    """The project's constraints without those that `packages` replaces."""
    replaced = {package.split("==")[0] for package in packages} | {"chdb", "chdb-core"}
    lines = (PROJECT / "constraints.txt").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if line.split("==")[0].strip() not in replaced)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name != NEWEST and name not in PACKAGES:
            sys.exit(f"no engine {name}: there are {', '.join((*PACKAGES, NEWEST))}")
        install(name)
