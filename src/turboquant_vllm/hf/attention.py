"""The attention function "tq4" for transformers: packed keys and values are read as they are, dense ones as usual."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from turboquant_vllm import ops, reference
from turboquant_vllm.attention import tq4_attention
from turboquant_vllm.checks import check_masks, check_sm_scale
from turboquant_vllm.codec import TQ4Keys, TQ4Tensor
from turboquant_vllm.cuda.decode import Operands
from turboquant_vllm.hf.dense import dense_attention
from turboquant_vllm.hf.pages import PagedTensor, SpanMask, attend_pages
from turboquant_vllm.hf.tensors import CausalMask, DeferredTensor, PackedTensor, some_of, tokens_before, unpack
from turboquant_vllm.limits import why_not_decode
from turboquant_vllm.records import Masks, Operand, Tables

__all__ = ["ATTENTION_NAME", "attention_forward", "check_options", "register"]

ATTENTION_NAME = "tq4"

# Arguments that change the result: a bias of the scores, sinks of each query, the keys or blocks that sparse attention
# chooses, and transformers' own pages.
_NOT_HANDLED = ("position_bias", "sinks", "indices", "block_indices", "cache")
_TAKES_ANY = 'attn_implementation="eager" takes the same cache'


def register() -> None:
    """Make ``attn_implementation="tq4"`` known to transformers, together with its mask function. Twice does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from turboquant_vllm.hf.masks import attention_mask

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature of transformers' attention interface.

    Args:
        module: the attention layer; its ``is_causal`` counts where the argument is None.
        query: ``[B, H_q, N_q, D]``.
        key, value: ``[B, H_kv, N_kv, D]``, packed by a TurboQuantCache or dense.
        attention_mask: a mask of :func:`turboquant_vllm.hf.masks.attention_mask`; or any of shape ``[B, 1 or H_q, N_q, N_kv]``,
            bool or additive, which takes decompressed keys and values; None: causal, aligned to the bottom right, or
            everything visible where the layer is not causal.
        dropout: 0.
        scaling: factor on the scores; None means ``1 / sqrt(D)``.
        sliding_window: keys that a query sees at most; counts where the mask does not say.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        s_aux: one logit per query head, ``[H_q]``, that takes part in the softmax and has no value.

    Returns:
        ``[B, N_q, H_q, D]`` in the query's dtype, and None for the weights, which are never formed. Queries that are padding
        give zeros.

    Raises:
        TypeError: a mask of integers, which may mean either.
        ValueError: dropout, weights, or an argument that would change the result and is not handled.
    """
    check_options({"dropout": dropout, **kwargs})
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    sinks = None if s_aux is None else s_aux.float()
    options: dict[str, Any] = {"sm_scale": scaling, "softcap": softcap, "sinks": sinks}

    if attention_mask is None:
        window = sliding_window if is_causal else None
        output = _attend(query, key, value, is_causal=is_causal, window=window, **options)
    elif isinstance(attention_mask, SpanMask) and isinstance(key, PagedTensor) and _belong_together(key, value):
        output = attend_pages(query, key, attention_mask, **options)
    elif not isinstance(attention_mask, CausalMask):
        if isinstance(attention_mask, SpanMask):
            attention_mask = attention_mask.written()
        elif attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise TypeError(f"attention_mask must be bool, or floating-point and additive, got {attention_mask.dtype}")
        output = dense_attention(query, _dense(key), _dense(value), mask=attention_mask, **options)
    elif attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        want, got = list(attention_mask.shape[2:]), [query.shape[2], key.shape[2]]
        raise ValueError(f"attention_mask: expected {want} queries and keys, got {got}: the model changes them on the way")
    elif attention_mask.visible is None:
        output = _attend(query, key, value, is_causal=True, window=attention_mask.window, **options)
    else:
        output = _attend_padded(query, key, value, attention_mask, options)
    return output.transpose(1, 2).contiguous(), None


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError if among the arguments of :func:`attention_forward` is one that it does not handle."""
    if options.get("dropout"):
        raise ValueError(f"dropout: expected 0 (the cache is for inference), got {options['dropout']}")
    if options.get("output_attentions"):
        raise ValueError("output_attentions: expected False (the weights are never formed), got True")
    for name in _NOT_HANDLED:
        if options.get(name) is not None:
            misnamed = name == "cache" and hasattr(options[name], "layers")  # a model that does not know the name passes it on
            advice = "this release of transformers calls it past_key_values" if misnamed else _TAKES_ANY
            raise ValueError(f"{name}: expected None, got {type(options[name]).__name__}; {advice}")


def _belong_together(key: PagedTensor, value: torch.Tensor) -> bool:
    """Whether the pages of these keys hold these values: some models change values on the way."""
    return isinstance(value, PagedTensor) and value.buffer is key.buffer and (key.which, value.which) == (0, 1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    sm_scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    is_causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Attention of queries that are the last of their sequences, ``[B, H_q, N_q, D]``."""
    if window is not None and key.shape[2] <= window:
        window = None
    is_causal = is_causal and (query.shape[2] > 1 or window is not None)
    before = tokens_before(key) if isinstance(key, PackedTensor) else 0
    hidden = not before  # groups are read whole, so what comes before the keys must be before all windows
    if before and query.shape[2] == 1:
        is_causal, window, hidden = True, min(key.shape[2], window or key.shape[2]), True
    elif before and is_causal and window is not None:
        hidden = query.shape[2] + window - 1 <= key.shape[2]
    masks: dict[str, Any] = {"is_causal": is_causal, "sliding_window": window, "softcap": softcap, "sinks": sinks}
    if not (isinstance(key, PackedTensor) and isinstance(value, PackedTensor) and hidden and _lie_alike(key, value)):
        return dense_attention(query, _dense(key), _dense(value), sm_scale=sm_scale, **masks)
    if not torch.compiler.is_compiling() and _decodes(query.device, query.dtype, query.shape, key.shape[1]):
        return _decode(query, key, value, before, sm_scale, is_causal, window, softcap, sinks)
    keys, codec = unpack(key, before)
    values, _ = unpack(value, before)
    if query.dtype == torch.float64:  # which no kernel takes
        scale = check_sm_scale(sm_scale, query.shape[-1])
        tables = codec.key_tables if isinstance(keys, TQ4Keys) else codec.tables
        return reference.attention(query, Operand(*keys), Operand(*values), tables, scale, Masks(**masks))[0]
    assert isinstance(values, TQ4Tensor)
    return tq4_attention(query, keys, values, codec, sm_scale=sm_scale, **masks)


def _lie_alike(key: PackedTensor, value: PackedTensor) -> bool:
    """Whether values begin where these keys do, and are none that have offsets: some models change them about."""
    return value.groups is None and value.first == key.first


@lru_cache(maxsize=1024)
def _decodes(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], num_kv_heads: int) -> bool:
    """Whether the native kernel serves queries of ``shape [B, H_q, N_q, D]`` over what a cache keeps."""
    rows = shape[1] // num_kv_heads * shape[2]
    return not (ops.why_not_cuda(device) or why_not_decode(dtype, shape[3], rows)) and shape[0] > 0


def _decode(
    query: torch.Tensor,
    key: PackedTensor,
    value: PackedTensor,
    before: int,
    sm_scale: float | None,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`_attend` of few queries on a GPU, where the host's time counts: nothing is viewed or checked needlessly.

    ``before`` more tokens are read, which the window hides.
    """
    if softcap is not None or sinks is not None:  # these come from the model, all else from the cache
        check_masks(is_causal, window, softcap, sinks, query.shape[1], query.device)
    operands = key.operands
    if operands is None or operands.k is not key.codes or operands.v is not value.codes:
        keys = Operand(key.codes, key.norms, key.groups, key.steps)
        tables = Tables(key.centroids, key.rotation, key.key_scales)
        operands = Operands(keys, Operand(value.codes, value.norms), tables)
    scale = check_sm_scale(sm_scale, query.shape[3])
    masks = Masks(is_causal, window, softcap, sinks)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for launch in operands.prepare(query, key.count + before, scale, masks, out, None, first=key.first - before):
        launch()
    return out


def _attend_padded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: CausalMask, options: dict[str, Any]
) -> torch.Tensor:
    """As :func:`_attend`, each run of sequences with the same padding by itself, without the padding."""
    if mask.window is not None and any(isinstance(keys, torch.Tensor) for _, keys in mask.parts):
        # The window counts padding between visible keys.
        return dense_attention(query, _dense(key), _dense(value), mask=mask.written(), **options)
    output = query.new_zeros((*query.shape[:3], value.shape[3]))
    earlier = key.shape[2] - query.shape[2]
    for sequences, keys in mask.parts:
        if isinstance(keys, slice):
            queries: slice | torch.Tensor = slice(max(keys.start - earlier, 0), max(keys.stop - earlier, 0))
        else:
            queries = keys[keys >= earlier] - earlier
        some = query[sequences, :, queries]
        if some.numel():
            part = (_part(x, sequences, keys) for x in (key, value))
            output[sequences, :, queries] = _attend(some, *part, is_causal=True, window=mask.window, **options)
    return output


def _part(x: torch.Tensor, sequences: slice, keys: slice | torch.Tensor) -> torch.Tensor:
    """Some keys of some sequences, packed where they are packed."""
    if not isinstance(x, PackedTensor):
        return x[sequences, :, keys]
    if isinstance(keys, slice):
        return some_of(x, sequences, keys)
    if x.groups is not None:
        return x.dense()[sequences, :, keys]
    packed, codec = unpack(x)
    codes, norms = (t[sequences, :, keys] for t in packed[:2])
    return PackedTensor.of(TQ4Tensor(codes, norms), codec, x.dtype)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.dense() if isinstance(x, DeferredTensor) else x
