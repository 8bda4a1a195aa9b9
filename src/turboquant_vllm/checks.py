"""Argument checks shared by every public entry point.

Each error names the argument, what was expected and what came. Wrong types and dtypes raise TypeError, everything else
ValueError. No check reads a tensor's contents, so none of them waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from turboquant_vllm.records import GROUP

__all__ = [
    "MAX_HEAD_DIM",
    "AttentionShape",
    "PagedShape",
    "check_attention",
    "check_count",
    "check_dtype",
    "check_flag",
    "check_groups",
    "check_head_dim",
    "check_key_scales",
    "check_levels",
    "check_masks",
    "check_packed",
    "check_paged_attention",
    "check_paged_contents",
    "check_rotation",
    "check_seed",
    "check_shape",
    "check_sm_scale",
    "check_states",
    "check_windows",
]

MAX_HEAD_DIM = 512
DECODE_MAX_ROWS = 32  # query rows (tokens x heads of a group) per key/value head that a decode kernel takes in one go
QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SLOT_DTYPES = (torch.int32, torch.int64)
_LARGEST_SCALE = 2.0**127  # kernels multiply it by log2(e), in float32
# A score over the cap must not be so small that a GPU takes it for zero: 2^-126 times the cap is then less than 2^-24.
_LEAST_CAP, _LARGEST_CAP = 2.0**-100, 2.0**100
_WIDEST = 1 << 62


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call: ``q [batch, num_heads, q_len, head_dim]``, ``k, v [batch, num_kv_heads, kv_len, ...]``."""

    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class PagedShape:
    """Sizes of one call over pages: ``q [total_tokens, num_heads, head_dim]`` and ``block_table [num_seqs, max_pages]``."""

    total_tokens: int
    num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_pages: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads


def check_head_dim(head_dim: int, *, minimum: int = 2) -> None:
    """``head_dim`` must be an even int of at least ``minimum``."""
    if isinstance(head_dim, bool) or not isinstance(head_dim, int):
        raise TypeError(f"head_dim must be an int, got {type(head_dim).__name__}")
    if head_dim < minimum or head_dim % 2:
        raise ValueError(f"head_dim must be even and at least {minimum}, got {head_dim}")


def check_flag(name: str, value: object) -> None:
    """``value`` must be a bool."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_seed(seed: object) -> None:
    """``seed`` must be a non-negative int."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")


def check_count(name: str, value: object, minimum: int, maximum: int | None = None, *, multiple: int = 1) -> None:
    """``value`` must be an int from ``minimum`` to ``maximum`` (None: any), and a multiple of ``multiple``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum or (maximum is not None and value > maximum) or value % multiple:
        span = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be {span if multiple == 1 else f'a multiple of {multiple}, {span}'}, got {value}")


def check_dtype(name: str, tensor: object, dtypes: Sequence[torch.dtype]) -> None:
    """``tensor`` must be a tensor of one of ``dtypes``."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {tensor.dtype}")


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | str]) -> None:
    """``tensor`` must have the sizes in ``expected``; a string there is the name of a size that may be anything."""
    got = tensor.shape
    if len(got) == len(expected):
        for want, have in zip(expected, got, strict=True):
            if want != have and not isinstance(want, str):
                break
        else:
            return
    wanted = ", ".join(str(size) for size in expected)
    raise ValueError(f"{name} must have shape [{wanted}], got {list(got)}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device, owner: str) -> None:
    """``tensor`` must live where ``owner`` lives."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like {owner}, got {tensor.device}")


def check_levels(centroids: torch.Tensor | None) -> None:
    """``centroids`` must be float32 ``[16]``; any order, any values."""
    check_dtype("centroids", centroids, (torch.float32,))
    assert centroids is not None
    check_shape("centroids", centroids, (16,))


def check_rotation(rotation: torch.Tensor | None, head_dim: int) -> None:
    """``rotation`` must be float32 ``[head_dim, head_dim]``."""
    check_dtype("rotation", rotation, (torch.float32,))
    assert rotation is not None
    check_shape("rotation", rotation, (head_dim, head_dim))


def check_key_scales(key_scales: torch.Tensor | None, num_kv_heads: int, head_dim: int) -> None:
    """``key_scales`` must be None or float32 ``[num_kv_heads, head_dim]``."""
    if key_scales is not None:
        check_dtype("key_scales", key_scales, (torch.float32,))
        check_shape("key_scales", key_scales, (num_kv_heads, head_dim))


def check_groups(name: str, groups: torch.Tensor, steps: torch.Tensor, lead: Sequence[int], head_dim: int) -> None:
    """What keys ``[*lead, N, head_dim]`` with offsets share: int8 ``[*lead, ceil(N / 64), 2, head_dim]`` and float32
    ``[*lead, ceil(N / 64), 4]``; ``lead`` ends with N."""
    *rows, count = lead
    check_dtype(f"{name}.groups", groups, (torch.int8,))
    check_shape(f"{name}.groups", groups, (*rows, -(-count // GROUP), 2, head_dim))
    check_dtype(f"{name}.steps", steps, (torch.float32,))
    check_shape(f"{name}.steps", steps, (*rows, -(-count // GROUP), 4))


def check_packed(
    name: str, codes: torch.Tensor, norms: torch.Tensor | None, head_dim: int, lead: Sequence[int | str]
) -> torch.Tensor:
    """Codes uint8 ``[*lead, head_dim // 2]`` with norms float32 ``[*lead]`` or ``[*lead, 1]``; returns norms ``[*lead]``."""
    check_dtype(name, codes, (torch.uint8,))
    check_shape(name, codes, (*lead, head_dim // 2))
    check_dtype(norms_name(name), norms, (torch.float32,))
    assert norms is not None
    rows = codes.shape[:-1]
    if norms.shape == (*rows, 1):
        norms = norms.squeeze(-1)
    elif norms.shape != rows:
        raise ValueError(f"{norms_name(name)} must have shape {list(rows)} or {[*rows, 1]}, got {list(norms.shape)}")
    return norms


def check_sm_scale(sm_scale: float | None, head_dim: int) -> float:
    """The score scale as a float: ``1 / sqrt(head_dim)`` for None."""
    if sm_scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(sm_scale, bool) or not isinstance(sm_scale, (int, float)):
        raise TypeError(f"sm_scale must be a float or None, got {type(sm_scale).__name__}")
    if not -_LARGEST_SCALE <= sm_scale <= _LARGEST_SCALE:
        raise ValueError(
            f"sm_scale must be finite in float32, from {-_LARGEST_SCALE:.2g} to {_LARGEST_SCALE:.2g}, got {sm_scale}"
        )
    return float(sm_scale)


def check_masks(
    is_causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    num_heads: int,
    device: torch.device,
    *,
    causal_name: str = "is_causal",
) -> dict[str, Any]:
    """Those of ``sliding_window``, ``softcap`` and ``sinks`` that are given, by name, as the operators take them.

    ``sliding_window`` must be a positive int, and needs causal attention; ``softcap`` a positive number of float32's range;
    ``sinks`` float32 ``[num_heads]`` on ``device``. A window that is wider than 64 bits is taken for one that is wider than any
    cache.
    """
    check_flag(causal_name, is_causal)
    masks: dict[str, Any] = {}
    if sliding_window is not None:
        check_count("sliding_window", sliding_window, 1)
        if not is_causal:
            raise ValueError(f"sliding_window must come with {causal_name}=True, got {is_causal}")
        masks["sliding_window"] = min(sliding_window, _WIDEST)
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
            raise TypeError(f"softcap must be a float or None, got {type(softcap).__name__}")
        if not _LEAST_CAP <= softcap <= _LARGEST_CAP:
            span = f"from {_LEAST_CAP:.2g} to {_LARGEST_CAP:.2g}"
            raise ValueError(f"softcap must be positive and finite in float32, {span}, got {softcap}")
        masks["softcap"] = float(softcap)
    if sinks is not None:
        check_dtype("sinks", sinks, (torch.float32,))
        check_shape("sinks", sinks, (num_heads,))
        check_device("sinks", sinks, device, "q")
        masks["sinks"] = sinks
    return masks


def check_windows(windows: torch.Tensor, causal: bool, num_seqs: int, device: torch.device) -> torch.Tensor:
    """Sliding windows of single sequences must be int32 ``[num_seqs]`` on ``device``, and need causal attention."""
    check_dtype("sliding_window", windows, (torch.int32,))
    check_shape("sliding_window", windows, (num_seqs,))
    check_device("sliding_window", windows, device, "q")
    if not causal:
        raise ValueError(f"sliding_window must come with causal=True, got {causal}")
    return windows


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    k_norms: torch.Tensor | None,
    v: torch.Tensor,
    v_norms: torch.Tensor | None,
    centroids: torch.Tensor | None,
    rotation: torch.Tensor | None,
    *,
    names: tuple[str, str] = ("k", "v"),
    packed: tuple[bool, bool],
) -> tuple[AttentionShape, torch.Tensor | None, torch.Tensor | None]:
    """Check one attention call over whole tensors of keys and values, each packed or dense.

    Args:
        q: ``[batch, num_heads, q_len, head_dim]``, fp16, bf16 or fp32.
        k, v: uint8 codes ``[batch, num_kv_heads, kv_len, head_dim // 2]``, or dense ``[..., head_dim]`` in q's dtype.
        k_norms, v_norms: float32 ``[batch, num_kv_heads, kv_len]``, a trailing 1 allowed; None for a dense tensor.
        centroids: float32 ``[16]``; None where nothing is packed.
        rotation: float32 ``[head_dim, head_dim]``; None where nothing is packed.
        names: what the caller calls k and v.
        packed: whether k and v are packed.

    Returns:
        The sizes, and both norms without the trailing 1.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_dtype("q", q, QUERY_DTYPES)
    check_shape("q", q, ("batch", "num_heads", "q_len", "head_dim"))
    batch, num_heads, q_len, head_dim = q.shape
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q must have an even head_dim from 2 to {MAX_HEAD_DIM}, got {head_dim}")

    k_name, v_name = names
    k_norms = _check_operand(k_name, k, k_norms, q, ("num_kv_heads", "kv_len"), packed[0])
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    if 0 in (num_kv_heads, num_heads) or num_heads % num_kv_heads:
        raise ValueError(f"q must have a multiple of {k_name}'s {num_kv_heads} heads, got {num_heads}")
    v_norms = _check_operand(v_name, v, v_norms, q, (num_kv_heads, kv_len), packed[1])

    if any(packed):
        check_levels(centroids)
        check_rotation(rotation, head_dim)
    device = q.device
    if any(x is not None and x.device != device for x in (k, v, k_norms, v_norms, centroids, rotation)):
        names_of = {k_name: k, v_name: v, norms_name(k_name): k_norms, norms_name(v_name): v_norms}
        for name, tensor in {**names_of, "centroids": centroids, "rotation": rotation}.items():
            if tensor is not None:
                check_device(name, tensor, device, "q")
    return AttentionShape(batch, num_heads, num_kv_heads, q_len, kv_len, head_dim), k_norms, v_norms


def check_paged_attention(
    q: torch.Tensor,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    out: torch.Tensor | None,
) -> PagedShape:
    """Check one attention call over a cache of such pages; tensors as in :func:`turboquant_vllm.tq4_paged_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_dtype("q", q, QUERY_DTYPES)
    check_shape("q", q, ("total_tokens", "num_heads", head_dim))
    total_tokens, num_heads, _ = q.shape
    if num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(f"q must have a multiple of the cache's {num_kv_heads} heads, got {num_heads}")
    for name, tensor in (("block_table", block_table), ("seq_lens", seq_lens), ("cu_seqlens_q", cu_seqlens_q)):
        check_dtype(name, tensor, (torch.int32,))
        check_device(name, tensor, q.device, "q")
    check_shape("block_table", block_table, ("num_seqs", "max_pages"))
    num_seqs, max_pages = block_table.shape
    check_shape("seq_lens", seq_lens, (num_seqs,))
    check_shape("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,))
    if device != q.device:
        raise ValueError(f"cache must be on {q.device} like q, got {device}")
    if out is not None:
        check_dtype("out", out, (q.dtype,))
        check_shape("out", out, q.shape)
        check_device("out", out, q.device, "q")
    return PagedShape(total_tokens, num_seqs, num_heads, num_kv_heads, head_dim, page_size, max_pages)


def check_paged_contents(
    shape: PagedShape,
    num_pages: int,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
) -> None:
    """Check what the index tensors of a call over pages hold, which waits for the device.

    Raises:
        ValueError: naming the first entry that is wrong, what was expected and what came.
    """
    starts, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    table = block_table.tolist()
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens_q[0] must be 0, got {starts[0]}")
    longest = min(max_seq_len, shape.max_pages * shape.page_size)
    for sequence, length in enumerate(lengths):
        begin, end = starts[sequence], starts[sequence + 1]
        if not 0 <= end - begin <= max_query_len or end > shape.total_tokens:
            most = min(begin + max_query_len, shape.total_tokens)
            raise ValueError(f"cu_seqlens_q[{sequence + 1}] must be from {begin} to {most}, got {end}")
        if not 0 <= length <= longest:
            raise ValueError(f"seq_lens[{sequence}] must be from 0 to {longest}, got {length}")
        for column, page in enumerate(table[sequence][: -(-length // shape.page_size)]):
            if not 0 <= page < num_pages:
                raise ValueError(f"block_table[{sequence}, {column}] must be from 0 to {num_pages - 1}, got {page}")


def check_states(outs: torch.Tensor, lses: torch.Tensor) -> None:
    """Partial results ``outs [S, ..., head_dim]`` and their log-sum-exps ``lses [S, ...]``, floating, on one device."""
    for name, tensor in (("outs", outs), ("lses", lses)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if outs.dim() < 2:
        raise ValueError(f"outs must have shape [parts, ..., head_dim], got {list(outs.shape)}")
    check_shape("lses", lses, outs.shape[:-1])
    check_device("lses", lses, outs.device, "outs")


def norms_name(name: str) -> str:
    """What a caller who says ``k_packed`` or ``k.codes`` calls the norms: ``k_norms`` or ``k.norms``."""
    if name.endswith(".codes"):
        return name.removesuffix("codes") + "norms"
    return name.removesuffix("_packed") + "_norms"


def _check_operand(
    name: str,
    tensor: torch.Tensor,
    norms: torch.Tensor | None,
    q: torch.Tensor,
    lead: tuple[int | str, int | str],
    packed: bool,
) -> torch.Tensor | None:
    """Check K or V against q; ``lead`` is its expected ``(num_kv_heads, kv_len)``. Returns the norms without trailing 1."""
    batch, _, _, head_dim = q.shape
    if packed:
        return check_packed(name, tensor, norms, head_dim, (batch, *lead))
    check_dtype(name, tensor, (q.dtype,))
    check_shape(name, tensor, (batch, *lead, head_dim))
    return None
