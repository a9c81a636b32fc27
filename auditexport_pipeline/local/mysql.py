"""A private MySQL or MariaDB server for tests, the demo and `make dev`: one directory, one process, loopback."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Literal

from auditexport_pipeline.core.errors import LocalServerFailed, LocalServerMissing
from auditexport_pipeline.local.processes import LocalServer, lock_directory, tail

Family = Literal["mariadb", "mysql"]

SERVER_VARIABLE = "AUDITEXPORT_MYSQLD"
SERVER_NAMES = ("mariadbd", "mysqld")
# Packages install a server there; not all are on PATH. The last two are Homebrew's.
SERVER_DIRECTORIES = ("/usr/sbin", "/usr/local/sbin", "/usr/local/mysql/bin", "/opt/homebrew/bin", "/usr/local/bin")
HOW_TO_GET_ONE = (
    "no MySQL or MariaDB server on this machine: Debian/Ubuntu `apt-get install mariadb-server`, "
    f"macOS `brew install mariadb`, or {SERVER_VARIABLE}=path of a mysqld or mariadbd"
)

# Initialising takes 0.5 s (MariaDB) to 3 s (MySQL); the rest is for a loaded machine.
INITIALISED_WITHIN_S = 120.0
# Its supervisor stops a server whose starter died, and kills it after 15 s.
ORPHAN_GONE_WITHIN_S = 20.0

SETTINGS = (
    "--bind-address=127.0.0.1",
    # Names of the local host differ between machines; 127.0.0.1 does not.
    "--skip-name-resolve",
    "--character-set-server=utf8mb4",
    # As in production: MySQL writes a binary log by default, MariaDB does not.
    "--server-id=1",
    "--log-bin=binlog",
    "--binlog-format=ROW",
    "--binlog-row-image=FULL",
    # A million events write about 1 GB of it.
    "--max-binlog-size=256M",
    "--binlog-expire-logs-seconds=3600",
    # The default: a commit that was answered survives SIGKILL.
    "--innodb-flush-log-at-trx-commit=1",
    "--innodb-buffer-pool-size=256M",
    "--max-allowed-packet=64M",
    "--local-infile=OFF",
)

# --skip-name-resolve makes root@localhost unreachable over TCP; MariaDB's installer adds this one itself.
LOOPBACK_ROOT = (
    "CREATE USER 'root'@'127.0.0.1' IDENTIFIED BY '';\n"
    "GRANT ALL PRIVILEGES ON *.* TO 'root'@'127.0.0.1' WITH GRANT OPTION;\n"
)


def find_server() -> Path:
    """The server binary to start: `AUDITEXPORT_MYSQLD`, else `mariadbd` or `mysqld` where they usually are.

    Raises `LocalServerMissing` when there is none, or when the variable names something not executable.
    """
    if named := os.environ.get(SERVER_VARIABLE):
        found = shutil.which(os.path.expanduser(named))
        if found is None:
            raise LocalServerMissing(f"{SERVER_VARIABLE}={named} is not an executable file")
        return Path(found).absolute()
    usual_places = os.pathsep.join(SERVER_DIRECTORIES)
    for name in SERVER_NAMES:
        if found := shutil.which(name) or shutil.which(name, path=usual_places):
            return Path(found).absolute()
    raise LocalServerMissing(HOW_TO_GET_ONE)


class LocalMySQL(LocalServer):
    """A MySQL or MariaDB server whose data and log are in one directory. It reads no configuration of the host.

    The first `start()` initialises the data directory; later ones reuse it, also after a crash. `options` are appended to the
    server's command line and so win over ours. Root has no password and can only connect from 127.0.0.1. Raises
    `LocalServerMissing` when there is no server binary.
    """

    def __init__(self, directory: Path, *, port: int | None = None, options: Sequence[str] = ()) -> None:
        super().__init__(port)
        self.directory = directory.resolve()
        self.name = f"the local MySQL server in {self.directory}"
        self.data = self.directory / "data"
        self.log = self.directory / "mysqld.log"
        self.server = find_server()
        self.options = tuple(options)
        self._lock: IO[bytes] | None = None

    def stop(self) -> None:
        super().stop()
        if self._lock is not None:
            self._lock.close()

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the server, without a database."""
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/"

    @cached_property
    def _version_line(self) -> str:
        # MariaDB ships a `mysqld` too: only its own answer tells the families apart.
        answer = subprocess.run(
            [self.server, "--version"], capture_output=True, text=True, errors="replace", timeout=60
        )
        if answer.returncode != 0:
            raise LocalServerFailed(f"{self.server} --version failed: {tail(answer.stderr)}")
        return answer.stdout.strip()

    @property
    def family(self) -> Family:
        return "mariadb" if "mariadb" in self._version_line.lower() else "mysql"

    @property
    def version(self) -> str:
        """For example `10.11.19` or `9.7.4`."""
        found = re.search(r"Ver\s+(\d+(?:\.\d+)+)", self._version_line)
        if found is None:
            raise LocalServerFailed(f"{self.server} --version names no version: {self._version_line[:200]}")
        return found[1]

    @cached_property
    def _isolation(self) -> list[str]:
        """`--no-defaults`, so that the host's my.cnf is not read.

        It has to come first and only once: after that of a wrapper script, ours would be an unknown option.
        """
        with self.server.open("rb") as binary:
            head = binary.read(65536)
        wrapped = head.startswith(b"#!") and b"--no-defaults" in head
        return [] if wrapped else ["--no-defaults"]

    @property
    def _user(self) -> list[str]:
        # A server refuses to run as root without this option.
        return ["--user=root"] if os.geteuid() == 0 else []

    def _prepare(self) -> None:
        in_use = f"{self.name} is in use by a live process: stop that one, or use another directory"
        self._lock = lock_directory(self.directory, in_use)
        self._wait_for_orphan()
        if not self.data.exists():
            self._initialise()
        on_disk = "mysql" if (self.data / "mysql.ibd").exists() else "mariadb"
        if on_disk != self.family:
            raise LocalServerFailed(
                f"{self.name} was initialised by {on_disk} and {self.server} is {self.family}: use another directory"
            )

    @property
    def _temporary(self) -> Path:
        directory = self.directory / "tmp"
        directory.mkdir(exist_ok=True)
        return directory

    def _wait_for_orphan(self) -> None:
        """Waits for a server whose starter died, and which its supervisor is stopping now.

        The servers themselves would retry a locked file for 30 s (MariaDB) or 100 s (MySQL).
        """
        deadline = time.monotonic() + ORPHAN_GONE_WITHIN_S
        while _is_locked(self.data / "ibdata1"):
            if time.monotonic() > deadline:
                raise LocalServerFailed(
                    f"{self.name} is in use by a server of another program: stop it, or use another directory"
                )
            time.sleep(0.02)

    def _initialise(self) -> None:
        """Fills a directory beside `data` and renames it, so that a half-initialised one is never started."""
        for leftover in self.directory.glob("data.new.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="data.new.", dir=self.directory))
        with self.log.open("ab") as output:
            try:
                done = subprocess.run(
                    self._initialising_argv(fresh),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    timeout=INITIALISED_WITHIN_S,
                    # A MariaDB that starts in the host's TMPDIR would remove the temporary tables of other servers.
                    env={**os.environ, "TMPDIR": str(self._temporary)},
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise LocalServerFailed(f"{self.name} could not be initialised: {error}") from error
        if done.returncode != 0:
            reason = tail(self.log.read_text(errors="replace"))
            raise LocalServerFailed(f"{self.name} could not be initialised: {reason}")
        fresh.rename(self.data)

    def _initialising_argv(self, fresh: Path) -> list[str]:
        datadir = f"--datadir={fresh}"
        if self.family == "mariadb":
            options = ["--skip-test-db", "--skip-name-resolve", "--auth-root-authentication-method=normal"]
            return [*self._mariadb_installer(), datadir, *self._user, *options]
        accounts = self._temporary / "accounts.sql"
        accounts.write_text(LOOPBACK_ROOT)
        # Five times as fast as with the defaults.
        options = ["--skip-log-bin", "--performance-schema=OFF", "--auto-generate-certs=OFF", f"--init-file={accounts}"]
        return [str(self.server), *self._isolation, "--initialize-insecure", datadir, *self._user, *options]

    def _mariadb_installer(self) -> list[str]:
        beside = self.server.resolve().parent
        places = (self.server.parent, beside, beside.parent / "bin", beside.parent / "scripts")
        path = os.pathsep.join((*map(str, places), os.environ.get("PATH", ""), "/usr/bin", *SERVER_DIRECTORIES))
        for name in ("mariadb-install-db", "mysql_install_db"):
            if found := shutil.which(name, path=path):
                # An unpacked tarball has no compiled-in home.
                at_home = Path(found).parent.name == "scripts"
                return [found, "--no-defaults", *([f"--basedir={beside.parent}"] if at_home else [])]
        raise LocalServerMissing(f"{self.server} is there but mariadb-install-db is not: {HOW_TO_GET_ONE}")

    def _argv(self) -> list[str]:
        return [
            str(self.server),
            *self._isolation,
            f"--datadir={self.data}",
            f"--port={self.port}",
            # Relative to the data directory, which the server enters: socket paths end at ~100 bytes.
            "--socket=mysqld.sock",
            "--pid-file=mysqld.pid",
            f"--tmpdir={self._temporary}",
            *self._user,
            *SETTINGS,
            *(["--mysqlx=OFF"] if self.family == "mysql" else []),
            *self.options,
        ]

    def _answers(self) -> bool:
        """Whether this server answers: another one could listen on the port."""
        import pymysql

        try:
            connection = pymysql.connect(
                host="127.0.0.1", port=self.port, user="root", connect_timeout=5, read_timeout=5
            )
        except pymysql.err.OperationalError:
            return False
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT @@datadir")
            row = cursor.fetchone()
        return row is not None and Path(row[0]).resolve() == self.data


def _is_locked(system_tablespace: Path) -> bool:
    """Whether a live server holds InnoDB's lock on its first file."""
    try:
        with system_tablespace.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
