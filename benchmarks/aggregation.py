"""How fast updates become a version, and what memory that takes, beside Flower's FedAvg on the same arrays.

    python benchmarks/aggregation.py [--flower PYTHON] [--updates 1000] [--mb 6]

PYTHON is that of an environment with `flwr` (pip install flwr; it wants other versions of our packages, so one of its own). Each
row is a process: it makes one adapter of the OPT-350M shape's modules, about `--mb` MB, and so many updates of it, and times the
aggregation alone. Ours reads each update from the pool's files, which the page cache holds after they were written, through the
whole pipeline; "in memory" gives the pipeline arrays that are there, as Flower has them. Flower's are its two code paths: today's
(`flwr.serverapp`) and the older one in place. GB/s count the updates' bytes once. Memory is, for all rows alike, the peak from
before the updates exist to the end of the aggregation, less what the process held before: so the updates are in it wherever they
are held in memory. MB are 10**6 bytes.

A bare loop of the same multiplications and additions shows what the machine's memory allows one thread; what it holds is not
measured.

Limits: the plain average in memory 20 times Flower's faster path, and memory flat in the number of updates for rules that are
sums.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

ROWS, WIDTH, MODULES = 8, 1024, 90  # factors of rank 8; 90 modules are 5.9 MB
DISTINCT = 8  # different updates, taken in turn: what matters is that each is read anew
EVERY = [
    ("fedavg", "average", {}),
    ("fedadam", "average", {}),
    ("fedbuff", "average", {}),
    ("gsfs", "average", {}),
    ("fedavg", "ffa", {}),
    ("fedavg", "hetlora", {}),
    ("fedavg", "average", {"rule": "norm-clip"}),
]
FEW = [  # that look at all updates at once, or at products of factors
    ("fedavg", "flexlora", {}),
    ("fedavg", "flora", {}),
    ("fedavg", "fedex", {}),
    ("fedavg", "average", {"rule": "median"}),
    ("fedavg", "average", {"rule": "trimmed-mean"}),
    ("fedavg", "average", {"rule": "multi-krum"}),
]
FLOWER = """
import json, sys, time
import numpy as np
rows, width, modules, count, distinct, path = *map(int, sys.argv[1:6]), sys.argv[6]
shapes = [shape for _ in range(modules) for shape in ((rows, width), (width, rows))]
def arrays(number):
    rng = np.random.default_rng(number)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) * 1024 / 1e6
def restarted():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()
originals = [arrays(number) for number in range(distinct)]
if path == "today":
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    before = restarted()
    held = [RecordDict({"arrays": ArrayRecord([array.copy() for array in originals[n % distinct]]),
                        "metrics": MetricRecord({"n": n + 1})}) for n in range(count)]
    started = time.perf_counter()
    aggregate_arrayrecords(held, "n")
else:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.server.strategy.aggregate import aggregate_inplace
    before = restarted()
    held = [(None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters(originals[n % distinct]), n + 1, {})) for n in range(count)]
    started = time.perf_counter()
    aggregate_inplace(held)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "grown_mb": peak() - before}))
"""


def child(task: dict[str, Any]) -> dict[str, float]:
    """Aggregate once in this process."""
    from sfl.adapters.state import AdapterKey, AdapterState, device_half, edge_half
    from sfl.fed_server.aggregation import Aggregation
    from sfl.fed_server.pool import Half, Pool
    from sfl.fed_server.updates import Update
    from sfl.settings import FedSettings
    from sfl.telemetry import peak_since_restart_mb, restart_peak

    rank, count = ROWS, int(task["updates"])
    modules = int(task["modules"])

    def adapter(seed: int) -> AdapterState:
        rng = np.random.default_rng(seed)
        state: AdapterState = {}
        for number in range(modules):
            state[AdapterKey(number // 2, "qv"[number % 2], "A")] = rng.standard_normal((rank, WIDTH), dtype=np.float32)
            state[AdapterKey(number // 2, "qv"[number % 2], "B")] = rng.standard_normal((WIDTH, rank), dtype=np.float32)
        return state

    settings = FedSettings.model_validate(
        {"devices": count, "strategy": {"name": task["strategy"]}, "merge": task["merge"], "robust": task["robust"]}
    )
    aggregation, newest = Aggregation(settings), adapter(10**6)
    names = set(aggregation.trained(newest, rank))
    originals = [{key: value for key, value in adapter(seed).items() if key in names} for seed in range(DISTINCT)]
    size = sum(value.nbytes for value in originals[0].values())

    def update(number: int, read: Callable[[Collection[AdapterKey] | None], AdapterState]) -> Update:
        return Update(f"device-{number:05}", 0, number + 1, 1, 1, 8, 8, rank, 1, 0, read, lambda: newest)

    def held(original: AdapterState) -> Callable[[Collection[AdapterKey] | None], AdapterState]:
        own = {key: value.copy() for key, value in original.items()}
        return lambda keys: {key: value for key, value in own.items() if keys is None or key in keys}

    restart_peak()  # where the kernel cannot, the figure is from the process's start
    before = peak_since_restart_mb()
    with tempfile.TemporaryDirectory() as folder:
        if task["in_memory"]:
            updates = [update(number, held(originals[number % DISTINCT])) for number in range(count)]
        else:
            pool = Pool(Path(folder) / "pool", 600.0, time.monotonic)
            for number in range(count):
                for role, part in (("device", device_half), ("edge", edge_half)):
                    half = Half("1", f"device-{number:05}", role, 0, 8, 8)  # type: ignore[arg-type]
                    pool.add(half, part(originals[number % DISTINCT], 1), rank, 1)
            updates = [update(number, pooled.read) for number, pooled in enumerate(pool.take(mix_versions=True))]
        started = time.perf_counter()
        done = aggregation.aggregate(newest, updates, sum(update.examples for update in updates))
        seconds = time.perf_counter() - started
    if len(done.weights) + len(done.rejected) != count:
        sys.exit(f"{task}: {len(done.weights)} of {count} updates counted")
    return {"seconds": seconds, "grown_mb": peak_since_restart_mb() - before, "bytes": float(size)}


def ours(
    count: int, modules: int, strategy: str, merge: str, robust: dict[str, Any], in_memory: bool = False
) -> dict[str, float]:
    task = {
        "updates": count, "modules": modules, "strategy": strategy, "merge": merge, "robust": robust, "in_memory": in_memory
    }  # fmt: skip
    run = subprocess.run([sys.executable, __file__, "--child", json.dumps(task)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def flower(python: str, count: int, modules: int, path: str) -> dict[str, float]:
    words = [str(word) for word in (ROWS, WIDTH, modules, count, DISTINCT, path)]
    run = subprocess.run([python, "-c", FLOWER, *words], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def bound(count: int, modules: int) -> dict[str, float]:
    """The same sum as a bare loop: what NumPy can do on this machine with one thread, products in a buffer that stays cached."""
    shapes = [shape for _ in range(modules) for shape in ((ROWS, WIDTH), (WIDTH, ROWS))]
    updates = [[np.full(shape, number, np.float32) for shape in shapes] for number in range(count)]
    sums = [np.zeros(shape, np.float32) for shape in shapes]
    product = {shape: np.empty(shape, np.float32) for shape in set(shapes)}
    started = time.perf_counter()
    for update in updates:
        for value, into in zip(update, sums):
            into += np.multiply(value, np.float32(1 / count), out=product[value.shape])
    return {"seconds": time.perf_counter() - started}


def show(name: str, count: int, size: float, found: dict[str, float]) -> float:
    rate = count * size / found["seconds"] / 1e9
    grown = f"{found['grown_mb']:.0f}" if "grown_mb" in found else "-"
    print(f"{name:36} {count:6} {found['seconds']:8.2f} {rate:8.2f} {grown:>10}", flush=True)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flower", help="the python of an environment with flwr")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--mb", type=float, default=6.0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    modules = max(2, round(args.mb * 1e6 / (2 * ROWS * WIDTH * 4)))
    size, many, few = modules * 2 * ROWS * WIDTH * 4.0, args.updates, max(10, args.updates // 50)
    print(f"updates of {size / 1e6:.1f} MB")
    print(f"{'rule':36} {'number':>6} {'seconds':>8} {'GB/s':>8} {'MB grown':>10}")
    theirs = 0.0
    if args.flower:
        for path, name in (("today", "Flower FedAvg"), ("older", "Flower FedAvg, older, in place")):
            for count in (many // 5, many):
                theirs = max(theirs, show(name, count, size, flower(args.flower, count, modules, path)))
    plain = max(
        show("ours, fedavg, in memory", count, size, ours(count, modules, "fedavg", "average", {}, True))
        for count in (many // 5, many)
    )
    show("a bare NumPy loop, in memory", many // 5, size, bound(many // 5, modules))
    flat = True
    for strategy, merge, robust in EVERY:
        name = ", ".join(("ours", strategy, merge, *robust.values()))
        fewer, more = ours(many // 5, modules, strategy, merge, robust), ours(many, modules, strategy, merge, robust)
        for count, found in ((many // 5, fewer), (many, more)):
            show(name, count, found["bytes"], found)
        flat = flat and more["grown_mb"] < fewer["grown_mb"] + 2 * size / 1e6
    for strategy, merge, robust in FEW:
        found = ours(few, modules, strategy, merge, robust)
        show(", ".join(("ours", strategy, merge, *robust.values())), few, found["bytes"], found)
    print(f"memory of the sums flat from {many // 5} to {many} updates (within two adapters): {'met' if flat else 'MISSED'}")
    if args.flower:
        print(f"in memory {plain:.1f} GB/s, {plain / theirs:.1f} times Flower's {theirs:.2f}, aim 20")


if __name__ == "__main__":
    main()
