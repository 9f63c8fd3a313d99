"""A deferred module is imported at its first use, and behaves as itself before and after."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfl.model.deferred import Deferring, is_deferred

SOURCES = {
    "made_a/__init__.py": "from .inner import Thing, LIMIT\n__version__ = '1.2'\ndef grow(x): return x + 1\n",
    "made_a/inner.py": "class Thing:\n    size = 3\nLIMIT = 5\nTABLE = {'a': 1}\n",
    "made_b.py": "from made_a.inner import *\nimport made_a\nKIND = made_a.Thing\nMARK = made_a.grow(1)\n",
    "made_c.py": "def alone(): return 'alone'\n",
    "made_broken.py": "raise ValueError('broken')\n",
}


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    groups = [("made_a", "made_b"), ("made_c",), ("made_broken",), ("made_no",)]
    finder = Deferring(groups, {"made_a": {"without": lambda: "stand-in"}})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("made_")]:
        del sys.modules[name]


def module(name: str) -> Any:
    return importlib.import_module(name)


def test_naming_it_imports_nothing() -> None:
    made_a = module("made_a")
    thing, inner = made_a.Thing, module("made_a.inner")
    assert inner is made_a.inner
    assert not isinstance(3, thing) and not issubclass(int, thing)
    assert isinstance(None, thing | None) and isinstance(3, int | thing) and not isinstance("3", int | thing)
    assert importlib.util.find_spec("made_a") is not None
    assert inspect.getmodule(test_naming_it_imports_nothing) is sys.modules[__name__]  # looks at every module there is
    assert made_a.without() == "stand-in"
    assert is_deferred("made_a") and is_deferred("made_a.inner")


def test_the_first_use_imports_it_for_all_who_named_it() -> None:
    made_a, inner = module("made_a"), module("made_a.inner")
    thing, limit, table = made_a.Thing, inner.LIMIT, inner.TABLE
    assert thing.size == 3
    assert not is_deferred("made_a") and not is_deferred("made_a.inner")
    real = module("made_a")
    assert real is not made_a and made_a.Thing is real.Thing and inner.LIMIT == 5
    assert type(thing()) is real.Thing and isinstance(real.Thing(), thing) and thing == real.Thing
    assert limit == 5 and limit > 4 and limit >= 5 and bool(limit) and {real.Thing: 1}[thing] == 1
    assert table["a"] == 1 and list(table) == ["a"] and "a" in table and len(table) == 1
    assert thing | None == real.Thing | None


def test_a_class_may_derive_from_it() -> None:
    class Special(module("made_a").Thing):  # type: ignore[misc]
        pass

    assert Special().size == 3 and issubclass(Special, module("made_a.inner").Thing)


def test_its_group_comes_with_it_and_no_other_does() -> None:
    named = module("made_b").KIND
    module("made_a")
    alone = module("made_c").alone
    assert named.size == 3
    assert not is_deferred("made_a") and type(named()) is module("made_a").Thing and module("made_b").MARK == 2
    assert is_deferred("made_c") and alone() == "alone" and not is_deferred("made_c")


def test_names_that_it_does_not_have() -> None:
    with pytest.raises(ModuleNotFoundError):
        module("made_no")
    with pytest.raises(ImportError, match="nowhere"):
        exec("from made_a import nowhere")
    assert not hasattr(module("made_c"), "nowhere")


def test_star_imports_and_versions() -> None:
    names: dict[str, Any] = {}
    exec("from made_a.inner import *", names)
    assert names["LIMIT"] == 5 and names["Thing"] is module("made_a").Thing
    assert module("made_a").__version__ == "1.2"


def test_a_version_is_asked_of_the_module_itself() -> None:
    assert module("made_a").__version__ == "1.2"


def test_what_breaks_breaks_at_its_first_use() -> None:
    broken = module("made_broken")
    with pytest.raises(ValueError, match="broken"):
        broken.anything()
    with pytest.raises(ValueError, match="broken"):
        module("made_broken")
