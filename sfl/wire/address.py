"""Addresses, without gRPC: settings check them before anything is dialled."""

from __future__ import annotations

from sfl.errors import SettingsError


def check_address(address: str) -> tuple[str, int]:
    """Split `host:port`. Raises `SettingsError` when it is not of that form."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or "/" in host or (":" in host and not bracketed) or not port.isdecimal() or int(port) > 65535:
        raise SettingsError(f"'{address}' is no address: expected HOST:PORT, as in 192.168.1.10:7300 or [::1]:7300")
    return host, int(port)
