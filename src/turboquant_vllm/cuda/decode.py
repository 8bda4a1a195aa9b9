"""The native decode: attention of up to 32 query rows per key/value head over packed keys and values, in one launch or two.

Of two, the first kernel attends to parts of the keys, which form one line, and the second joins the parts. Where there is
little to do for each head, or many heads, a cluster of blocks does all of it (:mod:`turboquant_vllm.cuda.cluster`). What is
compiled depends on the device, the head dimension, the number of rows and on which of these serves, which sizes decide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from turboquant_vllm.cuda import cluster
from turboquant_vllm.cuda.runtime import Kernel, aligned, launch, load_kernel
from turboquant_vllm.cuda.sources import params_of, source
from turboquant_vllm.cuda.variants import (
    COMBINE_THREADS,
    Division,
    Variant,
    choose_variant,
    device_limits,
    divisor,
    rows_at_once,
)
from turboquant_vllm.limits import why_not_decode
from turboquant_vllm.records import GROUP, NO_MASKS, Masks, Operand, Tables

__all__ = ["Call", "Operands", "decode", "mask_args", "prepare"]

NO_WINDOW = 1 << 30  # as in the source
_LOG2_E = 1 / math.log(2)


@cache
def _kernels(index: int, variant: Variant) -> tuple[Kernel, Kernel]:
    params = params_of(variant, False)
    first, second = (
        load_kernel(source(), name, device=index, params=codes, defines=variant.defines) for name, codes in params.items()
    )
    return first, second


@dataclass(frozen=True)
class Call:
    """What of a call follows from its sizes alone; the layers of a model share it.

    Attributes:
        kernels: the two that are launched.
        grids: blocks of each.
        blocks: threads of each block.
        shared_bytes: of a block of the first.
        part_rows: rows of results of all parts.
        attend, combine: the numbers that the kernels take behind pointers and strides.
    """

    kernels: tuple[Kernel, Kernel]
    grids: tuple[int, int]
    blocks: tuple[int, int]
    shared_bytes: int
    part_rows: int
    attend: tuple[int, ...]
    combine: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=1024)
    def plan(
        cls,
        index: int,
        shape: tuple[int, ...],
        num_kv_heads: int,
        kv_len: int,
        split_len: int | None,
        masked: bool = False,
        offsets: bool = False,
        hadamard: bool = False,
    ) -> Call:
        """For queries of ``shape [B, H_q, N_q, D]`` on device ``index``."""
        batch, num_heads, q_len, head_dim = shape
        group = num_heads // num_kv_heads
        rows, heads = q_len * group, batch * num_kv_heads
        multiprocessors, shared_limit = device_limits(index)
        variant = choose_variant(head_dim, rows, shared_limit, masked, offsets, hadamard)
        if split_len is not None and (split_len < 16 or split_len % 16):
            raise ValueError(f"split_len must be a positive multiple of 16, got {split_len}")
        chunks = -(-rows // (4 * variant.row_tiles))
        passes, tiles = heads * chunks, -(-kv_len // 16)
        plan = Division.choose(passes, kv_len, multiprocessors, variant, split_len)
        workers = plan.blocks * plan.warps
        slots = passes * plan.splits if plan.splits else passes + workers
        piece, pieces = plan.split_len // 16 or 1, plan.splits or tiles
        share, more = divmod(passes * pieces, workers)
        numbers = (tiles, piece, pieces, max(share, 1), share + 1)
        divisors = tuple(itertools.chain.from_iterable(map(divisor, numbers)))
        work = (tiles, piece, pieces, share, more, int(split_len is not None), *divisors)
        layout = (num_kv_heads, group, rows, chunks, *divisor(num_kv_heads), *divisor(group), *divisor(chunks))
        # What a batch changes must change no order of additions where split_len promises that.
        at_once = 4 if split_len else rows_at_once(head_dim, heads * rows, multiprocessors)
        return cls(
            kernels=_kernels(index, variant),
            grids=(plan.blocks, -(-heads * rows // at_once)),
            blocks=(32 * variant.warps, COMBINE_THREADS[head_dim]),
            shared_bytes=variant.shared_bytes,
            part_rows=slots * 4 * variant.row_tiles,
            attend=(*work, *layout, plan.warps, kv_len, kv_len - q_len),
            combine=(*work, *layout, *divisor(rows), heads * rows, q_len, at_once),
        )


def mask_args(window: int | None, softcap: float | None, windows: torch.Tensor | None = None) -> tuple[int | float, ...]:
    """What the first kernel of a masked call takes last."""
    at = 0 if windows is None else windows.data_ptr()
    cap, rate = (0.0, 0.0) if softcap is None else (softcap * _LOG2_E, 2 / softcap)
    return at, NO_WINDOW if window is None else min(window, NO_WINDOW), cap, rate


def decode(
    q: torch.Tensor,
    k: Operand,
    v: Operand,
    tables: Tables,
    sm_scale: float,
    masks: Masks = NO_MASKS,
    *,
    pre_rotated: bool = False,
    rotated_output: bool = False,
    split_len: int | None = None,
    kv_len: int | None = None,
    hadamard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed keys and values; arguments that :func:`turboquant_vllm.checks.check_attention` accepted.

    Args:
        q: fp16 or bf16 ``[B, H_q, N_q, D]``, D 64, 128 or 256, ``N_q * H_q / H_kv`` at most 32.
        k, v: packed; codes with rows contiguous and 16-byte multiples apart, copied if they do not begin on a 16-byte
            boundary; norms of any strides.
        tables: what reads them.
        sm_scale: factor on the scores.
        masks: as in :func:`turboquant_vllm.reference.attention`.
        pre_rotated: q is ``q @ rotation.T`` already, as where the rotation is folded into a projection's weights.
        rotated_output: leave out the product with the rotation: the result is ``out @ rotation.T``.
        split_len: keys per split, a multiple of 16; None divides all keys of the batch evenly over the warps of the GPU.
        kv_len: how many of the N_kv keys there are, where the others are room for more; None means all.
        hadamard: whether the rotation is a Sylvester-Hadamard matrix times signs of its columns, over sqrt(D).

    The same call gives the same bits on the same model of GPU. With ``split_len``, a sequence in a batch gives the bits that
    it gives alone; without, where sums are cut depends on the sizes of the whole batch.

    Returns:
        out ``[B, H_q, N_q, D]`` in q's dtype and lse float32 ``[B, H_q, N_q]``; for a query that sees no key zeros, and its
        sink or -inf.

    Raises:
        ValueError: a size or an alignment that the kernels do not serve, see :func:`turboquant_vllm.limits.why_not_decode`;
            a split_len that is no positive multiple of 16.
        RuntimeError: compiling or launching failed.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    if k.data.shape[2] == 0 or kv_len == 0:
        sinks = masks.sinks
        return out.zero_(), lse.fill_(float("-inf")) if sinks is None else lse.copy_(sinks[:, None].expand_as(lse))
    launches = prepare(
        q, k, v, tables, sm_scale, masks, out, lse, pre_rotated=pre_rotated, rotated_output=rotated_output,
        split_len=split_len, kv_len=kv_len, hadamard=hadamard,
    )  # fmt: skip
    for enqueue in launches:
        enqueue()
    return out, lse


def prepare(
    q: torch.Tensor,
    k: Operand,
    v: Operand,
    tables: Tables,
    sm_scale: float,
    masks: Masks,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    pre_rotated: bool = False,
    rotated_output: bool = False,
    split_len: int | None = None,
    kv_len: int | None = None,
    hadamard: bool = False,
) -> tuple[Callable[[], None], ...]:
    """The launches of a call that is not empty: one, or two of which the first attends to parts of the keys, as a benchmark of
    the kernel times it, and the second joins these into out and lse.

    Arguments as in :func:`decode`; out and lse are contiguous, and lse may be None where it is not wanted.
    """
    if reason := why_not_decode(q.dtype, q.shape[3], q.shape[2] * (q.shape[1] // k.data.shape[1]), (k.data, v.data)):
        raise ValueError(reason)
    return Operands(k, v, tables, hadamard).prepare(
        q, k.data.shape[2] if kv_len is None else kv_len, sm_scale, masks, out, lse, pre_rotated=pre_rotated,
        rotated_output=rotated_output, split_len=split_len,
    )  # fmt: skip


@dataclass(frozen=True)
class _Offsets:
    """What the first kernel takes of keys with offsets."""

    groups: torch.Tensor
    steps: torch.Tensor
    key_scales: torch.Tensor | None

    @classmethod
    def of(cls, groups: torch.Tensor, steps: torch.Tensor, key_scales: torch.Tensor | None) -> _Offsets:
        """Copies where rows have gaps or are not aligned."""
        whole = (
            groups.stride(-1) == 1 and groups.stride(-2) == groups.shape[-1] and not any(x % 16 for x in groups.stride()[:3])
        )
        groups = aligned(groups if whole else groups.contiguous())
        steps = steps if steps.stride(-1) == 1 else steps.contiguous()
        return cls(groups, steps, None if key_scales is None else key_scales.contiguous())

    def arguments(self, first: int) -> tuple[int, ...]:
        """For keys from token ``first`` on, which begins a group."""
        assert first % GROUP == 0, first
        group, step = self.groups.stride()[:3], self.steps.stride()[:3]
        begin = first // GROUP
        at = (self.groups.data_ptr() + begin * group[2], self.steps.data_ptr() + 4 * begin * step[2])
        return *at, 0 if self.key_scales is None else self.key_scales.data_ptr(), *group, *step


class Operands:
    """Packed keys and values where they lie, and what reads them: the arguments that all calls over one buffer share.

    Args:
        k, v, tables, hadamard: as in :func:`decode`; :func:`turboquant_vllm.limits.why_not_decode` has nothing against them.
    """

    def __init__(self, k: Operand, v: Operand, tables: Tables, hadamard: bool = False) -> None:
        assert k.norms is not None
        assert v.norms is not None
        assert tables.centroids is not None
        assert tables.rotation is not None
        parts = (aligned(k.data), k.norms, aligned(v.data), v.norms)
        self._offsets: _Offsets | None = None
        if k.groups is not None and k.steps is not None:
            self._offsets = _Offsets.of(k.groups, k.steps, tables.key_scales)
        shared = (tables.centroids.contiguous(), aligned(tables.rotation.contiguous()))
        self._hadamard = hadamard
        self.k, self.v, self.num_kv_heads = k.data, v.data, k.data.shape[1]
        self._addresses = tuple(x.data_ptr() for x in parts)
        self._token_bytes = tuple(x.stride(2) * x.element_size() for x in parts)
        self._strides = tuple(stride for x in parts for stride in x.stride()[:3])
        self._tables = (shared[0].data_ptr(), shared[1].data_ptr())
        self._keep = (parts, shared)

    def prepare(
        self,
        q: torch.Tensor,
        kv_len: int,
        sm_scale: float,
        masks: Masks,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        first: int = 0,
        pre_rotated: bool = False,
        rotated_output: bool = False,
        split_len: int | None = None,
    ) -> tuple[Callable[[], None], ...]:
        """As :func:`prepare`, over ``kv_len`` tokens from ``first`` on."""
        shape = q.shape
        head_dim = shape[3]
        is_causal, window, softcap, sinks, _ = masks
        if window is not None:  # what no query sees is not even looked at
            seen = min(kv_len, window + shape[2] - 1)
            if self._offsets is not None:  # from where a group begins
                seen = min(kv_len, seen + (kv_len - seen) % GROUP)
            first, kv_len = first + kv_len - seen, seen
            window = window if shape[2] > 1 or seen > window else None
        masked = window is not None or softcap is not None or sinks is not None
        device, offsets, bf16 = q.get_device(), self._offsets is not None, int(q.dtype == torch.bfloat16)
        operands, tables = self._addresses, self._tables
        if first:
            operands = tuple(at + first * size for at, size in zip(operands, self._token_bytes, strict=True))
        of_masks = mask_args(window, softcap) if masked else ()
        of_offsets = () if self._offsets is None else self._offsets.arguments(first)
        sinks = None if sinks is None else sinks.contiguous()
        sinks_at = 0 if sinks is None else sinks.data_ptr()
        strides = (*q.stride(), *self._strides)
        hadamard = self._hadamard and not (pre_rotated or rotated_output)
        if hadamard and not split_len:
            heads, group = shape[0] * self.num_kv_heads, shape[1] // self.num_kv_heads
            one = cluster.plan(
                device,
                heads,
                self.num_kv_heads,
                group,
                group * shape[2],
                -(-kv_len // 16),
                head_dim,
                masked,
                offsets,
                False,
                _kernels,
            )
            if one is not None:
                left, left_at, counters = one.to_join(q.device)
                places = (counters, out.data_ptr(), 0 if lse is None else lse.data_ptr(), sinks_at)
                rows = (shape[1] * shape[2], shape[2], 1)
                args = (
                    q.data_ptr(), *operands, *tables, left_at, *strides, -(-kv_len // 16), *one.layout, kv_len,
                    kv_len - shape[2], int(is_causal), bf16, 0, sm_scale * _LOG2_E, *of_masks, *of_offsets, *places,
                    *(head_dim * x for x in rows), *rows, *one.last,
                )  # fmt: skip
                held = (self, q, out, lse, sinks, left)

                def attend_at_once() -> None:
                    _ = held
                    one.launch(args)

                return (attend_at_once,)
        call = Call.plan(device, shape, self.num_kv_heads, kv_len, split_len, masked, offsets, hadamard)
        # One allocation for the results of parts, and the log-sum-exps of the whole if nobody asked for them.
        unwanted = q.numel() // head_dim if lse is None else 0
        parts = torch.empty((call.part_rows * (head_dim + 4) + unwanted,), dtype=torch.float32, device=q.device)
        parts_at = parts.data_ptr()
        lse_at = parts_at + 4 * call.part_rows * (head_dim + 4) if lse is None else lse.data_ptr()
        attend_args = (
            q.data_ptr(), *operands, *tables, parts_at, *strides, *call.attend, int(is_causal), bf16, int(pre_rotated),
            sm_scale * _LOG2_E, *of_masks, *of_offsets,
        )  # fmt: skip
        combine_args = (
            parts_at, tables[1], out.data_ptr(), lse_at, *call.combine, bf16, int(rotated_output),
            *((sinks_at,) if masked else ()),
        )  # fmt: skip
        keep = (self, q, parts, out, lse, sinks)
        (attend_kernel, combine_kernel), grids, blocks = call.kernels, call.grids, call.blocks

        def attend() -> None:
            _ = keep
            launch(attend_kernel, (grids[0], 1, 1), (blocks[0], 1, 1), call.shared_bytes, None, attend_args)

        def combine() -> None:
            _ = keep
            launch(combine_kernel, (grids[1], 1, 1), (blocks[1], 1, 1), 0, None, combine_args, pdl=True)

        return attend, combine
