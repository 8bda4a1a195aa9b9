"""Tiny random models of many families, and the cache that defines what TurboQuantCache must compute."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
from transformers.masking_utils import eager_mask

from turboquant_vllm import TQ4Codec
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, register

VOCABULARY, WINDOW = 97, 8
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {**_COMMON, "head_dim": 32}
_MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_LLAMA4 = {
    **_EXPERTS,
    "intermediate_size_mlp": 64,
    "attention_chunk_size": WINDOW,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "moe_layers": [],
    "use_qk_norm": True,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_SHARED = {
    **_MIXED,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": _MIXED["layer_types"] * 2,
    "intermediate_size": [64] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": VOCABULARY}

# Family: class of the configuration, its arguments, and an attention of transformers that handles all of them.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _HEADS, "sdpa"),
    "mistral": ("MistralConfig", {**_HEADS, "sliding_window": WINDOW}, "sdpa"),
    "qwen2": ("Qwen2Config", {**_COMMON, "hidden_size": 128, "use_sliding_window": True, **_MIXED}, "sdpa"),
    "qwen3": ("Qwen3Config", _HEADS, "sdpa"),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_COMMON, **_MIXED, "hidden_size": 128, "use_sliding_window": True, "num_experts": 2, "num_experts_per_tok": 1,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "sdpa",
    ),
    "gemma2": ("Gemma2Config", {**_HEADS, **_MIXED, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 32}, "eager"),
    "gemma3": ("Gemma3TextConfig", {**_HEADS, **_MIXED, "query_pre_attn_scalar": 32}, "sdpa"),
    "phi3": ("Phi3Config", {**_COMMON, "hidden_size": 128}, "sdpa"),
    "gpt_oss": ("GptOssConfig", {**_HEADS, **_EXPERTS, **_MIXED}, "eager"),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "hidden_size": 128}, "sdpa"),
    "gpt2": ("GPT2Config", {**_GPT2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "eager"),
    "llama4": ("Llama4TextConfig", {**_HEADS, **_LLAMA4}, "sdpa"),
    "deepseek_v3": ("DeepseekV3Config", {**_COMMON, **_LATENT}, "sdpa"),
    "gemma3n": ("Gemma3nTextConfig", {**_HEADS, **_SHARED}, "sdpa"),  # its last layers use the keys and values of others
    "trained": ("LlamaConfig", {}, "sdpa"),  # the model of the demo
}  # fmt: skip

# Of models with recurrent states: in layers of their own, or side by side with attention.
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_ZAMBA2: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 128, "attention_head_dim": 32,
    "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "mamba_d_state": 8, "chunk_size": 8, "adapter_rank": 16,
}  # fmt: skip
HYBRIDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon_h1": ("FalconH1Config", {**_COMMON, **_MAMBA}, "sdpa"),
    "zaya": (
        "ZayaConfig",
        {**_HEADS, "layer_types": ["hybrid_sliding", "hybrid"], "sliding_window": WINDOW, "num_experts": 4,
         "num_experts_per_tok": 1, "moe_intermediate_size": 64},
        "sdpa",
    ),
    "bamba": ("BambaConfig", {**_COMMON, **_MAMBA, "attn_layer_indices": [1]}, "sdpa"),
    "lfm2": ("Lfm2Config", {**_COMMON, "layer_types": ["conv", "full_attention"]}, "sdpa"),
}  # fmt: skip

# Of families that attend in their own way, whatever they are asked for: class of the configuration, its arguments.
_CODEGEN = {**_GPT2, "n_head": 4, "rotary_dim": 16}
OUTSIDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 2, "hidden_size": 64}),
    "mpt": ("MptConfig", {"n_layers": 2, "n_heads": 2, "d_model": 64, "max_seq_len": 64}),
}
# And of those that look "tq4" up among attentions of their own, and do not find it.
REFUSING: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("FalconConfig", {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}),
    "falcon_alibi": ("FalconConfig", {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "alibi": True}),
}
_GPTJ = {**_GPT2, "rotary_dim": 16}
if Version(transformers.__version__) >= Version("5.24"):
    _TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    HYBRIDS["zamba2"] = ("Zamba2Config", {**_COMMON, **_ZAMBA2}, "sdpa")  # which earlier releases do not run with all calls
    FAMILIES["gptj"] = ("GPTJConfig", {**_GPTJ, **_TOKENS}, "sdpa")
    FAMILIES["codegen"] = ("CodeGenConfig", {**_CODEGEN, **_TOKENS}, "sdpa")
else:
    REFUSING["gptj"] = ("GPTJConfig", _GPTJ)
    OUTSIDERS["codegen"] = ("CodeGenConfig", _CODEGEN)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import this: more threads only wait for one another on models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def oracle_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as its formula says, in the query's dtype, for an additive mask ``[B, 1, N_q, N_kv]``."""
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(group, 1))
    scores = scores * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks.to(scores.dtype)], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value.repeat_interleave(group, 1)).contiguous(), None


def make_config(family: str) -> Any:
    """The configuration of a tiny model."""
    kind, arguments, _ = {**FAMILIES, **HYBRIDS}[family]
    if family == "trained":
        return transformers.AutoConfig.from_pretrained(MODEL)
    return getattr(transformers, kind)(**copy.deepcopy(arguments))


def make_model(family: str, attention: str = "tq4", dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A random model of ``family``, the same for the same seed, or the trained one; attention "oracle" is ours, above.

    In float64, where rounding moves no coordinate over the boundary between two codes.
    """
    register()
    transformers.AttentionInterface.register("oracle", oracle_attention)
    transformers.AttentionMaskInterface.register("oracle", eager_mask)
    config = make_config(family)
    # Large enough for sharp attention and logits that differ, where the default would make all tokens alike.
    config.initializer_range = 0.2
    torch.manual_seed(seed)
    implementations = {"attn_implementation": attention, "experts_implementation": "eager"}
    if family == "trained":
        return transformers.AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation=attention, dtype=dtype).eval()
    model = transformers.AutoModelForCausalLM.from_config(config, **implementations).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return model.to(dtype)


def tokens(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Random token ids ``shape`` that no model here takes for special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def stock_attention(family: str) -> str:
    """An attention implementation of transformers that handles all of a family's arguments."""
    return FAMILIES[family][2]


# Caches of plain TQ4, whose keys are what compress and decompress leave of them, each by itself.
plain_cache = functools.partial(TurboQuantCache, key_offsets=False)
plain_static_cache = functools.partial(TurboQuantStaticCache, key_offsets=False)


class _RoundTrip:
    """Passes what a layer stores through compress and decompress; its first call returns the states as they came."""

    exact_prefill = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        first = self.get_seq_length() == 0
        codec = TQ4Codec(key_states.shape[-1], device=key_states.device)
        stored = (codec.decompress(codec.compress(x), x.dtype) for x in (key_states, value_states))
        returned = super().update(*stored, *args, **kwargs)
        return (key_states, value_states) if first and self.exact_prefill else returned


# Layers of transformers' growing cache that keep keys and values, and the same behind a round trip.
_ROUND_TRIPS = {
    kind: type(f"RoundTrip{kind.__name__}", (_RoundTrip, kind), {})
    for kind in (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
    )
}


def reference_cache(
    model: Any, *, exact_prefill: bool = True, seed: int = 0, skip_layers: tuple[int, ...] = ()
) -> DynamicCache:
    """A dense cache whose keys and values have been through compress and decompress, as those of a plain cache have."""
    cache = DynamicCache(config=model.config)
    if getattr(model.config, "kv_lora_rank", None) is not None:
        return cache
    for index, layer in enumerate(cache.layers):
        if index in skip_layers:
            continue
        if type(layer) not in _ROUND_TRIPS:
            continue
        options = {name: getattr(layer, name) for name in ("sliding_window", "number_of_states") if hasattr(layer, name)}
        cache.layers[index] = _ROUND_TRIPS[type(layer)](**options)
        cache.layers[index].exact_prefill = exact_prefill
    return cache


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Models normalise in float32, also where all else is float64; quantisation moves these logits 10000 times as far."""
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-6, f"relative error {error:.1e}"


def generated(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> Any:
    """Result of eight greedy tokens, with the logits of each step."""
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(
        ids, **{CACHE_ARGUMENT: cache}, output_logits=True, return_dict_in_generate=True, eos_token_id=None, **options
    )


def assert_same_generation(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert_same(ours, theirs)
