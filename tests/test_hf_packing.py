"""Which layers are packed: both caches and `turboquant verify` have it from one place, and say so where it is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, MoshiConfig

from hf_models import FAMILIES, VOCABULARY, assert_same, make_config, make_model, one_thread  # noqa: F401
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache
from turboquant_vllm.hf.packing import why_dense
from turboquant_vllm.quality.attention import cache_format
from turboquant_vllm.quality.caches import known_formats
from turboquant_vllm.quality.formats import TQ4Format
from turboquant_vllm.verify.loading import CachedLayers, check_cache


@pytest.mark.parametrize("make", [TurboQuantCache, lambda config: TurboQuantStaticCache(config, 64)])
def test_a_cache_that_packs_nothing_says_why(make):
    message = "Cache keeps nothing in 4 bits: the layers of this model have multi-head latent attention"
    with pytest.warns(UserWarning, match=message) as seen:
        cache = make(make_config("deepseek_v3"))
    assert cache.packed_layers == []
    assert Path(seen[0].filename) == Path(__file__)  # where the cache was made


@pytest.mark.filterwarnings("error")
def test_a_cache_of_which_nothing_was_asked_says_nothing():
    assert TurboQuantCache(make_config("llama"), skip_layers=(0, 1)).packed_layers == []
    assert TurboQuantCache(make_config("gemma3n")).packed_layers == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*keeps nothing in 4 bits")
def test_growing_and_static_caches_pack_the_same_layers(family):
    config = make_config(family)
    packed = [layer for layer, reason in enumerate(why_dense(config)) if not reason]
    assert TurboQuantCache(config).packed_layers == TurboQuantStaticCache(config, 64).packed_layers == packed


def test_each_layer_that_stays_dense_has_its_reason():
    kinds = ["hybrid", "linear_attention", "full_attention", "conv", "hybrid_sliding"]
    reasons = ["", "linear attention", "", "linear attention", ""]
    assert why_dense(LlamaConfig(num_hidden_layers=5, layer_types=kinds, sliding_window=8)) == reasons


# What verify measures and counts


@pytest.mark.parametrize("dense", [(), (0,), (1,)])
@torch.no_grad()
def test_layers_that_share_follow_the_layer_whose_keys_they_read(dense, generator):
    model = make_model("gemma3n", "sdpa")
    layers = check_cache(model, "a model")
    assert sorted(layers.packed) == TurboQuantCache(model.config).packed_layers == [0, 1]
    assert layers.dense == {}
    ids = torch.randint(3, VOCABULARY, (1, 20), generator=generator)
    cache = TurboQuantCache(model.config, skip_layers=dense, exact_prefill=False, key_offsets=False)
    want = model(ids, **{CACHE_ARGUMENT: cache}).logits
    readers = {*dense, *(reader for reader, layer in ((2, 0), (3, 1)) if layer in dense)}
    with cache_format(model, TQ4Format(dense_layers=readers)):
        assert_same(model(ids, use_cache=False).logits, want)
    with cache_format(model, TQ4Format(dense_layers=dense)):
        changed = (model(ids, use_cache=False).logits - want).abs().max() > 1e-3 * want.abs().max()
    assert changed == bool(dense)  # it matters


def test_bytes_are_counted_once_and_for_layers_with_a_cache():
    layers = CachedLayers(packed={0: (2, 32, 32), 2: (1, 16, 16)}, dense={1: 64})
    plain = next(found for found in known_formats() if found.name == "plain")
    assert layers.bytes_per_token(plain, ()) == 2 * (20 + 20) + (12 + 12) + 128
    assert layers.bytes_per_token(plain, (0,)) == 2 * 128 + (12 + 12) + 128
    assert layers.bytes_per_token(plain, layers.packed) == 2 * 128 + 64 + 128


def test_a_model_of_which_nothing_is_packed_is_not_measured():
    with pytest.raises(ValueError, match=r"kept in 4 bits, a model \(DeepseekV3ForCausalLM\) has multi-head latent attention"):
        check_cache(make_model("deepseek_v3"), "a model")


@torch.no_grad()
def test_attention_beside_a_recurrent_state_is_measured(generator):
    model = make_model("falcon_h1", "sdpa")
    assert check_cache(model, "a model").packed == {0: (2, 16, 16), 1: (2, 16, 16)}
    ids = torch.randint(3, VOCABULARY, (1, 20), generator=generator)
    cache = TurboQuantCache(model.config, exact_prefill=False, key_offsets=False)
    want = model(ids, **{CACHE_ARGUMENT: cache}).logits
    with cache_format(model, TQ4Format()):
        assert_same(model(ids, use_cache=False).logits, want)


def test_masks_without_the_window_of_the_configuration():
    config = MoshiConfig(num_hidden_layers=2)
    assert TurboQuantCache(config).packed_layers == [0, 1]
    with pytest.raises(ValueError, match="got model_type moshi; TurboQuantCache works"):
        TurboQuantStaticCache(config, 64)
