"""Makes sure that this machine has a Chromium, a PostgreSQL, a Redis and a RabbitMQ, for `make test-e2e`.

What belongs here: finding them, and installing Debian's when we are root. What does not: starting them (`conftest`,
`servers`). No browser of Playwright's own is downloaded: its wheel drives the one that is there. Debian's
package makes a PostgreSQL cluster of its own, which is not used, and neither are the services of the other two.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from auditexport_pipeline.local.install import apt_install

# Debian's and Ubuntu's names, then the vendors'.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = {
    "chromium": "a Chromium",
    "postgresql": "a PostgreSQL server",
    "redis-server": "a Redis server",
    "rabbitmq-server": "a RabbitMQ server",
}


def find_browser() -> str | None:
    """The path of a Chromium on PATH."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def find_postgres() -> Path | None:
    """The directory with `initdb` and `postgres`: on PATH, or where Debian keeps them, the newest."""
    on_path = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = Path(on_path) if on_path else debian[-1] if debian else None
    return found.resolve().parent if found else None


def find_rabbitmq() -> Path | None:
    """The directory with RabbitMQ's own `rabbitmq-server`; Debian's on PATH would change the user first."""
    found = Path("/usr/lib/rabbitmq/bin")
    return found if (found / "rabbitmq-server").exists() else None


def missing() -> list[str]:
    """Debian's packages of what is not there."""
    there = {
        "chromium": find_browser(),
        "postgresql": find_postgres(),
        "redis-server": shutil.which("redis-server"),
        "rabbitmq-server": find_rabbitmq(),
    }
    return [package for package in PACKAGES if not there[package]]


def main() -> int:
    lacking = missing()
    if not lacking:
        return 0
    if not shutil.which("apt-get") or os.geteuid() != 0:
        print(
            f"auditexport: no {' and no '.join(PACKAGES[package][2:] for package in lacking)} on this machine: "
            f"Debian/Ubuntu `apt-get install {' '.join(lacking)}`",
            file=sys.stderr,
        )
        return 2
    if not apt_install(lacking):
        return 2
    if missing():
        print(f"auditexport: {', '.join(missing())} is installed and still not found", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
