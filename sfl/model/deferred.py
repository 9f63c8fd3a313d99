"""Modules that are imported when something of theirs is used, not when an import statement names them."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def is_deferred(module: str) -> bool:
    """Whether an import named this module and nothing of it was used so far."""
    return isinstance(sys.modules.get(module), DeferredModule)


class DeferredModule(ModuleType):
    """Stands in `sys.modules` for a module that nothing has used yet. The modules below a deferred package are deferred too."""

    def __init__(self, name: str, finder: Deferring) -> None:
        super().__init__(name)
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":  # asked by `from module import *`, which then reads the dictionary
            self.__dict__.update(vars(self._now()))
            return self.__dict__.get(name, [public for public in self.__dict__ if not public.startswith("_")])
        if name.startswith("__") and name != "__version__":  # what `inspect` and the like ask of every module there is
            raise AttributeError(f"deferred module '{self.__name__}' has no attribute '{name}'")
        below = f"{self.__name__}.{name}"
        if is_deferred(self.__name__) and PathFinder.find_spec(below, getattr(self, "__path__", ())) is not None:
            return import_module(below)
        if is_deferred(self.__name__) and name != "__version__" and self._mentions(name):
            return DeferredName(self, name)
        return getattr(self._now(), name)

    def _mentions(self, name: str) -> bool:
        """Whether the module's source has this name: if not, only the module itself can say whether it exists."""
        source = Path((self.__spec__ and self.__spec__.origin) or "")
        text = source.read_text(encoding="utf-8", errors="replace") if source.suffix == ".py" else ""
        return re.search(rf"\b{name}\b", text) is not None

    def _now(self) -> ModuleType:
        """The module itself, imported if need be."""
        return self._finder.import_now(self.__name__) if is_deferred(self.__name__) else import_module(self.__name__)


class DeferredName:
    """Stands for a class, function or other value of a deferred module, which is imported when this is used.

    `isinstance` alone imports nothing: a class whose module was never imported has no instance.
    """

    def __init__(self, module: DeferredModule, name: str) -> None:
        self.__dict__.update(_module=module, _name=name)

    def _real(self) -> Any:
        place = self.__dict__
        if "_value" not in place:
            place["_value"] = getattr(place["_module"]._now(), place["_name"])
        return place["_value"]

    def _has_instances(self) -> bool:
        return not is_deferred(self.__dict__["_module"].__name__)

    def __instancecheck__(self, instance: object) -> bool:
        return self._has_instances() and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._has_instances() and issubclass(subclass, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real(), name, value)

    def __or__(self, other: Any) -> Any:
        return DeferredUnion(self, other)

    def __ror__(self, other: Any) -> Any:
        return DeferredUnion(other, self)

    def __getitem__(self, key: Any) -> Any:
        return self._real()[key]

    def __contains__(self, item: Any) -> bool:
        return item in self._real()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real())

    def __len__(self) -> int:
        return len(self._real())

    def __bool__(self) -> bool:
        return bool(self._real())

    def __eq__(self, other: object) -> bool:
        return bool(self._real() == other)

    def __hash__(self) -> int:
        return hash(self._real())

    def __lt__(self, other: Any) -> bool:
        return bool(self._real() < other)

    def __le__(self, other: Any) -> bool:
        return bool(self._real() <= other)

    def __gt__(self, other: Any) -> bool:
        return bool(self._real() > other)

    def __ge__(self, other: Any) -> bool:
        return bool(self._real() >= other)


class DeferredUnion(DeferredName):
    """Stands for `first | second`, one of which is deferred: what an annotation is made of as a module is imported."""

    def __init__(self, first: Any, second: Any) -> None:
        self.__dict__["_parts"] = first, second

    def _real(self) -> Any:
        first, second = (part._real() if isinstance(part, DeferredName) else part for part in self.__dict__["_parts"])
        return first | second

    def __instancecheck__(self, instance: object) -> bool:
        return any(isinstance(instance, type(None) if part is None else part) for part in self.__dict__["_parts"])

    def __subclasscheck__(self, subclass: type) -> bool:
        return any(issubclass(subclass, type(None) if part is None else part) for part in self.__dict__["_parts"])


class Deferring(MetaPathFinder, Loader):
    """Defers modules and all below them, from when it stands first in `sys.meta_path`.

    `groups` are names of modules that need each other: the use of one ends the deferring of all of its group. `stand_ins`
    are values, by module and name, that do without the module. A module that is not installed is not found, as ever.
    """

    def __init__(self, groups: Iterable[Collection[str]], stand_ins: Mapping[str, Mapping[str, Any]]) -> None:
        self._groups = {name: frozenset(group) for group in groups for name in group}
        self._stand_ins = stand_ins
        self._used: set[str] = set()
        self._lock = threading.Lock()  # not held while something is imported, as imports have locks of their own

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        real = PathFinder.find_spec(fullname, path) if self._deferred_as(fullname) else None
        if real is None:
            return None
        spec = ModuleSpec(fullname, self, origin=real.origin, is_package=real.submodule_search_locations is not None)
        spec.submodule_search_locations = real.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return DeferredModule(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(self._stand_ins.get(module.__name__, {}))

    def import_now(self, name: str) -> ModuleType:
        """Import the deferred module `name`."""
        with self._lock:
            if root := self._deferred_as(name):
                self._used |= self._groups[root]
                for other in [other for other in sys.modules if is_deferred(other) and not self._deferred_as(other)]:
                    del sys.modules[other]
        return import_module(name)

    def _deferred_as(self, name: str) -> str | None:
        """The module that was to be deferred and is `name`, or has it below; None where it is not deferred or not any more."""
        while name and name not in self._groups:
            name = name.rpartition(".")[0]
        return name if name and name not in self._used else None
