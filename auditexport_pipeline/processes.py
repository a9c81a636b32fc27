"""Processes that drain: a process's name in the ledger, and whether such a process is dead.

What belongs here: the form of the name, and reading this machine's /proc. What does not: Dagster's runs, and what is
done with the batches of a dead process (`core.claiming`).

The name is `host:pid:boot-start`. `boot` stands for this boot and pid namespace of the machine, `start` for the
process's start: a process with the same pid later, or in another container of the same host name, has another name.
Without /proc, no process is called dead, and the lease decides.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from collections.abc import Iterable
from pathlib import Path

# As wide as the ledger's column, with room for the rest of the name.
LONGEST_HOST = 80


def this_process() -> str:
    """A name that no other process has, on this machine or another."""
    boot = _boot()
    start = _start(os.getpid()) or secrets.token_hex(4)
    return f"{_host()}:{os.getpid()}:{boot or secrets.token_hex(3)}-{start}"


def dead(names: Iterable[str]) -> set[str]:
    """Those of these names that were processes of this machine, in this boot, and have ended."""
    return {name for name in names if lives(name) is False}


def lives(name: str) -> bool | None:
    """Whether the process of this name lives; None for one of another machine or boot, or a name of another form."""
    host, _, rest = name.rpartition(":")
    host, _, pid = host.rpartition(":")
    boot, _, start = rest.partition("-")
    if host != _host() or not pid.isdecimal() or not boot or boot != _boot():
        return None
    return start == _start(int(pid)) or _hidden(int(pid))


def _host() -> str:
    return (socket.gethostname() or "host")[:LONGEST_HOST]


def _boot() -> str:
    """Six letters for this boot and pid namespace; empty without /proc."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return hashlib.sha256(f"{boot_id}{namespace}".encode()).hexdigest()[:6]


def _hidden(pid: int) -> bool:
    """Whether /proc does not show the process of another user (hidepid)."""
    if os.path.exists(f"/proc/{pid}"):
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        pass
    return False


def _start(pid: int) -> str:
    """When a process of this machine started, in ticks since the boot; empty when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return "" if state in ("Z", "X") else f"{int(fields[18]):x}"
