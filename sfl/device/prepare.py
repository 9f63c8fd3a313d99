"""From a device's settings to what it needs for training; every mistake in them is found here, before anything is dialled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterState
from sfl.allocator import map_large_blocks
from sfl.data.batches import Batches, Encoded, eval_batches, tokenise
from sfl.data.example import Example
from sfl.data.labels import LabelSet
from sfl.data.load import load_splits
from sfl.data.split import Splits
from sfl.device.run_plan import RunPlan
from sfl.device.run_state import new_session
from sfl.errors import SettingsError
from sfl.model.cut import DeviceHalf, check_cut
from sfl.model.fingerprint import model_fingerprint
from sfl.model.halves import load_device_half
from sfl.model.load import check_max_length, load_config, load_tokenizer
from sfl.model.local_adapter import LocalAdapter
from sfl.model.lora import AdapterSlots, inject_lora, resolve_targets
from sfl.model.recompute import recompute_blocks
from sfl.settings import DeviceSettings
from sfl.v1 import federation_pb2
from sfl.wire.adapters import lora_to_wire
from sfl.wire.split import OptimizerSpec, SessionRequest, rules_from_wire


@dataclass(frozen=True)
class PreparedDevice:
    """A device's settings, checked against its model, and its data."""

    settings: DeviceSettings
    model: str
    lora: LoraSpec
    optimizer: OptimizerSpec
    fingerprint: str
    splits: Splits
    session: str

    @classmethod
    def of(cls, settings: DeviceSettings, splits: Splits | None = None) -> PreparedDevice:
        """`splits` are the device's examples where they have been read before.

        Raises `SettingsError`, `ModelError` or `DataError` for what cannot work.
        """
        model = settings.model
        if model is None:
            raise SettingsError("model is not set: name a folder or a hub id, or have an edge server provide it")
        config = load_config(model)
        check_cut(config, _number(settings.cut))
        check_max_length(config, settings.max_length)
        lora = settings.lora
        if settings.rank is not None and settings.rank > lora.rank:
            raise SettingsError(f"rank {settings.rank} is above lora.rank {lora.rank}, the largest of all devices: lower it")
        optimizer = settings.optimizer
        return cls(
            settings=settings,
            model=model,
            lora=resolve_targets(config, lora.spec()),
            optimizer=OptimizerSpec(
                optimizer.name,
                optimizer.learning_rate,
                optimizer.weight_decay,
                decay_steps=settings.steps if optimizer.schedule == "linear" else 0,
                warmup_steps=optimizer.warmup_steps,
            ),
            fingerprint=model_fingerprint(model),
            splits=splits or load_splits(settings.data, settings.task),
            session=new_session(settings.name),
        )

    def join_request(self) -> federation_pb2.JoinRequest:
        """What the federation server has to know."""
        settings = self.settings
        return federation_pb2.JoinRequest(
            name=settings.name,
            role=federation_pb2.DEVICE,
            task=settings.task,
            base_model=self.model,
            model_fingerprint=self.fingerprint,
            lora=lora_to_wire(self.lora),
            cut=self.cut,
            examples=len(self.splits.train),
            labels=self.splits.labels if settings.task == "classification" else (),
            columns=self.splits.columns,
            max_length=settings.max_length,
            rank=self.rank,
            label_counts=self.splits.label_counts if settings.task == "classification" and settings.label_counts else (),
        )

    def sizes(self) -> dict[str, int]:
        """Number of examples in each split."""
        splits = self.splits
        return {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)}

    def session_request(self, version: int, policy: federation_pb2.UploadPolicy) -> SessionRequest:
        """What the edge has to know, to begin with global version `version`. Raises `WireError` as `rules_from_wire` does."""
        settings = self.settings
        return SessionRequest(
            session=self.session,
            device=settings.name,
            task=settings.task,
            cut=self.cut,
            version=version,
            model_fingerprint=self.fingerprint,
            lora=self.lora,
            optimizer=self.optimizer,
            seed=settings.seed,
            dtype=settings.compute_format,
            rank=self.rank,
            rules=rules_from_wire(policy),
        )

    def identity(self, labels: Sequence[str], policy: federation_pb2.UploadPolicy) -> dict[str, Any]:
        """What a checkpoint depends on, by the names of the settings: it is of no use where any of this is another."""
        settings = self.settings
        return {
            "model": self.fingerprint,
            "task": settings.task,
            "labels": list(labels),
            "cut": self.cut,
            "rank": settings.rank or self.lora.rank,
            "precision": settings.precision,
            "compute": settings.compute_format,
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "max_length": settings.max_length,
            "shuffle": settings.shuffle,
            **{f"lora.{name}": value for name, value in asdict(self.lora).items()},
            **{f"optimizer.{name}": value for name, value in asdict(self.optimizer).items()},
            **{f"the federation's {name}": value for name, value in asdict(rules_from_wire(policy)).items()},
        }

    def adapter(
        self, slots: AdapterSlots, state: AdapterState, version: int, policy: federation_pb2.UploadPolicy
    ) -> LocalAdapter:
        """The device's half of global version `version`, which is `state`, to be trained as the policy asks."""
        return LocalAdapter(slots, state, self.cut, version, self.optimizer, self.rank, rules_from_wire(policy))

    @property
    def rank(self) -> int:
        """The rank of this device's factors on the wire: 0 where it is that of the LoRA settings."""
        rank = self.settings.rank
        return 0 if rank is None or rank == self.lora.rank else rank

    @property
    def cut(self) -> int:
        """The cut layer. Raises `SettingsError` while it is still to be chosen."""
        return _number(self.settings.cut)

    def load_half(self) -> tuple[DeviceHalf, AdapterSlots]:
        """The device's half of the base, with LoRA in its blocks. Raises `ModelError` as `load_device_half` does."""
        settings = self.settings
        if settings.tight_memory:
            map_large_blocks()
        half = load_device_half(self.model, self.cut, settings.precision, settings.compute_format, settings.run_on)
        slots = inject_lora(half, self.lora)
        if settings.checkpointing:
            recompute_blocks(half)
        return half, slots

    def plan(self, labels: Sequence[str]) -> RunPlan:
        """The run, with the data as tokens; `labels` are the classes that all devices agreed on."""
        settings = self.settings
        tokenizer = load_tokenizer(self.model)
        classes = LabelSet(tuple(labels)) if settings.task == "classification" else None

        def encode(examples: Sequence[Example]) -> Encoded:
            return tokenise(examples, tokenizer, settings.max_length, classes)

        train, validation, test = map(encode, (self.splits.train, self.splits.validation, self.splits.test))
        return RunPlan(
            device=settings.name,
            session=self.session,
            cut=self.cut,
            steps=settings.steps,
            batches=Batches(train, settings.batch_size, shuffle=settings.shuffle, seed=settings.seed),
            validation=partial(eval_batches, validation, settings.batch_size, settings.validation_batches * settings.batch_size),
            test=partial(eval_batches, test, settings.batch_size),
            checkpoint_steps=settings.checkpoint_steps,
        )


def _number(cut: int | Literal["auto"]) -> int:
    if cut == "auto":
        raise SettingsError("a device's cut is chosen before it is prepared: see sfl.device.fit")
    return cut
