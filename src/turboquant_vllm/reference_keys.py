"""Keys whose groups share an offset and one outlying key, in plain PyTorch: the definition of that format.

Keys have a large common part that softmax does not see, and a few that are unlike all others. So what is coded in 4 bits is
what a key adds to its group's *offset*, and one key of the group, the *outlier*, has 8 bits of its own:

    y       = (w * k) @ rotation.T                           w: key scales [H_kv, D], ones if none
    y'      = o + (e if norm < 0 else norm * levels)         o, e: step * int8 [D] of the key's group
    k'      = (y' @ rotation) / w                            score = ((q / w) @ rotation.T) . y'

A group is 64 neighbouring tokens, counted from the start of a page or of a whole tensor. The outlier has codes like every key;
the sign of its norm says that it is one. So a key that is written over takes its mark along.

How a group is coded depends on what is known when its first key is written, at place 0:

- the offset is the mean of those of its keys that the same call writes, but for the outlier;
- if these are fewer than 64, the mean of the group before, but for its outlier, counts like :data:`PRIOR_WEIGHT` keys more;
- the outlier is the key that lies farthest from the offset; a later one that lies farther takes its place.

A vector with a NaN or an infinity has no part in an offset and is no outlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from turboquant_vllm.autocast import without_autocast
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.records import GROUP, Operand, Tables
from turboquant_vllm.reference_codes import compress_rotated, compute_dtype, rotated, scaled, unpack_codes

__all__ = ["PRIOR_WEIGHT", "compress_keys", "decompress_keys", "read_rotated", "rotate_keys", "rotate_queries", "store_keys"]

PRIOR_WEIGHT = 8
_STEPS = 127  # of 8 bits, to either side


@without_autocast
def rotate_keys(k: torch.Tensor, tables: Tables) -> torch.Tensor:
    """``(w * k) @ rotation.T`` of keys ``[..., H_kv, N, D]``, in float32, or float64 for such keys."""
    assert tables.rotation is not None
    k = k.to(compute_dtype(k))
    if tables.key_scales is not None:
        k = k * tables.key_scales.to(k.dtype).unsqueeze(-2)
    return rotated(k, tables.rotation)


@without_autocast
def rotate_queries(q: torch.Tensor, num_kv_heads: int, tables: Tables) -> torch.Tensor:
    """``(q / w) @ rotation.T`` of queries ``[B, H_q, N_q, D]``, in float32, or float64 for such queries."""
    assert tables.rotation is not None
    q = q.to(compute_dtype(q))
    if tables.key_scales is not None:
        q = q / tables.key_scales.to(q.dtype).repeat_interleave(q.shape[1] // num_kv_heads, 0)[:, None]
    return rotated(q, tables.rotation)


def read_rotated(k: Operand, centroids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys ``y' [..., N, D]`` in the basis that they are coded in; ``k`` begins where a group does."""
    assert k.norms is not None
    assert k.groups is not None
    assert k.steps is not None
    levels, norms = centroids.to(dtype)[unpack_codes(k.data)], k.norms.to(dtype).unsqueeze(-1)
    group = torch.arange(k.data.shape[-2], device=k.data.device) // GROUP
    offsets, outliers = (k.groups.to(dtype) * k.steps[..., :2].to(dtype).unsqueeze(-1)).unbind(-2)  # [..., groups, D]
    outliers = torch.where(norms < 0, outliers[..., group, :], 0.0)  # no NaN where there is none
    return offsets[..., group, :] + torch.where(norms < 0, outliers, levels * norms)


@without_autocast
def decompress_keys(k: Operand, tables: Tables, dtype: torch.dtype) -> torch.Tensor:
    """Keys ``k' [..., H_kv, N, D]`` in ``dtype``; ``k`` begins where a group does. float64 computes in float64."""
    assert tables.centroids is not None
    assert tables.rotation is not None
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    keys = read_rotated(k, tables.centroids, compute) @ tables.rotation.to(compute)
    if tables.key_scales is not None:
        keys = keys / tables.key_scales.to(compute).unsqueeze(-2)
    return keys.to(dtype)


@without_autocast
def compress_keys(k: torch.Tensor, tables: Tables, boundaries: torch.Tensor, scale: str) -> Operand:
    """Compress whole keys, whose first token begins a group.

    Args:
        k: ``[..., H_kv, N, D]``, any floating dtype.
        tables: rotation, levels, key scales ``[H_kv, D]``.
        boundaries, scale: as for :func:`turboquant_vllm.reference.compress`.

    Returns:
        Codes ``[..., H_kv, N, D // 2]``, norms, groups int8 ``[..., H_kv, ceil(N / 64), 2, D]`` and steps float32
        ``[..., H_kv, ceil(N / 64), 4]``: of the offset, of the outlier, the outlier's distance from the offset, and zero.
    """
    assert tables.centroids is not None
    y = rotate_keys(k, tables)
    *lead, count, head_dim = y.shape
    groups = -(-count // GROUP)
    y = torch.nn.functional.pad(y, (0, 0, 0, groups * GROUP - count)).unflatten(-2, (groups, GROUP))
    there = (torch.arange(groups * GROUP, device=y.device) < count).view(groups, GROUP)
    total, kept = _sum_but_outlier(y, there.expand(y.shape[:-1]))
    if count % GROUP and groups > 1:
        total[..., -1, :] += PRIOR_WEIGHT * _mean(total[..., -2, :], kept[..., -2])
        kept[..., -1] += PRIOR_WEIGHT
    offset, step = _eight_bits(_mean(total, kept))
    codes, norms, outlier = _code(y, there, _values(offset, step), tables, boundaries, scale)
    steps = torch.stack([step, outlier.step, outlier.distance, torch.zeros_like(step)], -1)
    norms = _mark(norms, outlier, outlier.distance > 0)
    whole = codes.reshape(*lead, groups * GROUP, head_dim // 2)[..., :count, :].contiguous()
    return Operand(whole, norms.reshape(*lead, -1)[..., :count].contiguous(), torch.stack([offset, outlier.codes], -2), steps)


@without_autocast
def store_keys(
    k: torch.Tensor,
    cache: PagedTQ4Cache,
    slot_mapping: torch.Tensor,
    previous_slots: torch.Tensor | None,
    tables: Tables,
    boundaries: torch.Tensor,
    scale: str,
) -> None:
    """Compress keys into the slots of pages.

    Args:
        k: ``[tokens, H_kv, D]``, any floating dtype.
        cache: pages with offsets.
        slot_mapping: ``[tokens]``; a token whose slot is not in the cache is left out. Tokens of one group stand one behind the
            other, in the order of their slots; tokens that are left out may stand between them.
        previous_slots: ``[tokens]``, the slot of the token before each in its sequence, negative where there is none; None:
            the slot before, where that is in the same page.
        tables, boundaries, scale: as for :func:`compress_keys`.
    """
    assert tables.centroids is not None
    y = rotate_keys(k.transpose(0, 1), tables)  # [H_kv, tokens, D]
    keys, before = cache.keys, None
    assert keys.norms is not None
    for run in _runs(slot_mapping.tolist(), cache):
        page, group, places = run.slots[0] // cache.slots_per_page, run.group, run.places
        own = y[:, run.rows]
        there = torch.ones(own.shape[:-1], dtype=torch.bool, device=y.device)
        at = keys.groups[page, :, group], keys.steps[page, :, group]  # type: ignore[index]
        start = group * GROUP
        distance = torch.full_like(at[1][:, 0], -1.0)
        if run.begins:
            total, kept = _sum_but_outlier(own, there)
            if len(run.rows) < GROUP:
                prior = _prior(run, before, y, cache, previous_slots, tables)
                if prior is not None:
                    total, kept = total + PRIOR_WEIGHT * prior, kept + PRIOR_WEIGHT
            at[0][:, 0], at[1][:, 0] = _eight_bits(_mean(total, kept))
            at[1][:, 3] = 0
        earlier = keys.norms[page, :, start : start + places[0]]  # [H_kv, places before]
        if not run.begins:
            distance = torch.where((earlier < 0).any(-1), at[1][:, 2], distance)
        offset = _values(at[0][:, 0], at[1][:, 0])
        codes, norms, outlier = _code(own, there, offset, tables, boundaries, scale)
        farther = outlier.distance > distance
        keys.norms[page, :, start : start + places[0]] = torch.where(farther[:, None], earlier.abs(), earlier)
        at[0][:, 1] = torch.where(farther[:, None], outlier.codes, at[0][:, 1])
        for i, x in ((1, outlier.step), (2, outlier.distance)):
            at[1][:, i] = torch.where(farther, x.float(), at[1][:, i])
        to = torch.tensor(places, device=y.device) + start
        keys.data[page, :, to], keys.norms[page, :, to] = codes, _mark(norms, outlier, farther & (outlier.distance > 0))
        before = run


@dataclass(frozen=True)
class _Run:
    """Tokens of one call in one group: their rows and slots."""

    rows: list[int]
    slots: list[int]
    slots_per_page: int

    @property
    def group(self) -> int:
        """Of the page."""
        return self.slots[0] % self.slots_per_page // GROUP

    @property
    def places(self) -> list[int]:
        """In the group."""
        return [slot % GROUP for slot in self.slots]

    @property
    def begins(self) -> bool:
        """Whether the group's first key is among them."""
        return self.slots[0] % GROUP == 0


def _runs(slots: Sequence[int], cache: PagedTQ4Cache) -> Iterator[_Run]:
    run = _Run([], [], cache.slots_per_page)
    for row, slot in enumerate(slots):
        if not 0 <= slot < cache.num_slots:
            continue
        if run.rows and not (run.slots[-1] < slot and slot // GROUP == run.slots[-1] // GROUP):
            yield run
            run = _Run([], [], cache.slots_per_page)
        run.rows.append(row)
        run.slots.append(slot)
    if run.rows:
        yield run


def _prior(
    run: _Run,
    before: _Run | None,
    y: torch.Tensor,
    cache: PagedTQ4Cache,
    previous_slots: torch.Tensor | None,
    tables: Tables,
) -> torch.Tensor | None:
    """The mean ``[H_kv, D]`` of the group before, but for its outlier; None if there is none.

    Of keys that the same call writes as they came; else as they read back; of a group that began before and that the same
    call goes on with, the offset.
    """
    slot = run.slots[0]
    previous = slot - 1 if slot % cache.slots_per_page else -1
    if previous_slots is not None:
        previous = int(previous_slots[run.rows[0]])
    if not 0 <= previous < cache.num_slots:
        return None
    page, place = previous // cache.slots_per_page, previous % cache.slots_per_page
    start = place // GROUP * GROUP
    keys = cache.keys
    assert keys.norms is not None
    assert keys.groups is not None
    assert keys.steps is not None
    assert tables.centroids is not None
    if before is not None and before.slots[-1] == previous:
        if before.begins:
            own = y[:, before.rows]
            return _mean(*_sum_but_outlier(own, torch.ones(own.shape[:-1], dtype=torch.bool, device=y.device)))
        return _values(keys.groups[page, :, place // GROUP, 0], keys.steps[page, :, place // GROUP, 0]).to(y.dtype)
    some, group = slice(start, place + 1), slice(place // GROUP, place // GROUP + 1)
    norms = keys.norms[page, :, some]
    written = Operand(keys.data[page, :, some], norms, keys.groups[page, :, group], keys.steps[page, :, group])
    read = read_rotated(written, tables.centroids, y.dtype)
    good = (norms >= 0) & read.isfinite().all(-1)
    return _mean(torch.where(good.unsqueeze(-1), read, 0.0).sum(-2), good.sum(-1))


def _mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """``total / count``, zeros of nothing."""
    return total / count.clamp(min=1).unsqueeze(-1)


def _sum_but_outlier(y: torch.Tensor, there: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum ``[..., D]`` and number ``[...]`` of the finite ones of ``y [..., n, D]``, but for that farthest from their mean."""
    good = there & y.isfinite().all(-1)
    y = torch.where(good.unsqueeze(-1), y, 0.0)
    count = good.sum(-1)
    far = torch.where(good, _length(y - _mean(y.sum(-2), count).unsqueeze(-2)), -1.0).argmax(-1)
    kept = good & (torch.arange(y.shape[-2], device=y.device) != far.unsqueeze(-1))
    return torch.where(kept.unsqueeze(-1), y, 0.0).sum(-2), kept.sum(-1)


def _length(x: torch.Tensor) -> torch.Tensor:
    """Lengths ``[...]`` of ``x [..., D]``; no square leaves the range."""
    x, shift = scaled(x)
    return (x.square().sum(-1, keepdim=True).sqrt() / shift).squeeze(-1)


@dataclass(frozen=True)
class _Outlier:
    """The key of each group that lies farthest from the offset: which it is, and its residual in 8 bits."""

    index: torch.Tensor
    codes: torch.Tensor
    step: torch.Tensor
    distance: torch.Tensor  # zero where no key is finite


def _code(
    y: torch.Tensor, there: torch.Tensor, offset: torch.Tensor, tables: Tables, boundaries: torch.Tensor, scale: str
) -> tuple[torch.Tensor, torch.Tensor, _Outlier]:
    """Codes and norms of keys ``y [..., n, D]`` around ``offset [..., D]``, and the one that lies farthest from it."""
    residual = y - offset.to(y.dtype).unsqueeze(-2)
    codes, norms = compress_rotated(residual, boundaries, tables.centroids, scale)
    good = there & residual.isfinite().all(-1)
    distance, index = torch.where(good, _length(residual), 0.0).max(-1)
    farthest = residual.gather(-2, index[..., None, None].expand(*index.shape, 1, y.shape[-1])).squeeze(-2)
    eight, step = _eight_bits(torch.where((distance > 0).unsqueeze(-1), farthest, 0.0))
    return codes, norms, _Outlier(index, eight, step, distance.float())


def _mark(norms: torch.Tensor, outlier: _Outlier, chosen: torch.Tensor) -> torch.Tensor:
    """``norms [..., n]``, negative at the outlier where it is ``chosen``."""
    is_outlier = torch.arange(norms.shape[-1], device=norms.device) == outlier.index.unsqueeze(-1)
    return torch.where(is_outlier & chosen.unsqueeze(-1), -norms, norms)


def _eight_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x [..., D]`` as int8 and one float32 step; zeros have the step 0."""
    step = (x.abs().amax(-1) / _STEPS).float()
    units = x / torch.where(step == 0, 1.0, step).to(x.dtype).unsqueeze(-1)
    return units.round().clamp(-_STEPS, _STEPS).to(torch.int8), step


def _values(codes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return codes.float() * step.unsqueeze(-1)
