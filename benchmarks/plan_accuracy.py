"""How far `sfl plan` is off: its predicted peak of a device beside the measured one.

    python benchmarks/plan_accuracy.py [--only TEXT] [--steps 6] [--models FOLDER]

Measured is the highest resident memory (VmHWM) of the real daemon with `tight_memory`, in MB of 10**6 bytes, through real gRPC
with a federation server and an edge server beside it. Models have the true shape and random weights, but five blocks: what a
device holds does not depend on those that it does not hold. None of these combinations was used for the constants of
sfl/planning, which come from tiny models and other combinations; a calibration of this machine is used where there is one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from members import device_command, end_of, servers
from shapes import config_of, make_model, write_texts

from sfl.planning.calibration import read_calibration
from sfl.planning.plan import make_plan
from sfl.planning.request import PlanRequest
from sfl.settings import Precision

BLOCKS, LIMIT = 5, 0.10


@dataclass(frozen=True)
class Combination:
    """A device: model shape, cut, precision of its base and size of its batch."""

    shape: str
    cut: int
    precision: Precision
    batch: int
    length: int
    micro_batch: int = 0
    checkpointing: bool = False

    def __str__(self) -> str:
        parts = f" by {self.micro_batch}" if self.micro_batch else ""
        again = ", checkpointing" if self.checkpointing else ""
        return f"{self.shape}, cut {self.cut}, {self.precision}, {self.batch}x{self.length}{parts}{again}"


COMBINATIONS = (
    Combination("opt-125m", 1, "fp32", 4, 128),
    Combination("opt-125m", 3, "bf16", 8, 64),
    Combination("opt-125m", 2, "int8", 16, 128, micro_batch=4),
    Combination("opt-125m", 4, "fp32", 2, 256),
    Combination("opt-350m", 2, "fp32", 4, 128),
    Combination("opt-350m", 1, "nf4", 4, 128),
    Combination("opt-350m", 3, "int8", 4, 256, checkpointing=True),
    Combination("opt-1.3b", 1, "int8", 4, 128, micro_batch=1),
    Combination("opt-1.3b", 2, "bf16", 4, 128),
    Combination("opt-1.3b", 2, "nf4", 4, 128, micro_batch=2),
    Combination("opt-1.3b", 3, "bf16", 8, 64),
    Combination("opt-1.3b", 4, "int8", 2, 128),
    Combination("minilm", 2, "fp32", 16, 64),
    Combination("minilm", 3, "bf16", 32, 64),
    Combination("minilm", 1, "int8", 16, 128),
    Combination("tinyllama-1.1b", 1, "fp32", 4, 64),
    Combination("tinyllama-1.1b", 3, "int8", 4, 128, micro_batch=1),
    Combination("tinyllama-1.1b", 4, "bf16", 2, 128),
)


def predicted(one: Combination) -> float:
    """MB that the planner says, from the configuration alone."""
    request = PlanRequest(
        batch_size=one.batch,
        max_length=one.length,
        micro_batch=one.micro_batch,
        checkpointing=one.checkpointing,
        precision=one.precision,
        lowest_cut=one.cut,
    )
    return make_plan(config_of(one.shape, BLOCKS), request).cuts[0].device_mb


def measured(one: Combination, models: Path, steps: int) -> float:
    """MB that the daemon takes over so many steps."""
    model = make_model(one.shape, models / f"{one.shape}-{BLOCKS}", BLOCKS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_texts(folder / "texts.txt", 100, one.length)
        flags = ("--precision", "bf16", "--lowest-cut", str(one.cut), "--threads", "1")
        with servers(folder / "servers", model, edge_flags=flags) as running:
            command = device_command(
                running, str(model), folder / "device", data,
                cut=one.cut, precision=one.precision, micro_batch=one.micro_batch, steps=steps, batch_size=one.batch,
                max_length=one.length, threads=1,
            )  # fmt: skip
            command += ["--checkpointing"] if one.checkpointing else []
            subprocess.run(command, check=True, stderr=(folder / "device.txt").open("w"), timeout=1200)
        return float(end_of(folder / "device")["peak_rss_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only combinations whose description holds this")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models", help="where models are kept")
    args = parser.parse_args()
    print(f"constants: {read_calibration().source}")
    print(f"{'':58} predicted  measured    error")
    errors = []
    for one in COMBINATIONS:
        if args.only not in str(one):
            continue
        guess, real = predicted(one), measured(one, args.models, args.steps)
        errors.append(guess / real - 1)
        print(f"{one!s:58} {guess:9.1f} {real:9.1f} {errors[-1]:+8.1%}", flush=True)
    worst = max(map(abs, errors), default=0.0)
    print(f"{len(errors)} combinations, largest error {worst:.1%}; limit {LIMIT:.0%}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
