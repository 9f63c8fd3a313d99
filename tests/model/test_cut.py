"""A cut changes nothing: edge(device(x)) is bit-equal to the uncut model, in every family, at every cut."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import AlbertConfig, T5Config

from sfl.errors import ModelError
from sfl.model.cut import DeviceHalf, EdgeHalf, check_cut
from sfl.model.families import family_of, require_task
from tests.tiny import CLASSIFIERS_ONLY, FAMILIES, tiny_batch, tiny_config, tiny_model

CASES = [(f, t) for f in FAMILIES for t in ("classification", "causal-lm") if t == "classification" or f not in CLASSIFIERS_ONLY]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_logits_loss_and_cut_gradient_are_those_of_the_uncut_model(family: str, task: str) -> None:
    config = tiny_config(family)
    model = tiny_model(config, task)
    model.config.use_cache = False  # a cache changes memory layouts and with them last bits
    ids, mask = tiny_batch(config)
    labels = torch.tensor([0, 2, 1]) if task == "classification" else ids.masked_fill(mask == 0, -100)
    whole = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    blocks = [state.detach() for state in whole.hidden_states]
    edge = EdgeHalf(copy.deepcopy(model), lowest_cut=1)
    for cut in range(1, config.num_hidden_layers):
        device = DeviceHalf(copy.deepcopy(model), cut)
        hidden = device(ids, mask).detach().requires_grad_(True)
        assert torch.equal(hidden, blocks[cut]), f"cut {cut}"
        output = edge(hidden, mask, labels, cut)
        assert torch.equal(output.logits, whole.logits), f"cut {cut}"
        assert output.loss is not None and torch.equal(output.loss, whole.loss)
        output.loss.backward()
        assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_left_padding() -> None:
    config = tiny_config("llama")
    model = tiny_model(config)
    model.config.use_cache = False
    ids, mask = (tensor.flip(1) for tensor in tiny_batch(config))
    expected = model(input_ids=ids, attention_mask=mask).logits
    edge = EdgeHalf(copy.deepcopy(model), 2)
    assert torch.equal(edge(DeviceHalf(model, 2)(ids, mask), mask, None, 2).logits, expected)


def test_cuts_share_the_block_objects() -> None:
    model = tiny_model(tiny_config("opt", layers=5))
    decoder = model.model.decoder
    whole, block, tokens = (
        sum(p.numel() for p in part.parameters()) for part in (model, decoder.layers[0], decoder.embed_tokens)
    )
    edge = EdgeHalf(model, lowest_cut=2)
    ids, mask = tiny_batch(edge.config)
    for cut in (2, 3, 4, 2):
        edge(torch.zeros(*ids.shape, 32), mask, None, cut)
    for cut, view in edge._views.items():
        for index in range(cut, 5):
            assert view[index] is edge.own_blocks[index]
        assert not list(view[:cut].parameters())
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in edge.parameters()}
    assert sum(storages.values()) == 4 * (whole - 2 * block - tokens)
    assert edge._source.hidden is None  # no activation is kept after a step


def test_dropped_parts_are_freed() -> None:
    model = tiny_model(tiny_config("gpt2"), "causal-lm")
    third = weakref.ref(model.transformer.h[2].mlp.c_fc.weight)
    first = weakref.ref(model.transformer.h[0].mlp.c_fc.weight)
    norm = weakref.ref(model.transformer.ln_f.weight)
    device = DeviceHalf(model, 1)
    gc.collect()
    assert third() is None and norm() is None and first() is not None
    assert set(device.own_blocks) == {0}
    assert not hasattr(model, "lm_head")
    model = tiny_model(tiny_config("gpt2"), "causal-lm")
    first = weakref.ref(model.transformer.h[0].mlp.c_fc.weight)
    edge = EdgeHalf(model, 1)
    gc.collect()
    assert first() is None and set(edge.own_blocks) == {1, 2, 3}


def test_layerdrop_cannot_skip_the_source() -> None:
    model = tiny_model(tiny_config("opt", layerdrop=0.99))
    ids, mask = tiny_batch(model.config)
    edge = EdgeHalf(model, 1).train()
    hidden = torch.randn(*ids.shape, 32)
    assert torch.equal(edge(hidden, mask, None, 1).logits, edge(hidden, mask, None, 1).logits)


@pytest.mark.parametrize("cut", [-1, 0, 4, 5])
def test_cut_outside_the_range(cut: int) -> None:
    config = tiny_config("bert")
    for make in (DeviceHalf, EdgeHalf):
        with pytest.raises(ModelError, match="between 1 and 3"):
            make(tiny_model(config), cut)
    with pytest.raises(ModelError, match=f"cut {cut} is not possible"):
        check_cut(config, cut)


def test_edge_refuses_what_it_cannot_compute() -> None:
    edge = EdgeHalf(tiny_model(tiny_config("bert")), lowest_cut=2)
    mask = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ModelError, match="below this edge's lowest cut, 2"):
        edge(torch.zeros(2, 5, 32), mask, None, 1)
    with pytest.raises(ModelError, match="does not fit"):
        edge(torch.zeros(2, 4, 32), mask, None, 2)
    with pytest.raises(ModelError, match="pad_token_id"):
        EdgeHalf(tiny_model(tiny_config("llama", pad_token_id=None)), 1)


def test_a_model_is_cut_once() -> None:
    model = tiny_model(tiny_config("llama"))
    DeviceHalf(model, 2)
    with pytest.raises(ModelError, match="cut before"):
        EdgeHalf(model, 2)


@pytest.mark.parametrize("config", [AlbertConfig(), T5Config()])
def test_family_that_cannot_be_cut(config: AlbertConfig | T5Config) -> None:
    with pytest.raises(ModelError, match=f"'{config.model_type}' cannot be cut: .*opt, gpt2, .*distilbert"):
        family_of(config)


def test_encoder_has_no_causal_lm() -> None:
    with pytest.raises(ModelError, match="'bert' has no task 'causal-lm'"):
        require_task(family_of(tiny_config("bert")), "causal-lm")
