"""What a smaller number format of the frozen base costs in accuracy: fp32, bf16, int8 and nf4 on the emotion texts.

    python benchmarks/precision_loss.py --data DIR [--steps 400] [--seeds 2] [--precisions fp32,bf16,int8,nf4] [--png FILE]

DIR holds train.txt and test.txt (`text;label`, six emotions). MiniLM (or `--model`), cut 2, one device and its edge, both with
the same base format, through the daemons' own engines in one process. The adapter is fp32 in all of them, and its figures are
those on the ordinary fp32 base. Prints accuracy and macro-F1 on the test texts, and the difference in accuracy from fp32 of the
same seed: mean and range over the seeds. Writes the smoothed training losses as a picture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from sfl.cluster.metrics import read_events
from sfl.cluster.report import smoothed
from sfl.data.read import read_examples
from sfl.data.settings import DataSettings
from sfl.evaluate import Result, evaluate
from sfl.model.default import default_model
from sfl.settings import DeviceSettings, FedSettings, OptimizerSettings, StrategySettings
from sfl.simulation import simulate


def trained(args: argparse.Namespace, precision: str, seed: int) -> tuple[list[float], float, Result]:
    """Training losses, the device's own accuracy through the split in this format, and the adapter's figures on the fp32 base."""
    device = DeviceSettings.model_validate(
        {
            "name": "device",
            "model": args.model,
            "cut": 2,
            "data": DataSettings(path=args.data / "train.txt", validation=0.02, test=0.1),
            "batch_size": 16,
            "max_length": 64,
            "steps": args.steps,
            "optimizer": OptimizerSettings(learning_rate=args.lr, schedule="linear"),
            "seed": seed,
            "precision": precision,
        }
    )
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        simulate(FedSettings(devices=1, strategy=StrategySettings(name="fedavg", local_steps=args.steps)), [device], out)
        events = read_events(out / "device" / "metrics.jsonl")
        test = read_examples(args.data / "test.txt", DataSettings(path=args.data / "test.txt"))
        result = evaluate(args.model, out / "adapters" / "v1", test)
    losses = [event["loss"] for event in events if event["event"] == "step"]
    through_split = next(event["accuracy"] for event in events if event["event"] == "eval" and event["split"] == "test")
    return losses, through_split, result


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})"


def draw(path: Path, curves: dict[str, list[float]]) -> None:
    """One smoothed loss curve a format, of the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for precision, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), smoothed(losses), label=precision, linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, smoothed")
    axes.set_title("One adapter, four number formats of the frozen base", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=None, help="default: the pretrained MiniLM that the demo uses")
    parser.add_argument("--precisions", default="fp32,bf16,int8,nf4", help="fp32 first: the others are compared with it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    args.model = args.model or str(default_model("classification"))
    results: dict[str, list[tuple[list[float], float, Result]]] = {}
    for seed in range(args.seeds):
        for precision in args.precisions.split(","):
            losses, through_split, result = trained(args, precision, seed)
            results.setdefault(precision, []).append((losses, through_split, result))
            print(f"  seed {seed} {precision}: last losses {statistics.mean(losses[-20:]):.4f}, accuracy in training's format"
                  f" {through_split:.4f}, on the fp32 base {result.accuracy:.4f}", file=sys.stderr, flush=True)  # fmt: skip
    first = next(iter(results))
    print(f"{args.steps} steps of 16, {args.seeds} seeds; means, and differences from {first} of the same seed")
    print("format  loss of the last 20 steps  accuracy  macro-F1  difference in accuracy")
    for precision, runs in results.items():
        last = statistics.mean(statistics.mean(losses[-20:]) for losses, _, _ in runs)
        accuracy = [run[2].accuracy or 0.0 for run in runs]
        f1 = statistics.mean(run[2].f1_macro or 0.0 for run in runs)
        away = [own - (base[2].accuracy or 0.0) for own, base in zip(accuracy, results[first])]
        print(f"{precision:6}  {last:25.4f}  {statistics.mean(accuracy):8.4f}  {f1:8.4f}  {spread(away)}")
    if args.png:
        draw(args.png, {precision: runs[0][0] for precision, runs in results.items()})


if __name__ == "__main__":
    main()
