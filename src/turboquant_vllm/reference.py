"""Every operation in plain PyTorch: the definition that the kernels are tested against, and the CPU backend.

Layout, for a head dimension D (see docs/architecture.md for the whole contract):

- codes: uint8 ``[..., D // 2]``; byte i holds coordinate 2i in its high nibble and 2i + 1 in its low nibble;
- norms: float32 ``[...]``, one per vector;
- a vector is ``norm * centroids[codes] @ rotation``.

Arithmetic is float32, or float64 where the first argument is float64.
"""

from __future__ import annotations

import torch

from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.records import NO_MASKS, Masks, Operand, Sequences, Tables

__all__ = ["attention", "compress", "decompress", "merge_attention_states", "paged_attention", "store", "unpack_codes"]

# Vectors outside this range are scaled by a power of two before their squares are summed, so that none over- or underflows.
_LARGE, _SMALL, _SHIFT = 1e15, 1e-15, 2.0**100


def compress(
    x: torch.Tensor,
    rotation: torch.Tensor,
    boundaries: torch.Tensor,
    centroids: torch.Tensor | None = None,
    scale: str = "norm",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise vectors: rotate ``x / |x|``, keep each coordinate's cell and one scale.

    Args:
        x: ``[..., D]``, any floating dtype.
        rotation: float32 ``[D, D]``, orthogonal.
        boundaries: float32 ``[15]``, ascending; code = number of boundaries below the coordinate.
        centroids: float32 ``[16]``, the levels that will be read back, each in its own cell; needed by every scale but
            "norm".
        scale: what is kept in ``norms``, with y = x @ rotation.T and c the levels of its codes: "norm" keeps |x|,
            "least_squares" <y, c> / <c, c>, which is nearest to x, and "unbiased" |x|^2 / <y, c>, whose inner product
            with x is |x|^2.

    Returns:
        codes uint8 ``[..., D // 2]`` and norms float32 ``[...]``. The zero vector has norm 0. A vector with a NaN or Inf,
        or too long for float32, has norm NaN: attention cannot overlook that, as it could a score of -Inf.
    """
    x = x.to(_compute_dtype(x))
    largest = x.abs().amax(-1, keepdim=True)
    shift = torch.ones_like(largest)
    shift = torch.where(largest > _LARGE, 1 / _SHIFT, torch.where(largest < _SMALL, _SHIFT, shift))
    scaled = x * shift
    length = scaled.square().sum(-1, keepdim=True).sqrt()
    y = scaled @ rotation.to(x.dtype).T / torch.where(length > 0, length, 1.0)
    # The cell of a NaN is arbitrary, but it is the same in every implementation.
    code = torch.bucketize(y.nan_to_num(nan=-1.0), boundaries.to(x.dtype)).to(torch.uint8)
    codes = code[..., 0::2] << 4 | code[..., 1::2]
    if scale != "norm":
        assert centroids is not None
        levels = centroids.to(x.dtype)[code.long()]
        product = (y * levels).sum(-1, keepdim=True)  # positive, but for the zero vector
        if scale == "least_squares":
            length = length * product / levels.square().sum(-1, keepdim=True)
        else:
            length = length / torch.where(length == 0, 1.0, product)
    norms = (length / shift).squeeze(-1).float()
    return codes, torch.where(norms.isfinite(), norms, float("nan"))


def decompress(
    codes: torch.Tensor, norms: torch.Tensor, centroids: torch.Tensor, rotation: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Reconstruct vectors ``norms * (centroids[codes] @ rotation)`` in ``dtype``, ``[..., D]``.

    Args:
        codes: uint8 ``[..., D // 2]``.
        norms: float32 ``[...]``.
        centroids: float32 ``[16]``, in any order.
        rotation: float32 ``[D, D]``.
        dtype: any floating dtype; float64 computes in float64.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    levels = centroids.to(compute)[unpack_codes(codes)]
    return (levels @ rotation.to(compute) * norms.to(compute).unsqueeze(-1)).to(dtype)


def store(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedTQ4Cache,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor,
    boundaries: torch.Tensor,
    centroids: torch.Tensor | None = None,
    scale: str = "norm",
) -> None:
    """Compress keys and values into the slots of pages.

    Args:
        k, v: ``[tokens, H_kv, D]``, any floating dtype.
        cache: pages of ``H_kv`` heads and vectors of D coordinates.
        slot_mapping: ``[tokens]``, int32 or int64, ``page * page_size + place``; a token whose slot is not in the cache, as
            -1, is left out. No two tokens have the same slot.
        rotation: float32 ``[D, D]``, orthogonal.
        boundaries: float32 ``[15]``, ascending.
        centroids, scale: as in :func:`compress`.
    """
    kept = (slot_mapping >= 0) & (slot_mapping < cache.num_slots)
    slot = slot_mapping[kept].long()
    page, place = slot // cache.page_size, slot % cache.page_size
    for x, codes, norms in ((k, cache.k_codes, cache.k_norms), (v, cache.v_codes, cache.v_norms)):
        codes[page, :, place], norms[page, :, place] = compress(x[kept], rotation, boundaries, centroids, scale)


def unpack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Indices of the levels, int64 ``[..., D]``, from packed codes ``[..., D // 2]``."""
    return torch.stack([codes >> 4, codes & 15], -1).flatten(-2).long()


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
        block: keys per step; the memory used grows with ``N_q * block``.

    Returns:
        out in q's dtype and shape, and lse ``[B, H_q, N_q]``, the natural logarithm of the sum of exponentials, the sink's
        among them. A query that sees no key has zeros, and its sink or -inf.

        A NaN in the norm of a key or value that a query sees reaches its row, and so does an Inf in a value's; an Inf in a
        key's is a score of +-Inf (+-softcap, where given): NaN, or a weight of zero.
    """
    is_causal, sliding_window, softcap, sinks, _ = masks
    compute = _compute_dtype(q)
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.data.shape[1:3]
    group = num_heads // num_kv_heads

    query = q.to(compute)
    if k.is_packed:
        assert tables.rotation is not None
        query = query @ tables.rotation.to(compute).T
    query = query.reshape(batch, num_kv_heads, group * q_len, head_dim) * sm_scale  # rows: head of the group, position
    last = torch.arange(q_len, device=q.device).repeat(group) + (kv_len - q_len if is_causal else kv_len)
    begin = 0
    if sliding_window is not None:
        assert is_causal
        begin = max(0, kv_len - q_len + 1 - sliding_window)

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
        out = out @ tables.rotation.to(compute)
    lse = torch.where(seen, top + total.log(), float("-inf"))
    return out.reshape(q.shape).to(q.dtype), lse.reshape(batch, num_heads, q_len)


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
    lse = torch.full(q.shape[:2], float("-inf"), dtype=_compute_dtype(q), device=q.device)
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


def merge_attention_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention over disjoint sets of keys into attention over their union.

    Args:
        outs: ``[S, ..., D]``, the S partial results.
        lses: ``[S, ...]``, their log-sum-exps (natural logarithm); -inf marks a part that saw no key.

    Returns:
        out ``[..., D]`` in ``outs``' dtype, and lse ``[...]`` in ``lses``' dtype.
    """
    compute = _compute_dtype(lses)
    lse = torch.logsumexp(lses.to(compute), 0)
    weight = torch.exp(lses.to(compute) - torch.where(lse == float("-inf"), 0.0, lse)).unsqueeze(-1)
    # Only a part that saw nothing is left out: a NaN is kept, however small its part's weight.
    seen = (lses != float("-inf")).unsqueeze(-1)
    out = (torch.where(seen, outs.to(compute), 0.0) * weight).sum(0)
    return out.to(outs.dtype), lse.to(lses.dtype)


def _tile(x: Operand, tables: Tables, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values ``start:stop`` as ``[B, H_kv, n, D]``, and the factor ``[B, H_kv, 1, n]`` on their scores or weights."""
    if x.norms is None:
        return x.data[:, :, start:stop].to(dtype), torch.ones((), dtype=dtype, device=x.data.device)
    assert tables.centroids is not None
    levels = tables.centroids.to(dtype)[unpack_codes(x.data[:, :, start:stop])]
    return levels, x.norms[:, :, None, start:stop].to(dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
