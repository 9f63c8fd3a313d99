"""Addresses, without gRPC: settings check them before anything is dialled."""

from __future__ import annotations

import ipaddress
import socket

from sfl.errors import AddressError


def check_address(address: str) -> tuple[str, int]:
    """Split `host:port`. Raises `SettingsError` when it is not of that form."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or "/" in host or (":" in host and not bracketed) or not port.isdecimal() or int(port) > 65535:
        raise AddressError(f"'{address}' is no address: expected HOST:PORT, as in 192.168.1.10:7300 or [::1]:7300")
    return host, int(port)


def connect(address: str, wait_s: float) -> socket.socket:
    """A bare connection to `host:port`. Raises `OSError`: `ConnectionRefusedError` where nobody listens, `TimeoutError` where
    nothing answers in time."""
    host, port = check_address(address)
    return socket.create_connection((host.strip("[]"), port), timeout=wait_s)


def is_loopback(address: str) -> bool:
    """Whether what goes to `host:port` never leaves this machine."""
    host = check_address(address)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
