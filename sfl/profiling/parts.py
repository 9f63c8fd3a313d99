"""What a device half holds in memory, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sfl.model.cut import DeviceHalf
from sfl.model.local_adapter import LocalAdapter
from sfl.profiling.counting import StepCounter
from sfl.profiling.resident import Resident, resident
from sfl.wire.frames import Traffic


@dataclass(frozen=True)
class Held:
    """Bytes in memory at the end of a phase; `weights` and `embeddings` are None where they are not measured.

    `gradients` and `optimiser` are the larger of the phase's begin and end. `mapped` is how much of weights and embeddings
    are pages of a file.
    """

    weights: int | None
    embeddings: int | None
    mapped: int | None
    adapter: int
    gradients: int
    optimiser: int
    wire: int


@dataclass
class DeviceParts:
    """The device's half, its adapter and its link's traffic, watched through the phases of its steps."""

    half: DeviceHalf
    adapter: LocalAdapter
    traffic: Traffic
    count_in_step: int
    counter: StepCounter = field(default_factory=StepCounter)
    aside: bool = False  # from the counted step to the next one: until then its memory may not be given back
    _counting: bool = False
    _step: int = 0
    _at_begin: dict[str, int] = field(default_factory=dict)
    _before: tuple[int, int] = (0, 0)
    _received: int = 0
    _wire: int = 0

    def phase_begins(self, phase: str) -> None:
        """Call it before anything of the phase is done, in the thread that does it."""
        if phase == "forward":
            self._received = self._wire = 0
            self._step += 1
            self.aside = self._counting = self._step == self.count_in_step
            if self._counting:
                self.counter.__enter__()  # type: ignore[no-untyped-call]
        elif phase == "wait":
            self._before = self.traffic.sent, self.traffic.received
        self._at_begin = self._of_adapter()

    def phase_ends(self, phase: str) -> None:
        """Call it after everything of the phase is done, in the thread that did it."""
        if phase == "wait":
            sent, received = self._before
            self._received = self.traffic.received - received
            self._wire = self.traffic.sent - sent + self._received
        else:
            self._wire = self._received  # the gradient's bytes stay until the step is over
        if self._counting:
            self.counter.end_of(phase, [*self._base(), *_all(self.adapter.tensors())])
            if phase == "step":
                self.counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._counting = False

    def held(self) -> Held:
        """Call it where a phase ends, after `phase_ends`."""
        tables, rest = self._split_base()
        embeddings, weights = resident(tables), resident(rest)
        now = self._of_adapter()
        return Held(
            weights=weights.total if weights else None,
            embeddings=embeddings.total if embeddings else None,
            mapped=_mapped(weights, embeddings),
            adapter=now["adapter"],
            gradients=max(now["gradients"], self._at_begin.get("gradients", 0)),
            optimiser=max(now["optimiser"], self._at_begin.get("optimiser", 0)),
            wire=self._wire,
        )

    def on_gpu(self) -> dict[str, int]:
        """Bytes on the GPU now, by part; empty for a half on the CPU."""
        tables, rest = self._split_base()
        parts = {"weights": rest, "embeddings": tables, **self.adapter.tensors()}
        sizes = {name: sum(t.nbytes for t in tensors if t.device.type == "cuda") for name, tensors in parts.items()}
        return {name: size for name, size in sizes.items() if size}

    def _of_adapter(self) -> dict[str, int]:
        return {
            name: sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")
            for name, tensors in self.adapter.tensors().items()
        }

    def _base(self) -> Iterator[Tensor]:
        tables, rest = self._split_base()
        yield from tables
        yield from rest

    def _split_base(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the frozen half: those of embeddings, and the others. The adapter's are in neither."""
        own = {id(tensor) for tensor in self.adapter.tensors()["adapter"]}
        tables: list[Tensor] = []
        rest: list[Tensor] = []
        for module in self.half.modules():
            found = [tensor for tensor in _tensors_in(vars(module).values()) if id(tensor) not in own]
            (tables if is_embedding(module) else rest).extend(found)
        return tables, rest


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows up in a table by token or position."""
    return isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__


def _tensors_in(values: Iterable[Any], depth: int = 3) -> Iterator[Tensor]:
    """Tensors among the values, in dictionaries, lists and the plain objects that quantised weights keep their state in."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
            if state := getattr(value, "quant_state", None):  # bitsandbytes
                yield from _tensors_in(vars(state).values(), depth - 1)
        elif isinstance(value, nn.Module) or depth == 0:
            continue
        elif isinstance(value, dict):
            yield from _tensors_in(value.values(), depth - 1)
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value, depth - 1)
        elif hasattr(value, "absmax"):  # what bitsandbytes keeps of a quantised weight beside it
            yield from _tensors_in(vars(value).values(), depth - 1)


def _all(parts: dict[str, list[Tensor]]) -> Iterator[Tensor]:
    for tensors in parts.values():
        yield from tensors


def _mapped(weights: Resident | None, embeddings: Resident | None) -> int | None:
    return weights.of_files + embeddings.of_files if weights and embeddings else None
