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
from peft import PeftModel

from sfl.cluster.demo import default_model
from sfl.data.batches import Batches, tokenise
from sfl.data.example import Example
from sfl.data.labels import LabelSet
from sfl.data.load import load_splits
from sfl.data.settings import DataSettings
from sfl.evaluate import evaluate
from sfl.model.load import load_task_model, load_tokenizer
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
            optimizer=OptimizerSettings(learning_rate=args.lr),
            seed=seed,
        )
        for path in captures
    ]


def federated(strategy: StrategySettings, devices: Sequence[DeviceSettings], test: list[Example], seed: int) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        fed = FedSettings(devices=len(devices), strategy=strategy)
        torch.manual_seed(seed)
        federation = simulate(fed, devices, out).federation
        version = federation.version or 0
        result = evaluate(devices[0].model, out / "adapters" / f"v{version}", test)
        uploaded = sum(event["bytes"] for device in devices for event in _events(out / device.name / "metrics.jsonl", "submit"))
        uploads = federation.submissions
        uploaded = uploads * federation.adapter_bytes
    return Outcome(
        strategy.name,
        seed,
        result.accuracy or 0.0,
        result.f1_macro or 0.0,
        result.loss,
        version,
        uploads,
        uploaded,
        time.monotonic() - started,
    )


def _events(path: Path, kind: str) -> list[dict[str, int]]:
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [event for event in events if event["event"] == kind]


def centralised(devices: Sequence[DeviceSettings], train: list[Example], test: list[Example], seed: int) -> Outcome:
    """Unsplit PEFT on the pooled training flows: as many steps of as many examples as all devices together, from the same v0."""
    started = time.monotonic()
    first = devices[0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        probe = [device.model_copy(update={"steps": 1}) for device in devices]
        simulate(FedSettings(devices=len(devices), strategy=StrategySettings(name="fedavg")), probe, out)
        version_0 = out / "adapters" / "v0"
        labels = LabelSet(tuple(example.label for example in (*train, *test) if example.label))
        torch.manual_seed(seed)
        base = load_task_model(first.model, "classification", labels.names)
        model = PeftModel.from_pretrained(base, str(version_0), is_trainable=True).train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=first.optimizer.learning_rate, weight_decay=0.0)
        encoded = tokenise(train, load_tokenizer(first.model), first.max_length, labels)
        batches = Batches(encoded, first.batch_size, shuffle=True, seed=seed)
        for _ in range(first.steps * len(devices)):
            batch = next(batches)
            loss = model(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                labels=torch.from_numpy(batch.labels),
            ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        final = out / "central"
        model.save_pretrained(str(final))
        (final / "sfl.json").write_text((version_0 / "sfl.json").read_text(encoding="utf-8"), encoding="utf-8")
        result = evaluate(first.model, final, test)
    wall_s = time.monotonic() - started
    return Outcome("centralised", seed, result.accuracy or 0.0, result.f1_macro or 0.0, result.loss, 0, 0, 0, wall_s)


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
    parser.add_argument("--cut", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every run's figures here")
    args = parser.parse_args()
    args.model = args.model or str(default_model("classification"))
    outcomes = []
    for seed in range(args.seeds):
        devices = device_settings(args, seed)
        splits = [load_splits(device.data, "classification") for device in devices]
        train = [example for split in splits for example in split.train]
        test = [example for split in splits for example in split.test]
        if seed == 0:
            print(
                f"{len(devices)} devices, {len(train)} training flows, {len(test)} test flows, {args.steps} steps of {args.batch_size}"
            )
        for name in args.strategies.split(","):
            if name == "centralised":
                outcome = centralised(devices, train, test, seed)
            else:
                outcome = federated(StrategySettings(name=name, local_steps=args.local_steps), devices, test, seed)
            outcomes.append(outcome)
            print(f"  seed {seed} {name}: accuracy {outcome.accuracy:.3f}, macro-F1 {outcome.f1_macro:.3f}", file=sys.stderr)
    report(outcomes)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
