"""Models with recurrent states: attention's keys and values are packed, the states stay as transformers keeps them."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    StaticLayer,
)

from hf_models import (
    HYBRIDS,
    WINDOW,
    assert_same,
    assert_same_generation,
    generated,
    make_config,
    make_model,
    one_thread,  # noqa: F401
    plain_cache,
    plain_static_cache,
    reference_cache,
    tokens,
)
from turboquant_vllm.files import read_tensors, write_tensors
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache
from turboquant_vllm.hf.packing import why_dense
from turboquant_vllm.hf.recurrent import growing_layer, recurrent_states, static_layer

model_of = functools.cache(make_model)
PACKED = {"falcon_h1": [0, 1], "zamba2": [1], "zaya": [0, 1], "bamba": [1], "lfm2": [1]}
SIDE_BY_SIDE = [family for family in HYBRIDS if family in ("falcon_h1", "zamba2", "zaya")]
CONFIG = LlamaConfig(num_hidden_layers=2, layer_types=["linear_attention", "hybrid"])
CUTS = ((0, 11), (11, 12), (12, 13), (13, 18), (18, 23))
MAKE = {
    "growing": plain_cache,
    "static": functools.partial(plain_static_cache, max_cache_len=30),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def logits(model, cache, ids, cuts, mask=None):
    found = []
    for start, stop in cuts:
        arguments = {} if mask is None else {"attention_mask": mask[:, :stop]}
        found.append(model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}, **arguments).logits)
    return torch.cat(found, 1)


@pytest.mark.filterwarnings("error:.*keeps nothing in 4 bits")
@pytest.mark.parametrize("family", HYBRIDS)
def test_attention_is_packed(family):
    config = make_config(family)
    assert [layer for layer, reason in enumerate(why_dense(config)) if not reason] == PACKED[family]
    assert TurboQuantCache(config).packed_layers == TurboQuantStaticCache(config, 64).packed_layers == PACKED[family]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("skipped", [(), (1,)])
@kinds
@torch.no_grad()
def test_any_cutting_of_a_padded_text_gives_the_same_logits_as_a_dense_cache(family, skipped, kind, generator):
    oracle, ours = model_of(family, "oracle"), model_of(family, "tq4")
    ids = tokens(generator, 3, 23)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    want = logits(oracle, reference_cache(oracle, skip_layers=skipped), ids, CUTS, mask)
    cache = MAKE[kind](ours.config, skip_layers=skipped)
    assert_same(logits(ours, cache, ids, CUTS, mask)[mask.bool()], want[mask.bool()])
    exact = logits(oracle, reference_cache(oracle, skip_layers=(0, 1)), ids, CUTS, mask)
    if cache.packed_layers:  # it is not an exact cache
        assert (want - exact)[mask.bool()].abs().max() > 1e-3 * want[mask.bool()].abs().max()


@pytest.mark.parametrize("family", SIDE_BY_SIDE)
@kinds
def test_beams(family, kind, generator):
    oracle, ours = model_of(family, "oracle"), model_of(family, "tq4")
    ids = tokens(generator, 2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, "disable_compile": True}
    expected = generated(oracle, reference_cache(oracle), ids, **options)
    assert_same_generation(generated(ours, MAKE[kind](ours.config), ids, **options), expected)


@pytest.mark.parametrize("family", HYBRIDS)
@kinds
@torch.no_grad()
def test_reset_forgets_everything(family, kind, generator):
    model = model_of(family, "tq4")
    cache = MAKE[kind](model.config)
    logits(model, cache, tokens(generator, 2, 14), ((0, 9), (9, 14)))
    cache.reset()
    ids = tokens(generator, 2 if kind == "static" else 3, 14)
    want = logits(model, MAKE[kind](model.config), ids, ((0, 9), (9, 14)))
    assert torch.equal(logits(model, cache, ids, ((0, 9), (9, 14))), want)


@pytest.mark.parametrize("family", SIDE_BY_SIDE)
@torch.no_grad()
def test_a_copy_goes_its_own_way(family, generator):
    model = model_of(family, "tq4")
    ids, other = tokens(generator, 2, 15), tokens(generator, 2, 4)
    cache = plain_cache(model.config)
    logits(model, cache, ids, ((0, 9), (9, 11)))
    twin = copy.deepcopy(cache)
    model(other, **{CACHE_ARGUMENT: twin})
    straight = plain_cache(model.config)
    want = logits(model, straight, ids, ((0, 9), (9, 11), (11, 15)))[:, 11:]
    assert torch.equal(model(ids[:, 11:], **{CACHE_ARGUMENT: cache}).logits, want)


# Layers


LIKE = {"full": LinearAttentionAndFullAttentionLayer(2), "sliding": LinearAttentionAndSlidingWindowAttentionLayer(WINDOW, 2)}
LAYERS = {
    **{f"growing {name}": lambda like=like: growing_layer(like, 3, seed=0) for name, like in LIKE.items()},
    **{f"paged {name}": lambda like=like: static_layer(like, 3, 64, packed=True, seed=0) for name, like in LIKE.items()},
    "dense static": lambda: static_layer(LIKE["full"], 3, 64, packed=False),
}
CHANGES = {
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select_mask": (lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "offload": (lambda layer: (layer.offload(), layer.prefetch()), [0, 1, 2]),
}


def made(make):
    layer = make()
    if isinstance(layer, StaticLayer) and not hasattr(StaticLayer, "crop"):
        pytest.skip("these releases of transformers cannot take tokens back from a dense cache of fixed size")
    return layer


def fill(layer, randn, recurrent=True):
    """What was stored: keys, and states by name."""
    keys, conv, state = randn(3, 2, 5, 32), randn(3, 8, 4), randn(3, 2, 8)
    layer.update_conv_state(conv)
    if recurrent:
        layer.update_recurrent_state(state)
    else:
        layer.update_conv_state(conv, 1)
    layer.update(keys, keys)
    return keys, {"conv.0": conv, **({"recurrent.0": state} if recurrent else {"conv.1": conv})}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_sequences_keep_their_states(make, change, randn):
    if make is LAYERS["dense static"] and change in ("select", "select_mask", "repeat"):
        pytest.skip("transformers' own layers of fixed size have no such methods")
    layer = make()
    _, states = fill(layer, randn)
    before = layer.keys[...] * 1
    act, sequences = CHANGES[change]
    act(layer)
    found = recurrent_states(layer)
    assert found.keys() == states.keys()
    for name, x in states.items():
        assert torch.equal(found[name], x[sequences])
    assert torch.equal((layer.keys[...] * 1)[:, :, :5], before[sequences][:, :, :5])


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_say_what_they_can_do(make, randn):
    layer = made(make)
    assert not layer.supports_early_init
    layer.crop(-1)  # nothing is there yet
    assert not layer.is_croppable
    fill(layer, randn, recurrent=False)
    assert layer.is_croppable
    assert layer.get_seq_length() == 5
    layer.update_recurrent_state(randn(3, 2, 8))
    assert not layer.is_croppable
    assert layer.is_compileable == hasattr(layer, "max_cache_len")


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_tokens_are_taken_back_where_no_recurrent_state_has_seen_them(make, randn):
    layer = made(make)
    keys, states = fill(layer, randn, recurrent=False)
    layer.crop(0)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    assert layer.get_seq_length() == 5
    layer.activate_past_recording()
    more = randn(3, 8, 2)
    layer.update_conv_state(more)
    layer.update_conv_state(more, 1)
    layer.update(keys[:, :, :2], keys[:, :, :2])
    assert not layer.is_compileable
    layer.crop(-1)
    assert layer.get_seq_length() == 6
    for found in recurrent_states(layer).values():
        assert torch.equal(found, torch.cat((states["conv.0"], more), -1)[..., 1:5])
    layer.update_recurrent_state(randn(3, 2, 8))
    with pytest.raises(RuntimeError, match="layer 3: cannot remove 2 tokens from a recurrent state"):
        layer.crop(-2)
    assert layer.get_seq_length() == 6


# Files


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("skipped", [(), (1,)])
@kinds
@torch.no_grad()
def test_either_kind_of_cache_reads_what_the_other_wrote(family, skipped, kind, tmp_path, generator):
    model = model_of(family, "tq4")
    ids = tokens(generator, 2, 25)
    cache = MAKE[kind](model.config, skip_layers=skipped)
    logits(model, cache, ids, ((0, 12), (12, 15)))
    cache.save(tmp_path / "file")
    want = logits(model, cache, ids, ((15, 16), (16, 25)))
    for read in (TurboQuantCache.load, functools.partial(TurboQuantStaticCache.load, max_cache_len=40)):
        loaded = read(tmp_path / "file", model.config)
        assert loaded.packed_layers == cache.packed_layers
        assert_same(logits(model, loaded, ids, ((15, 16), (16, 25))), want)


def test_files_state_what_they_hold(tmp_path, randn):
    cache = plain_cache(CONFIG)
    cache.save(tmp_path / "empty")
    header = json.loads(read_tensors(tmp_path / "empty", "turboquant-hf-cache")[1]["cache"])
    assert [layer["states"] for layer in header["layers"]] == [[], []]
    fill(cache.layers[1], randn)
    cache.save(tmp_path / "file")
    tensors, metadata = read_tensors(tmp_path / "file", "turboquant-hf-cache")
    assert json.loads(metadata["cache"])["layers"] == [
        {"kind": "states", "length": 0, "states": []},
        {"kind": "packed", "window": None, "length": 5, "states": ["conv.0", "recurrent.0"], "dtype": "float32"},
    ]
    assert {"1.conv.0", "1.recurrent.0", "1.codes", "1.norms"} <= tensors.keys()


CHANGED = [
    (lambda t, h: t.pop("1.conv.0"), "layer 1: expected states to be names of floating tensors, got .'conv.0', 'recurrent.0'."),
    (lambda t, h: t.update({"1.conv.0": t["1.conv.0"].int()}), "layer 1: expected states to be names of floating tensors"),
    (lambda t, h: h["layers"][1].update(states=5), "layer 1: expected states to be names of floating tensors, got 5"),
    (lambda t, h: h["layers"][1].update(states=[]), "expected tensors of 2 layers, got .'1.conv.0', '1.recurrent.0'. beside"),
    (
        lambda t, h: (h["layers"][1].pop("states"), t.pop("1.conv.0"), t.pop("1.recurrent.0")),
        "layer 1: expected states among .'conv.0', 'recurrent.0'., got None",
    ),
    (
        lambda t, h: (h["layers"][1]["states"].append("conv.1"), t.update({"1.conv.1": t["1.conv.0"].clone()})),
        "layer 1: expected states among .'conv.0', 'recurrent.0'., got .'conv.0', 'recurrent.0', 'conv.1'.",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGED)
def test_files_that_do_not_fit_are_refused(change, message, tmp_path, randn):
    cache = plain_cache(CONFIG)
    fill(cache.layers[1], randn)
    path = tmp_path / "file"
    cache.save(path)
    tensors, metadata = read_tensors(path, "turboquant-hf-cache")
    header = json.loads(metadata["cache"])
    change(tensors, header)
    write_tensors(path, tensors, {"format": metadata["format"], "cache": json.dumps(header)})
    with pytest.raises(ValueError, match=f"file: .*{message}"):
        TurboQuantCache.load(path, CONFIG)
