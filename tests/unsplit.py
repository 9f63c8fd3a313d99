"""The reference for split training: PEFT on the uncut model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sfl.adapters import peft_format
from sfl.adapters.state import AdapterState
from sfl.device.prepare import PreparedDevice
from sfl.model.load import load_task_model, load_tokenizer
from sfl.settings import DeviceSettings


def train_unsplit(settings: DeviceSettings, labels: tuple[str, ...], version_0: Path) -> tuple[list[float], Any]:
    """Losses and the trained model, from the same version 0 and on the same batches as the device of these settings."""
    device = PreparedDevice.of(settings)
    base = load_task_model(settings.model, settings.task, labels)
    model = PeftModel.from_pretrained(base, version_0, is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make = torch.optim.SGD if settings.optimizer.name == "sgd" else torch.optim.AdamW
    optimizer = make(trained, lr=settings.optimizer.learning_rate, weight_decay=0.0)
    falls = settings.optimizer.schedule == "linear"
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / settings.steps if falls else 1.0)
    pad = load_tokenizer(settings.model).pad_token_id
    losses = []
    batches = device.plan(labels).batches
    for _ in range(settings.steps):
        batch = next(batches)
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        causal = settings.task == "causal-lm"
        target = ids.masked_fill(mask == 0, -100) if causal else torch.from_numpy(batch.labels)
        assert pad == model.config.pad_token_id
        loss = model(input_ids=ids, attention_mask=mask, labels=target).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def read_trained(model: Any, like: Path, folder: Path) -> AdapterState:
    """What PEFT itself saves of `model` (in `folder`), read with the layout of our adapter `like`."""
    model.save_pretrained(folder)
    (folder / "sfl.json").write_text((like / "sfl.json").read_text())
    return peft_format.read(folder)[0]
