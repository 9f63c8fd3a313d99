"""The same run with a native device and with one under QEMU's aarch64: their losses must agree. See aarch64-smoke.sh."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from members import Servers, end_of, servers

from sfl.cluster.metrics import read_events
from tests.flows import write_texts
from tests.tiny import save_tiny_model

TOLERANCE = 1e-3  # relative; two processors add up in different orders
TIME_S = 1800.0  # for one device; it takes about a minute where the machine has nothing else to do


@dataclass(frozen=True)
class Machine:
    """Where a device runs: the Python that starts it, and what is added to the environment."""

    name: str
    python: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Result:
    """What a device came to: the loss of each step, its peak resident memory in MB and its time from start to end in s."""

    losses: tuple[float, ...]
    peak_mb: float
    wall_s: float


@dataclass(frozen=True)
class Case:
    """What is compared: the number format of the device's base, and whether the device gets its half from the edge."""

    precision: str
    provided: bool
    steps: int
    model: Path
    data: Path

    def __str__(self) -> str:
        return f"{self.precision}, {'half from the edge' if self.provided else 'model on the device'}"

    def command(self, running: Servers, out: Path) -> list[str]:
        """Arguments of `sfl device` against `running`."""
        flags = {
            "name": "device",
            "out": out,
            "federation": running.fed,
            "edge": running.edge,
            "data.path": self.data,
            "precision": self.precision,
            "cut": 2,
            "steps": self.steps,
            "batch-size": 4,
            "max-length": 48,
            "threads": 1,
            "optimizer.learning-rate": 0.003,  # more would turn rounding in bf16 into a difference
            **({} if self.provided else {"model": self.model}),
        }
        return ["device", *(f"--{name}={value}" for name, value in flags.items())]


def train(machine: Machine, case: Case, folder: Path) -> Result:
    """A run of the three daemons in `folder`, which is new; ends this process where the device fails."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # so that no half is there already
    log, out = folder / "device.txt", folder / "device"
    with servers(folder / "servers", case.model) as running, log.open("w") as stream:
        started = time.monotonic()
        code = subprocess.run(
            [*machine.python, "-m", "sfl.cli.main", *case.command(running, out)],
            cwd=folder,
            env={**os.environ, **machine.environment},
            stdout=stream,
            stderr=stream,
            timeout=TIME_S,
        ).returncode
        wall_s = time.monotonic() - started
    if code:
        how = f"was ended by {Signals(-code).name}" if code < 0 else f"ended with {code}"
        hint = f": a package uses an instruction that {machine.name} lacks" if code == -Signals.SIGILL else ""
        sys.exit(f"{log.read_text()}\nerror: the {machine.name} device {how}{hint}")
    losses = tuple(float(event["loss"]) for event in read_events(out / "metrics.jsonl") if event["event"] == "step")
    return Result(losses, end_of(out)["peak_rss_mb"], wall_s)


def agree(machines: tuple[Machine, Machine], case: Case, folder: Path) -> bool:
    """Whether the losses of `case` are the same on both machines; prints both runs. Ends this process where one has failed."""
    print(f"{case}\n  {'':<22}{'loss':>10}{'':{10 * (case.steps - 1)}}{'peak RSS':>12}{'time':>10}", flush=True)
    runs = []
    for machine in machines:
        result = train(machine, case, folder / machine.name)
        runs.append(result.losses)
        losses = "".join(f"{loss:10.6f}" for loss in result.losses)
        print(f"  {machine.name:<22}{losses}{result.peak_mb:9.0f} MB{result.wall_s:8.1f} s", flush=True)
        if len(result.losses) != case.steps:
            sys.exit(f"error: {case.steps} losses were expected")
    differences = [abs(other - loss) / abs(loss) for loss, other in zip(*runs, strict=True)]
    same = all(difference <= TOLERANCE for difference in differences)  # false where a loss is not a number
    print(f"  relative difference {max(differences):.1e}, allowed {TOLERANCE:.0e}: {'ok' if same else 'TOO MUCH'}", flush=True)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--qemu", required=True)
    parser.add_argument("--cpu", required=True)
    parser.add_argument("--root", type=Path, required=True, help="Debian's arm64 files")
    parser.add_argument("--site", type=Path, required=True, help="aarch64 packages of sfl[train]")
    parser.add_argument("--precisions", required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    for name in [name for name in os.environ if name.upper().startswith("SFL_")]:
        del os.environ[name]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    root = args.root.resolve()
    emulator = (args.qemu, "-cpu", args.cpu, "-L", str(root), str(root / "usr/bin/python3.11"))
    packages = {"PYTHONPATH": os.pathsep.join([str(args.site.resolve()), os.environ["PYTHONPATH"]])}
    machines = Machine("native", (sys.executable,), {}), Machine(f"aarch64 {args.cpu}", emulator, packages)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = save_tiny_model(folder / "model", "opt"), write_texts(folder / "texts.txt", 60)
        cases = [
            Case(precision, provided, args.steps, model, data)
            for precision in args.precisions.split(",")
            for provided in (False, True)
        ]
        differing = [str(case) for number, case in enumerate(cases) if not agree(machines, case, folder / str(number))]
    if differing:
        sys.exit(f"error: the losses differ: {'; '.join(differing)}")


if __name__ == "__main__":
    main()
