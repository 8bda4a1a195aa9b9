"""Random steps of a server over one layer, and what each of their sequences must get: for the tests of the vLLM plugin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import oracle
from turboquant_vllm.vllm.batch import Run, plan_runs
from turboquant_vllm.vllm.layer import SLOT_NORM_BYTES, PagedLayer, codec_for


@dataclass
class Step:
    """A step of sequences of ``lengths`` (query tokens, keys), whose earlier tokens are in the pages already.

    ``q [T, H_q, D]``, ``k, v [T, H_kv, D]`` and ``slots [T]`` are the step's own; ``keys, values`` all tokens of each sequence.
    """

    layer: PagedLayer
    lengths: Sequence[tuple[int, int]]
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *(tokens for tokens, _ in self.lengths)], dtype=np.int32)

    def runs(self, decode_len: int = 1) -> list[Run]:
        totals = np.array([keys for _, keys in self.lengths], dtype=np.int32)
        on_device = (torch.from_numpy(self.starts), torch.from_numpy(totals), self.block_table)
        return plan_runs(*on_device, self.starts, totals, decode_len)

    def store(self) -> None:
        self.layer.store(self.k, self.v, self.kv_cache, self.slots)

    def expected(self, index: int, *, exact: bool) -> torch.Tensor:
        """The result ``[tokens, H_q, D]`` of one sequence in float64."""
        layer, codec = self.layer, codec_for(self.layer.head_dim, self.q.device)
        keys, values = self.keys[index], self.values[index]
        if not exact:
            # What a sequence reads is what was written for it, rounded to no dtype.
            packed = (codec.compress(x) for x in (keys, values))
            keys, values = (oracle.decompress(*x, codec.centroids, codec.rotation) for x in packed)
        first, stop = self.starts[index], self.starts[index + 1]
        q, keys, values = (x.transpose(0, 1)[None] for x in (self.q[first:stop], keys, values))
        masks = (layer.sliding_window, layer.softcap, layer.sinks)
        return oracle.attention(q, keys, values, layer.sm_scale, True, *masks)[0][0].transpose(0, 1)

    def check(self, out: torch.Tensor, index: int, *, exact: bool) -> None:
        oracle.assert_close(out[self.starts[index] : self.starts[index + 1]], self.expected(index, exact=exact))


def random_step(
    generator: torch.Generator,
    lengths: Sequence[tuple[int, int]],
    layer: PagedLayer,
    *,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """A step whose sequences' pages lie in random order; unused slots and the rest of the block table are poison."""
    heads, head_dim = layer.num_kv_heads, layer.head_dim
    used = [-(-keys // page_size) for _, keys in lengths]
    num_pages = sum(used) + 2
    shape = (num_pages, heads, page_size, head_dim + SLOT_NORM_BYTES)
    kv_cache = torch.full(shape, 255, dtype=torch.uint8)
    order = torch.randperm(num_pages, generator=generator).int()
    block_table = torch.full((len(lengths), max(used) + 1), -1, dtype=torch.int32)

    def normal(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, head_dim, generator=generator).to(dtype)

    keys, values, slots = [], [], []
    for index, (tokens, total) in enumerate(lengths):
        own, order = order[: used[index]], order[used[index] :]
        block_table[index, : used[index]] = own
        places = torch.arange(total)
        slot = own.long()[places // page_size] * page_size + places % page_size
        keys.append(normal(total, heads))
        values.append(normal(total, heads))
        past = total - tokens
        layer.store(keys[-1][:past], values[-1][:past], kv_cache, slot[:past])
        slots.append(slot[past:])
    count = sum(tokens for tokens, _ in lengths)
    pairs = list(zip(lengths, keys, values, strict=True))
    return Step(
        layer=layer,
        lengths=lengths,
        kv_cache=kv_cache,
        block_table=block_table,
        q=normal(count, layer.num_heads),
        k=torch.cat([k[total - tokens :] for (tokens, total), k, _ in pairs]),
        v=torch.cat([v[total - tokens :] for (tokens, total), _, v in pairs]),
        slots=torch.cat(slots),
        keys=keys,
        values=values,
    )
