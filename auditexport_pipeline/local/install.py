"""For `make`: installs Debian's MariaDB server, as root, when this machine has no MySQL or MariaDB server.

The packages have the binaries only: no service is set up or started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from auditexport_pipeline.core.errors import LocalServerMissing
from auditexport_pipeline.local.mysql import find_server

# The server, and `my_print_defaults`, without which its installer does nothing.
PACKAGES = ("mariadb-server-core", "mariadb-client-core")


def _check() -> None:
    """Raises `LocalServerMissing` unless a server can be initialised and started."""
    server = find_server()
    if server.name == "mariadbd" and not shutil.which("my_print_defaults"):
        beside = {server.parent, server.resolve().parent, server.resolve().parent.parent / "bin"}
        if not any((directory / "my_print_defaults").exists() for directory in beside):
            raise LocalServerMissing(
                f"{server} is there but my_print_defaults, which initialises it, is not: Debian/Ubuntu `apt-get install {PACKAGES[1]}`"
            )


def apt_install(packages: Sequence[str]) -> bool:
    """Installs Debian's packages as root; prints an error to standard error and returns False when that fails."""
    print(f"installing {' and '.join(packages)} (once)", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", *arguments], env=quiet, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"auditexport: apt-get {arguments[0]} failed: {done.stderr.strip()}", file=sys.stderr)
            return False
    return True


def main() -> int:
    try:
        _check()
    except LocalServerMissing as error:
        if not shutil.which("apt-get") or os.geteuid() != 0 or os.environ.get("AUDITEXPORT_MYSQLD"):
            print(f"auditexport: {error}", file=sys.stderr)
            return 2
        if not apt_install(PACKAGES):
            return 2
        _check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
