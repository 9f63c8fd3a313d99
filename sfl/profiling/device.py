"""A device half in this process: the real trainer on random tokens, with an edge that only stands in."""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sfl.adapters.state import AdapterState
from sfl.data.batches import Batch
from sfl.data.settings import DataSettings
from sfl.device.prepare import PreparedDevice
from sfl.device.trainer import DeviceTrainer
from sfl.model.local_adapter import LocalAdapter
from sfl.model.lora import AdapterSlots
from sfl.phases import phase
from sfl.profiling.recorder import Recorder
from sfl.profiling.stand_in_edge import StandInEdge
from sfl.settings import DeviceSettings

LABELS = ("a", "b")
_TOKENS_IN_A_WORD = 8  # at most, so that no text is cut


def run_steps(settings: DeviceSettings, recorder: Recorder | None = None) -> None:
    """Load, tokenise, train `settings.steps` steps and one to count tensors in; `settings.data` is not looked at.

    Each step has other random tokens, all texts as long as `max_length`. Memory is treated as tight unless the settings say
    that it is not. Raises `ModelError` for what cannot work.
    """
    settings = settings.model_copy(update={"tight_memory": settings.tight_memory is not False})
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    with tempfile.TemporaryDirectory(prefix="sfl-profile-") as folder:
        texts = _write_texts(Path(folder) / "texts.txt", settings)
        data = DataSettings(path=texts, format="semicolon", validation=0.0, test=0.0)
        device = PreparedDevice.of(settings.model_copy(update={"data": data}))
        with phase("tokenise"):
            device.plan(LABELS)
    with phase("load"):
        half, slots = device.load_half()
    adapter = LocalAdapter(slots, _random_adapter(slots), device.cut, 1, device.optimizer)
    link = StandInEdge()
    if recorder is not None:
        recorder.observe(half, adapter, link.traffic, count_in_step=settings.steps + 1)
    trainer = DeviceTrainer(half, adapter, link, settings.task, settings.micro_batch, bool(settings.tight_memory))
    batches = _random_batches(settings, half.config.vocab_size, half.config.pad_token_id)
    for step in range(1, settings.steps + 2):
        trainer.step(step, next(batches))


def _write_texts(path: Path, settings: DeviceSettings) -> Path:
    """As many texts of made-up words as the steps take."""
    chance = random.Random(settings.seed)
    words = max(1, settings.max_length // _TOKENS_IN_A_WORD)
    with path.open("w", encoding="utf-8") as file:
        for row in range(max(2, settings.batch_size * settings.steps)):
            text = " ".join("".join(chance.choices(string.ascii_lowercase, k=5)) for _ in range(words))
            file.write(f"{text};{LABELS[row % 2]}\n")
    return path


def _random_batches(settings: DeviceSettings, vocabulary: int, pad: int | None) -> Iterator[Batch]:
    """Uniform token ids without padding: they touch more embedding rows than a real text does."""
    chance = np.random.default_rng(settings.seed)
    shape = settings.batch_size, settings.max_length
    while True:
        ids = chance.integers(0, vocabulary, shape)
        ids[ids == pad] = (pad or 0) + 1 if (pad or 0) + 1 < vocabulary else 0
        labels = np.arange(settings.batch_size) % len(LABELS) if settings.task == "classification" else None
        yield Batch(ids, np.ones(shape, dtype=np.int64), labels)


def _random_adapter(slots: AdapterSlots) -> AdapterState:
    """A random, B zero, as where training starts."""
    chance = np.random.default_rng(0)
    state: AdapterState = {}
    for key, (module, name) in slots.slots.items():
        shape = tuple(module.get_parameter(name).shape)
        drawn = chance.normal(0, 0.02, shape) if key.part == "A" else np.zeros(shape)
        state[key] = drawn.astype(np.float32)
    return state
