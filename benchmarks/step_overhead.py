"""What splitting costs in time: a split training step over the unsplit PEFT step, paired, in one run.

    python benchmarks/step_overhead.py [--pairs 12] [--threads 2] [--only opt-350m|minilm]

Federation server, edge server and device are processes of their own, as on separate machines; this process holds the
unsplit PEFT model. Each pair is one step of either on the same batch, in turns, each with `--threads` threads (the
halves of a split step never compute at the same time). Prints the median ratio with its quartiles, the limit it has to
meet, and where the split step's time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--device" in sys.argv:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as `sfl device` does before torch is loaded

import torch
from peft import PeftModel
from shapes import make_model, write_texts

from sfl.cluster.metrics import read_events
from sfl.cluster.plan import free_addresses
from sfl.data.settings import DataSettings
from sfl.device.edge_link import GrpcEdgeLink
from sfl.device.prepare import PreparedDevice
from sfl.device.trainer import DeviceTrainer
from sfl.model.default import default_model
from sfl.model.load import load_task_model
from sfl.settings import DeviceSettings
from sfl.wire.federation import FederationClient
from sfl.wire.split import ORDINARY, CutBatch, StepResult, StepTerms

LIMIT = 1.10
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    cut: int
    batch_size: int
    length: int


class TimedLink(GrpcEdgeLink):
    """Notes how long the device waited for the edge in its last step."""

    waited_s = 0.0

    def step(self, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY, checkpoint: int = 0) -> StepResult:
        started = time.perf_counter()
        result = super().step(step, version, batch, terms, checkpoint)
        self.waited_s = time.perf_counter() - started
        return result


@contextlib.contextmanager
def processes(settings: DeviceSettings, folder: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    """A federation server, an edge server and a device that does one step for each line it reads; yields the device."""
    sfl = [sys.executable, "-m", "sfl.cli.main"]
    fed = ["--listen", settings.federation, "--devices", "1", "--out", str(folder / "fed"), "--strategy.name", "fedavg"]
    edge = ["--listen", settings.edge, "--federation", settings.federation, "--model", str(settings.model)]
    config = folder / "device.json"
    config.write_text(settings.model_dump_json(), encoding="utf-8")
    with (folder / "log.txt").open("w") as log:
        children: list[subprocess.Popen[Any]] = [
            subprocess.Popen([*sfl, "fed", *fed], stderr=log),
            subprocess.Popen([*sfl, "edge", *edge, "--threads", str(threads), "--out", str(folder / "edge")], stderr=log),
            subprocess.Popen(
                [sys.executable, __file__, "--device", str(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ),
        ]
        try:
            yield children[2]
        finally:
            for child in reversed(children):
                child.terminate()
                child.wait(timeout=20)


def be_device(config: Path) -> None:
    """Join, then one step for each line on standard input; answers with its times and loss as a line of JSON."""
    settings = DeviceSettings.model_validate_json(config.read_text(encoding="utf-8"))
    torch.set_num_threads(settings.threads)
    device = PreparedDevice.of(settings)
    federation = FederationClient(settings.federation, settings.name, settings.wait_s)
    federation.join(device.join_request())
    agreement = federation.agreement(120)
    plan = device.plan(list(agreement.labels))
    half, slots = device.load_half()
    version = federation.version(0, 300)
    state = federation.fetch(version, 0, device.cut)
    adapter = device.adapter(slots, state, version, agreement.policy)
    link = TimedLink(settings.edge, device.session_request(version, agreement.policy), 120, 120)
    trainer = DeviceTrainer(half, adapter, link, settings.task)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin, start=1):
        batch = next(plan.batches)
        started = time.perf_counter()
        result = trainer.step(number, batch)
        took_s = time.perf_counter() - started
        print(json.dumps({"split_s": took_s, "waited_s": link.waited_s, "loss": result.loss}), flush=True)


def measure(case: Case, pairs: int, threads: int, folder: Path) -> None:
    fed, edge = free_addresses(2)
    settings = DeviceSettings(
        name="device",
        edge=edge,
        federation=fed,
        model=case.model,
        cut=case.cut,
        data=DataSettings(path=write_texts(folder / "texts.txt", 400, case.length)),
        batch_size=case.batch_size,
        max_length=case.length,
        threads=threads,
        wait_s=120,
    )
    batches = PreparedDevice.of(settings).plan(["a", "b"]).batches
    split, unsplit_s, worst = [], [], 0.0
    with processes(settings, folder, threads) as device:
        if device.stdin is None or device.stdout is None or device.stdout.readline() != "ready\n":
            sys.exit((folder / "log.txt").read_text(encoding="utf-8"))
        base = load_task_model(case.model, "classification", ["a", "b"])
        version_0 = folder / "fed" / "adapters" / "v0"
        unsplit = PeftModel.from_pretrained(base, str(version_0), is_trainable=True).train()
        trained = [parameter for parameter in unsplit.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.optimizer.learning_rate, weight_decay=0.0)
        for _ in range(pairs + WARM_UP):
            batch = next(batches)
            ids, mask, truth = map(torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.labels))
            time.sleep(0.05)  # the other side's threads have come to rest
            started = time.perf_counter()
            loss = unsplit(input_ids=ids, attention_mask=mask, labels=truth).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            unsplit_s.append(time.perf_counter() - started)
            time.sleep(0.05)
            device.stdin.write("step\n")
            device.stdin.flush()
            split.append(json.loads(device.stdout.readline()))
            worst = max(worst, abs(split[-1]["loss"] - loss.item()) / abs(loss.item()))
    edge_s = [event["wall_s"] for event in read_events(folder / "edge" / "metrics.jsonl") if event["event"] == "step"]
    ratios = [each["split_s"] / alone for each, alone in zip(split, unsplit_s)][WARM_UP:]
    low, middle, high = statistics.quantiles(ratios, n=4)
    total = statistics.median(each["split_s"] for each in split[WARM_UP:])
    waited = statistics.median(each["waited_s"] for each in split[WARM_UP:])
    at_edge = statistics.median(edge_s[WARM_UP:])
    print(
        f"{case.name}: cut {case.cut}, {case.batch_size}x{case.length}, {pairs} pairs, {threads} threads\n"
        f"  ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}), limit {LIMIT:.2f}: {'met' if middle <= LIMIT else 'MISSED'}\n"
        f"  unsplit {1e3 * statistics.median(unsplit_s[WARM_UP:]):.0f} ms; split {1e3 * total:.0f} ms = device"
        f" {1e3 * (total - waited):.0f} + edge {1e3 * at_edge:.0f} + wire and hand-over {1e3 * (waited - at_edge):.1f}\n"
        f"  largest relative difference of the two losses {worst:.1e} (dropout differs where the model has any)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["opt-350m", "minilm"])
    parser.add_argument("--device", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device:
        be_device(args.device)
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only != "opt-350m":
            (folder / "minilm").mkdir()
            case = Case("MiniLM", str(default_model("classification")), 2, 16, 64)
            measure(case, 2 * args.pairs, args.threads, folder / "minilm")
        if args.only != "minilm":
            model = make_model("opt-350m", folder / "model")
            (folder / "opt").mkdir()
            measure(Case("OPT-350M shape", str(model), 2, 4, 128), args.pairs, args.threads, folder / "opt")


if __name__ == "__main__":
    main()
