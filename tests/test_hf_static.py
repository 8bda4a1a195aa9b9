"""TurboQuantStaticCache: the same values as a growing cache, in pages that stay where they are, under torch.compile."""

from __future__ import annotations

import functools
from inspect import signature

import pytest
import torch

pytest.importorskip("transformers")

from transformers import CompileConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.masking_utils import create_chunked_causal_mask

from hf_models import (
    FAMILIES,
    assert_same,
    assert_same_generation,
    generated,
    make_config,
    make_model,
    one_thread,  # noqa: F401
    plain_static_cache,
    reference_cache,
    tokens,
)
from oracle import assert_close
from turboquant_vllm import TQ4Codec
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, attention_forward
from turboquant_vllm.hf.pages import PAGE_SIZE, PagedTensor, find_spans
from turboquant_vllm.hf.static import MAX_CHUNK, DenseStaticLayer, PagedLayer
from turboquant_vllm.hf.tensors import additive

HEADS, DIM, WINDOW = 2, 32, 100
CODEC = TQ4Codec(DIM)
model_of = functools.cache(make_model)
families = pytest.mark.parametrize("family", FAMILIES)


def both(family):
    return model_of(family, "oracle"), model_of(family, "tq4")


@pytest.fixture
def states(randn):
    """``states(batch, count)``: keys and values of new tokens."""
    return lambda batch, count: (randn(batch, HEADS, count, DIM), randn(batch, HEADS, count, DIM))


def stored(x):
    return CODEC.decompress(CODEC.compress(x), x.dtype)


# Models


@families
@torch.no_grad()
@pytest.mark.parametrize("skipped", [(), (0,)])
def test_any_cutting_of_a_padded_text_gives_the_same_logits_as_a_dense_cache(family, skipped, generator):
    oracle, ours = both(family)
    ids = tokens(generator, 3, 23)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference_cache(oracle, skip_layers=skipped)
    static = plain_static_cache(ours.config, max_cache_len=30, skip_layers=skipped)
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, 18), (18, 23)):
        arguments = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        want = oracle(ids[:, start:stop], **{CACHE_ARGUMENT: expected}, **arguments).logits
        got = ours(ids[:, start:stop], **{CACHE_ARGUMENT: static}, **arguments).logits
        real = mask[:, start:stop].bool()
        assert_same(got[real], want[real])


@families
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_and_generate_again_after_reset(family, options, generator):
    oracle, ours = both(family)
    if family == "llama4" and "block_sequence_ids" not in signature(create_chunked_causal_mask).parameters:
        pytest.skip("these releases of transformers cannot generate with this model and any cache of fixed size")
    static = plain_static_cache(ours.config, max_cache_len=24)
    for _ in range(2):
        ids = tokens(generator, 2, 12)
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        expected = generated(oracle, reference_cache(oracle), ids, attention_mask=mask, **options)
        assert_same_generation(generated(ours, static, ids, attention_mask=mask, **options), expected)
        static.reset()
        assert static.get_seq_length() == 0


@pytest.mark.parametrize(
    ("family", "attention", "length", "padding"),
    [
        ("llama", "tq4", 12, 5),
        ("llama", "sdpa", 12, 5),
        ("falcon_h1", "tq4", 12, 5),
        ("gemma3", "tq4", 12, 5),
        ("gemma3", "tq4", 5, 0),  # begins within the window, ends beyond it
    ],
)
def test_generate_compiles_one_graph_for_all_steps(family, attention, length, padding, generator):
    model = model_of(family, attention)
    ids = tokens(generator, 2, length)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    expected = generated(model, TurboQuantCache(model.config), ids, attention_mask=mask)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = TurboQuantStaticCache(model.config, max_cache_len=24)
    actual = generated(model, static, ids, attention_mask=mask, compile_config=options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_same_generation(actual, expected)


@torch.no_grad()
def test_long_windows_turn_over_their_pages(generator):
    oracle, ours = both("gemma3")
    ids = tokens(generator, 1, 700)
    expected, static = reference_cache(oracle), plain_static_cache(ours.config, max_cache_len=700)
    for start, stop in ((0, 300), *((i, i + 1) for i in range(300, 304)), (304, 480), (480, 690), (690, 691)):
        want = oracle(ids[:, start:stop], **{CACHE_ARGUMENT: expected}).logits
        assert_same(ours(ids[:, start:stop], **{CACHE_ARGUMENT: static}).logits, want)
    sliding, full = static.layers
    assert sliding.nbytes < full.nbytes / 2


# Layers


def layer_of(window=None, room=400, **options):
    return PagedLayer(0, room, window=window, seed=0, **options)


def visible_part(x, layer, count):
    """What queries of the last ``count`` tokens may see of all places."""
    length = int(layer.cumulative_length)
    first = 0 if layer.window is None else max(0, length - count - layer.window + 1)
    return x[:, :, first:length]


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("counts", [(1, 1, 1), (70, 5, 1), (447, 1), (130, 150, 1), (64, 64, 64, 1)])
def test_layers_keep_what_was_stored(window, counts, states):
    layer = layer_of(window)
    seen = []
    for step, count in enumerate(counts):
        if step:
            assert layer.get_mask_sizes(count) == (448, 0)
        k, v = states(2, count)
        seen.append(stored(k))
        keys, values = layer.update(k, v)
        if step == 0:
            assert keys is k
            assert values is v
            continue
        assert isinstance(keys, PagedTensor)
        assert keys.shape == (2, HEADS, 448, DIM)
        want = visible_part(torch.cat(seen, 2), layer, count)
        assert torch.equal(visible_part(keys.dense(), layer, count), want)
        assert torch.equal(visible_part(values.dense(), layer, count)[:, :, -count:], stored(v))
    assert layer.get_seq_length() == sum(counts)


def test_no_method_is_left_to_a_base_class():
    contract = {name for base in (CacheLayerMixin, DynamicLayer, StaticLayer) for name in vars(base) if name[0] != "_"}
    contract -= {"supports_early_init", "get_max_cache_shape", "cumulative_length"}
    assert contract <= vars(PagedLayer).keys()


def test_pages_stay_where_they_are(states):
    layer = layer_of()
    layer.update(*states(2, 30))
    tensors = (layer.buffer, layer.block_table, layer.cumulative_length)
    layer.update(*states(2, 30))
    layer.crop(-3)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.offload()
    layer.prefetch()
    layer.reset()
    layer.update(*states(2, 30))
    assert all(a is b for a, b in zip(tensors, (layer.buffer, layer.block_table, layer.cumulative_length), strict=True))


CHANGES = {
    "crop": lambda layer: layer.crop(-2),
    "crop_to": lambda layer: layer.crop(31),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "select_mask": lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("offsets", [False, True])
def test_changes_do_what_they_do_to_a_growing_layer(change, offsets, states):
    layer = layer_of(key_offsets=offsets)
    growing = TurboQuantCache(make_config("llama"), key_offsets=offsets).layers[0]
    for count in (3, 30):
        k, v = states(3, count)
        layer.update(k, v)
        growing.update(k, v)
    CHANGES[change](layer)
    CHANGES[change](growing)
    assert layer.get_seq_length() == growing.get_seq_length()
    k, v = states(growing.keys.shape[0], 2)
    for got, want in zip(layer.update(k, v), growing.update(k, v), strict=True):
        assert torch.equal(got.dense()[:, :, : want.shape[2]], want.dense())


def test_changes_to_an_empty_layer_are_harmless():
    for change in CHANGES.values():
        layer = layer_of()
        change(layer)
        layer.reset()
        assert layer.keys is None
        assert (layer.get_seq_length(), layer.nbytes, layer.is_initialized) == (0, 0, False)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_pages_cost_what_the_format_says(window, states):
    layer = layer_of(window, room=10_000)
    layer.update(*states(1, 5))
    tokens = 10_000 if window is None else WINDOW + MAX_CHUNK
    vector = 2 * HEADS * (DIM // 2 + 4)
    assert tokens * vector <= layer.nbytes < (tokens + PAGE_SIZE) * vector


def test_too_many_tokens_are_refused(states):
    layer = layer_of(room=50)
    layer = layer_of(WINDOW, room=10_000)
    layer.update(*states(1, 3000))
    with pytest.raises(ValueError, match=f"expected at most {MAX_CHUNK} tokens at a time behind a sliding window"):
        layer.update(*states(1, MAX_CHUNK + 1))


def test_a_window_that_forgot_says_so(states):
    layer = layer_of(WINDOW, room=10_000)
    layer.update(*states(1, 3000))
    layer.crop(-200)
    with pytest.raises(RuntimeError, match="layer 0: cannot remove 300 tokens behind a window of 100"):
        layer.crop(-300)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("make", [PagedLayer, DenseStaticLayer])
@pytest.mark.parametrize("window", [None, 7])
def test_a_full_cache_says_so(exact, make, window, states):
    if make is DenseStaticLayer:
        window = {}
    else:
        window = {"window": window, "seed": 0}
    for counts, asked in (((65,), 65), ((64, 1), 1), ((60, 3, 2), 2), ((63, 1, 1), 1)):
        layer = make(3, 50, exact_prefill=exact, **window)
        for count in counts[:-1]:
            layer.get_mask_sizes(count)
            layer.update(*states(2, count))
        seen = sum(counts[:-1])
        message = (
            rf"layer 3: the cache is full: expected at most 64 tokens in all \(max_cache_len\), got {seen} and {asked} more"
        )
        with pytest.raises(ValueError, match=message):
            layer.get_mask_sizes(asked)
        with pytest.raises(ValueError, match=message):
            layer.update(*states(2, asked))
        assert int(layer.get_seq_length()) == seen


@torch.no_grad()
@pytest.mark.parametrize("attention", ["tq4", "sdpa"])
@pytest.mark.parametrize("skipped", [(), (0,), (0, 1)])
def test_generate_with_too_little_room_says_so(attention, skipped, generator):
    model = model_of("gemma3", attention)
    cache = TurboQuantStaticCache(model.config, max_cache_len=64, skip_layers=skipped)
    with pytest.raises(ValueError, match="the cache is full: expected at most 64 tokens in all"):
        generated(model, cache, tokens(generator, 2, 60))


# The cache


@torch.no_grad()
@pytest.mark.parametrize("attention", ["tq4", "sdpa"])
@pytest.mark.parametrize("skipped", [(0,), (1,), (-1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n"])
def test_dense_layers_take_every_option_of_packed_ones(family, skipped, attention, generator):
    model = model_of(family, attention)
    # Releases differ in whether layers that use those of others have a place in a cache.
    skipped = tuple(layer for layer in skipped if layer < len(TurboQuantCache(model.config).layers))
    for offsets in (False, True):
        options = {"skip_layers": skipped, "exact_prefill": False, "seed": 7, "key_offsets": offsets}
        ids, mask = tokens(generator, 2, 15), torch.ones(2, 15, dtype=torch.long)
        if not offsets:  # the keys of padding have a part in offsets, and attentions differ in what they make of padding
            mask[1, :4] = 0
        growing, static = TurboQuantCache(model.config, **options), TurboQuantStaticCache(model.config, 64, **options)
        for start, stop in ((0, 9), (9, 10), (10, 15)):
            arguments = {"attention_mask": mask[:, :stop]}
            want = model(ids[:, start:stop], **{CACHE_ARGUMENT: growing}, **arguments).logits
            got = model(ids[:, start:stop], **{CACHE_ARGUMENT: static}, **arguments).logits
            real = mask[:, start:stop].bool()
            assert_same(got[real], want[real])


def test_layers_of_each_kind():
    cache = TurboQuantStaticCache(make_config("gemma3"), max_cache_len=50, skip_layers=(0,))
    assert [type(layer) for layer in cache.layers] == [DenseStaticLayer, PagedLayer]
    assert cache.packed_layers == [1]
    assert cache.is_compileable
    assert cache.get_max_length() == 64
    cache = TurboQuantStaticCache(make_config("gemma3"), max_cache_len=50)
    assert cache.is_sliding == [True, False]
    assert TurboQuantStaticCache(make_config("deepseek_v3"), max_cache_len=50).packed_layers == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_cache_len": 0}, ValueError, "max_cache_len must be from 1 to 2147483584, got 0"),
        ({"max_cache_len": 8, "seed": -1}, ValueError, "seed must not be negative, got -1"),
        ({"max_cache_len": 8, "skip_layers": (5,)}, ValueError, "skip_layers must hold numbers from -2 to 1, got 5"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TurboQuantStaticCache(make_config("llama"), **options)


def test_head_dimensions_that_pages_cannot_hold_are_refused(randn):
    cache = TurboQuantStaticCache(make_config("llama"), max_cache_len=8)
    k = randn(1, 2, 3, 18)
    with pytest.raises(ValueError, match=r"layer 1: expected a head dimension that is a multiple of 16.*skip_layers=\(1,\)"):
        cache.update(k, k, 1)


# Attention over pages


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gemma2"])
def test_decoding_decompresses_nothing(family, monkeypatch):
    def refuse(self):
        raise AssertionError("keys or values were decompressed")

    monkeypatch.setattr(PagedTensor, "dense", refuse)
    model = make_model(family, dtype=torch.float32)
    ids, mask = torch.arange(3, 33).repeat(2, 1), torch.ones(2, 30, dtype=torch.long)
    mask[1, :4] = 0
    cache = TurboQuantStaticCache(model.config, max_cache_len=40)
    model(ids[:, :20], attention_mask=mask[:, :20], **{CACHE_ARGUMENT: cache})
    for step in range(20, 23):
        model(ids[:, step : step + 1], attention_mask=mask[:, : step + 1], **{CACHE_ARGUMENT: cache})


@torch.no_grad()
def test_padding_between_visible_keys_changes_nothing(generator):
    oracle, ours = both("gemma3")
    ids, mask = tokens(generator, 2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, 6:12] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected, static = reference_cache(oracle), plain_static_cache(ours.config, max_cache_len=40)
    for start, stop in ((0, 12), (12, 13), (13, 14), (14, 16)):
        arguments = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        want = oracle(ids[:, start:stop], **{CACHE_ARGUMENT: expected}, **arguments).logits
        got = ours(ids[:, start:stop], **{CACHE_ARGUMENT: static}, **arguments).logits
        real = mask[:, start:stop].bool()
        assert_same(got[real], want[real])


@pytest.mark.parametrize("changed", ["keys", "values", "neither"])
def test_what_a_model_makes_of_keys_or_values_is_what_it_gets(changed, states, randn):
    layer = layer_of(room=64)
    layer.update(*states(2, 20))
    keys, values = layer.update(*states(2, 1))
    query, sees = randn(2, HEADS, 1, DIM), (torch.arange(64) < 21)[None, None, None].expand(2, 1, 1, 64)
    keys, values = keys.flip(1) if changed == "keys" else keys, values.flip(1) if changed == "values" else values
    got, _ = attention_forward(torch.nn.Module(), query, keys, values, find_spans(sees, torch.float32))
    want = torch.nn.functional.scaled_dot_product_attention(query, keys + 0, values + 0, attn_mask=sees)
    assert_close(got.transpose(1, 2), want.double())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("paged", [True, False])
def test_a_mask_of_integers_is_no_mask(dtype, paged, states, randn):
    layer = layer_of(room=64)
    layer.update(*states(2, 20))
    keys, values = layer.update(*states(2, 1))
    if not paged:
        keys, values = keys + 0, values + 0
    for shape in ((2, 1, 1, 64), (3, 1, 1, 3)):  # also as wide as spans
        mask = torch.ones(shape, dtype=dtype)
        with pytest.raises(TypeError, match=f"attention_mask must be bool, or floating-point and additive, got {dtype}"):
            attention_forward(torch.nn.Module(), randn(2, HEADS, 1, DIM), keys, values, mask)


@torch.no_grad()
def test_a_mask_of_the_users_own_is_followed(generator):
    ours, ids = model_of("llama", "tq4"), tokens(generator, 2, 13)
    sees = torch.rand(2, 1, 1, 64, generator=generator) < 0.5
    sees[..., 12] = True
    sees[..., 13:] = False
    results = []
    for mask in (sees, additive(sees, torch.float64), sees.int()):
        cache = TurboQuantStaticCache(ours.config, max_cache_len=64)
        ours(ids[:, :12], **{CACHE_ARGUMENT: cache})
        arguments = {"attention_mask": mask, CACHE_ARGUMENT: cache}
        if mask.dtype == torch.int32:
            with pytest.raises(TypeError, match="attention_mask must be bool"):
                ours(ids[:, 12:], **arguments)
        else:
            results.append(ours(ids[:, 12:], **arguments).logits)
    assert_same(*results)
