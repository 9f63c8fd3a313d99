"""What a device without a model receives: bytes over those of its half, with an empty cache, after a kill and at a later start.

    python benchmarks/provisioning.py [--shape opt-350m] [--cut 2] [--precisions fp32,bf16,int8] [--models FOLDER]

A real edge server packs the half; each start is a process of its own that fetches over real gRPC on this machine. "Half" are the
bytes of the half's tensors; what is received beyond them are checksums, the tokenizer, the configuration and gRPC's messages.
MB are 10**6 bytes. The limit is 1.02 times the half, for one start and for the two that a kill makes of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from members import Servers, servers

from sfl.cache.cache import HalfCache
from sfl.cache.manifest import BLOCK_BYTES
from sfl.cluster.metrics import read_events

LIMIT = 1.02
WAIT_S = 600


class Device:
    """A device with a cache of its own, as often as it is started."""

    def __init__(self, folder: Path, running: Servers, cut: int, precision: str) -> None:
        self.name = folder.name
        self.out = folder / "out"
        self.cache = HalfCache(folder / "cache", 0)
        self._settings = {
            "name": self.name, "edge": running.edge, "cut": cut, "precision": precision, "data": {"path": __file__},
            "cache": str(self.cache.folder), "cache_limit_mb": 100_000, "out": str(self.out),
        }  # fmt: skip

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, __file__, "--child", json.dumps(self._settings)], text=True)

    def run(self) -> dict[str, Any]:
        """Its report after a whole start."""
        if self.start().wait(WAIT_S):
            sys.exit(f"{self.name} failed")
        return [event for event in read_events(self.out / "metrics.jsonl") if event["event"] == "provision"][-1]

    def run_until(self, bytes_on_disk: float) -> int:
        """SIGKILL once so much is on the disk; how much is there then."""
        child = self.start()
        deadline = time.monotonic() + WAIT_S
        while (there := self.on_disk()) < bytes_on_disk:
            if child.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.name} was not to be killed in the middle: {there} bytes are there")
            time.sleep(0.002)
        child.kill()
        child.wait()
        return self.on_disk()

    def on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.cache.folder.rglob("*.safetensors"))

    def half(self) -> int:
        """Bytes of the tensors of its half: the file less its header."""
        (file,) = self.cache.folder.rglob("*.safetensors")
        with file.open("rb") as stream:
            return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def provided_to(running: Servers, device: str) -> int:
    """Bytes of files that the edge server has sent to `device`, those of killed processes included."""
    events = read_events(running.folder / "edge" / "metrics.jsonl")
    return sum(event["bytes"] for event in events if event["event"] == "provide" and event["device"] == device)


def row(what: str, received: float, half: int, seconds: float | None, limited: bool) -> None:
    share = received / half
    verdict = ("ok" if share <= LIMIT else "ABOVE THE LIMIT") if limited else ""
    rate = "" if seconds is None else f"{seconds:8.2f}"
    print(f"  {what:<44} {received / 1e6:10.3f} {share:10.5f} {rate:>8}  {verdict}", flush=True)


def measure(model: Path, cut: int, precision: str) -> None:
    with (
        tempfile.TemporaryDirectory() as name,
        servers(Path(name) / "run", model, edge_flags=("--cache", f"{name}/e")) as running,
    ):
        whole = Device(Path(name) / "whole", running, cut, precision)
        first = whole.run()
        half = whole.half()
        print(f"cut {cut}, {precision}: half {half / 1e6:.1f} MB, files {first['bytes'] / 1e6:.1f} MB")
        print(f"  {'':<44} {'MB':>10} {'of half':>10} {'s':>8}  limit {LIMIT}")
        row("empty cache (with packing)", first["bytes_received"], half, first["seconds"], True)
        later = whole.run()
        row("second start", later["bytes_received"], half, later["seconds"], True)
        killed = Device(Path(name) / "killed", running, cut, precision)
        there = killed.run_until(half / 2)
        row("killed with so much on its disk", there, half, None, False)
        rest = killed.run()
        row("start after it", rest["bytes_received"], half, rest["seconds"], False)
        row("both, with the block that the kill cut short", there + rest["bytes_received"] + BLOCK_BYTES, half, None, True)
        time.sleep(1)  # the edge notes a broken stream a moment later
        row("put on the way by the edge for both", provided_to(running, "killed"), half, None, False)
        row("second start", killed.run()["bytes_received"], half, None, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-350m")
    parser.add_argument("--cut", type=int, default=2)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models", help="where models are kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        from sfl.device.provision import provided
        from sfl.settings import DeviceSettings

        provided(DeviceSettings.model_validate_json(args.child))
        return
    model = args.models / args.shape
    subprocess.run([sys.executable, Path(__file__).with_name("shapes.py"), args.shape, model], check=True)
    for precision in args.precisions.split(","):
        measure(model, args.cut, precision)


if __name__ == "__main__":
    main()
