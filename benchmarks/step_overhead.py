"""What splitting costs in time: a split training step over the unsplit PEFT step, paired, in one run.

    python benchmarks/step_overhead.py [--pairs 12] [--threads 2] [--only opt-350m|minilm]

Federation server and edge server are real daemons in processes of their own; this process is the device and also
holds the unsplit PEFT model. Each pair is one step of either on the same batch, in turns, each with `--threads` threads
(the two halves of a split step never compute at the same time). Prints the median ratio with its quartiles, the limit
it has to meet, and where the split step's time goes.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from shapes import make_model, write_texts

from sfl.cluster.demo import default_model
from sfl.cluster.metrics import read_events
from sfl.cluster.plan import free_addresses
from sfl.data.settings import DataSettings
from sfl.device.edge_link import GrpcEdgeLink
from sfl.device.prepare import PreparedDevice
from sfl.device.trainer import DeviceTrainer
from sfl.model.halves import load_device_half
from sfl.model.load import load_task_model
from sfl.model.local_adapter import LocalAdapter
from sfl.model.lora import inject_lora
from sfl.settings import DeviceSettings
from sfl.wire.federation import FederationClient
from sfl.wire.split import CutBatch, StepResult

LIMIT = 1.10


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    cut: int
    batch_size: int
    length: int


class TimedLink(GrpcEdgeLink):
    """Adds up how long the device waits for the edge."""

    waited_s = 0.0

    def step(self, step: int, version: int, batch: CutBatch) -> StepResult:
        started = time.perf_counter()
        result = super().step(step, version, batch)
        self.waited_s += time.perf_counter() - started
        return result


@contextlib.contextmanager
def servers(model: str, folder: Path, threads: int) -> Iterator[tuple[str, str]]:
    """A federation server and an edge server; yields their addresses."""
    fed, edge = free_addresses(2)
    common = [sys.executable, "-m", "sfl.cli.main"]
    commands = [
        [*common, "fed", "--listen", fed, "--devices", "1", "--out", str(folder / "fed"), "--strategy.name", "fedavg"],
        [
            *common,
            "edge",
            "--listen",
            edge,
            "--federation",
            fed,
            "--model",
            model,
            "--threads",
            str(threads),
            "--out",
            str(folder / "edge"),
        ],
    ]
    logs = (folder / "servers.log").open("w")
    children = [subprocess.Popen(command, stderr=logs, stdout=logs) for command in commands]
    try:
        yield fed, edge
    finally:
        for child in reversed(children):
            child.terminate()
            child.wait(timeout=20)
        logs.close()


def measure(case: Case, pairs: int, threads: int, folder: Path) -> None:
    data = write_texts(folder / "texts.txt", 400, case.length)
    with servers(case.model, folder, threads) as (fed, edge):
        settings = DeviceSettings(
            name="device",
            edge=edge,
            federation=fed,
            model=case.model,
            cut=case.cut,
            data=DataSettings(path=data),
            batch_size=case.batch_size,
            max_length=case.length,
            steps=1,
            wait_s=120,
        )
        device = PreparedDevice.of(settings)
        federation = FederationClient(fed, settings.name, settings.wait_s)
        federation.join(device.join_request())
        labels = list(federation.agreement(120).labels)
        half = load_device_half(case.model, case.cut)
        version = federation.version(0, 300)
        whole = federation.fetch(version)
        state = {key: value for key, value in whole.items() if key.layer < case.cut}
        adapter = LocalAdapter(inject_lora(half, device.lora), state, case.cut, version, device.optimizer)
        link = TimedLink(edge, device.session_request(version), 120, 120)
        trainer = DeviceTrainer(half, adapter, link, settings.task)
        base = load_task_model(case.model, "classification", labels)
        unsplit = PeftModel.from_pretrained(base, str(folder / "fed" / "adapters" / "v0"), is_trainable=True).train()
        trained = [parameter for parameter in unsplit.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.optimizer.learning_rate, weight_decay=0.0)
        batches = device.plan(labels).batches

        split_s, unsplit_s, worst = [], [], 0.0
        warmup = 2
        for pair in range(pairs + warmup):
            batch = next(batches)
            ids, mask, truth = map(torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.labels))
            started = time.perf_counter()
            loss = unsplit(input_ids=ids, attention_mask=mask, labels=truth).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            middle = time.perf_counter()
            waited = link.waited_s
            result = trainer.step(pair + 1, batch)
            ended = time.perf_counter()
            worst = max(worst, abs(result.loss - loss.item()) / abs(loss.item()))
            if pair >= warmup:
                unsplit_s.append(middle - started)
                split_s.append((ended - middle, link.waited_s - waited))
        link.close()
        federation.leave()
        federation.close()
    edge_s = [event["wall_s"] for event in read_events(folder / "edge" / "metrics.jsonl") if event["event"] == "step"][warmup:]
    ratios = sorted(split / alone for (split, _), alone in zip(split_s, unsplit_s))
    quartiles = statistics.quantiles(ratios, n=4)
    total = statistics.median(split for split, _ in split_s)
    waited = statistics.median(wait for _, wait in split_s)
    at_edge = statistics.median(edge_s)
    alone = statistics.median(unsplit_s)
    verdict = "met" if quartiles[1] <= LIMIT else "MISSED"
    print(
        f"{case.name}: cut {case.cut}, {case.batch_size}x{case.length}, {pairs} pairs, {threads} threads\n"
        f"  ratio {quartiles[1]:.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}), limit {LIMIT}: {verdict}\n"
        f"  unsplit {1e3 * alone:.0f} ms; split {1e3 * total:.0f} ms = device {1e3 * (total - waited):.0f}"
        f" + edge {1e3 * at_edge:.0f} + wire and hand-over {1e3 * (waited - at_edge):.1f}\n"
        f"  largest relative difference of the two losses {worst:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["opt-350m", "minilm"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only != "opt-350m":
            (folder / "minilm").mkdir()
            measure(
                Case("MiniLM", str(default_model("classification")), 2, 16, 64), 2 * args.pairs, args.threads, folder / "minilm"
            )
        if args.only != "minilm":
            model = make_model("opt-350m", folder / "model")
            (folder / "opt").mkdir()
            measure(Case("OPT-350M shape", str(model), 2, 4, 128), args.pairs, args.threads, folder / "opt")


if __name__ == "__main__":
    main()
