"""Every operation in plain PyTorch: the definition that the kernels are tested against, and the CPU backend.

Layout, for a head dimension D (see docs/architecture.md for the whole contract):

- codes: uint8 ``[..., D // 2]``; byte i holds coordinate 2i in its high nibble and 2i + 1 in its low nibble;
- norms: float32 ``[...]``, one per vector;
- a vector is ``norm * centroids[codes] @ rotation``.

Arithmetic is float32, or float64 where the first argument is float64.
"""

from __future__ import annotations

from typing import Any

import torch

from turboquant_vllm.autocast import without_autocast
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.records import GROUP, NO_MASKS, Masks, Operand, Sequences, Tables
from turboquant_vllm.reference_codes import compress, compute_dtype, decompress, rotated, unpack_codes
from turboquant_vllm.reference_keys import compress_keys, decompress_keys, read_rotated, rotate_queries, store_keys

__all__ = [
    "attention",
    "compress",
    "compress_keys",
    "decompress",
    "decompress_keys",
    "fill_paged_attention",
    "merge_attention_states",
    "paged_attention",
    "store",
    "unpack_codes",
]


@without_autocast
def store(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedTQ4Cache,
    slot_mapping: torch.Tensor,
    tables: Tables,
    boundaries: torch.Tensor,
    scale: str = "norm",
    previous_slots: torch.Tensor | None = None,
) -> None:
    """Compress keys and values into the slots of pages.

    Args:
        k, v: ``[tokens, H_kv, D]``, any floating dtype.
        cache: pages of ``H_kv`` heads and vectors of D coordinates; with offsets, keys are written as
            :func:`turboquant_vllm.reference_keys.store_keys` says.
        slot_mapping: ``[tokens]``, int32 or int64, ``page * page_size + place``; a token whose slot is not in the cache, as
            -1, is left out. No two tokens have the same slot.
        tables: rotation and levels.
        boundaries: float32 ``[15]``, ascending.
        scale: as in :func:`compress`.
        previous_slots: of keys with offsets.
    """
    assert tables.rotation is not None
    kept = (slot_mapping >= 0) & (slot_mapping < cache.num_slots)
    slot = slot_mapping[kept].long()
    page, place = slot // cache.slots_per_page, slot % cache.slots_per_page
    if cache.has_offsets:
        store_keys(k, cache, slot_mapping, previous_slots, tables, boundaries, scale)
    for x, (codes, norms, *_) in ((k, cache.keys), (v, cache.values))[cache.has_offsets :]:
        assert norms is not None
        packed = compress(x[kept], tables.rotation, boundaries, tables.centroids, scale)
        codes[page, :, place], norms[page, :, place] = packed


@without_autocast
def attention(
    q: torch.Tensor,
    k: Operand,
    v: Operand,
    tables: Tables,
    sm_scale: float,
    masks: Masks = NO_MASKS,
    *,
    block: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed or dense keys and values, streaming over blocks of keys.

    Args:
        q: ``[B, H_q, N_q, D]``; query head h reads key/value head ``h // (H_q // H_kv)``.
        k, v: keys and values ``[B, H_kv, N_kv, D]``.
        tables: what reads those of them that are packed.
        sm_scale: factor on the scores.
        masks: is_causal: query i sees keys ``0 .. N_kv - N_q + i`` (aligned to the bottom right);
            sliding_window: with is_causal, of those the last ``sliding_window`` alone; None means all;
            softcap: scores, times sm_scale, become ``softcap * tanh(score / softcap)``; None leaves them;
            sinks: float32 ``[H_q]``, for each head the logit of one more key whose value is zero, seen by every query;
            neither scaled nor capped.
        block: keys per step, a multiple of 64 where keys have offsets; the memory used grows with ``N_q * block``.

    Returns:
        out in q's dtype and shape, and lse ``[B, H_q, N_q]``, the natural logarithm of the sum of exponentials, the sink's
        among them. A query that sees no key has zeros, and its sink or -inf.

        A NaN in the norm of a key or value that a query sees reaches its row, and so does an Inf in a value's; an Inf in a
        key's is a score of +-Inf (+-softcap, where given): NaN, or a weight of zero.
    """
    is_causal, sliding_window, softcap, sinks, _ = masks
    compute = compute_dtype(q)
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.data.shape[1:3]
    group = num_heads // num_kv_heads

    query = rotate_queries(q, num_kv_heads, tables) if k.is_packed else q.to(compute)
    query = query.reshape(batch, num_kv_heads, group * q_len, head_dim) * sm_scale  # rows: head of the group, position
    last = torch.arange(q_len, device=q.device).repeat(group) + (kv_len - q_len if is_causal else kv_len)
    begin = 0
    if sliding_window is not None:
        assert is_causal
        begin = max(0, kv_len - q_len + 1 - sliding_window) // GROUP * GROUP  # where a group begins

    shape = (batch, num_kv_heads, group * q_len)
    top = torch.full(shape, float("-inf"), dtype=compute, device=q.device)
    total = torch.zeros(shape, dtype=compute, device=q.device)
    acc = torch.zeros((*shape, head_dim), dtype=compute, device=q.device)
    if sinks is not None:
        top = sinks.to(compute).reshape(num_kv_heads, group).repeat_interleave(q_len, -1).expand(shape)
        total = (top != float("-inf")).to(compute)
    for start in range(begin, kv_len, block):
        stop = min(start + block, kv_len)
        keys, key_scale = _tile(k, tables, start, stop, compute)
        values, value_scale = _tile(v, tables, start, stop, compute)
        key = torch.arange(start, stop, device=q.device)
        visible = key <= last[:, None]
        if sliding_window is not None:
            visible &= key > last[:, None] - sliding_window
        score = query @ keys.transpose(-1, -2) * key_scale
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        score = score.masked_fill(~visible, float("-inf"))
        new_top = torch.maximum(top, score.amax(-1))
        anchor = torch.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        p = torch.exp(score - anchor.unsqueeze(-1))
        keep = torch.exp(top - anchor)
        total = total * keep + p.sum(-1)
        # A hidden value's scale never enters, not even as 0 * NaN.
        weight = (p * value_scale).masked_fill(~visible, 0.0)
        acc = acc * keep.unsqueeze(-1) + weight @ values
        top = new_top

    seen = total != 0  # NaN counts as seen
    out = torch.where(seen.unsqueeze(-1), acc / total.unsqueeze(-1), 0.0)
    if v.is_packed:
        assert tables.rotation is not None
        out = rotated(out, tables.rotation.T)
    lse = torch.where(seen, top + total.log(), float("-inf"))
    return out.reshape(q.shape).to(q.dtype), lse.reshape(batch, num_heads, q_len)


@without_autocast
def paged_attention(
    q: torch.Tensor, cache: PagedTQ4Cache, sequences: Sequences, tables: Tables, sm_scale: float, masks: Masks = NO_MASKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch of sequences over pages of packed keys and values, one sequence after the other.

    Args:
        q: ``[T, H_q, D]``, the query tokens of all sequences one after the other.
        cache: the pages, ``H_kv`` key/value heads.
        sequences: where they lie. An entry of the block table that names no page is taken for the nearest that exists, and a
            length beyond what the table has room for for that.
        tables, sm_scale, masks: as in :func:`attention`.

    Returns:
        out in q's dtype and shape, and lse ``[T, H_q]``; zeros and -inf for tokens of no sequence.
    """
    block_table = sequences.block_table
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=compute_dtype(q), device=q.device)
    room = block_table.shape[1] * cache.page_size if cache.num_pages else 0
    starts = sequences.cu_seqlens_q.clamp(0, q.shape[0]).tolist()
    for sequence, length in enumerate(sequences.seq_lens.clamp(0, room).tolist()):
        tokens = slice(starts[sequence], max(starts[sequence], starts[sequence + 1]))
        used = block_table[sequence, : -(-length // cache.page_size)].long().clamp(0, max(cache.num_pages - 1, 0))

        def gather(pages: Operand, used: torch.Tensor = used, length: int = length) -> Operand:
            """``[num_pages, H_kv, page_size, ...]`` as ``[1, H_kv, length, ...]``."""
            return pages.each(lambda x: x[used].transpose(0, 1).flatten(1, 2)[None]).tokens(0, length)

        query = q[tokens].transpose(0, 1)[None]
        own = masks if masks.windows is None else masks._replace(sliding_window=int(masks.windows[sequence]))
        some, some_lse = attention(query, gather(cache.keys), gather(cache.values), tables, sm_scale, own)
        out[tokens], lse[tokens] = some[0].transpose(0, 1), some_lse[0].T
    return out, lse


def fill_paged_attention(q: torch.Tensor, *call: Any) -> None:
    """As :func:`paged_attention`, into ``out`` and ``lse``, the last two arguments."""
    *inputs, out, lse = call
    for target, found in zip((out, lse), paged_attention(q, *inputs), strict=True):
        target.copy_(found)


@without_autocast
def merge_attention_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention over disjoint sets of keys into attention over their union.

    Args:
        outs: ``[S, ..., D]``, the S partial results.
        lses: ``[S, ...]``, their log-sum-exps (natural logarithm); -inf marks a part that saw no key.

    Returns:
        out ``[..., D]`` in ``outs``' dtype, and lse ``[...]`` in ``lses``' dtype.
    """
    compute = compute_dtype(lses)
    lse = torch.logsumexp(lses.to(compute), 0)
    weight = torch.exp(lses.to(compute) - torch.where(lse == float("-inf"), 0.0, lse)).unsqueeze(-1)
    # Only a part that saw nothing is left out: a NaN is kept, however small its part's weight.
    seen = (lses != float("-inf")).unsqueeze(-1)
    out = (torch.where(seen, outs.to(compute), 0.0) * weight).sum(0)
    return out.to(outs.dtype), lse.to(lses.dtype)


def _tile(x: Operand, tables: Tables, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values ``start:stop`` as ``[B, H_kv, n, D]``, and the factor ``[B, H_kv, 1, n]`` on their scores or weights."""
    one = torch.ones((), dtype=dtype, device=x.data.device)
    if x.norms is None:
        return x.data[:, :, start:stop].to(dtype), one
    assert tables.centroids is not None
    if x.groups is not None:
        return read_rotated(x.tokens(start, stop - start), tables.centroids, dtype), one
    levels = tables.centroids.to(dtype)[unpack_codes(x.data[:, :, start:stop])]
    return levels, x.norms[:, :, None, start:stop].to(dtype)
