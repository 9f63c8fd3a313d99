"""The two functions of bitsandbytes that are used. Importing this imports it: 4 MB where imports are lean, 120 where not.

Raises `ModelError` where it is not installed or cannot be imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfl.errors import PrecisionError


def _import() -> Any:
    try:
        import bitsandbytes.functional

        bitsandbytes.functional.quantize_4bit.__name__  # noqa: B018  # used, so that an import that was put off is done here
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise PrecisionError(
            f"nf4 needs bitsandbytes, which cannot be imported ({error}): pip install 'sfl[quant]', or take precision = int8"
        ) from error
    return bitsandbytes.functional


_functional = _import()


def quantise(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Of fp32 rows (n, multiple of `block`): uint8 with two values each, and an fp32 scale for each `block` values; both flat."""
    packed, state = _functional.quantize_4bit(rows, blocksize=block, compress_statistics=False, quant_type="nf4")
    return packed.reshape(-1), state.absmax


def dequantise(packed: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The values (n, m) in `dtype` of packed rows (n, m / 2) and their scales (n, m / block), both contiguous."""
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    state = _functional.QuantState(
        absmax=scale.reshape(-1), shape=shape, blocksize=block, quant_type="nf4", dtype=dtype, code=_code(packed.device)
    )
    values: Tensor = _functional.dequantize_4bit(packed.reshape(-1, 1), state)
    return values


def _code(device: torch.device) -> Tensor:
    code: Tensor = _functional.get_4bit_type("nf4", device=device)
    return code
