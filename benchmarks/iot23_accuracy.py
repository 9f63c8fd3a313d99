"""Accuracy on IoT-23: each capture a device, federated beside centralised LoRA with as many examples seen.

    python benchmarks/iot23_accuracy.py --data DIR [--steps 100] [--seeds 3] [--strategies fedavg,gsfs,gsfs-printed]

DIR holds captures as Zeek or TSV files (the sets that the published figures use are 34-1, 42-1, 21-1, 44-1 and the
honeypots 4-1, 5-1 and 7-1). Prompts hold behaviour columns only, repeated flows are dropped, train and test are divided
by content, so that no test row was seen by any device. Everything runs in one process with the daemons' own engines.
Prints one row a strategy: accuracy, macro-F1 and loss of the central adapter on the pooled test flows, mean and spread over
seeds, bytes of adapters to the federation server, and wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sfl.data.example import Example
from sfl.data.load import load_splits
from sfl.data.settings import DataSettings
from sfl.evaluate import evaluate
from sfl.model.default import default_model
from sfl.settings import DeviceSettings, FedSettings, OptimizerSettings, StrategySettings
from sfl.simulation import simulate


@dataclass(frozen=True)
class Outcome:
    """What one run came to; `uploaded` are bytes of adapter deltas sent to the federation server."""

    strategy: str
    seed: int
    accuracy: float
    f1_macro: float
    loss: float
    versions: int
    uploads: int
    uploaded: int
    wall_s: float


def device_settings(args: argparse.Namespace, seed: int) -> list[DeviceSettings]:
    captures = sorted(path for path in args.data.iterdir() if path.suffix in (".tsv", ".labeled"))
    if not captures:
        sys.exit(f"{args.data} holds no captures (*.tsv, *.conn.log.labeled)")
    return [
        DeviceSettings(
            name=path.name.split(".")[0],
            model=args.model,
            cut=args.cut,
            data=DataSettings(path=path),
            batch_size=args.batch_size,
            steps=args.steps,
            optimizer=OptimizerSettings(learning_rate=args.lr, schedule=args.schedule),
            seed=seed,
            precision=args.precision,
        )
        for path in captures
    ]


def federated(
    strategy: StrategySettings, devices: Sequence[DeviceSettings], test: list[Example], seed: int, name: str = ""
) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        torch.manual_seed(seed)
        federation = simulate(FedSettings(devices=len(devices), strategy=strategy), devices, out).federation
        version = federation.version or 0
        result = evaluate(devices[0].model, out / "adapters" / f"v{version}", test)
    return Outcome(
        strategy=name or strategy.name,
        seed=seed,
        accuracy=result.accuracy or 0.0,
        f1_macro=result.f1_macro or 0.0,
        loss=result.loss,
        versions=version,
        uploads=federation.submissions,
        uploaded=federation.submissions * federation.adapter_bytes,
        wall_s=time.monotonic() - started,
    )


def centralised(devices: Sequence[DeviceSettings], train: list[Example], test: list[Example], seed: int) -> Outcome:
    """All training flows at one place, as many steps of as many examples as all devices together, from the same version 0.

    It is a federation of one device, which trains exactly as unsplit PEFT does (tests/engine/test_split_equals_unsplit.py).
    """
    with tempfile.TemporaryDirectory() as folder:
        pooled = Path(folder) / "pooled.jsonl"
        lines = (json.dumps({"text": example.text, "label": example.label}) for example in train)
        pooled.write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = DataSettings(path=pooled, drop_repeats=False, validation=0, test=0)
        steps = sum(device.steps for device in devices)
        alone = devices[0].model_copy(update={"name": "central", "data": data, "steps": steps})
        return federated(StrategySettings(name="fedavg", local_steps=steps), [alone], test, seed, "centralised")


def report(outcomes: Sequence[Outcome]) -> None:
    print(f"{'strategy':14} {'accuracy':>15} {'macro-F1':>15} {'loss':>15} {'versions':>8} {'uploads':>7} {'MB up':>6} {'s':>5}")
    for name in dict.fromkeys(outcome.strategy for outcome in outcomes):
        runs = [outcome for outcome in outcomes if outcome.strategy == name]
        cells = []
        for figure in ("accuracy", "f1_macro", "loss"):
            values = [getattr(run, figure) for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})")
        mean = {key: statistics.mean(getattr(run, key) for run in runs) for key in ("versions", "uploads", "uploaded", "wall_s")}
        print(
            f"{name:14} {cells[0]:>15} {cells[1]:>15} {cells[2]:>15} {mean['versions']:8.1f} {mean['uploads']:7.1f}"
            f" {mean['uploaded'] / 1e6:6.1f} {mean['wall_s']:5.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=None, help="default: the pretrained MiniLM that the demo uses")
    parser.add_argument("--strategies", default="centralised,fedavg,gsfs,gsfs-printed")
    parser.add_argument("--steps", type=int, default=100, help="local steps of each device")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--local-steps", type=int, default=10, help="steps in a FedAvg round")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--schedule", choices=["constant", "linear"], default="linear", help="of the learning rate")
    parser.add_argument("--cut", type=int, default=2)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "int8", "nf4"], default="bf16", help="of the base; adapters are fp32"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write every run's figures here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.model = args.model or str(default_model("classification"))
    outcomes = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        devices = device_settings(args, seed)
        splits = [load_splits(device.data, "classification") for device in devices]
        train = [example for split in splits for example in split.train]
        test = [example for split in splits for example in split.test]
        if seed == args.first_seed:
            flows = f"{len(train)} training flows, {len(test)} test flows"
            print(f"{len(devices)} devices, {flows}, {args.steps} steps of {args.batch_size} each, {args.precision} base")
        for name in args.strategies.split(","):
            if name == "centralised":
                outcome = centralised(devices, train, test, seed)
            else:
                outcome = federated(StrategySettings(name=name, local_steps=args.local_steps), devices, test, seed)
            outcomes.append(outcome)
            print(
                f"  seed {seed} {name}: {outcome.accuracy:.3f} {outcome.f1_macro:.3f} {outcome.loss:.3f}",
                file=sys.stderr,
                flush=True,
            )
    report(outcomes)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
