"""Checkpoints whose headers or index point elsewhere than to their own tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfl.errors import ModelError
from sfl.model.checkpoint import INDEX, Checkpoint, WeightsFile


def write(path: Path, offsets: list[int]) -> Path:
    text = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": offsets}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return path


@pytest.mark.parametrize("offsets", [[-4, 0], [-100, -96], [4, 0], [0, -4]])
def test_a_tensor_lies_behind_the_header(tmp_path: Path, offsets: list[int]) -> None:
    assert (
        WeightsFile(write(tmp_path / "good.safetensors", [4, 8])).tensors["a"].stop
        == (tmp_path / "good.safetensors").stat().st_size
    )
    with pytest.raises(ModelError, match=r"no safetensors file, or is truncated \(tensor 'a' begins at byte"):
        WeightsFile(write(tmp_path / "bad.safetensors", offsets))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/secret.safetensors", "a/b.safetensors", "..", "", "a\\b", "a\0"])
def test_parts_lie_beside_their_index(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path / "secret.safetensors", [0, 4])
    write(folder / "part.safetensors", [0, 4])
    for name in ("part.safetensors", shard):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        if name != shard:
            assert Checkpoint(folder).get("a") is not None
    with pytest.raises(ModelError, match="which is no plain file name: fetch it again"):
        Checkpoint(folder)
