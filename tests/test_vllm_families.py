"""Mixtures of layers in vLLM's engine: recurrent states beside attention, two head dimensions, shared caches, sinks.

What starts has pages of one size, or packed ones side by side, and none as large as bf16 would have them; what runs says what
transformers says over the same cache.
"""

from __future__ import annotations

import pytest
import torch

from vllm_engine_cases import (  # isort: skip  (skips where there is no engine)
    DEVICE,
    Engine,
    one_process,  # noqa: F401  (fixture)
    random_prompts,
)
import transformers

from engine_gate import Gate
from hf_models import VOCABULARY
from turboquant_vllm import PagedTQ4Cache
from turboquant_vllm.hf import register

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {**SIZES, "head_dim": 64}
MIXED = {"sliding_window": 40, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
CONV = {"conv_dim": 128, "block_dim": 128, "block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0, "norm_eps": 1e-5}
GEMMA = {**HEADS, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}

# Configuration, architecture; head dimension of the largest page, how many of these a block has, whether pages of several sizes
# stand side by side in it.
MODELS = {
    "gpt_oss": (
        lambda: transformers.GptOssConfig(**HEADS, **MIXED, num_local_experts=4, num_experts_per_tok=2),
        "GptOssForCausalLM",
        (64, 1, False),
    ),
    "gemma3n": (
        lambda: transformers.Gemma3nTextConfig(
            **{**GEMMA, "num_hidden_layers": 6, "intermediate_size": [128] * 6},
            sliding_window=40,
            layer_types=["sliding_attention", "full_attention"] * 3,
            num_kv_shared_layers=2,
            laurel_rank=8,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 6,
        ),
        "Gemma3nForCausalLM",
        (64, 2, False),
    ),
    "gemma4": (
        lambda: transformers.Gemma4TextConfig(
            **GEMMA, **MIXED, global_head_dim=128, num_global_key_value_heads=2, num_kv_shared_layers=0
        ),
        "Gemma4ForCausalLM",
        (128, 1, True),
    ),
    "lfm2": (
        lambda: transformers.Lfm2Config(**SIZES, **CONV, layer_types=["conv", "full_attention", "conv", "full_attention"]),
        "Lfm2ForCausalLM",
        (32, 2, False),
    ),
    "falcon_h1": (
        lambda: transformers.FalconH1Config(**HEADS, **MAMBA, mamba_d_ssm=256),
        "FalconH1ForCausalLM",
        (64, 4, False),
    ),
    "qwen3_next": (
        lambda: transformers.Qwen3NextConfig(
            **HEADS,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        ),
        "Qwen3NextForCausalLM",
        (64, 1, False),
    ),
    "granite4": (
        lambda: transformers.GraniteMoeHybridConfig(
            **SIZES,
            **MAMBA,
            layer_types=["mamba", "attention", "mamba", "mamba"],
            mamba_expand=2,
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=128,
            position_embedding_type="rope",
        ),
        "GraniteMoeHybridForCausalLM",
        (32, 1, False),
    ),
}


def make(family, folder):
    """A random model, saved for vLLM."""
    register()
    build, architecture, _ = MODELS[family]
    config = build()
    config.initializer_range = 0.2
    torch.manual_seed(0)
    given = {"attn_implementation": "tq4", "dtype": torch.bfloat16, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **given).to(DEVICE).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    model.get_input_embeddings().weight.data.mul_(0.05)  # a token must not just repeat itself
    model.config.architectures = [architecture]
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_runs(family, tmp_path, generator):
    model = make(family, tmp_path)
    prompts = random_prompts(generator, 100, 5, 64, 17)
    form = {"exact_prefill": False, "key_offsets": True}
    memory = 2**26
    options = {"max_model_len": 192, "kv_cache_memory_bytes": memory, "block_size": 64}
    with Engine(model=tmp_path, dtype=torch.bfloat16, **form, **options) as engine:
        config = engine.llm.llm_engine.vllm_config
        _, _, (dim, pages, side_by_side) = MODELS[family]
        tokens, blocks = config.cache_config.block_size, config.cache_config.num_gpu_blocks
        page = PagedTQ4Cache.page_bytes(64, 2, dim, True) * (tokens // 64)
        assert page * 3.1 <= 2 * 4 * dim * tokens  # two heads in bf16
        assert blocks == memory // (pages * page)
        assert (config.cache_config.kv_cache_layout == "BLHNC") == side_by_side
        if family == "qwen3_next" and DEVICE == "cpu":  # its operators are not written in Python
            return
        answers = engine.answers(prompts)
    Gate(model, **form).check(prompts, answers)
