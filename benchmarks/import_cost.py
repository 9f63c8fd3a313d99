"""What a device's imports cost: resident memory by import stage, with and without `lean_imports`, each in a fresh process.

    python benchmarks/import_cost.py [--models opt,llama,bert] [--repeats 3]

Figures are resident memory (VmRSS) after each import, the median over the repeats, in MB of 10**6 bytes. The stages go from what
nobody can do without to all that a device has imported when it starts its first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path

STAGES = (
    ("python", ()),
    ("numpy, grpc", ("numpy", "grpc")),
    ("torch", ("torch",)),
    ("transformers", ("transformers", "transformers.models.auto")),
    ("its model code", ("transformers.modeling_utils", "transformers.models.auto.modeling_auto")),
    ("peft", ("peft",)),
    ("sfl.device", ("sfl.device.daemon",)),
    ("sfl.cli", ("sfl.cli.main",)),
)


def resident_mb() -> float:
    """VmRSS of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))


def child(kind: str, models: list[str]) -> None:
    """Import everything in turn; prints the resident memory after each stage."""
    found = {}
    for stage, modules in (*STAGES, ("models", [f"transformers.models.{name}.modeling_{name}" for name in models])):
        for module in modules:
            import_module(module)
        if stage == "torch" and kind == "lean":
            from sfl.model.lean_imports import lean_imports

            lean_imports()
        found[stage] = resident_mb()
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="opt", help="families whose code is imported at the end")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=("lean", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.models.split(","))
        return
    medians = {}
    for kind in ("plain", "lean"):
        command = [sys.executable, __file__, "--child", kind, "--models", args.models]
        runs = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) for _ in range(args.repeats)
        ]
        medians[kind] = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
    print(f"{'imported':<16} {'plain':>7} {'more':>7} {'lean':>7} {'more':>7}")
    before = dict.fromkeys(medians, 0.0)
    for stage in medians["plain"]:
        now = {kind: found[stage] for kind, found in medians.items()}
        print(f"{stage:<16}" + "".join(f" {now[kind]:7.1f} {now[kind] - before[kind]:+7.1f}" for kind in now))
        before = now


if __name__ == "__main__":
    main()
