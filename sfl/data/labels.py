"""The classes that all devices agree on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sfl.errors import DataError


@dataclass(frozen=True)
class LabelSet:
    """Class names, sorted and distinct; a class's index is its place in `names` and its column in the logits."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(sorted(set(self.names))))
        object.__setattr__(self, "_index", {name: index for index, name in enumerate(self.names)})

    @classmethod
    def union(cls, *label_sets: Iterable[str]) -> LabelSet:
        """The set of all names that any of `label_sets` holds."""
        return cls(tuple(name for names in label_sets for name in names))

    def index(self, name: str | None) -> int:
        """The class index of `name`. Raises `DataError` if it is not in the set."""
        index: dict[str | None, int] = self.__dict__["_index"]
        if name not in index:
            agreed = ", ".join(self.names) or "none"
            raise DataError(f"label '{name}' is not among those agreed on ({agreed}): evaluate on data with these labels")
        return index[name]

    def __len__(self) -> int:
        return len(self.names)
