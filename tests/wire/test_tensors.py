"""Tensors as raw bytes: what goes in comes out to the bit, and what cannot be is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfl.errors import WireError
from sfl.v1 import tensor_pb2 as pb
from sfl.wire.tensors import ITEM_BYTES, RawTensor, check_header, from_numpy, require, to_numpy
from sfl.wire.torch_tensors import WIRE_DTYPE, from_torch, to_torch

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
ARRAYS = st.one_of(
    *(
        hnp.arrays(np.dtype(code), SHAPES, elements={"allow_nan": False, "allow_infinity": False})
        for code in ("<f4", ">f4", "<f2")
    ),
    hnp.arrays(np.dtype("<i8"), SHAPES),
)


def received(tensor: RawTensor) -> RawTensor:
    """The tensor as a receiver has it: its own bytes, its header checked."""
    header = tensor.header()
    check_header(pb.TensorHeader.FromString(header.SerializeToString()))
    return RawTensor(header.name, header.dtype, tuple(header.shape), bytearray(tensor.data))


@given(ARRAYS, st.booleans())
def test_numpy_round_trip(array: np.ndarray, transposed: bool) -> None:
    array = array.T if transposed else array
    back = to_numpy(received(from_numpy("x", array)))
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("<")
    assert np.array_equal(back, array)
    assert np.array_equal(np.signbit(back), np.signbit(array))


@given(SHAPES, st.sampled_from(sorted(WIRE_DTYPE, key=str)), st.integers(0, 2**32), st.booleans())
def test_torch_round_trip(shape: tuple[int, ...], dtype: torch.dtype, seed: int, transposed: bool) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1000).to(dtype)
    tensor = tensor.mT if transposed and tensor.ndim > 1 else tensor
    raw = from_torch("x", tensor)
    assert raw.header().byte_length == tensor.numel() * ITEM_BYTES[raw.dtype]
    back = to_torch(received(raw))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


def test_int64_extremes_and_denormals_survive() -> None:
    integers = torch.tensor([-(2**63), 2**63 - 1, -1, 0])
    assert torch.equal(to_torch(received(from_torch("x", integers))), integers)
    small = torch.tensor([1e-45, -0.0, 3.4e38])
    assert to_torch(received(from_torch("x", small))).numpy().tobytes() == small.numpy().tobytes()


def test_the_bytes_are_little_endian() -> None:
    assert bytes(from_numpy("x", np.array([1.0], dtype=">f4")).data) == b"\x00\x00\x80\x3f"
    assert bytes(from_torch("x", torch.tensor([258])).data) == b"\x02\x01" + bytes(6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(dtype: torch.dtype, value: float) -> None:
    raw = from_torch("activation", torch.tensor([[1.0, value]], dtype=dtype))
    with pytest.raises(WireError, match="'activation' holds values that are not finite"):
        to_torch(received(raw))
    if dtype != torch.bfloat16:
        with pytest.raises(WireError, match="not finite"):
            to_numpy(received(raw))


def test_dtypes_that_cannot_be_sent() -> None:
    for array in (np.zeros(2), np.zeros(2, dtype=bool), np.zeros(2, dtype="i4"), np.zeros(2, dtype=complex)):
        with pytest.raises(WireError, match="cannot be sent"):
            from_numpy("x", array)
    with pytest.raises(WireError, match="cannot be sent"):
        from_torch("x", torch.zeros(2, dtype=torch.float64))
    with pytest.raises(WireError, match="NumPy cannot hold"):
        to_numpy(from_torch("x", torch.zeros(2, dtype=torch.bfloat16)))


def header(**changes: Any) -> pb.TensorHeader:
    return pb.TensorHeader(**{"name": "x", "dtype": pb.FLOAT32, "shape": [2, 3], "codec": pb.RAW, "byte_length": 24, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"byte_length": 23}, "announces 23 bytes, expected 24"),
        ({"byte_length": 0}, "announces 0 bytes, expected 24"),
        ({"dtype": pb.INT64}, "announces 24 bytes, expected 48"),
        ({"dtype": pb.DTYPE_UNSPECIFIED}, "dtype 0"),
        ({"dtype": 77}, "dtype 77"),
        ({"codec": pb.CODEC_UNSPECIFIED}, "codec 0"),
        ({"codec": 9}, "codec 9"),
        ({"shape": [-2, -3]}, "negative"),
        ({"shape": [0, 2**62], "byte_length": 0}, "no tensor has"),
        ({"shape": [1] * 70, "byte_length": 4}, "no tensor has"),
        ({"shape": [2**62, 2**62], "byte_length": 4}, "no tensor has"),
    ],
)
def test_headers_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    check_header(header())
    with pytest.raises(WireError, match=message):
        check_header(header(**changes))


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.integers(-2, 4), st.integers(2**31, 2**63 - 1)), max_size=12),
    st.integers(0, 6),
    st.integers(0, 2),
    st.integers(0, 2**64 - 1),
)
def test_a_header_that_passes_the_check_makes_a_tensor(shape: list[int], dtype: Any, codec: Any, length: int) -> None:
    exact = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    for byte_length in (length, exact if 0 <= exact < 2**64 else 0):
        made = header(shape=shape, dtype=dtype, codec=codec, byte_length=byte_length)
        try:
            check_header(made)
        except WireError:
            continue
        if byte_length < 2**20:
            assert to_torch(RawTensor("x", dtype, tuple(shape), bytearray(byte_length))).shape == tuple(shape)


def test_require_names_what_differs() -> None:
    tensor = from_numpy("activation", np.zeros((2, 3, 4), dtype="f4"))
    require(tensor, "activation", pb.FLOAT32, (None, 3, 4))
    with pytest.raises(WireError, match="expected tensor 'labels', got 'activation'"):
        require(tensor, "labels", pb.FLOAT32, (2, 3, 4))
    with pytest.raises(WireError, match="dtype FLOAT32, expected BFLOAT16"):
        require(tensor, "activation", pb.BFLOAT16, (2, 3, 4))
    for shape in ((2, 3), (2, 3, 5), (2, 3, 4, 1), (None, None)):
        with pytest.raises(WireError, match="shape 2x3x4, expected"):
            require(tensor, "activation", pb.FLOAT32, shape)
    with pytest.raises(WireError, match=r"expected [?]x3"):  # None is any size but 0
        require(from_numpy("x", np.zeros((0, 3), dtype="f4")), "x", pb.FLOAT32, (None, 3))
