"""Pages of keys with offsets in poisoned memory, and the check of every byte that a call has written there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from compression_checks import check_compress
from store_cases import lay_out_rows
from turboquant_vllm import PagedTQ4Cache, TQ4Codec
from turboquant_vllm.paged import chunk_bytes, slots_per_page
from turboquant_vllm.records import GROUP, Operand
from turboquant_vllm.reference_keys import PRIOR_WEIGHT, _Run, _runs, read_rotated, rotate_keys

# What rounding in float32 changes in a vector that is scaled and rotated, or in a mean of such: a few 2^-24 for each of the
# additions that a coordinate goes through, relative to the vectors' length.
ROUNDING = 2e-6

Store = Callable[..., Any]  # of k, v, the cache, the codec, slots and previous slots


class GroupedPages:
    """A cache with offsets, its pages scattered in memory full of poison, and sequences in it.

    Attributes:
        repeats: whether each call is made again, on a copy, to see that it gives the same bits.
    """

    repeats = True

    def __init__(
        self,
        generator: torch.Generator,
        codec: TQ4Codec,
        lengths: Sequence[int],
        *,
        heads: int = 2,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        slot_dtype: torch.dtype = torch.int64,
        has_previous: bool = True,
        layout: str = "contiguous",
        gap: int = 48,
    ) -> None:
        self.generator, self.codec, self.dtype, self.slot_dtype = generator, codec, dtype, slot_dtype
        self.heads, self.page_size, self.has_previous, self.layout = heads, page_size, has_previous, layout
        used = [-(-length // page_size) for length in lengths]
        self.num_pages = sum(used) + 2
        self.width = heads * chunk_bytes(page_size, codec.head_dim, True)
        self.stride = self.width + gap
        # 255 is NaN in norms and steps.
        self.memory = torch.full((16 + self.num_pages * self.stride,), 255, dtype=torch.uint8, device=codec.device)
        self.tables = torch.randperm(self.num_pages, generator=generator)[: sum(used)].split(used)
        self.filled = [0] * len(lengths)

    def cache_in(self, memory: torch.Tensor) -> PagedTQ4Cache:
        """The cache as a part of ``memory``, which is like its own."""
        buffer = memory.as_strided((self.num_pages, self.width), (self.stride, 1), 16)
        return PagedTQ4Cache.of_checked(buffer, self.page_size, self.heads, self.codec.head_dim, True)

    def slot(self, sequence: int, position: int) -> int:
        """-1 before the first."""
        if position < 0:
            return -1
        page, place = divmod(position, self.page_size)
        return int(self.tables[sequence][page]) * slots_per_page(self.page_size, True) + place

    def write(
        self, store: Store, *chunks: torch.Tensor | None, first: int | None = None, pad: float = 0.0, check: bool = True
    ) -> None:
        """Append keys ``[H_kv, n, D]`` to each sequence, or write them over from ``first`` on, in one call; and check it.

        ``pad``: how many tokens without a slot stand before each, in the mean.
        """
        rows, slots, previous = [], [], []
        outside = (-1, self.cache_in(self.memory).num_slots, -(2**31), 2**31 - 1)
        for sequence, chunk in enumerate(chunks):
            if chunk is None:
                continue
            begin = self.filled[sequence] if first is None else first
            for i, row in enumerate(chunk.unbind(1)):
                while float(torch.rand((), generator=self.generator)) < pad / (1 + pad):
                    rows.append(torch.full_like(row, float("nan")))
                    slots.append(outside[len(slots) % 4])
                    previous.append(self.slot(sequence, begin + i))
                rows.append(row)
                slots.append(self.slot(sequence, begin + i))
                previous.append(self.slot(sequence, begin + i - 1))
            self.filled[sequence] = begin + chunk.shape[1]
        k = torch.stack(rows).to(self.dtype)
        v = torch.randn(k.shape, generator=self.generator).to(k)
        k, v = (lay_out_rows(x.to(self.codec.device), self.layout) for x in (k, v))
        to, before = (torch.tensor(x, device=k.device).to(self.slot_dtype) for x in (slots, previous))
        call = (k, v, to, before if self.has_previous else None)
        if check:
            self.check(store, *call)
        else:
            store(k, v, self.cache_in(self.memory), self.codec, *call[2:])

    def check(self, store: Store, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, previous: torch.Tensor | None) -> None:
        """Run ``store`` and look at every byte of the memory that the pages are in; the same call again writes the same."""
        before, start = self.memory.clone(), self.memory.clone()
        store(k, v, self.cache_in(self.memory), self.codec, slots, previous)
        new, old = self.cache_in(self.memory), self.cache_in(before)
        check_keys(new, old, k, self.codec, slots, previous)
        kept = (slots >= 0) & (slots < new.num_slots)
        slot = slots[kept].long()
        page, place = slot // new.slots_per_page, slot % new.slots_per_page
        stored = new.v_codes[page, :, place], new.v_norms[page, :, place]
        check_compress(lambda *_: stored, v[kept], self.codec)
        old.v_codes[page, :, place], old.v_norms[page, :, place] = stored
        assert torch.equal(before, self.memory), "bytes that are no token's have changed"
        if self.repeats:
            store(k, v, self.cache_in(start), self.codec, slots, previous)
            assert torch.equal(start, self.memory), "the same call has not given the same bits"


def check_keys(
    new: PagedTQ4Cache,
    old: PagedTQ4Cache,
    k: torch.Tensor,
    codec: TQ4Codec,
    slots: torch.Tensor,
    previous: torch.Tensor | None,
) -> None:
    """Hold what a call has made of keys against the definition in float64, run by run; then put it into ``old``, too.

    Offsets are those of the definition, but for coordinates within rounding of two codes; codes, norms and outliers are held
    against the offset that was written.
    """
    y = rotate_keys(k.transpose(0, 1).double(), codec.key_tables)  # [H_kv, tokens, D]
    error = ROUNDING * y.norm(dim=-1)
    before = None
    for run in _runs(slots.tolist(), new):
        page, group = run.slots[0] // new.slots_per_page, run.group
        own, rounding = y[:, run.rows], error[:, run.rows]
        if run.begins:
            for head in range(y.shape[0]):
                priors = _priors(run, before, y[head], old, previous, codec, head) if len(run.rows) < GROUP else [None]
                _check_offset(new, own[head], priors, (page, head, group))
        _check_run(new, old, codec, run, own, rounding)
        places = torch.tensor(run.places, device=k.device) + group * GROUP
        for to, x in zip(old.keys, new.keys, strict=True):
            assert to is not None
            assert x is not None
            if to.shape[2] == new.page_size:
                to[page, :, places] = x[page, :, places]
            else:
                to[page, :, group] = x[page, :, group]
        before = run


def _sums_but_outlier(y: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Sums and numbers of the finite ones of ``y [n, D]`` but one: the farthest, or any that rounding might make so."""
    y = y[y.isfinite().all(-1)]
    if len(y) == 0:
        return [(torch.zeros(y.shape[-1], dtype=y.dtype, device=y.device), 0)]
    distance = (y - y.mean(0)).norm(dim=-1)
    near = distance >= distance.max() - ROUNDING * y.norm(dim=-1).max()
    return [(torch.cat([y[:i], y[i + 1 :]]).sum(0), len(y) - 1) for i in near.nonzero().flatten().tolist()]


def _priors(
    run: _Run,
    before: _Run | None,
    y: torch.Tensor,
    old: PagedTQ4Cache,
    previous: torch.Tensor | None,
    codec: TQ4Codec,
    head: int,
) -> list[torch.Tensor | None]:
    """What a group's mean may be filled up with, ``[D]``; None: nothing."""
    slot = run.slots[0]
    last = (slot - 1 if slot % old.slots_per_page else -1) if previous is None else int(previous[run.rows[0]])
    if not 0 <= last < old.num_slots:
        return [None]
    page, place = last // old.slots_per_page, last % old.slots_per_page
    group = place // GROUP
    keys = old.keys.each(lambda x: x[page, head])
    assert keys.norms is not None
    assert keys.groups is not None
    assert keys.steps is not None
    if before is not None and before.slots[-1] == last:
        if before.begins:
            return [total / max(count, 1) for total, count in _sums_but_outlier(y[before.rows])]
        return [keys.groups[group, 0].double() * keys.steps[group, 0].double()]
    some = slice(group * GROUP, place + 1)
    part = Operand(keys.data[some], keys.norms[some], keys.groups[group : group + 1], keys.steps[group : group + 1])
    read = read_rotated(part, codec.centroids, torch.float64)
    read = read[(keys.norms[some] >= 0) & read.isfinite().all(-1)]
    return [read.sum(0) / max(len(read), 1)]


def _check_offset(new: PagedTQ4Cache, own: torch.Tensor, priors: list[torch.Tensor | None], at: tuple[int, int, int]) -> None:
    page, head, group = at
    assert new.keys.groups is not None
    assert new.keys.steps is not None
    codes, step = new.keys.groups[page, head, group, 0].double(), new.keys.steps[page, head, group, 0].double()
    excess = []
    for prior in priors:
        for total, count in _sums_but_outlier(own):
            weight = 0 if prior is None else PRIOR_WEIGHT
            mean = (total + weight * (0 if prior is None else prior)) / max(count + weight, 1)
            largest = own[own.isfinite().all(-1)].norm(dim=-1).max() if count else mean.norm()
            rounding = ROUNDING * max(largest, mean.norm()) + 2.0**-140
            # Half a step, and the step's own rounding; of a step too small for float32 all of it.
            off = (codes * step - mean).abs().max() - step * 0.5 - 130 * (2.0**-24 * step + 2.0**-149)
            far = abs(step * 127 - mean.abs().max()) - ROUNDING * mean.abs().max() - 127 * 2.0**-149
            excess.append(max(float(off - rounding), float(far - rounding)))
    assert min(excess) <= 0, f"offset of head {head} in slot {page, group} is wrong by {min(excess)}, a step is {float(step)}"
    assert new.keys.steps[page, head, group, 3] == 0


def _check_run(
    new: PagedTQ4Cache, old: PagedTQ4Cache, codec: TQ4Codec, run: _Run, own: torch.Tensor, rounding: torch.Tensor
) -> None:
    """Codes, norms and the outlier of all heads: ``own [H_kv, n, D]``, ``rounding [H_kv, n]``."""
    page, group = run.slots[0] // new.slots_per_page, run.group
    places = torch.tensor(run.places, device=own.device) + group * GROUP
    earlier = slice(group * GROUP, group * GROUP + run.places[0])
    (codes, norms, groups, steps), (_, old_norms, old_groups, old_steps) = (
        [x[page] for x in cache.keys if x is not None] for cache in (new, old)
    )
    if not run.begins:
        for x, y in ((groups[:, group, 0], old_groups[:, group, 0]), (steps[:, group, ::3], old_steps[:, group, ::3])):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)  # the offset of a begun group stays
    offset = (groups[:, group, 0].float() * steps[:, group, 0, None]).double()
    residual = own - offset[:, None]
    stored = codes[:, places], norms[:, places].abs()
    plain = codec.with_key_scales(None)
    check_compress(lambda *_: stored, residual @ codec.rotation.double(), plain, rounding)
    good = residual.isfinite().all(-1)
    distance = torch.where(good, residual.norm(dim=-1), 0.0)
    for head in range(len(own)):
        tolerance = ROUNDING * distance[head].max() + torch.where(good, rounding, 0.0)[head].max().clamp(min=2.0**-140)
        marks = (norms[head, places] < 0).nonzero().flatten().tolist()
        stood = bool((old_norms[head, earlier] < 0).any()) and not run.begins
        had = float(old_steps[head, group, 2]) if stood else -1.0
        farthest = float(distance[head].max())
        unchanged = torch.equal(steps[head, group, 1:3], old_steps[head, group, 1:3]) and not run.begins
        unchanged = unchanged and torch.equal(groups[head, group, 1], old_groups[head, group, 1])
        if farthest < had - tolerance or (not marks and unchanged and farthest <= had + tolerance):
            assert unchanged
            assert not marks
            torch.testing.assert_close(norms[head, earlier], old_norms[head, earlier], rtol=0, atol=0, equal_nan=True)
            continue
        assert farthest > had - tolerance
        index = marks[0] if marks else int(distance[head].argmax())
        assert len(marks) == (farthest > 0), (marks, farthest)
        assert distance[head, index] >= farthest - tolerance
        # What stood there is an ordinary key now.
        unmarked = torch.where(old_norms[head, earlier] < 0, -old_norms[head, earlier], old_norms[head, earlier])
        torch.testing.assert_close(norms[head, earlier], unmarked, rtol=0, atol=0, equal_nan=True)
        step, outlier = steps[head, group, 1].double(), torch.where(good[head, index], residual[head, index], 0.0)
        off = (groups[head, group, 1].double() * step - outlier).abs().max()
        assert off <= step * (0.5 + 130 * 2.0**-24) + tolerance + 130 * 2.0**-149
        assert abs(step * 127 - outlier.abs().max()) <= tolerance + ROUNDING * outlier.abs().max() + 127 * 2.0**-149
        assert abs(steps[head, group, 2] - farthest) <= tolerance
        old_norms[head, earlier] = norms[head, earlier]
