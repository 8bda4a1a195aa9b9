"""Prompts with images, whose tokens see one another both ways: Gemma 3 and PaliGemma, tiny and random."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from hf_models import (
    VOCABULARY,
    WINDOW,
    assert_same,
    assert_same_generation,
    generated,
    one_thread,  # noqa: F401
    oracle_attention,
    plain_cache,
    plain_static_cache,
    reference_cache,
)
from turboquant_vllm.hf import CACHE_ARGUMENT, register

IMAGE, IMAGE_TOKENS, PATCHES = 90, 4, 16  # the token that stands for a part of an image; how many do; of 16 patches of 4 pixels
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA3 = {**_TEXT, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


@functools.cache
def model_of(family, attention):
    register()
    transformers.AttentionInterface.register("oracle", oracle_attention)
    transformers.AttentionMaskInterface.register("oracle", transformers.masking_utils.eager_mask)
    if family == "gemma3":
        config = transformers.Gemma3Config(
            text_config=copy.deepcopy(_GEMMA3), vision_config={**_VISION, "image_size": 16}, mm_tokens_per_image=IMAGE_TOKENS,
            image_token_id=IMAGE, boi_token_id=91, eoi_token_id=92,
        )  # fmt: skip
        kind = transformers.Gemma3ForConditionalGeneration
    else:
        config = transformers.PaliGemmaConfig(
            text_config={"model_type": "gemma", **copy.deepcopy(_TEXT)}, projection_dim=64, image_token_id=IMAGE,
            vision_config={**_VISION, "model_type": "siglip_vision_model", "image_size": 8, "vision_use_head": False},
        )  # fmt: skip
        kind = transformers.PaliGemmaForConditionalGeneration
    torch.manual_seed(0)
    return (
        kind._from_config(config, attn_implementation={"": attention, "text_config": attention, "vision_config": "eager"})
        .double()
        .eval()
    )


def prompt(family, generator, length=20):
    """A text around an image, of two sequences; what a processor makes of it."""
    ids = torch.randint(3, 80, (2, length), generator=generator)
    first = 0 if family == "paligemma" else 5
    ids[:, first : first + IMAGE_TOKENS] = IMAGE
    kinds = (ids == IMAGE).long()
    if family == "paligemma":  # in whose prefix all tokens see one another
        kinds = torch.zeros_like(ids)
    size = 8 if family == "paligemma" else 16
    pixels = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    return ids, {"pixel_values": pixels, "token_type_ids": kinds}


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.no_grad()
def test_logits_are_those_of_a_dense_cache(family, kind, generator):
    oracle, ours = model_of(family, "oracle"), model_of(family, "tq4")
    ids, image = prompt(family, generator)
    expected = reference_cache(oracle)
    cache = plain_cache(ours.config) if kind == "growing" else plain_static_cache(ours.config, max_cache_len=40)
    more = torch.randint(3, 80, (2, 6), generator=generator)
    for step, part in enumerate((ids, more[:, :1], more[:, 1:])):
        mask = torch.ones(2, expected.get_seq_length() + part.shape[1], dtype=torch.long)
        options = {"attention_mask": mask, **(image if step == 0 else {})}
        want = oracle(part, **{CACHE_ARGUMENT: expected}, **options).logits
        got = ours(part, **{CACHE_ARGUMENT: cache}, **options).logits
        assert_same(got, want)
        if step == 0:  # that the image's tokens see what follows them matters
            causal = oracle(part, **{**options, "token_type_ids": image["token_type_ids"] * 0 + (family == "paligemma")}).logits
            assert (causal - want).abs().max() > 1e-3 * want.abs().max()
    assert cache.packed_layers == [0, 1]


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_generate(family, generator):
    oracle, ours = model_of(family, "oracle"), model_of(family, "tq4")
    ids, image = prompt(family, generator)
    mask = torch.ones_like(ids)
    expected = generated(oracle, reference_cache(oracle), ids, attention_mask=mask, **image)
    assert_same_generation(generated(ours, plain_cache(ours.config), ids, attention_mask=mask, **image), expected)
