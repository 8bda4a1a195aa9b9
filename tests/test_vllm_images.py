"""Prompts with images in vLLM's engine, for a model whose positions have three axes (M-RoPE): the shape of Qwen2.5-VL.

Images come as embeddings, so no vision tower runs: how their tokens lie in the cache, and where, is the same.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from vllm_engine_cases import (  # isort: skip  (skips where there is no engine)
    DEVICE,
    Engine,
    noticed,
    one_head_of_another,
    one_process,  # noqa: F401  (fixture)
    random_prompts,
)

pytest.importorskip("torchvision", exc_type=ImportError)  # transformers' processors of images and videos import it

import transformers
from tokenizers import Tokenizer, models

from engine_gate import Gate
from hf_models import VOCABULARY
from turboquant_vllm.hf import register
from turboquant_vllm.vllm.layer import PagedLayer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

IMAGE, VIDEO, START, END = 90, 91, 92, 93  # above all tokens of `texts`
SPECIAL = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}
WITH_IMAGES = {"skip_tokenizer_init": False, "enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0, "video": 0}}
GRIDS = ((1, 6, 8), (1, 10, 6))  # time, height, width in patches, of which 2 x 2 are one token


def make(folder):
    """A random model, saved for vLLM with a processor."""
    register()
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config.text_config.initializer_range = 0.2
    torch.manual_seed(0)
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    attention = {"": "tq4", "text_config": "tq4", "vision_config": "eager"}
    model = kind._from_config(config, attn_implementation=attention, dtype=torch.bfloat16).to(DEVICE).eval()
    for name, parameter in model.named_parameters():
        if "language_model.layers" in name and name.endswith("proj.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.01)  # a token must not just repeat itself
    model.lm_head.weight.data[IMAGE : END + 1] = 0  # least likely: an answer is a text
    model.config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({SPECIAL.get(n, f"t{n}"): n for n in range(VOCABULARY)}, unk_token="t0"))
    transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(),
        transformers.PreTrainedTokenizerFast(tokenizer_object=words),
        transformers.Qwen2VLVideoProcessor(),
    ).save_pretrained(folder)
    return model


def texts(generator, *lengths):
    return [[token % IMAGE for token in prompt] for prompt in random_prompts(generator, *lengths)]


class Images:
    """What stands for the tokens of images: embeddings ``[height * width / 4, hidden]`` of each of :data:`GRIDS`."""

    def __init__(self, generator):
        self.embeddings = [0.01 * torch.randn(h * w // 4, 256, generator=generator).bfloat16() for _, h, w in GRIDS]

    def engine_prompt(self, prompt, indices):
        """For vLLM, which puts an image's tokens in the place of one."""
        embeds = {
            "image_embeds": torch.cat([self.embeddings[index] for index in indices]),
            "image_grid_thw": torch.tensor([GRIDS[index] for index in indices]),
        }
        return {"prompt_token_ids": prompt, "multi_modal_data": {"image": embeds}}

    def unfolded(self, prompt, indices):
        counts = iter([len(self.embeddings[index]) for index in indices])
        return [one for token in prompt for one in ([IMAGE] * next(counts) if token == IMAGE else [token])]

    def inputs(self, model, tokens, start):
        """For transformers: embeddings and positions of a sequence from place ``start`` on."""
        ids = torch.tensor([tokens], device=model.device)
        of_count = {len(one): (one, grid) for one, grid in zip(self.embeddings, GRIDS, strict=True)}
        found = [of_count[len(list(run))] for token, run in itertools.groupby(tokens) if token == IMAGE]
        embeds = model.get_input_embeddings()(ids)
        grids = None
        if found:
            embeds[ids == IMAGE] = torch.cat([one for one, _ in found]).to(embeds)
            grids = torch.tensor([grid for _, grid in found], device=model.device)
        positions, _ = model.model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=grids)
        return {"inputs_embeds": embeds[:, start:], "position_ids": positions[..., start:]}

    def plain_positions(self, model, tokens, start):
        """What would be wrong: positions that know of no images."""
        given = self.inputs(model, tokens, start)
        return {**given, "position_ids": torch.arange(start, len(tokens), device=model.device).expand(3, 1, -1)}


@pytest.mark.parametrize(
    ("key_offsets", "fault"),
    [(True, None), (False, None), (False, one_head_of_another), (False, Images.plain_positions)],
)
def test_texts_and_images(key_offsets, fault, tmp_path, generator, monkeypatch):
    model, images = make(tmp_path), Images(generator)
    form = {"exact_prefill": False, "key_offsets": key_offsets}
    prompts = texts(generator, 100, 5, 40, 70, 90)
    shown = [(), (), (0,), (1, 0), (1,)]
    for prompt, indices in zip(prompts, shown, strict=True):
        for place in range(len(indices)):
            prompt[7 + 20 * place : 10 + 20 * place] = [START, IMAGE, END]
    given = [images.engine_prompt(*one) if one[1] else one[0] for one in zip(prompts, shown, strict=True)]
    unfolded = [images.unfolded(*one) for one in zip(prompts, shown, strict=True)]
    if fault is one_head_of_another:
        right = PagedLayer.attend
        monkeypatch.setattr(PagedLayer, "attend", lambda *args, **where: fault(right, *args, **where))
    options = {"max_model_len": 192, "kv_cache_memory_bytes": 2**24, "block_size": 64}
    with Engine(model=tmp_path, dtype=torch.bfloat16, **form, **options, **WITH_IMAGES) as engine:
        answers = engine.answers(given)
    inputs = images.plain_positions if fault is Images.plain_positions else images.inputs
    with noticed(fault):
        Gate(model, **form, inputs=inputs).check(unfolded, answers)
