"""The reference for split training: PEFT on the uncut model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sfl.adapters import peft_format
from sfl.adapters.state import AdapterState
from sfl.device.prepare import PreparedDevice
from sfl.model.load import load_task_model, load_tokenizer
from sfl.settings import DeviceSettings


class Unsplit:
    """A device whose model PEFT trains in one piece, from version 0 and on the same batches as the device of these settings."""

    def __init__(self, settings: DeviceSettings, labels: tuple[str, ...], version_0: Path) -> None:
        device = PreparedDevice.of(settings)
        base = load_task_model(settings.model, settings.task, labels)
        self.model: Any = PeftModel.from_pretrained(base, version_0, is_trainable=True).train()
        self.trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.examples = len(device.splits.train)
        make = torch.optim.SGD if settings.optimizer.name == "sgd" else torch.optim.AdamW
        self._optimizer = make(self.trained.values(), lr=settings.optimizer.learning_rate, weight_decay=0.0)
        falls = settings.optimizer.schedule == "linear"
        rate = torch.optim.lr_scheduler.LambdaLR
        self._schedule = rate(self._optimizer, lambda done: 1 - done / settings.steps if falls else 1.0)
        self._batches = device.plan(labels).batches
        self._causal = settings.task == "causal-lm"
        assert load_tokenizer(settings.model).pad_token_id == self.model.config.pad_token_id

    def step(self) -> float:
        """One step; its loss."""
        batch = next(self._batches)
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        target = ids.masked_fill(mask == 0, -100) if self._causal else torch.from_numpy(batch.labels)
        loss = self.model(input_ids=ids, attention_mask=mask, labels=target).loss
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return loss.item()


def train_unsplit(settings: DeviceSettings, labels: tuple[str, ...], version_0: Path) -> tuple[list[float], Any]:
    """Losses and the trained model of one device alone."""
    device = Unsplit(settings, labels, version_0)
    return [device.step() for _ in range(settings.steps)], device.model


def train_unsplit_together(devices: Sequence[DeviceSettings], labels: tuple[str, ...], version_0: Path, local_steps: int) -> Any:
    """The model after FedAvg in rounds of `local_steps` steps: what is trained becomes the mean, weighted by |D_k|."""
    members = [Unsplit(settings, labels, version_0) for settings in devices]
    whole = sum(member.examples for member in members)
    for _ in range(devices[0].steps // local_steps):
        for member in members:
            for _ in range(local_steps):
                member.step()
        with torch.no_grad():
            for name in members[0].trained:
                mean = sum(member.examples / whole * member.trained[name].double() for member in members)
                for member in members:
                    member.trained[name].copy_(mean)
    return members[0].model


def read_trained(model: Any, like: Path, folder: Path) -> AdapterState:
    """What PEFT itself saves of `model` (in `folder`), read with the layout of our adapter `like`."""
    model.save_pretrained(folder)
    (folder / "sfl.json").write_text((like / "sfl.json").read_text())
    return peft_format.read(folder)[0]
