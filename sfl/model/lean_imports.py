"""What transformers, peft and bitsandbytes import and a device never uses: left out of memory until it is used after all."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sfl.model.deferred import Deferring

# Modules in one group need each other: the use of one brings all.
_UNUSED = (
    (  # distributed tensors and torch's compiler
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed._composable",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "transformers.distributed.expert_parallel",
        "transformers.distributed.tensor_parallel",
        "sympy",
    ),
    ("transformers.distributed.sharding_utils",),
    ("scipy", "sklearn"),  # other models' losses and generation
    ("huggingface_hub.hf_api", "huggingface_hub.hf_file_system"),  # uploads
    ("accelerate",),
    ("bitsandbytes",),  # used for nf4 alone
    ("jinja2",),  # chat templates
    ("PIL",),
)
# Packages of which a device uses these modules and no other.
_PARTLY_USED = {
    "peft.tuners": {"lora", "tuners_utils", "_buffer_dict"},
    "transformers.quantizers": {"auto", "base", "quantizers_utils"},
}


def lean_imports() -> None:
    """Defer what a device never uses; call it before anything imports transformers or peft. A second call does nothing.

    What is deferred works as ever once it is used, at the memory and time that it always took. What another version of
    these packages imports beside it is imported. `torch.compile` gives every function back as it is from now on: a device
    compiles nothing, as a compiler takes more memory than a half.
    """
    if any(isinstance(finder, Deferring) for finder in sys.meta_path):
        return
    import torch

    rest = [[f"{package}.{name}" for name in _names_in(package) - used] for package, used in _PARTLY_USED.items()]
    sys.meta_path.insert(0, Deferring((*_UNUSED, *rest), _stand_ins()))
    torch.compile = _as_it_is  # type: ignore[assignment]


def _stand_ins() -> dict[str, dict[str, Any]]:
    """What is called while transformers, peft and torch's optimisers are imported or made, without the modules it is from."""
    compiler = dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), _as_it_is)
    found: dict[str, dict[str, Any]] = {"torch._dynamo": {**compiler, "graph_break": _nothing}}
    try:
        found["accelerate"] = {"__version__": version("accelerate")}
        found["accelerate.utils"] = {"is_mlu_available": _is_mlu_installed}
    except PackageNotFoundError:
        pass  # peft needs it, and will say so
    return found


def _names_in(package: str) -> set[str]:
    """Names of the modules in a package's folder, which is not imported; none where it is not installed."""
    top, *below = package.split(".")
    spec = PathFinder.find_spec(top)
    folders = [str(Path(place, *below)) for place in (spec.submodule_search_locations or ())] if spec else []
    return {module.name for module in pkgutil.iter_modules(folders)}


def _as_it_is(function: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
    """Compiling a function, or marking it for the compiler, where nothing is compiled. Without one, a decorator."""
    return _as_it_is if function is None else function


def _nothing(*args: Any, **options: Any) -> None:
    """Where a compiled graph would end."""


def _is_mlu_installed() -> bool:
    return find_spec("torch_mlu") is not None
