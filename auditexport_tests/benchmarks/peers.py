"""Other people's exporters, each in a virtual environment of its own, none of them a dependency of this project.

What belongs here: their pinned versions and the making of their environments. What does not: how they are called
(`peer_quickhouse`, `peer_dlt`, which run in those environments) and what they are compared with (`contenders`).
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys

from auditexport_pipeline.local.stack import PROJECT

ENVIRONMENTS = PROJECT / ".auditexport" / "peers"
INSTALL_WITHIN_S = 300
# Drivers and pyarrow are pinned by constraints.txt, so that all contenders have the same.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "quickhouse": ("quickhouse==0.21.0",),
    "dlt": ("dlt[sql_database]==1.31.0", "sqlalchemy", "pymysql", "cryptography", "pyarrow"),
}


class NotInstalled(Exception):
    """pip could not make a peer's environment; the text is its last line."""


def python(peer: str) -> str:
    """The interpreter of the peer's environment, made if it is not there. Raises `NotInstalled`, having tried once."""
    made = _made(peer)
    if isinstance(made, NotInstalled):
        raise made
    return made


@functools.cache
def _made(peer: str) -> str | NotInstalled:
    requirements = REQUIREMENTS[peer]
    pinned = "\n".join([*requirements, sys.version, (PROJECT / "constraints.txt").read_text()])
    directory = ENVIRONMENTS / f"{peer}-{hashlib.sha256(pinned.encode()).hexdigest()[:12]}"
    interpreter = directory / "bin" / "python"
    ready = directory / ".ready"
    if ready.exists():
        return str(interpreter)
    print(f"installing {requirements[0]} into {directory.relative_to(PROJECT)} (once)", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        _run([sys.executable, "-m", "venv", str(directory)])
        _run([*install, "-c", str(PROJECT / "constraints.txt"), *requirements])
    except (OSError, subprocess.SubprocessError, NotInstalled) as error:
        shutil.rmtree(directory, ignore_errors=True)
        return NotInstalled(f"not installed: {error}")
    ready.touch()
    return str(interpreter)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_WITHIN_S, check=False)
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise NotInstalled(said[-1].strip() if said else f"exit status {done.returncode}")
