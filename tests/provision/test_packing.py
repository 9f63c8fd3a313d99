"""The process that packs: it asks for room first, says why it cannot, and never outlives the edge server."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfl.cache.key import HalfKey
from sfl.edge_server.daemon import description_of
from sfl.edge_server.packing import packable, packer
from sfl.errors import ModelError, SettingsError
from sfl.model.fingerprint import model_fingerprint
from sfl.model.load import load_config
from sfl.model.lora import resolve_targets
from sfl.model.source import model_source
from sfl.settings import EdgeSettings
from tests.provision.made import Device, edge
from tests.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("packing") / "model", "opt")


def pack(model: Path, precision: str, folder: Path, room: int) -> None:
    """Pack at cut 1 where so many bytes are free."""

    async def require_room(size: int) -> None:
        if size > room:
            raise SettingsError("the disk is full")

    key = HalfKey(model_source(model, model_fingerprint(model)), 1, precision)
    asyncio.run(packer(str(model))(key, folder, require_room))


def test_room_is_asked_for_first(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    with pytest.raises(SettingsError, match="the disk is full"):
        pack(model, "int8", folder, 0)
    assert not folder.exists()


def test_an_edge_whose_tokenizer_changed_packs_anew_and_its_device_fetches_anew(model: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(model, tmp_path / "model")
    tokenizer = whole / "tokenizer_config.json"
    device = Device(tmp_path, "127.0.0.1:0", cut=1)
    for text in (tokenizer.read_text(), json.dumps({**json.loads(tokenizer.read_text()), "padding_side": "left"})):
        tokenizer.write_text(text)
        settings = EdgeSettings(name="edge", model=str(whole))
        config = load_config(whole)
        described = description_of(settings, config, resolve_targets(config, settings.lora.spec()), model_fingerprint(whole))
        with edge(tmp_path / "edge", description=described, pack=packer(str(whole)), address=device.settings.edge) as served:
            device.settings = device.settings.model_copy(update={"edge": served.address})
            half = Path(str(device.start().model))
            assert (half / "tokenizer_config.json").read_text() == text
            assert model_fingerprint(half) == described.fingerprint
            assert device.last()["bytes_cached"] == 0
    assert len(device.cache.entries()) == len(served.cache.entries()) == 2


def test_a_bitsandbytes_that_does_not_run_is_the_reason(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("print('hello')\nraise RuntimeError('no kernel for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert "nf4" in packable()
    with pytest.raises(ModelError, match=r"cut 1 in nf4 of source \w+ cannot be packed: nf4 .* \(no kernel for this machine\)"):
        pack(model, "nf4", tmp_path / "half", 10**9)


def test_it_ends_with_the_edge_server(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sfl.edge_server.packing", str(model), "1", "fp32", str(tmp_path / "half")]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout.strip().isdigit(), done.stderr
    assert not (tmp_path / "half").exists()
