"""An adapter evaluated with PEFT on the uncut model, against figures worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from sfl.adapters import peft_format
from sfl.adapters.layout import AdapterLayout, LoraSpec
from sfl.adapters.state import HEAD, AdapterKey
from sfl.cli.main import app
from sfl.data.example import Example, content_key
from sfl.data.load import load_splits
from sfl.data.settings import DataSettings
from sfl.errors import AdapterError, DataError, ModelError
from sfl.evaluate import evaluate, examples_for
from sfl.model.families import family_of
from sfl.model.fingerprint import model_fingerprint
from sfl.model.load import load_config, load_task_model, load_tokenizer
from sfl.model.lora import initial_adapter, resolve_targets
from tests.daemons.forked import Forked
from tests.tiny import save_tiny_model

LABELS = ("bad", "good", "odd")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "bert", "bert")


def write_adapter(folder: Path, model: Path, task: str, trained: bool = True, **changes: object) -> Path:
    """An adapter whose B is not zero when `trained`, with the head of a freshly loaded model."""
    config = load_config(model)
    lora = resolve_targets(config, LoraSpec())
    family = family_of(config)
    labels = LABELS if task == "classification" else ()
    head = {}
    if labels:
        base = load_task_model(model, "classification", labels, seed=5)
        for path in family.head:
            for name, value in base.get_submodule(path).named_parameters():
                head[AdapterKey(HEAD, path, name)] = value.detach().numpy().copy()
    state = initial_adapter(config, task, lora, head, seed=1)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    if trained:
        for key in state:
            if key.part == "B":
                state[key] = random.normal(0, 0.5, state[key].shape).astype(np.float32)
    layout = AdapterLayout(
        base_model=str(model), model_fingerprint=model_fingerprint(model), task=task, lora=lora, blocks=family.blocks,
        head=family.head if labels else (), num_layers=config.num_hidden_layers, labels=labels, max_length=12,
    )  # fmt: skip
    peft_format.write(folder, state, replace(layout, **changes))  # type: ignore[arg-type]
    return folder


def examples(count: int = 50) -> list[Example]:
    words = ("tcp", "udp", "http", "dns", "fox", "dog", "history", "benign")
    texts = [" ".join(words[(i * 7 + j * (1 + i % 3)) % len(words)] for j in range(1 + i % 9)) for i in range(count)]
    return [Example(text, LABELS[i % 3], None, content_key(text)) for i, text in enumerate(texts)]


def test_an_untrained_adapter_is_the_base_model(tmp_path: Path, model: Path) -> None:
    adapter = write_adapter(tmp_path / "v0", model, "classification", trained=False)
    result = evaluate(model, adapter, examples(), batch_size=7)
    base, tokenizer = load_task_model(model, "classification", LABELS, seed=5), load_tokenizer(model)
    losses, right = [], []
    with torch.no_grad():
        for example in examples():
            encoded = tokenizer(example.text, truncation=True, max_length=12, return_tensors="pt")
            logits = base(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
            truth = LABELS.index(example.label or "")
            losses.append(cross_entropy(logits, torch.tensor([truth])).item())
            right.append(int(logits.argmax()) == truth)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.accuracy == pytest.approx(np.mean(right))
    assert result.count == 50 and result.classes is not None
    assert [(each.label, each.count) for each in result.classes] == [("bad", 17), ("good", 17), ("odd", 16)]
    assert result.f1_macro == pytest.approx(np.mean([each.f1 for each in result.classes]))
    json.dumps(result.as_dict())


def test_a_trained_adapter_counts_whatever_the_batches(tmp_path: Path, model: Path) -> None:
    zero = evaluate(model, write_adapter(tmp_path / "v0", model, "classification", trained=False), examples())
    adapter = write_adapter(tmp_path / "v1", model, "classification")
    some, other = (evaluate(model, adapter, examples(), batch_size=size) for size in (3, 50))
    assert abs(some.loss - zero.loss) > 1e-4
    assert some.loss == pytest.approx(other.loss, rel=1e-5) and some.accuracy == other.accuracy


def test_a_causal_lm_has_a_loss_per_token(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "opt", "opt")
    result = evaluate(model, write_adapter(tmp_path / "v0", model, "causal-lm", trained=False), examples(20), batch_size=4)
    base, tokenizer = load_task_model(model, "causal-lm"), load_tokenizer(model)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples(20):
            ids = tokenizer(example.text, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
            if ids.shape[1] < 2:
                continue
            total += base(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert result.count == tokens and result.loss == pytest.approx(total / tokens, rel=1e-5)
    assert result.accuracy is None and result.f1_macro is None and result.classes is None


def test_what_cannot_be_evaluated(tmp_path: Path, model: Path) -> None:
    adapter = write_adapter(tmp_path / "v0", model, "classification")
    with pytest.raises(DataError, match=r"1 of 51 examples .* 'unheard'; it knows bad, good, odd"):
        evaluate(model, adapter, [*examples(), Example("x", "unheard", None, "k")])
    with pytest.raises(DataError, match="no examples"):
        evaluate(model, adapter, [])
    with pytest.raises(ModelError, match="not the model that the adapter was trained on"):
        evaluate(save_tiny_model(tmp_path / "other", "bert", seed=9), adapter, examples())
    with pytest.raises(AdapterError):
        evaluate(model, tmp_path / "nothing", examples())
    with pytest.raises(AdapterError, match=r"there is no adapter folder .*nothing"):
        peft_format.read_layout(tmp_path / "nothing")
    for number in (9, 29):
        write_adapter(tmp_path / "adapters" / f"v{number}", model, "classification")
    with pytest.raises(AdapterError, match=r"adapters holds versions of an adapter: give one of them, such as .*/adapters/v29$"):
        peft_format.read_layout(tmp_path / "adapters")


def test_examples_are_made_with_the_adapters_columns_and_split(tmp_path: Path, model: Path) -> None:
    rows = "".join(f"tcp\t{i}\tSF\tD\t{i % 5}\t{'Benign' if i % 2 else 'DDoS'}\n" for i in range(120))
    path = tmp_path / "flows.tsv"
    path.write_text("proto\tduration\tconn_state\thistory\torig_bytes\tlabel\n" + rows + rows)
    adapter = write_adapter(tmp_path / "v0", model, "classification", columns=("conn_state", "duration"))
    layout = peft_format.read_layout(adapter)
    settings = DataSettings(path=path)
    found = examples_for(layout, [settings])
    assert len(found) == 120 and found[3].text == "state SF duration 3"
    assert len(examples_for(layout, [settings.model_copy(update={"drop_repeats": False})])) == 240
    test = examples_for(layout, [settings, settings], "test")
    own = load_splits(settings.model_copy(update={"columns": layout.columns}), "classification").test
    assert test == own * 2 and 0 < len(own) < 60


def test_texts_are_made_of_the_adapters_text_columns(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("title,body,label\n" + "".join(f"t{i},b{i},good\n" for i in range(60)))
    settings = DataSettings(path=path, text_columns=("title", "body"))
    columns = load_splits(settings, "classification").columns
    assert columns == ("title", "body")
    adapter = write_adapter(tmp_path / "v0", model, "classification", columns=columns)
    found = examples_for(peft_format.read_layout(adapter), [DataSettings(path=path)])
    assert [example.text for example in found[:2]] == ["t0 || b0", "t1 || b1"]


def test_the_command(tmp_path: Path, model: Path) -> None:
    adapter = write_adapter(tmp_path / "v0", model, "classification")
    path = tmp_path / "data.txt"
    path.write_text("".join(f"{example.text} {i};{example.label}\n" for i, example in enumerate(examples())))
    arguments = ["eval", "--model", str(model), "--adapter", str(adapter), "--data", str(path)]
    command = [sys.executable, "-m", "sfl.cli.main", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "kernels" not in done.stderr, done.stderr
    printed = json.loads(done.stdout)
    expected = evaluate(model, adapter, examples_for(peft_format.read_layout(adapter), [DataSettings(path=path)]))
    assert printed["count"] == 50 and printed["accuracy"] == expected.accuracy and printed["loss"] == pytest.approx(expected.loss)
    path.write_text(path.read_text() + "a new thing;unheard\n")
    refused = Forked(arguments, tmp_path / "stdout", tmp_path / "stderr")
    assert refused.wait(100) == 2
    reason = (tmp_path / "stderr").read_text()
    assert "unheard" in reason and "bad, good, odd" in reason and "Traceback" not in reason


def test_labels_that_are_not_in_the_data_are_counted(tmp_path: Path, model: Path) -> None:
    adapter = write_adapter(tmp_path / "v0", model, "classification")
    path = tmp_path / "data.txt"

    def said(labels: tuple[str, ...]) -> str:
        path.write_text("".join(f"tcp udp {i};{labels[i % len(labels)]}\n" for i in range(9)))
        result = CliRunner().invoke(app, ["eval", "--adapter", str(adapter), "--data", str(path)], catch_exceptions=False)
        assert result.exit_code == 0 and "macro-F1" in result.stdout
        return result.stderr

    assert "labels in the data: only 1 of the 3 that the model knows; macro-F1 leaves out" in said(("good",))
    assert "labels in the data" not in said(LABELS)
