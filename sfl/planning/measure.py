"""`sfl plan --calibrate`: what a device and an edge take on this machine with next to no model, and how fast it computes.

Each figure comes from a fresh process, `python -m sfl.planning.measure`, that trains as the daemons do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sfl.errors import ModelError, SflError
from sfl.planning.calibration import PRECISIONS, Calibration, installed_versions
from sfl.planning.request import PlanRequest
from sfl.settings import Precision

_TIMEOUT_S = 900.0
_STEPS = 4
# What channels, threads and their buffers take in a daemon, and a process that trains by itself does without: measured on x86-64.
_GRPC_MB, _EDGE_GRPC_MB = 9.0, 18.0
# The smallest models, and one with a block of a common width: a hidden size of 768, as in BERT-base and OPT-125M.
_TINY = {"hidden_size": 64, "num_attention_heads": 2, "ffn_dim": 128}
_WIDE = {"hidden_size": 768, "num_attention_heads": 12, "ffn_dim": 3072}
_BATCH = {"tiny": (1, 8), "wide": (4, 64)}


@dataclass(frozen=True)
class _Run:
    """What one process took: peak in MB, and seconds of computing in a step, the least of all but the first."""

    peak_mb: float
    seconds: float


def measure_machine(tell: Callable[[str], None]) -> Calibration:
    """Measure; `tell` is told what comes next. A precision that this machine cannot run is left out, and `tell` told why.

    Raises `ModelError` when not even fp32 runs.
    """
    floors: dict[str, float] = {}
    gflops: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="sfl-calibrate-") as name:
        folder = Path(name)
        for size, sizes in (("tiny", _TINY), ("wide", _WIDE)):
            _write_model(folder / size, sizes)
        for precision in PRECISIONS:
            try:
                tell(f"memory of a device, {precision}")
                floors[precision] = round(_run("device", folder / "tiny", precision, "tiny").peak_mb + _GRPC_MB, 1)
                tell(f"speed of a device, {precision}")
                seconds = _run("device", folder / "wide", precision, "wide").seconds
                gflops[precision] = round(_flops(folder / "wide", precision) / seconds / 1e9, 2)
            except ModelError as error:
                floors.pop(precision, None)
                if precision == "fp32":
                    raise
                tell(f"{precision} is left out: {error}")
        tell("memory of an edge server")
        edge_mb = round(_run("edge", folder / "tiny", "fp32", "tiny").peak_mb + _EDGE_GRPC_MB, 1)
    return Calibration(floors, edge_mb, gflops, installed_versions())


def _run(role: str, model: Path, precision: Precision, size: str) -> _Run:
    command = [sys.executable, "-m", "sfl.planning.measure", role, str(model), precision, size]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"a measuring process took more than {_TIMEOUT_S:g} s") from error
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(f"a measuring process broke off: {reason}") from error
    if "error" in answer:
        raise ModelError(answer["error"])
    return _Run(**answer)


def _flops(model: Path, precision: Precision) -> int:
    from sfl.model.load import load_config
    from sfl.planning.plan import make_plan

    batch, length = _BATCH["wide"]
    request = PlanRequest(batch_size=batch, max_length=length, precision=precision)
    return make_plan(load_config(model), request).cuts[0].device_flops


def _write_model(folder: Path, sizes: dict[str, int]) -> None:
    """An OPT of two blocks with random weights and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model("opt", **sizes, num_hidden_layers=2, vocab_size=1024, max_position_embeddings=128)
    auto: Any = AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def _train_device(model: str, precision: Precision, size: str) -> float:
    """Seconds of computing in a step."""
    from sfl.model.lean_imports import lean_imports

    lean_imports()
    import sfl.device.daemon  # noqa: F401  # all that a device imports
    from sfl.data.settings import DataSettings
    from sfl.phases import watching
    from sfl.profiling.device import run_steps
    from sfl.settings import DeviceSettings

    batch, length = _BATCH[size]
    settings = DeviceSettings(
        name="calibration",
        model=model,
        precision=precision,
        batch_size=batch,
        max_length=length,
        steps=_STEPS,
        tight_memory=True,
        data=DataSettings(path=Path("none")),
    )
    watch = _Watch()
    with watching(watch):
        run_steps(settings)
    return min(watch.steps[1:])


class _Watch:
    """Adds up the time of the passes of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._phase = ""
        self._since = 0.0

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        if self._phase == "forward":
            self.steps.append(now - self._since)
        elif self._phase == "backward":
            self.steps[-1] += now - self._since
        self._phase, self._since = phase, now


def _train_edge(model: str, precision: Precision, size: str) -> float:
    """Steps of an edge server; no seconds of a device."""
    from sfl.model.lean_imports import lean_imports

    lean_imports()
    import torch

    import sfl.edge_server.daemon  # noqa: F401  # all that an edge imports
    from sfl.adapters.layout import LoraSpec
    from sfl.edge_server.engine import EdgeEngine
    from sfl.model.halves import load_edge_half
    from sfl.model.lora import head_state, initial_adapter, inject_lora, resolve_targets
    from sfl.wire.split import CutBatch, OptimizerSpec, SessionRequest

    batch, length = _BATCH[size]
    half = load_edge_half(model, "classification", 1, ("a", "b"), precision)
    lora = resolve_targets(half.config, LoraSpec())
    initial = initial_adapter(half.config, "classification", lora, head_state(half), 0)
    engine = EdgeEngine(half, inject_lora(half, lora), "classification", lora, "")
    session = engine.open(SessionRequest("s", "d", "classification", 1, 1, "", lora, OptimizerSpec(), 0, "fp32"), initial)
    for step in range(1, _STEPS + 1):
        hidden = torch.zeros(batch, length, half.config.hidden_size)
        mask = torch.ones(batch, length, dtype=torch.int64)
        engine.step(session, step, 1, CutBatch(hidden, mask, torch.zeros(batch, dtype=torch.int64)))
    return 0.0


def main() -> None:
    """Measure in this process; prints JSON."""
    role, model, precision, size = sys.argv[1:]
    train = {"device": _train_device, "edge": _train_edge}[role]
    try:
        seconds = train(model, cast(Precision, precision), size)
    except SflError as error:
        answer: dict[str, Any] = {"error": str(error)}
    else:
        from sfl.telemetry import peak_rss_mb

        answer = {"peak_mb": peak_rss_mb(), "seconds": seconds}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
