"""Tiny configurations of model families: one rule for all, and a table of what single families need beside it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PretrainedConfig

VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, WIDTH, WINDOW = 97, 4, 2, 32, 64, 8
LARGEST_LAYERS = 4

# Fields of any configuration, at any depth, by name. Token ids have a rule of their own, and so have lists by layer.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embedding_size", "emb_dim", "word_embed_proj_dim", "embedding_dim",
         "attention_hidden_size", "lru_width", "input_embedding_size", "output_embedding_size"),
        WIDTH,
    ),
    **dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner", "dim_ff",
         "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "dff", "d_inner", "intermediate_size_mlp",
         "shared_intermediate_size", "dense_intermediate_size", "expert_ffn_hidden_size", "feed_forward_size",
         "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "prompt_mid_dim", "mamba_d_ssm"),
        WIDTH,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
         "num_decoder_attention_heads", "num_encoder_attention_heads", "attention_heads", "swa_num_attention_heads"),
        HEADS,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "num_query_groups", "swa_num_key_value_heads", "kv_n_heads",
         "num_global_key_value_heads"),
        KV_HEADS,
    ),
    **dict.fromkeys(
        ("head_dim", "dim_head", "kv_channels", "attention_head_dim", "d_head", "swa_head_dim", "global_head_dim", "d_kv"),
        HEAD_DIM,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length", "context_length",
         "max_target_positions", "max_source_positions"),
        128,
    ),
    **dict.fromkeys(
        ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "sliding_window_size",
         "local_attention_window_len"),
        WINDOW,
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k", "n_group", "num_expert_group"), 2
    ),
    **dict.fromkeys(("topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "laurel_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "index_head_dim", "rotary_dim", "adapter_rank"), 16),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_topk"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "index_n_heads"), 2),
    "v_head_dim": HEAD_DIM,
    "qk_head_dim": 32,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "altup_num_inputs": 2,
    "first_k_dense_replace": 1,
    "query_pre_attn_scalar": HEAD_DIM,
    "original_max_position_embeddings": 128,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,  # large enough for sharp attention and logits that differ
    "is_decoder": True,
    "use_cache": True,
    "tie_word_embeddings": False,
}  # fmt: skip
_ALWAYS = ("num_key_value_heads", "head_dim", "num_experts_per_tok")  # also where they are None
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "eod_token_id": 2}

# What the rule does not know: by model type, merged into the configuration it makes.
_WINDOWS = ["sliding_attention", "full_attention"]
_ATTENDS = ["linear_attention", "full_attention"]
_QWEN4 = {
    "hc_lowrank": 16, "ple_embed_dim": 16, "ngram_vocab_size_base": 64, "heads_per_ngram": 2, "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32,
    "indexer_budget": 8, "indexer_compress_ratio": 4, "ple_layer_ids": [1],
}  # fmt: skip
_SHARED = {  # the last layers use the keys and values of others
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": _WINDOWS * 2,
    "intermediate_size": [WIDTH] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}
_DOTS3 = {
    "num_key_value_heads": HEADS, "num_local_experts": 4, "index_head_dim": 32, "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": HEAD_DIM,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": HEAD_DIM,
}  # fmt: skip
_GEMMA4 = {"global_head_dim": 512}  # as these models have it, where head_dim is 256
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_groups": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": _MAMBA,
    "granitemoehybrid": {**_MAMBA, "layer_types": _ATTENDS},
    "helium": {"head_dim": WIDTH // HEADS},  # its output projection is as wide as its states
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "layer_types": _WINDOWS * 2,
    },
    "qwen2": {"use_sliding_window": True, "layer_types": _WINDOWS},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": _WINDOWS},
    "qwen3": {"use_sliding_window": True, "layer_types": _WINDOWS},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "gemma3n_text": _SHARED,
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "mamba2": {"n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "n_group": 1},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "roc_bert": {"shape_vocab_size": VOCABULARY, "shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xlnet": {"d_head": 16},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # where its attention looks for them
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": _DOTS3,
    "cohere_compass_text": {
        "layer_types": _WINDOWS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _WINDOWS},
    },
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 16}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * WIDTH},
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_arguments(default: PretrainedConfig) -> dict[str, Any]:
    """Arguments that make a tiny configuration of the kind of ``default``, by the rule alone."""
    fields, given = default.to_dict(), dict[str, Any]()
    known = _names(type(default)) | set(fields)
    count = next((fields[name] for name in _LAYERS if isinstance(fields.get(name), int)), None)
    lists = {
        name: value
        for name in fields
        if isinstance(value := _of(default, name), (list, tuple)) and len(value) == count and count > 1
    }
    chosen = _layers(list(lists.values()))
    for name, value in fields.items():
        inner = _of(default, name)
        if isinstance(inner, PretrainedConfig):
            given[name] = {"model_type": inner.model_type, **tiny_arguments(inner)}
        elif name in lists:
            given[name] = [_smaller(name, lists[name][layer]) for layer in chosen]
        elif name in _LAYERS:
            given[name] = len(chosen)
        elif name in _TOKENS:
            given[name] = _TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            given[name] = VOCABULARY - 1 - len(given) % 10  # some place that no text here uses
        elif name in _SIZES and (value is not None or name in _ALWAYS):
            given[name] = _SIZES[name]
        elif isinstance(value, dict) and "mrope_section" in value:
            given[name] = {**value, "mrope_section": [4, 6, 6]}
    if fields.get("kv_lora_rank"):  # all heads have keys of their own, made of latents; rotations are as wide as their part
        given |= {name: HEADS for name in ("num_key_value_heads",) if name in given}
        given |= {name: _SIZES["qk_rope_head_dim"] for name in ("head_dim",) if name in given}
    return {name: value for name, value in given.items() if name in known}


def tiny_config(kind: type[PretrainedConfig]) -> PretrainedConfig:
    """A tiny configuration of this class."""
    return kind(**_merged(tiny_arguments(kind()), OVERRIDES.get(kind.model_type, {})))


def _of(config: PretrainedConfig, name: str) -> Any:
    """A field, or None where it differs from layer to layer, which configurations of some kinds do not tell."""
    try:
        return getattr(config, name, None)
    except Exception:  # of a class that only some releases have
        return None


def _names(kind: Any) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters)


def _layers(lists: list[Any]) -> list[int]:
    """Layers of the whole model that show all kinds it has, in order; two at least, and not too many."""
    chosen: list[int] = []
    for values in lists:
        kinds = [str(value) for value in values]
        if len(set(kinds)) <= LARGEST_LAYERS:
            chosen += [kinds.index(kind) for kind in sorted(set(kinds), key=kinds.index)
                       if kind not in {kinds[layer] for layer in chosen}]  # fmt: skip
    found = sorted(set(chosen))[:LARGEST_LAYERS]
    spare = (layer for layer in range(LARGEST_LAYERS) if layer not in found)
    return sorted(found + [next(spare) for _ in range(2 - len(found))])


def _smaller(name: str, value: Any) -> Any:
    if name == "num_attention_heads_per_layer":
        return HEADS
    return min(value, WIDTH) if isinstance(value, int) and not isinstance(value, bool) else value


def _merged(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``given`` with ``more``, also within the configurations inside."""
    inner = {
        name: _merged(given[name], value) if isinstance(value, dict) and isinstance(given.get(name), dict) else value
        for name, value in more.items()
    }
    return {**given, **inner}
