"""TurboQuantCache against a dense cache of the same values: many model families, every way in which generate uses a cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from hf_models import (
    FAMILIES,
    OUTSIDERS,
    REFUSING,
    VOCABULARY,
    assert_same,
    assert_same_generation,
    generated,
    make_model,
    one_thread,  # noqa: F401
    plain_cache,
    plain_static_cache,
    reference_cache,
    stock_attention,
    tokens,
)
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, register

families = pytest.mark.parametrize("family", FAMILIES)


model_of = functools.cache(make_model)


def both(family: str) -> tuple[Any, Any]:
    """The same model with attention as its formula says, and with ours."""
    return model_of(family, "oracle"), model_of(family, "tq4")


@families
@torch.no_grad()
def test_transformers_own_attention_reads_the_same_cache(family, generator):
    stock = model_of(family, stock_attention(family))
    ids = tokens(generator, 2, 23)
    expected, packed = reference_cache(stock), plain_cache(stock.config)
    for start, stop in ((0, 11), (11, 12), (12, 18), (18, 23)):
        part = ids[:, start:stop]
        assert torch.equal(stock(part, **{CACHE_ARGUMENT: packed}).logits, stock(part, **{CACHE_ARGUMENT: expected}).logits)


@families
@torch.no_grad()
def test_any_cutting_of_a_text_gives_the_same_logits_as_a_dense_cache(family, generator):
    oracle, ours = both(family)
    ids = tokens(generator, 2, 23)
    expected, packed = reference_cache(oracle), plain_cache(ours.config)
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, 18), (18, 23)):
        want = oracle(ids[:, start:stop], **{CACHE_ARGUMENT: expected}).logits
        assert_same(ours(ids[:, start:stop], **{CACHE_ARGUMENT: packed}).logits, want)
    if family != "deepseek_v3":
        own = ours.config.num_hidden_layers - getattr(ours.config, "num_kv_shared_layers", 0)
        assert packed.packed_layers == list(range(own))
        assert (want - oracle(ids).logits[:, 18:]).abs().max() > 1e-3 * want.abs().max()  # it is not an exact cache


@families
@torch.no_grad()
def test_without_exact_prefill_chunks_change_nothing(family, generator):
    oracle, ours = both(family)
    ids = tokens(generator, 2, 19)
    want = oracle(ids, **{CACHE_ARGUMENT: reference_cache(oracle, exact_prefill=False)}).logits
    for chunk in (19, 7):
        packed = plain_cache(ours.config, exact_prefill=False)
        got = [ours(part, **{CACHE_ARGUMENT: packed}).logits for part in ids.split(chunk, 1)]
        assert_same(torch.cat(got, 1), want)


@families
@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(family, padding, generator):
    oracle, ours = both(family)
    lengths, longest = (13, 6, 6, 12), 13
    ids = tokens(generator, 4, longest + 8)
    mask = torch.ones(4, longest + 8, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
        if padding == "right":
            mask[row, :longest] = mask[row, :longest].flip(0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected, packed = reference_cache(oracle), plain_cache(ours.config)
    for start, stop in ((0, 9), (9, longest), (longest, longest + 1), (longest + 1, longest + 8)):
        arguments = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        want = oracle(ids[:, start:stop], **{CACHE_ARGUMENT: expected}, **arguments).logits
        real = mask[:, start:stop].bool()
        assert_same(ours(ids[:, start:stop], **{CACHE_ARGUMENT: packed}, **arguments).logits[real], want[real])


@families
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beams", "prefill_chunks"],
)
def test_generate(family, options, generator):
    oracle, ours = both(family)
    ids = tokens(generator, 2, 12)
    mask = torch.ones_like(ids)
    if "prefill_chunk_size" not in options:  # which transformers does not offer for padded batches of some models
        mask[1, :5] = 0
    expected = generated(oracle, reference_cache(oracle), ids, attention_mask=mask, **options)
    actual = generated(ours, plain_cache(ours.config), ids, attention_mask=mask, **options)
    assert_same_generation(actual, expected)


@families
def test_sampled_sequences_of_one_prompt(family, generator):
    oracle, ours = both(family)
    ids = tokens(generator, 1, 12)
    results = []
    for model, cache in ((oracle, reference_cache(oracle)), (ours, plain_cache(ours.config))):
        torch.manual_seed(1)
        results.append(generated(model, cache, ids, num_return_sequences=3, do_sample=True))
    assert_same_generation(*results[::-1])


@families
def test_prompt_lookup_takes_wrong_guesses_back(family, generator):
    oracle, ours = both(family)
    ids = tokens(generator, 1, 5).repeat(1, 4)  # repetitions, so that there is something to look up
    # Guesses belong to the first call, so only without exact prefill do they change nothing.
    expected = generated(oracle, reference_cache(oracle, exact_prefill=False), ids)
    packed = plain_cache(ours.config, exact_prefill=False)
    actual = generated(ours, packed, ids, prompt_lookup_num_tokens=3)
    assert_same_generation(actual, expected)


@families
def test_a_conversation_goes_on_with_the_same_cache_and_starts_again_after_reset(family, generator):
    oracle, ours = both(family)
    first, more, other = tokens(generator, 2, 9), tokens(generator, 2, 5), tokens(generator, 3, 7)
    results = []
    for model, cache in ((oracle, reference_cache(oracle)), (ours, plain_cache(ours.config))):
        one = generated(model, cache, first, max_new_tokens=5)
        two = generated(model, cache, torch.cat([one.sequences, more], 1), max_new_tokens=5)
        if isinstance(cache, TurboQuantCache):
            cache.reset()
            assert cache.get_seq_length() == 0
        else:  # transformers before 5.23 only writes zeros into a dense cache
            cache = reference_cache(oracle)
        results.append((one, two, generated(model, cache, other, max_new_tokens=5)))
    for expected, actual in zip(*results, strict=True):
        assert_same_generation(actual, expected)


@pytest.mark.parametrize("name", [*OUTSIDERS, *REFUSING])
@torch.no_grad()
def test_models_with_attention_of_their_own_get_it_decompressed_or_refuse(name, generator):
    refuses = name in REFUSING
    kind, arguments = {**OUTSIDERS, **REFUSING}[name]
    config = getattr(transformers, kind)(**{"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, **arguments})
    register()
    make = transformers.AutoModelForCausalLM.from_config
    if refuses:
        with pytest.raises(KeyError, match="tq4"):
            make(config, attn_implementation="tq4")
    model = make(config, attn_implementation="eager").eval().double()
    ids = tokens(generator, 2, 14)
    parts = [ids[:, start:stop] for start, stop in ((0, 9), (9, 10), (10, 14))]
    expected = reference_cache(model)
    want = [model(part, **{CACHE_ARGUMENT: expected}).logits for part in parts]
    for attention in ("eager",) if refuses else ("eager", "tq4"):
        model.config._attn_implementation = attention  # which set_attn_implementation refuses for some of these
        packed = plain_cache(model.config)
        for part, logits in zip(parts, want, strict=True):
            assert torch.equal(model(part, **{CACHE_ARGUMENT: packed}).logits, logits)
        assert packed.packed_layers == [0, 1]
        if name == "mpt":  # the only one that takes a cache of fixed size
            static = plain_static_cache(model.config, max_cache_len=20)
            for part, logits in zip(parts, want, strict=True):
                assert_same(model(part, **{CACHE_ARGUMENT: static}).logits, logits)
