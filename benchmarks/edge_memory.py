"""What another device costs an edge server: its peak memory with 16 devices over that with 1, beside a model for each device.

    python benchmarks/edge_memory.py [--shape opt-350m] [--devices 1,4,16] [--copies 1,2,4] [--steps 3] [--precision fp32]

The edge is the real daemon, whose devices are connections of this process: each joins, opens a session at cut 2 and sends
`--steps` batches of 4x128 through real gRPC, in turns. The baseline is a process that holds an edge's half of the model, with
adapter and optimiser, for each device, as servers do that give every client a model of its own; its cost for 16 is drawn out
from what `--copies` show. Figures are peaks (VmHWM) of fresh processes, in MB of 10**6 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from members import end_of, servers
from shapes import config_of, make_model, write_texts

from sfl.data.settings import DataSettings
from sfl.device.edge_link import GrpcEdgeLink
from sfl.device.prepare import PreparedDevice
from sfl.settings import DeviceSettings, Precision
from sfl.wire.federation import FederationClient
from sfl.wire.split import CutBatch

BATCH, LENGTH, CUT = 4, 128, 2
LIMIT = 1.10


def batch(hidden: int, seed: int) -> CutBatch:
    """A random batch at the cut."""
    activation = torch.randn(BATCH, LENGTH, hidden, generator=torch.Generator().manual_seed(seed))
    return CutBatch(activation, torch.ones(BATCH, LENGTH, dtype=torch.int64), torch.arange(BATCH) % 2)


def shared_edge(model: Path, shape: str, devices: int, steps: int, precision: Precision) -> float:
    """Peak of the edge daemon with so many devices, in MB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = DataSettings(path=write_texts(folder / "texts.txt", 40, LENGTH))
        with (
            servers(folder / "servers", model, devices, ("--lowest-cut", str(CUT), "--precision", precision)) as running,
            ExitStack() as stack,
        ):
            settings = [
                DeviceSettings(name=f"device-{index}", model=str(model), federation=running.fed, edge=running.edge,
                               cut=CUT, data=data, batch_size=BATCH, max_length=LENGTH, wait_s=120)
                for index in range(devices)
            ]  # fmt: skip
            members = [PreparedDevice.of(each) for each in settings]
            clients = [FederationClient(each.federation, each.name, each.wait_s) for each in settings]
            for member, client in zip(members, clients):
                stack.callback(client.close)
                client.join(member.join_request())
            links = []
            for member, client in zip(members, clients):
                policy = client.agreement(120).policy
                links.append(GrpcEdgeLink(running.edge, member.session_request(client.version(0, 300), policy), 120, 120))
                stack.callback(links[-1].hang_up)
            for step in range(1, steps + 1):
                for index, link in enumerate(links):
                    link.step(step, 0, batch(config_of(shape).hidden_size, 100 * step + index))
        return float(end_of(folder / "servers" / "edge")["peak_rss_mb"])


def model_for_each(model: str, shape: str, copies: int, steps: int, precision: Precision) -> None:
    """Hold an edge's half for each of `copies` devices and train them in turns; prints the peak."""
    from sfl.adapters.layout import LoraSpec
    from sfl.adapters.state import edge_half
    from sfl.edge_server.engine import EdgeEngine
    from sfl.model.halves import load_edge_half
    from sfl.model.lora import head_state, initial_adapter, inject_lora, resolve_targets
    from sfl.telemetry import peak_rss_mb
    from sfl.wire.split import OptimizerSpec, SessionRequest

    config = config_of(shape)
    lora = resolve_targets(config, LoraSpec(8, 16.0, 0.0, ()))
    trained = []
    for index in range(copies):
        half = load_edge_half(model, "classification", CUT, ["a", "b"], precision)
        state = initial_adapter(half.config, "classification", lora, head_state(half), 0)
        engine = EdgeEngine(half, inject_lora(half, lora), "classification", lora, "")
        request = SessionRequest(f"s{index}", f"d{index}", "classification", CUT, 0, "", lora, OptimizerSpec(), 0, "fp32")
        trained.append((engine, engine.open(request, edge_half(state, CUT))))
    for step in range(1, steps + 1):
        for index, (engine, session) in enumerate(trained):
            engine.step(session, step, 0, batch(config.hidden_size, 100 * step + index))
    print(json.dumps(peak_rss_mb()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-350m")
    parser.add_argument("--devices", default="1,4,16")
    parser.add_argument("--copies", default="1,2,4")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models", help="where models are kept")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model_for_each(args.child[0], args.shape, int(args.child[1]), args.steps, args.precision)
        return
    model = make_model(args.shape, args.models / args.shape)
    print(f"{args.shape}, cut {CUT}, {BATCH}x{LENGTH}, {args.precision}, {args.steps} steps of each device")
    shared = {}
    for devices in map(int, args.devices.split(",")):
        shared[devices] = shared_edge(model, args.shape, devices, args.steps, args.precision)
        print(f"one model for all, {devices:>2} devices: {shared[devices]:6.0f} MB", flush=True)
    own = {}
    for copies in map(int, args.copies.split(",")):
        command = [sys.executable, __file__, "--shape", args.shape, "--steps", str(args.steps), "--precision", args.precision]
        child = subprocess.run([*command, "--child", str(model), str(copies)], check=True, stdout=subprocess.PIPE, text=True)
        own[copies] = float(json.loads(child.stdout))
        print(f"a model for each,  {copies:>2} devices: {own[copies]:6.0f} MB", flush=True)
    few, many = min(shared), max(shared)
    ratio = shared[many] / shared[few]
    print(f"{many} devices over {few}: {ratio:.3f}, limit {LIMIT:.2f}: {'met' if ratio <= LIMIT else 'MISSED'}")
    if len(own) > 1:
        first, last = min(own), max(own)
        each = (own[last] - own[first]) / (last - first)
        drawn = own[first] + (many - first) * each
        print(f"a model for each costs {each:.0f} MB a device: {drawn:.0f} MB for {many}, {drawn / own[first]:.1f} times one")


if __name__ == "__main__":
    main()
