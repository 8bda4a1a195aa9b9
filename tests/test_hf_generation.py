"""Caches made anew for each call of ``generate``, and ways of generating that take no cache of ours."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

from hf_models import VOCABULARY, make_model
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, fresh_cache, register

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def static_cache(model):
    return TurboQuantStaticCache(model.config, 40)


@pytest.fixture
def model():
    register()
    model = make_model("llama")
    model.set_attn_implementation("tq4")
    return model


@pytest.fixture
def ids(generator):
    return torch.randint(3, VOCABULARY, (2, 9), generator=generator)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("make", [TurboQuantCache, static_cache])
def test_each_call_gets_a_cache_of_its_own(model, ids, make, options):
    made = []

    def remembered(model):
        made.append(make(model))
        return made[-1]

    expected = model.generate(ids, **{CACHE_ARGUMENT: make(model)}, **GREEDY, **options)
    for _ in range(2):  # with one cache for both, the second would go on behind the first
        assert torch.equal(model.generate(ids, custom_generate=fresh_cache(remembered), **GREEDY, **options), expected)
    assert [cache.get_seq_length() for cache in made] == [9 + 6 - 1] * 2


def test_prompt_look_up(model, ids):
    ids = ids[:1].repeat(1, 3)
    expected = model.generate(ids, **{CACHE_ARGUMENT: TurboQuantCache(model)}, prompt_lookup_num_tokens=3, **GREEDY)
    got = model.generate(ids, custom_generate=fresh_cache(), prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(got, expected)


def test_a_cache_that_is_passed_too_is_refused(model, ids):
    with pytest.raises(ValueError, match="expected none beside custom_generate"):
        model.generate(ids, custom_generate=fresh_cache(), **{CACHE_ARGUMENT: TurboQuantCache(model)}, **GREEDY)


def test_a_pipeline_over_a_list_of_prompts(model):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = type(model).from_pretrained(MODEL, attn_implementation="tq4")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["def parse_args(", "import", "def parse_args("]
    alone = [write(prompt, **{CACHE_ARGUMENT: TurboQuantCache(model)}, **GREEDY)[0]["generated_text"] for prompt in prompts]
    together = [found[0]["generated_text"] for found in write(prompts, custom_generate=fresh_cache(), **GREEDY)]
    assert together == alone
    assert alone[0] == alone[2]


def test_continuous_batching_is_refused(model):
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    with pytest.raises(ValueError, match=r'tq4"?.* is not supported'):
        model.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(**GREEDY))
