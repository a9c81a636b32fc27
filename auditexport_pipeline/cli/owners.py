"""Who drains at the prompt: the name that a process gives itself in the ledger, and whether such a process is dead.

What belongs here: the name's form, and asking this machine's kernel. What does not: owners that are Dagster runs, and
what is done with the batches of a dead one (`core.claiming`).

The name is `host:pid:boot-start`. `boot` stands for this boot and pid namespace of the machine, `start` for the process's
start: neither a pid that is given again, nor another container of the same host name is taken for the process. Where
the kernel does not tell (no /proc), nobody is called dead, and the lease decides.
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


def dead(owners: Iterable[str]) -> set[str]:
    """Those of these owners that were processes of this machine, in this boot, and are no more."""
    boot = _boot()
    gone = set()
    for owner in owners:
        host, _, rest = owner.rpartition(":")
        host, _, pid = host.rpartition(":")
        its_boot, _, start = rest.partition("-")
        if host == _host() and pid.isdecimal() and boot and its_boot == boot and start != _start(int(pid)):
            gone.add(owner)
    return gone


def _host() -> str:
    return (socket.gethostname() or "host")[:LONGEST_HOST]


def _boot() -> str:
    """What stands for this boot and pid namespace, in six letters; empty where nobody tells."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return hashlib.sha256(f"{boot_id}{namespace}".encode()).hexdigest()[:6]


def _start(pid: int) -> str:
    """When a process of this machine started, in ticks since the boot; empty when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return "" if state in ("Z", "X") else f"{int(fields[18]):x}"
