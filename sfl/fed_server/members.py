"""What a member says of itself, and what all of them must have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sfl.adapters.layout import LoraSpec
from sfl.errors import ModelDiffersError, TrainingDiffersError

Role = Literal["device", "edge"]

MOST_EXAMPLES = 10**12  # that are believed


@dataclass(frozen=True)
class Member:
    """A device or an edge server, as it joins; what follows `cut` is said by devices only. See federation.proto."""

    name: str
    role: Role
    task: str
    base_model: str = field(compare=False)  # where it has the model, which may change; the fingerprint may not
    model_fingerprint: str
    lora: LoraSpec
    cut: int = 0
    examples: int = 0
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    max_length: int = 0
    rank: int = 0  # of its LoRA factors; 0: that of `lora`
    label_counts: tuple[int, ...] = ()  # training examples with each of `labels`; none where it does not say
    edge: str = field(default="", compare=False)  # the edge server that it has a session with, once it has one; it may move

    @property
    def own_rank(self) -> int:
        """The rank of its LoRA factors."""
        return self.rank or self.lora.rank

    def describe(self) -> str:
        return f"edge server '{self.name}'" if self.role == "edge" else f"device '{self.name}' (cut {self.cut})"


@dataclass(frozen=True)
class Common:
    """What all members must have in common, and where it comes from: the first member or an earlier run's adapter."""

    source: str
    task: str
    model_fingerprint: str
    lora: LoraSpec

    def require(self, member: Member) -> None:
        """Raise `RefusedError` naming the first difference with both values."""
        who = member.describe()
        if member.task != self.task:
            raise TrainingDiffersError(f"{who} has task '{member.task}', {self.source} has '{self.task}'")
        if member.model_fingerprint != self.model_fingerprint:
            raise ModelDiffersError(
                f"{who} has another base model than {self.source}: fingerprint {member.model_fingerprint}"
                f" against {self.model_fingerprint}; give both the same model files"
            )
        difference = member.lora.difference(self.lora)
        if difference is not None:
            raise TrainingDiffersError(f"{who} has other LoRA settings than {self.source}: {difference}")


@dataclass(frozen=True)
class Prompts:
    """How devices make texts, the same for all, and where it comes from."""

    source: str
    columns: tuple[str, ...]
    max_length: int

    def require(self, member: Member) -> None:
        """Raise `RefusedError` naming the difference with both values."""
        for what, mine, theirs in (
            ("columns", member.columns, self.columns),
            ("max_length", member.max_length, self.max_length),
        ):
            if mine != theirs:
                raise TrainingDiffersError(f"{member.describe()} has {what} {_show(mine)}, {self.source} has {_show(theirs)}")


def _show(value: tuple[str, ...] | int) -> str:
    return str(value) if isinstance(value, int) else ", ".join(value) or "none"
