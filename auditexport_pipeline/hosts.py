"""Which hosts are this machine."""

from __future__ import annotations

import ipaddress


def is_local(host: str | None) -> bool:
    """Whether a URL's host is this machine's loopback, so that nothing travels over a network."""
    try:
        return not host or host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
