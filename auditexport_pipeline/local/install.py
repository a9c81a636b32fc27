"""Makes sure that this machine has a MySQL or MariaDB server binary, for `make`.

What belongs here: asking whether there is one, and installing Debian's when we are root. What does not:
starting it (`mysql`). The package holds the binary alone: no service is set up or started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from auditexport_pipeline.core.errors import LocalServerMissing
from auditexport_pipeline.local.mysql import find_server

PACKAGE = "mariadb-server-core"


def main() -> int:
    try:
        find_server()
    except LocalServerMissing as error:
        if not shutil.which("apt-get") or os.geteuid() != 0 or os.environ.get("AUDITEXPORT_MYSQLD"):
            print(f"auditexport: {error}", file=sys.stderr)
            return 2
        print(f"installing {PACKAGE} (once)", flush=True)
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", PACKAGE]):
            done = subprocess.run(["apt-get", *arguments], env=quiet, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"auditexport: apt-get {arguments[0]} failed: {done.stderr.strip()}", file=sys.stderr)
                return 2
        find_server()
    return 0


if __name__ == "__main__":
    sys.exit(main())
