"""The smallest container in which a device trains: the real daemons, in Docker, over real gRPC, without swap.

    python benchmarks/containers.py [--shape opt-1.3b] [--cuts 1,2,4] [--precisions fp32,bf16,int8,nf4] [--micro-batch 1]
    python benchmarks/containers.py --limit 512 --cuts 2 --precisions int8     # one run inside one limit, all layers at the edge

Needs a Docker engine (DOCKER_HOST) and an image with this machine's C library; this environment and checkout are mounted into
it. The device has a copy of the environment and its own provisioned half, evicted from the page cache before each run, so that
every file page it touches is charged to its container. To find the smallest limits, with 3 steps each, the edge's model ends 2
blocks above the deepest cut, which a device does not notice. A container in which a run takes more than `PATIENCE` times as
long as without a limit, reading the same pages over and over, is too small. MB are 10**6 bytes, found to `--step` MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from shapes import make_model, write_texts

ROOT = Path(__file__).parents[1]
BATCH, LENGTH, STEPS, SEARCH_STEPS = 4, 128, 10, 3
LOWEST = 160  # MB: no container is tried below
LONGEST_S, PATIENCE = 900.0, 5.0
EVICT = """
import os, sys
for place in sys.argv[1:]:
    for folder, _, names in os.walk(place):
        for name in names:
            if not os.path.islink(path := os.path.join(folder, name)):
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
"""


def docker(*words: object, check: bool = True) -> str:
    """The output of a docker command. Raises `CalledProcessError` with `check`."""
    done = subprocess.run(["docker", *map(str, words)], check=check, capture_output=True, text=True)
    return done.stdout.strip()


class Yard:
    """A network and a folder for the containers of one benchmark, all gone at its end."""

    def __init__(self, image: str, folder: Path) -> None:
        self.image = image
        self.folder = folder
        self.network = f"sfl-{uuid.uuid4().hex[:8]}"
        self.environment = folder / "environment"
        docker("network", "create", self.network)
        subprocess.run(["cp", "-a", sys.prefix, self.environment], check=True)

    def start(self, name: str, *command: object, flags: tuple[object, ...] = (), environment: Path | None = None) -> None:
        """`sfl COMMAND` as the container `name`, with `environment` in the place of this one."""
        mounts = [(environment or Path(sys.prefix), sys.prefix), (ROOT, ROOT), (self.folder, self.folder)]
        if Path(sys.base_prefix) not in (Path("/usr"), Path(sys.prefix)):
            mounts.append((Path(sys.base_prefix), sys.base_prefix))
        volumes = [word for source, target in mounts for word in ("-v", f"{source}:{target}")]
        docker("rm", "-f", name, check=False)
        docker("run", "-d", "--name", name, "--network", self.network, "-w", ROOT, *volumes, *flags, self.image,
               sys.executable, "-m", "sfl.cli.main", *command)  # fmt: skip

    def evict(self, *places: Path) -> None:
        """Drop the files in `places` from the page cache, so that who reads them next is charged for them."""
        os.sync()
        subprocess.run([sys.executable, "-c", EVICT, *map(str, places)], check=True)

    def close(self) -> None:
        for name in ("device", "edge", "fed"):
            docker("rm", "-f", f"{self.network}-{name}", check=False)
        docker("network", "rm", self.network, check=False)

    def train(
        self,
        model: Path,
        cut: int,
        precision: str,
        micro_batch: int,
        limit_mb: int | None,
        steps: int,
        within_s: float = LONGEST_S,
    ) -> dict[str, object]:
        """One run of `steps` steps; what the device reported at its end, or why it has none."""
        names = {role: f"{self.network}-{role}" for role in ("fed", "edge", "device")}
        out = self.folder / f"run-{uuid.uuid4().hex[:6]}"
        cache = self.folder / "cache"
        federation, edge = f"{names['fed']}:7300", f"{names['edge']}:7301"
        self.start(
            names["fed"], "fed", "--listen", "0.0.0.0:7300", "--devices", 1, "--strategy.name", "fedavg", "--out", out / "fed",
            "--tls.plaintext",
        )  # fmt: skip
        self.start(names["edge"], "edge", "--listen", "0.0.0.0:7301", "--federation", federation, "--model", model,
                   "--precision", "bf16", "--cache", self.folder / "edge-cache", "--out", out / "edge",
                   "--tls.plaintext")  # fmt: skip
        limits = () if limit_mb is None else ("--memory", f"{limit_mb * 10**6}b", "--memory-swap", f"{limit_mb * 10**6}b")
        self.evict(self.environment, cache)
        self.start(
            names["device"], "device", "--name", "device", "--federation", federation, "--edge", edge, "--cut", cut,
            "--precision", precision, "--cache", cache, "--steps", steps, "--batch-size", BATCH, "--max-length", LENGTH,
            "--micro-batch", micro_batch, "--threads", 1, "--tight-memory",
            "--data.path", self.folder / "texts.txt", "--out", out / "device", "--tls.plaintext",
            flags=limits, environment=self.environment,
        )  # fmt: skip
        try:
            code = int(
                subprocess.run(["docker", "wait", names["device"]], check=True, stdout=subprocess.PIPE, timeout=within_s).stdout
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {within_s:.0f} s"}
        if code:
            killed = docker("inspect", "-f", "{{.State.OOMKilled}}", names["device"]) == "true"
            last = subprocess.run(
                ["docker", "logs", "--tail", "1", names["device"]], stdout=-1, stderr=subprocess.STDOUT, text=True
            )
            return {"failed": "out of memory" if killed or code == 137 else f"exit code {code}: {last.stdout.strip()}"}
        events = [json.loads(line) for line in (out / "device" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return {**events[-1], "losses": [event["loss"] for event in events if event["event"] == "step"]}


def smallest(yard: Yard, model: Path, cut: int, precision: str, micro_batch: int, step_mb: int) -> tuple[int, float]:
    """MB of the smallest container, and the peak without a limit; ends this process where the run fails without one."""
    yard.train(model, cut, precision, micro_batch, None, 1)  # provisions the device
    started = time.monotonic()
    free = yard.train(model, cut, precision, micro_batch, None, SEARCH_STEPS)
    if "failed" in free:
        sys.exit(f"cut {cut}, {precision}, without a limit: {free['failed']}")
    within_s = PATIENCE * (time.monotonic() - started)

    def fails_in(limit_mb: int) -> bool:
        return "failed" in yard.train(model, cut, precision, micro_batch, limit_mb, SEARCH_STEPS, within_s)

    peak = float(str(free["peak_rss_mb"]))
    works = (int(peak) // step_mb + 2) * step_mb
    while fails_in(works):
        works += 2 * step_mb
    fails = LOWEST
    while works - fails > step_mb:
        # Near the peak first: file pages can be evicted, so the smallest is some way below it, not half.
        middle = max((works + fails) // 2, works - 4 * step_mb) // step_mb * step_mb
        if fails_in(middle):
            fails = middle
        else:
            works = middle
    return works, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-1.3b")
    parser.add_argument("--cuts", default="1,2,4")
    parser.add_argument("--precisions", default="fp32,bf16,int8,nf4")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--step", type=int, default=32, help="MB to which the smallest container is found")
    parser.add_argument("--limit", type=int, help="MB: one run for each cut and precision inside this limit, no search")
    parser.add_argument("--image", default="python:3.11-slim-bookworm")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models", help="where models are kept")
    args = parser.parse_args()
    cuts = [int(cut) for cut in args.cuts.split(",")]
    layers = None if args.limit else max(cuts) + 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts.txt", 60, LENGTH)
        model = make_model(args.shape, args.models / (args.shape if layers is None else f"{args.shape}-{layers}"), layers=layers)
        (folder / "model").symlink_to(model)
        subprocess.run(["cp", "-aL", model, folder / "base"], check=True)
        yard = Yard(args.image, folder)
        try:
            for cut in cuts:
                for precision in args.precisions.split(","):
                    started = time.monotonic()
                    if args.limit:
                        yard.train(folder / "base", cut, precision, args.micro_batch, None, 1)  # provisions the device
                        result = yard.train(folder / "base", cut, precision, args.micro_batch, args.limit, STEPS)
                        shown = (
                            result.get("failed")
                            or f"{STEPS} steps, peak RSS {result['peak_rss_mb']} MB, losses {result['losses']}"
                        )
                        print(f"cut {cut}, {precision}, {args.limit} MB without swap: {shown}", flush=True)
                    else:
                        works, peak = smallest(yard, folder / "base", cut, precision, args.micro_batch, args.step)
                        took = time.monotonic() - started
                        found = f"smallest container {works} MB; peak RSS without a limit {peak:.0f} MB"
                        print(f"cut {cut}, {precision:>4}: {found} ({took:.0f} s)", flush=True)
        finally:
            yard.close()


if __name__ == "__main__":
    main()
