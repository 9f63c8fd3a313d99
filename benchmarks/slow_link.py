"""Real daemons, two of six devices and their edge server behind a slow link: time and bytes with each strategy.

    python benchmarks/slow_link.py --data train.txt --link PROGRAM [--steps 100] [--mbit 1] [--delay-ms 100] [--target 0.5]

Needs root and iproute2. Two network namespaces: in one the federation server, an edge server and four devices, in the other an
edge server and two devices. PROGRAM joins them, `PROGRAM NS_A IP_A NS_B IP_B --delay-ms D --mbit M`, says "ready" on its output
and forwards packets until SIGTERM; the delay is one way. So activations stay on the fast side of the link, and both halves of
adapters cross it. The daemons compute side by side on this machine's cores. Data are the emotion texts (`text;label`), unevenly
divided (Dirichlet 1.0), the model is MiniLM in bf16, LoRA and optimiser those of `benchmarks/network.toml`.

One row a strategy: seconds from version 0 to the last version and to the first version of `--target` accuracy on the pooled test
examples, the bytes to and from the federation server, and the uploads of the two slow devices and of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfl.cluster.metrics import read_events
from sfl.compare.run import spaced
from sfl.data.load import load_splits
from sfl.data.settings import DataSettings
from sfl.evaluate import evaluate
from sfl.model.default import default_model

FAST, SLOW = "10.77.0.1", "10.77.0.2"
FED, EDGE = 7300, 7301
DEVICES, BEHIND = 6, 2
MODULES = "query,key,value,attention.output.dense,intermediate.dense"
LOOKS = 8  # versions that are evaluated
STRATEGIES = {
    "fedavg": ["--strategy.name", "fedavg", "--strategy.local-steps", "5"],
    "gsfs, network off": ["--strategy.name", "gsfs"],
    "gsfs, network on": ["--strategy.name", "gsfs", "--strategy.network"],
}


@dataclass(frozen=True)
class Machine:
    """A network namespace, and its address on the link."""

    namespace: str
    address: str

    def start(self, folder: Path, name: str, *command: str) -> subprocess.Popen[bytes]:
        """`sfl` with these words; its log goes to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        words = ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "sfl.cli.main", *command]
        with (folder / f"{name}.txt").open("w") as log:
            return subprocess.Popen([*words, "--out", str(folder / name)], stdout=log, stderr=log, env=_one_thread())


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def link(program: str, mbit: float, delay_ms: float) -> Iterator[tuple[Machine, Machine]]:
    """Two machines and the link between them, which end with the block."""
    fast, slow = (Machine(f"sfl{os.getpid()}-{side}", ip) for side, ip in (("fast", FAST), ("slow", SLOW)))
    for machine in (fast, slow):
        subprocess.run(["ip", "netns", "add", machine.namespace], check=True)
        subprocess.run(["ip", "-n", machine.namespace, "link", "set", "lo", "up"], check=True)
    words = [program, fast.namespace, fast.address, slow.namespace, slow.address]
    forwarder = subprocess.Popen(
        [*words, "--delay-ms", str(delay_ms), "--mbit", str(mbit)], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        if forwarder.stdout is None or "ready" not in forwarder.stdout.readline():
            sys.exit(f"{program} did not say that it is ready")
        yield fast, slow
    finally:
        forwarder.terminate()
        forwarder.wait(10)
        for machine in (fast, slow):
            subprocess.run(["ip", "netns", "del", machine.namespace], check=False)


def train(args: argparse.Namespace, strategy: list[str], out: Path) -> None:
    """One run of all daemons; their metrics and versions are below `out`."""
    plain = ["--tls.plaintext"]  # the link is this machine's own
    common = ["--lora.target-modules", MODULES, *plain]
    with link(args.link, args.mbit, args.delay_ms) as (fast, slow), contextlib.ExitStack() as stack:

        def running(machine: Machine, name: str, *command: str) -> subprocess.Popen[bytes]:
            process = machine.start(out, name, *command)
            stack.callback(_end, process)
            return process

        fed = f"{FAST}:{FED}"
        running(fast, "fed", "fed", "--listen", fed, "--devices", str(DEVICES), *plain, *strategy)
        for machine, name in ((fast, "edge-fast"), (slow, "edge-slow")):
            listen = ["--listen", f"{machine.address}:{EDGE}", "--federation", fed, "--model", args.model]
            running(machine, name, "edge", "--name", name, *listen, *common, "--precision", "bf16")
        devices = []
        for index in range(DEVICES):
            machine, name = (slow if index < BEHIND else fast), f"device-{index + 1}"
            servers = ["--federation", fed, "--edge", f"{machine.address}:{EDGE}", "--model", args.model, "--cut", "2"]
            training = ["--steps", str(args.steps), "--batch-size", "8", "--optimizer.learning-rate", "3e-3"]
            training += ["--optimizer.schedule", "linear", "--precision", "bf16", "--max-length", "64"]
            devices.append(running(machine, name, "device", "--name", name, *servers, *common, *training, *_data(args, index)))
        for process in devices:
            if process.wait(args.limit_s):
                sys.exit(f"a device has failed: see the logs in {out}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _data(args: argparse.Namespace, index: int) -> list[str]:
    shared = ["--data.path", str(args.data), "--data.partition", "label-skew", "--data.partition-alpha", "1.0"]
    return [
        *shared,
        "--data.part-count",
        str(DEVICES),
        "--data.part-index",
        str(index),
        "--data.max-examples",
        str(args.examples),
    ]


def figures(args: argparse.Namespace, out: Path) -> list[str]:
    """The row of a run."""
    fed = read_events(out / "fed" / "metrics.jsonl")
    made = {event["version"]: event["t"] for event in fed if event["event"] == "aggregate"}
    begun = min(event["t"] for index in range(DEVICES) for event in _events(out, index) if event["event"] == "step")
    end = next(event for event in fed if event["event"] == "end")
    tests = [example for index in range(DEVICES) for example in _test(args, index)]
    versions = sorted(made)
    reached, last = None, 0.0
    for version in (versions[index] for index in spaced(len(versions), LOOKS)):
        last = evaluate(args.model, out / "fed" / "adapters" / f"v{version}", tests).accuracy or 0.0
        if reached is None and last >= args.target:
            reached = made[version] - begun
    uploads = [sum(event["event"] == "submit" for event in _events(out, index)) for index in range(DEVICES)]
    return [
        f"{last:.3f}",
        f"{made[versions[-1]] - begun:.0f}",
        "-" if reached is None else f"{reached:.0f}",
        f"{end['bytes_received'] / 1e6:.1f}",
        f"{end['bytes_sent'] / 1e6:.1f}",
        str(sum(uploads[:BEHIND])),
        str(sum(uploads[BEHIND:])),
    ]


def _events(out: Path, index: int) -> list[dict[str, Any]]:
    return read_events(out / f"device-{index + 1}" / "metrics.jsonl")


def _test(args: argparse.Namespace, index: int) -> list[Any]:
    settings = DataSettings(
        path=args.data,
        partition="label-skew",
        partition_alpha=1.0,
        part_count=DEVICES,
        part_index=index,
        max_examples=args.examples,
    )
    return load_splits(settings, "classification").test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--link", required=True, help="the program that joins two namespaces by a slow link")
    parser.add_argument("--model", default=None, help="by default the pretrained all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--examples", type=int, default=8000)
    parser.add_argument("--mbit", type=float, default=1.0)
    parser.add_argument("--delay-ms", type=float, default=100.0, help="one way")
    parser.add_argument("--target", type=float, default=0.5, help="accuracy")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="for one strategy")
    parser.add_argument("--out", type=Path, default=None, help="keep logs, metrics and versions there")
    args = parser.parse_args()
    args.model = args.model or str(default_model("classification"))
    titles = ("accuracy", "s in all", f"s to {args.target:g}", "MB up", "MB down", "slow uploads", "other uploads", "s here")
    print(f"{'':20}" + "".join(f"{title:>14}" for title in titles))
    with contextlib.nullcontext(args.out) if args.out else tempfile.TemporaryDirectory() as folder:
        for name, strategy in STRATEGIES.items():
            out, started = Path(folder) / name.replace(", ", "-").replace(" ", "-"), time.monotonic()
            train(args, strategy, out)
            row = [*figures(args, out), f"{time.monotonic() - started:.0f}"]
            print(f"{name:20}" + "".join(f"{cell:>14}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
