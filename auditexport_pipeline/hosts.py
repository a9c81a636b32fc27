"""Which hosts are this machine: nothing that is said to them travels."""

from __future__ import annotations

import ipaddress


def is_local(host: str | None) -> bool:
    """Whether a host, as a URL names it, is this machine's loopback, so that nothing travels."""
    try:
        return not host or host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
