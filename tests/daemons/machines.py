"""Machines that are network namespaces, all on one switch, which is a namespace too; for tests that run as root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import pytest

ADDRESSES = {"fed": "10.0.0.1", "edge": "10.0.0.2", "camera": "10.0.0.3", "hub": "10.0.0.4"}
_NOBODY = "02:00:00:00:00:99"  # an address of Ethernet that no port has

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Machines:
    """A namespace for each machine; leaving the `with` block removes them."""

    def __init__(self) -> None:
        mark = f"sfl{os.getpid()}"
        self._switch = f"{mark}-switch"
        self._namespaces = {machine: f"{mark}-{machine}" for machine in ADDRESSES}

    def command(self, machine: str) -> list[str]:
        """What stands before a command line that is to run on `machine`."""
        return ["ip", "netns", "exec", self._namespaces[machine]]

    def unplug(self, machine: str) -> None:
        """Pull its cable: it sees that, the others do not."""
        ip("-n", self._switch, "link", "set", f"port-{machine}", "down")

    def plug(self, machine: str) -> None:
        ip("-n", self._switch, "link", "set", f"port-{machine}", "up")

    def part(self, one: str, other: str) -> None:
        """From now on nothing of `one` reaches `other`, and neither is told: what is sent goes to a port that nobody has."""
        neighbour = [ADDRESSES[other], "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent"]
        ip("-n", self._namespaces[one], "neigh", "replace", *neighbour)

    def join(self, one: str, other: str) -> None:
        ip("-n", self._namespaces[one], "neigh", "del", ADDRESSES[other], "dev", "eth0")

    def __enter__(self) -> Machines:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def _make(self) -> None:
        for namespace in (self._switch, *self._namespaces.values()):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self._switch, "link", "set", "br0", "up")
        for machine, namespace in self._namespaces.items():
            port = f"port-{machine}"
            ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            ip("-n", namespace, "addr", "add", f"{ADDRESSES[machine]}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        for namespace in (self._switch, *self._namespaces.values()):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", namespace)
