"""What a device needs: peak memory of the real daemon beside the unsplit PEFT process and beside the floor.

    python benchmarks/device_memory.py [--shapes opt-350m,opt-1.3b] [--cuts 1,2,4] [--precisions fp32,bf16,int8,nf4]
                                       [--micro-batch 1] [--steps 10] [--models FOLDER] [--no-unsplit]

Every figure is the highest resident memory (VmHWM) of a fresh process, in MB of 10**6 bytes. All train LoRA r 8 on q and v
with AdamW at 4x128; devices do it through real gRPC with a federation server and an edge server beside them. The floor is
what nobody can go below: `import torch, grpc`, the device's resident weights, its adapter with gradient and moments, and the
activations that the backward pass needs. benchmarks/containers.py finds the smallest container.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from members import device_command, end_of, servers

if TYPE_CHECKING:
    from sfl.settings import Precision

BATCH, LENGTH = 4, 128
# Peak of the device over the unsplit process: the shape, the device's precision, and what is allowed.
LIMITS = {"opt-350m": 0.20, "opt-1.3b": 0.08}
FLOOR_AIM = 1.3


def child(*arguments: object) -> dict[str, float]:
    """The figures that this script prints, run anew for one measurement."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def unsplit(model: str, precision: str, steps: int) -> None:
    """Train the whole model with PEFT; prints the peak."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from sfl.telemetry import peak_rss_mb

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    base = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype, num_labels=2)
    peft = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")).train()
    optimizer = torch.optim.AdamW([parameter for parameter in peft.parameters() if parameter.requires_grad])
    mask, labels = torch.ones(BATCH, LENGTH, dtype=torch.int64), torch.arange(BATCH) % 2
    for _ in range(steps):
        ids = torch.randint(4, 1000, (BATCH, LENGTH))
        peft(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"peak": peak_rss_mb()}))


def floor_of_imports() -> None:
    """Import torch and grpc and nothing else; prints the resident memory."""
    import grpc  # noqa: F401
    import torch  # noqa: F401

    from sfl.telemetry import peak_rss_mb

    print(json.dumps({"peak": peak_rss_mb()}))


def floor_of_training(model: str, cut: int, precision: Precision, micro_batch: int) -> None:
    """Count what a device's half has to keep; prints MB of weights, adapter (with gradient and moments) and activations."""
    import torch
    from transformers import AutoConfig

    from sfl.adapters.layout import LoraSpec
    from sfl.model.halves import load_device_half
    from sfl.model.lora import inject_lora, resolve_targets

    config = AutoConfig.from_pretrained(model)
    half = load_device_half(model, cut, precision)
    slots = inject_lora(half, resolve_targets(config, LoraSpec(8, 16.0, 0.0, ())))
    adapter = 0
    for module, name in slots.slots.values():
        parameter = module.get_parameter(name).requires_grad_()
        adapter += parameter.nbytes
    own = {tensor.untyped_storage().data_ptr() for tensor in [*half.parameters(), *half.buffers()]}
    blocks = list(half.own_blocks.values())
    weights = sum(tensor.nbytes for block in blocks for tensor in [*block.parameters(), *block.buffers()]) - adapter
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(4, 1000, (micro_batch or BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        half.train()(ids, torch.ones_like(ids))
    print(json.dumps({"weights": weights / 1e6, "adapter": 4 * adapter / 1e6, "activations": sum(kept.values()) / 1e6}))


def device_peak(model: Path, cut: int, precision: str, micro_batch: int, steps: int) -> float:
    """Peak of the real daemon over `steps` steps, in MB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "texts.txt"
        data.write_text(
            "".join(
                f"{' '.join(str((7 * row + 13 * word) % 1000) for word in range(LENGTH))};{'ab'[row % 2]}\n" for row in range(100)
            )
        )
        with servers(folder / "servers", model, edge_flags=("--precision", "bf16")) as running:
            command = device_command(
                running, str(model), folder / "device", data,
                cut=cut, precision=precision, micro_batch=micro_batch, steps=steps, batch_size=BATCH, max_length=LENGTH,
                threads=1,
            )  # fmt: skip
            subprocess.run(command, check=True, stderr=(folder / "device.txt").open("w"), timeout=1200)
        return float(end_of(folder / "device")["peak_rss_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="opt-350m,opt-1.3b")
    parser.add_argument("--cuts", default="1,2,4")
    parser.add_argument("--precisions", default="fp32,bf16,int8,nf4")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "models", help="where models are kept")
    parser.add_argument("--no-unsplit", action="store_true", help="leave out the unsplit processes")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = args.child
        if kind == "imports":
            floor_of_imports()
        elif kind == "unsplit":
            unsplit(rest[0], rest[1], int(rest[2]))
        else:
            floor_of_training(rest[0], int(rest[1]), rest[2], int(rest[3]))
        return
    imports = child("--child", "imports")["peak"]
    print(f"import torch, grpc: {imports:.0f} MB")
    for shape in args.shapes.split(","):
        model = args.models / shape
        subprocess.run([sys.executable, Path(__file__).with_name("shapes.py"), shape, model], check=True)
        whole = {}
        if not args.no_unsplit:
            whole = {precision: child("--child", "unsplit", model, precision, 2)["peak"] for precision in ("fp32", "bf16")}
        print(f"\n{shape}, {BATCH}x{LENGTH}, micro-batch {args.micro_batch or BATCH}, {args.steps} steps; unsplit PEFT: "
              + (", ".join(f"{precision} {peak:.0f} MB" for precision, peak in whole.items()) or "not measured"))  # fmt: skip
        print("cut  base   peak  of fp32  of bf16  weights  adapter  activ.  floor  over it")
        best: list[float] = []  # of fp32 for the smaller shape, and of any precision for the larger
        for cut in map(int, args.cuts.split(",")):
            for precision in args.precisions.split(","):
                peak = device_peak(model, cut, precision, args.micro_batch, args.steps)
                parts = child("--child", "floor", model, cut, precision, args.micro_batch)
                floor = imports + sum(parts.values())
                shares = [f"{peak / whole[base]:8.3f}" if base in whole else f"{'-':>8}" for base in ("fp32", "bf16")]
                if "fp32" in whole and (shape != "opt-350m" or precision == "fp32"):
                    best.append(peak / whole["fp32"])
                print(
                    f"{cut:>3} {precision:>5} {peak:6.0f} {shares[0]} {shares[1]} {parts['weights']:8.1f} {parts['adapter']:8.1f}"
                    f" {parts['activations']:7.1f} {floor:6.0f} {peak / floor:8.2f}",
                    flush=True,
                )
        print(f"aim for the peak over the floor: {FLOOR_AIM}")
        if shape in LIMITS and best:
            verdict = "met" if min(best) <= LIMITS[shape] else "MISSED"
            print(f"least peak over the unsplit fp32 process: {min(best):.3f}, limit {LIMITS[shape]:.2f}: {verdict}")


if __name__ == "__main__":
    main()
