"""A device's lean process computes what any other does, and has not imported what it never uses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import FAMILIES

ROOT = Path(__file__).parents[2]


def output_of(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def lean() -> Any:
    return json.loads(output_of("-m", "tests.model.lean_child", "lean", *FAMILIES))


@pytest.fixture(scope="module")
def plain() -> Any:
    return json.loads(output_of("-m", "tests.model.lean_child", "plain", *FAMILIES))


def test_every_family_trains_to_the_same_bits(lean: Any, plain: Any) -> None:
    assert lean["losses"].keys() == set(FAMILIES)
    assert all(len(set(losses)) == 3 for losses in lean["losses"].values()), "a half that learns nothing proves nothing"
    assert lean["losses"] == plain["losses"]


def test_what_a_device_never_uses_is_not_imported(lean: Any, plain: Any) -> None:
    assert set(plain["there"]["daemon"]) >= {
        "torch._dynamo",
        "torch.distributed.tensor",
        "sympy",
        "accelerate",
        "peft.tuners.loha",
    }
    for stage, there in lean["there"].items():
        assert not there, stage


USES = """
import sys
from sfl.model.lean_imports import lean_imports
lean_imports(); lean_imports()
import sfl.device.daemon
import torch
from sfl.model.deferred import is_deferred
"""


def test_what_is_used_after_all_works() -> None:
    tuner = """
from peft import LoHaConfig, get_peft_model
assert is_deferred("peft.tuners.loha")
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoHaConfig(r=2, target_modules=["0"], init_weights=False))
model(torch.ones(1, 4)).sum().backward()
assert any(parameter.grad is not None for name, parameter in model.named_parameters() if "hada" in name)
"""
    tensors = """
from torch.distributed.tensor import DTensor
assert is_deferred("torch.distributed.tensor") and not isinstance(torch.ones(1), DTensor)
import sympy
assert is_deferred("sympy")
x = sympy.Symbol("x")
assert sympy.solve(2 * x - 6) == [3]
assert not is_deferred("sympy") and not is_deferred("torch.distributed.tensor")
torch._dynamo.reset()
assert not is_deferred("torch._dynamo") and torch._dynamo is sys.modules["torch._dynamo"]
import torch.distributed.tensor
assert torch.distributed.tensor.DTensor is DTensor._real() and not isinstance(torch.ones(1), DTensor)
assert issubclass(DTensor._real(), torch.Tensor)
"""
    compiler = """
def double(x): return 2 * x
assert torch.compile(double) is double and torch.compile(mode="default")(double) is double
import torch._dynamo
assert torch._dynamo.disable(double) is double and is_deferred("torch._dynamo")
"""
    assert output_of("-c", f"{USES}{tuner}{compiler}{tensors}print('done')").endswith("done\n")
