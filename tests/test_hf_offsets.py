"""Caches whose keys have offsets: a model computes over one what it computes over what the keys read back as."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import make_config, make_model, one_thread, oracle_attention, tokens  # noqa: F401
from oracle import assert_close
from turboquant_vllm import TQ4Codec
from turboquant_vllm.codec import TQ4Keys
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, attention_forward
from turboquant_vllm.hf.layers import PackedLayer, PackedSlidingLayer
from turboquant_vllm.hf.tensors import PackedTensor, some_of

FAMILIES = ["llama", "gemma3"]


def model_of(family: str, attention: str = "tq4"):
    model = make_model(family)
    model.set_attn_implementation(attention)
    return model


def offsets_cache(config, kind: str = "growing", **options):
    return TurboQuantCache(config, **options) if kind == "growing" else TurboQuantStaticCache(config, 256, **options)


@torch.no_grad()
@pytest.mark.parametrize(("attention", "kind"), [("tq4", "growing"), ("sdpa", "growing"), ("tq4", "static")])
@pytest.mark.parametrize("family", FAMILIES)
# Not from a single token on: where keys have one length and the offset is zero, rounding chooses the outlier.
@pytest.mark.parametrize("chunks", [(100, 1, 1, 30, 1), (5, *(1,) * 65), (64, 64, 3)])
def test_attention_reads_what_the_cache_gives_decompressed(generator, family, attention, kind, chunks):
    model, other = model_of(family, attention), model_of(family, "oracle")
    ids, first = tokens(generator, 2, sum(chunks)), 0
    cache, same = (offsets_cache(model.config, kind) for _ in range(2))
    for count in chunks:
        some = ids[:, first : first + count]
        got = model(some, **{CACHE_ARGUMENT: cache}).logits
        want = other(some, **{CACHE_ARGUMENT: same}).logits  # this has keys and values decompressed
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        first += count
    assert isinstance(cache.layers[0].export()[0], TQ4Keys)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["growing", "static"])
def test_keys_are_those_that_the_codec_makes(generator, kind):
    cache = offsets_cache(make_config("llama"), kind)
    k, v = torch.randn(2, 2, 2, 130, 16, generator=generator) + 4
    cache.update(k, v, 0)
    keys, values, count = cache.layers[0].export()
    codec = TQ4Codec(16)
    want = codec.compress_keys(k)
    assert count == 130
    for name, got, expected in zip(TQ4Keys._fields, keys, want, strict=True):
        assert torch.equal(got, expected), name
    assert torch.equal(values.codes, codec.compress(v).codes)
    plain = offsets_cache(make_config("llama"), kind, key_offsets=False)
    plain.update(k, v, 0)
    assert plain.nbytes < cache.nbytes < 1.7 * plain.nbytes  # of head dimension 16


@torch.no_grad()
@pytest.mark.parametrize(("attention", "kind"), [("tq4", "growing"), ("sdpa", "growing"), ("tq4", "static")])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches(generator, family, attention, kind):
    model, other = model_of(family, attention), model_of(family, "oracle")
    for one in (model, other):  # a second layer's keys would have what different attentions make of rows that see nothing
        one.model.layers = one.model.layers[:1]
    ids, padding = tokens(generator, 2, 75), 9
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    cache, same, alone = (offsets_cache(model.config, kind) for _ in range(3))
    for first, stop in ((0, 70), (70, 71), (71, 75)):
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, first:stop]
        how = {"attention_mask": mask[:, :stop], "position_ids": position}
        got = model(ids[:, first:stop], **{CACHE_ARGUMENT: cache}, **how).logits
        want = other(ids[:, first:stop], **{CACHE_ARGUMENT: same}, **how).logits
        seen = mask[:, first:stop].bool()
        torch.testing.assert_close(got[seen], want[seen], rtol=1e-5, atol=1e-5)
        # Padding beside it changes nothing for a sequence without any.
        unpadded = model(ids[:1, first:stop], **{CACHE_ARGUMENT: alone}).logits
        torch.testing.assert_close(got[:1], unpadded, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_crop_copies_files(generator, family, tmp_path):
    model = model_of(family)
    ids = tokens(generator, 2, 90)
    scales = {0: torch.rand(model.config.num_key_value_heads, model.config.head_dim, generator=generator) + 0.5}
    cache = offsets_cache(model.config, key_scales=scales)
    cache.activate_past_recording()
    model(ids[:, :80], **{CACHE_ARGUMENT: cache})
    model(ids[:, 80:85], **{CACHE_ARGUMENT: cache})
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.save(tmp_path / "file")
    loaded = TurboQuantCache.load(tmp_path / "file", model.config)
    flipped = ids.flip(0)
    want = model(flipped[:, 82:85], **{CACHE_ARGUMENT: cache}).logits
    assert torch.equal(model(flipped[:, 82:85], **{CACHE_ARGUMENT: loaded}).logits, want)
    assert torch.equal(loaded.layers[0].codec.key_scales, scales[0])
    with pytest.raises(ValueError, match="expected keys without offsets, got keys with offsets"):
        TurboQuantCache.load(tmp_path / "file", model.config, key_offsets=False)
    static = TurboQuantStaticCache.load(tmp_path / "file", model.config, max_cache_len=100)
    torch.testing.assert_close(model(flipped[:, 82:85], **{CACHE_ARGUMENT: static}).logits, want)
    static.crop(-3)
    static.save(tmp_path / "static")
    loaded = TurboQuantCache.load(tmp_path / "static", model.config)
    torch.testing.assert_close(model(flipped[:, 82:85], **{CACHE_ARGUMENT: loaded}).logits, want)


# Windows: groups are kept whole, but what a call returns is what its mask has room for.


def reloaded(layer):
    new = PackedSlidingLayer(0, layer.window, seed=0, exact_prefill=False, key_offsets=True)
    keys, values, length = layer.export()
    new.restore(keys, values, layer.dtype, length)
    return new


CHANGES = {
    "crop": lambda layer: layer.crop(-3),
    "crop_to_a_whole_group": lambda layer: layer.crop(64 - layer.get_seq_length()) if layer.get_seq_length() > 64 else None,
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "file": lambda layer: reloaded(layer) if layer.window else None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("window", [8, 70])
@pytest.mark.parametrize("counts", [(12, 3, 1), (100, 1, 30, 1), (61, 1, 1, 1, 1, 2)])
def test_windows_return_what_their_masks_have_room_for(change, window, counts, randn):
    options = {"seed": 0, "exact_prefill": False, "key_offsets": True}
    layer, full = PackedSlidingLayer(0, window, **options), PackedLayer(0, **options)
    if change.startswith("crop"):
        layer.activate_past_recording()
    for i, count in enumerate((*counts, 4, 1, 1)):
        if i == len(counts):
            layer = CHANGES[change](layer) or layer
            CHANGES[change](full)
        seen = layer.get_seq_length()
        assert seen == full.get_seq_length()
        kept = min(seen, window - 1)
        assert layer.get_mask_sizes(count) == (kept + count, seen - kept)
        states = randn(2, 2, count, 16) + 3, randn(2, 2, count, 16)
        for got, want in zip(layer.update(*states), full.update(*states), strict=True):
            assert got.shape == (2, 2, kept + count, 16)
            assert torch.equal(got.dense(), want.dense()[:, :, -kept - count :])
    # Of those that may be read, with their group, and as many once more.
    assert layer.storage.capacity <= 2 * (min(sum(counts) + 6, window - 1 + 64 + max(counts)))


@torch.no_grad()
@pytest.mark.parametrize(("attention", "skipped"), [("tq4", 0), ("tq4", 1), ("sdpa", 0)])
def test_windows_of_both_kinds_share_a_mask(attention, skipped, generator, tmp_path):
    model, other = model_of("mistral", attention), model_of("mistral", "oracle")  # all of whose layers have a window
    ids = tokens(generator, 2, 95)
    cache, same = (offsets_cache(model.config, skip_layers=(skipped,)) for _ in range(2))
    for first, stop in ((0, 70), (70, 75), (75, 76), (76, 90), (90, 95)):
        got = model(ids[:, first:stop], **{CACHE_ARGUMENT: cache}).logits
        want = other(ids[:, first:stop], **{CACHE_ARGUMENT: same}).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if stop == 76:
            cache.save(tmp_path / "file")
            cache = TurboQuantCache.load(tmp_path / "file", model.config)
            assert cache.packed_layers == [1 - skipped]


@torch.no_grad()
def test_a_window_is_cropped_to_what_its_file_had(generator, tmp_path):
    model = model_of("gemma3")  # whose first layer has a window of 8
    cache = offsets_cache(model.config)
    cache.update(*torch.randn(2, 2, 2, 80, 32, generator=generator), 0)
    cache.save(tmp_path / "file")
    for loaded in (
        TurboQuantCache.load(tmp_path / "file", model.config),
        TurboQuantStaticCache.load(tmp_path / "file", model.config, max_cache_len=100),
    ):
        layer = loaded.layers[0]
        with pytest.raises(RuntimeError, match="layer 0: cannot remove 10 tokens"):
            layer.crop(-10)  # the window would begin at token 63, which is in the group before
        layer.crop(-9)
        assert layer.get_seq_length() == 71


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_that_begin_within_a_group(dtype, randn):
    codec = TQ4Codec(16)
    k, v = randn(3, 2, 150, 16).to(dtype) + 2, randn(3, 2, 150, 16).to(dtype)
    whole, all_values = (PackedTensor.of(x, codec, dtype) for x in (codec.compress_keys(k), codec.compress(v)))
    keys, values = (some_of(x, slice(0, 2), slice(70, 150)) for x in (whole, all_values))
    dense = [x.dense().double()[:2, :, 70:] for x in (whole, all_values)]
    assert torch.equal(keys.dense().double(), dense[0])
    later = torch.arange(80) - 80  # positions, counted from the end
    for q_len in (1, 3):
        queries = torch.arange(q_len)[:, None] - q_len
        q = randn(2, 4, q_len, 16).to(dtype)
        for window in (None, 1, 9, 78, 79, 80, 81, 100):
            sees = (later <= queries) & (later > queries - (window or 1000))
            bias = torch.zeros(1, 1, q_len, 80).double().masked_fill(~sees, float("-inf"))
            want = oracle_attention(torch.nn.Module(), q.double(), *dense, bias)[0]
            got, _ = attention_forward(torch.nn.Module(), q, keys, values, None, sliding_window=window)
            assert_close(got, want)
        everything = torch.zeros(1, 1, q_len, 80).double()
        for pair, vectors in (((keys, values), dense), ((values, keys), dense[::-1]), ((keys, keys), (dense[0], dense[0]))):
            got, _ = attention_forward(torch.nn.Module(), q, *pair, None, is_causal=False)
            assert_close(got, oracle_attention(torch.nn.Module(), q.double(), *vectors, everything)[0])


@torch.no_grad()
def test_generate(generator):
    model = model_of("llama")
    ids = tokens(generator, 2, 60)
    for options in ({}, {"num_beams": 2}):
        how = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(ids), **options}
        out = model.generate(ids, **{CACHE_ARGUMENT: offsets_cache(model.config)}, **how)
        model.set_attn_implementation("sdpa")
        want = model.generate(ids, **{CACHE_ARGUMENT: offsets_cache(model.config)}, **how)
        model.set_attn_implementation("tq4")
        assert torch.equal(out, want)


def test_wrong_arguments():
    config = make_config("llama")
    with pytest.raises(ValueError, match="key_scales must come with key_offsets=True"):
        TurboQuantCache(config, key_offsets=False, key_scales={0: torch.ones(2, 16)})
    with pytest.raises(TypeError, match="key_offsets must be a bool"):
        TurboQuantCache(config, key_offsets=1)
    cache = offsets_cache(config, key_scales={0: torch.ones(3, 16)})
    with pytest.raises(ValueError, match=r"key_scales must have shape \[2, 16\], got \[3, 16\]"):
        cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
