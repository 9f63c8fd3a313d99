"""benchmarks/network.toml with real daemons and a real link, two of six devices behind a slow one: time and bytes.

    python benchmarks/slow_link.py --data DIR/train.txt --link PROGRAM [--only TEXT] [--out FOLDER] [--limit-s 7200]
                                   [--SETTING VALUE]...

DIR holds the CARER texts, `text;label`, six emotions. Variants, devices, data, training and the link's figures are those of
network.toml, under its first seed alone; settings of `sfl compare` change them, `--steps 20 --target 0.4 --seeds 2` for example.

Needs root and iproute2. There are two network namespaces: in one the federation server, an edge server and the devices on the
fast links, in the other an edge server and those on the slowest. PROGRAM joins them: `PROGRAM NS_A IP_A NS_B IP_B --delay-ms D
--mbit M` says "ready" on its output and carries packets until SIGTERM, M Mbit/s each way and D ms one way.

What is not as in the simulation: the daemons, a thread each, share this machine's cores, so a step takes what it takes; the edge
server of the slow devices is behind the link with them, so activations do not cross it and both halves of their adapters do,
while simulated time counts the device's half; and nothing limits the others.

A row a variant and seed. Accuracies are those of versions on the pooled test examples, with the uncut model. Seconds count from
the beginning of the first step of any device, to the last version and to the first one of the target accuracy: `curve_points`
evenly spaced versions are evaluated, and then each between the first of these that has it and the one before. MB of 10^6 bytes,
to and from the federation server; uploads of the slow devices and of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sfl.cli.load_settings import as_toml, load
from sfl.cluster.metrics import last, read_events
from sfl.cluster.supervisor import Program, Supervisor
from sfl.compare.division import Source
from sfl.compare.job import Job, prepare
from sfl.compare.run import Loaded, spaced
from sfl.compare.settings import CompareSettings
from sfl.compare.variants import variants
from sfl.connection_settings import TlsSettings
from sfl.errors import SflError
from sfl.model.default import default_model
from sfl.settings import DaemonSettings, EdgeSettings, WorkerSettings

FAST, SLOW = "10.77.0.1", "10.77.0.2"
FED, EDGE = 7300, 7301
READY_S = 30.0  # that the link may take
START_S = 600.0  # that daemons may wait for each other while all of them start
TITLES = ("versions", "accuracy", "s in all", "s to target", "MB up", "MB down", "slow uploads", "other uploads", "s here")


@dataclass(frozen=True)
class Machine:
    """A network namespace, and its address on the link."""

    namespace: str
    address: str

    def program(self, role: str, settings: DaemonSettings) -> Program:
        """`sfl ROLE` here; its configuration and log go to its `out`."""
        settings.out.mkdir(parents=True)
        config = settings.out / "config.toml"
        config.write_text(as_toml(settings), encoding="utf-8")
        sfl = [sys.executable, "-m", "sfl.cli.main", role, "--config", str(config)]
        command = ["ip", "netns", "exec", self.namespace, *sfl]
        return Program(settings.name, command, settings.out / "log.txt", ends=role == "device")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def link(program: str, mbit: float, delay_ms: float) -> Iterator[tuple[Machine, Machine]]:
    """The fast and the slow machine and the link between them, all of which end with the block."""
    fast, slow = (Machine(f"sfl{os.getpid()}-{side}", address) for side, address in (("fast", FAST), ("slow", SLOW)))
    with contextlib.ExitStack() as stack:
        for machine in (fast, slow):
            ip("netns", "add", machine.namespace)
            stack.callback(ip, "netns", "del", machine.namespace)
            ip("-n", machine.namespace, "link", "set", "lo", "up")
        words = [program, fast.namespace, fast.address, slow.namespace, slow.address]
        words += ["--delay-ms", f"{delay_ms:g}", "--mbit", f"{mbit:g}"]
        # A session of its own: a terminal's Ctrl-C ends the daemons first, in order and while they can still talk.
        carrier = stack.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True))
        stack.callback(_end, carrier)
        if carrier.stdout is None or not select.select([carrier.stdout], [], [], READY_S)[0]:
            sys.exit(f"{program} has said nothing for {READY_S:g} s")
        if "ready" not in carrier.stdout.readline():
            sys.exit(f"{program} did not say that it is ready")
        yield fast, slow


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def behind(job: Job) -> list[str]:
    """The devices on the slowest link."""
    speeds = job.conditions.speeds
    slowest = min(speed.bytes_per_s for speed in speeds.values())
    return [name for name, speed in speeds.items() if speed.bytes_per_s == slowest]


def train(job: Job, program: str, limit_s: float, out: Path) -> None:
    """One run of all daemons, to the end of the last device; configurations, logs, metrics and versions are below `out`.

    Raises `ChildError` for a daemon that fails; ends this process when it takes longer than `limit_s` seconds.
    """
    slow_ones = behind(job)
    speed = job.conditions.speeds[slow_ones[0]]
    fed = f"{FAST}:{FED}"
    tls = TlsSettings(plaintext=True)  # the link is this machine's own
    common = {"federation": fed, "threads": 1, "wait_s": START_S, "tls": tls}
    like = job.devices[0]
    shared = {name: getattr(like, name) for name in WorkerSettings.model_fields if name not in DaemonSettings.model_fields}
    with link(program, speed.bytes_per_s * 8 / 1e6, speed.round_trip_s * 1e3 / 2) as (fast, slow):
        settings = job.fed.model_copy(
            update={"listen": fed, "out": out / "fed", "adapters": out / "adapters", "keep_versions": 0, "tls": tls}
        )
        programs = [fast.program("fed", settings)]
        for name, machine in (("edge-fast", fast), ("edge-slow", slow)):
            own = {"name": name, "listen": f"{machine.address}:{EDGE}", "out": out / name}
            programs.append(machine.program("edge", EdgeSettings(**{**shared, **common, **own})))
        for device in job.devices:
            machine = slow if device.name in slow_ones else fast
            own = {"edge": f"{machine.address}:{EDGE}", "out": out / device.name}
            programs.append(machine.program("device", device.model_copy(update={**common, **own})))
        Supervisor(programs, _environment(), grace_s=30.0, finish_s=60.0).run(_until(time.monotonic() + limit_s, out))


def _environment() -> dict[str, str]:
    """This process's, without settings that would override the configuration files."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("SFL_")}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _until(deadline: float, out: Path) -> Callable[[], None]:
    def look() -> None:
        if time.monotonic() > deadline:
            sys.exit(f"the run has not come to its end in time (--limit-s): see the logs below {out}")

    return look


def first(versions: Sequence[int], looks: int, good: Callable[[int], bool]) -> int | None:
    """The first good one: `looks` of the versions are tried, evenly spaced, then each before the first good one of these."""
    before = -1
    for look in (versions[index] for index in spaced(len(versions), looks)):
        if good(look):
            return next(version for version in versions if version > before and good(version))
        before = look
    return None


def figures(job: Job, settings: CompareSettings, loaded: Loaded, out: Path) -> list[str]:
    """The cells of a run, up to "other uploads"."""
    target = math.inf if settings.target is None else settings.target
    path = out / "fed" / "metrics.jsonl"
    fed = read_events(path)
    made = {event["version"]: event["t"] for event in fed if event["event"] == "aggregate"}
    if not made:
        raise SflError(f"{path} tells of no version after the first")
    events = {device.name: read_events(out / device.name / "metrics.jsonl") for device in job.devices}
    begun = min(event["t"] - event["wall_s"] for each in events.values() for event in each if event["event"] == "step")

    @cache
    def accuracy(version: int) -> float:
        return loaded.scores(out / "adapters", version, job.division).accuracy

    newest = max(made)
    reached = first(sorted(made), settings.curve_points, lambda version: accuracy(version) >= target)
    uploads = {name: sum(event["event"] == "submit" for event in each) for name, each in events.items()}
    slow = sum(uploads[name] for name in behind(job))
    end = last(fed, "end", path)
    return [
        str(newest),
        f"{accuracy(newest):.3f}",
        f"{made[newest] - begun:.0f}",
        "-" if reached is None else f"{made[reached] - begun:.0f}",
        f"{end['bytes_received'] / 1e6:.1f}",
        f"{end['bytes_sent'] / 1e6:.1f}",
        str(slow),
        str(sum(uploads.values()) - slow),
    ]


def compare(settings: CompareSettings, only: str, program: str, limit_s: float, folder: Path) -> None:
    """Make all runs of variants with `only` in their name, and print a row for each when it is done."""
    model, source = settings.model or str(default_model("classification")), Source(settings)
    print(f"{settings.steps} steps a device, target {settings.target}")
    print(f"{'':28}" + "".join(f"{title:>14}" for title in TITLES), flush=True)
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        division = source.division(seed)
        loaded = Loaded(model, division.labels, settings)
        for variant in variants(settings):
            if variant.centralised or only not in variant.name:  # centralised training has no daemons
                continue
            job, started = prepare(settings, model, variant, seed, division), time.monotonic()
            out = folder / f"{variant.name}-{seed}".replace(", ", "-").replace(" ", "-")
            if out.exists():
                sys.exit(f"{out} is there from an earlier call: choose another --out, or delete it")
            train(job, program, limit_s, out)
            row = figures(job, settings, loaded, out)
            row.append(f"{time.monotonic() - started:.0f}")
            print(f"{job.title:28}" + "".join(f"{cell:>14}" for cell in row), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--link", required=True, help="the program that joins two namespaces by a slow link")
    parser.add_argument("--only", default="", help="only variants with this in their name")
    parser.add_argument("--limit-s", type=float, default=7200.0, help="seconds that a run may take")
    parser.add_argument(
        "--out", type=Path, default=Path("out/slow_link"), help="folder for configurations, logs, metrics and versions"
    )
    args, rest = parser.parse_known_args(arguments)
    if os.geteuid() or shutil.which("ip") is None:
        sys.exit("network namespaces need root and iproute2")
    file = Path(__file__).with_name("network.toml")
    try:
        settings = load(CompareSettings, file, ["--seeds", "1", *rest], environment={}, prog="slow_link.py")
        compare(settings, args.only, args.link, args.limit_s, args.out.absolute())
    except (SflError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
