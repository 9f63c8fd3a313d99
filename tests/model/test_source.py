"""What is packed has a name of its own: it changes with the tokenizer and the configuration, the fingerprint does not."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from sfl.model.checkpoint import find_files
from sfl.model.fingerprint import model_fingerprint
from sfl.model.pack import pack_device_half
from sfl.model.source import COPIED, model_source
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("made") / "model", "opt")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "model")


def source_of(model: Path) -> str:
    return model_source(model, model_fingerprint(model))


def test_it_changes_with_what_is_copied_and_the_fingerprint_does_not(model: Path) -> None:
    fingerprint, sources = model_fingerprint(model), [source_of(model)]
    tokenizer = model / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "padding_side": "left"}))
    sources.append(source_of(model))
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dropout": 0.5}))
    sources.append(source_of(model))
    (model / "chat_template.jinja").write_text("")
    sources.append(source_of(model))
    (model / "chat_template.jinja").rename(model / "vocab.txt")
    sources.append(source_of(model))
    (model / "README.md").write_text("not part of a half")
    assert source_of(model) == sources[-1]
    assert len(set(sources)) == 5
    assert model_fingerprint(model) == fingerprint
    assert model_source(model, "another") != sources[-1]


def test_it_is_that_of_the_whole_for_a_packed_half(model: Path, tmp_path: Path) -> None:
    pack_device_half(model, 1, "int8", tmp_path / "half")
    assert source_of(tmp_path / "half") == source_of(model)


def test_halves_of_another_format_are_another_source(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_of(model)
    monkeypatch.setattr("sfl.model.source.FORMAT", 1000)
    assert source_of(model) != before


def test_a_model_of_the_hub_has_that_of_its_local_copy(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the hub out of reach nothing is asked twice, not even for the files that the model does not have."""
    local = tmp_path / "models--some--model"
    shutil.copytree(made, local / "snapshots" / ("0" * 40))
    (local / "refs").mkdir()
    (local / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    assert model_source("some/model", "f") == model_source(made, "f")
    assert find_files("some/model", COPIED).keys() == find_files(made, COPIED).keys() >= {"config.json", "tokenizer.json"}
    assert find_files("no/model", COPIED) == {}
    assert "Retrying" not in caplog.text
