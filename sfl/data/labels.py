"""The classes that all devices agree on."""

from __future__ import annotations

from dataclasses import dataclass

from sfl.errors import LabelError


@dataclass(frozen=True)
class LabelSet:
    """Class names in the order of the logits: a class's index is its place in `names`.

    Raises `DataError` for a name that is there twice.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise LabelError(f"the labels {', '.join(self.names)} are not distinct: name each once")
        object.__setattr__(self, "_index", {name: index for index, name in enumerate(self.names)})

    def index(self, name: str | None) -> int:
        """The class index of `name`. Raises `DataError` if it is not in the set."""
        index: dict[str | None, int] = self.__dict__["_index"]
        if name not in index:
            agreed = ", ".join(self.names) or "none"
            raise LabelError(f"label '{name}' is not among those agreed on ({agreed}): evaluate on data with these labels")
        return index[name]

    def __len__(self) -> int:
        return len(self.names)
