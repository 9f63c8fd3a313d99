"""What a checkpoint costs: milliseconds and bytes on a device and at its edge server, for a model's adapter with AdamW.

    python benchmarks/checkpoints.py [--model FOLDER] [--cut 2] [--rank 8] [--folder WHERE]

`--folder` decides which disk is measured. Beside the whole it prints how much of it the disk takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from sfl import disk
from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import device_half
from sfl.device.checkpoints import CheckpointFiles
from sfl.edge_server.engine import EdgeEngine
from sfl.edge_server.session_files import SessionFiles
from sfl.model import chance
from sfl.model.default import default_model
from sfl.model.halves import load_device_half, load_edge_half
from sfl.model.load import load_config
from sfl.model.local_adapter import LocalAdapter
from sfl.model.lora import head_state, initial_adapter, inject_lora, resolve_targets
from sfl.wire.split import OptimizerSpec, SessionRequest

TIMES = 30
LABELS = ("benign", "malicious")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--cut", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    model, cut, optimizer = arguments.model or str(default_model("classification")), arguments.cut, OptimizerSpec("adamw", 1e-3)
    lora = resolve_targets(load_config(model), LoraSpec(arguments.rank, 2.0 * arguments.rank))
    edge = load_edge_half(model, "classification", 1, LABELS, "fp32", "fp32", "cpu", 0)
    version = initial_adapter(edge.config, "classification", lora, head_state(edge), 0)
    engine = EdgeEngine(edge, inject_lora(edge, lora), "classification", lora, "")
    request = SessionRequest("s", "device", "classification", cut, 0, "", lora, optimizer, 0, "fp32")
    session = engine.open(request, version)
    slots = inject_lora(load_device_half(model, cut, "fp32", "fp32", "cpu"), lora)
    adapter = LocalAdapter(slots, device_half(version, cut), cut, 0, optimizer)
    for each in (adapter, session.adapter):
        for parameter in each.tensors()["adapter"]:
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        each.step(1e-3)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        files, sessions = CheckpointFiles(Path(folder) / "state"), SessionFiles(Path(folder) / "sessions")
        files.require({})
        document = {"session": "s"}
        measure("device", Path(folder) / "state", lambda: files.write(
            lambda: (document, adapter.state() | chance.to_arrays(chance.current())), must=True))  # fmt: skip
        measure("edge", Path(folder) / "sessions", lambda: sessions.write(engine, session, 1, ()))


def measure(where: str, folder: Path, write: Callable[[], object]) -> None:
    whole, synced = list[float](), list[float]()
    sync = disk.sync

    def timed(path: Path) -> None:
        started = time.perf_counter()
        sync(path)
        synced[-1] += time.perf_counter() - started

    with patch.object(disk, "sync", timed):
        for _ in range(TIMES):
            synced.append(0.0)
            started = time.perf_counter()
            write()
            whole.append(time.perf_counter() - started)
    size = max(path.stat().st_size for path in folder.glob("*.state"))
    print(
        f"{where}: {1000 * median(whole):.1f} ms a checkpoint (slowest {1000 * max(whole):.1f} ms), of which the disk"
        f" {1000 * median(synced):.1f} ms; {size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
