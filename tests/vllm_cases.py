"""Random steps of a server over one layer, and what each of their sequences must get: for the tests of the vLLM plugin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import oracle
from turboquant_vllm import PagedTQ4Cache, TQ4Keys, tq4_store
from turboquant_vllm.vllm.batch import Run, plan_runs
from turboquant_vllm.vllm.dense import DenseLayer
from turboquant_vllm.vllm.layer import PagedLayer, place_of
from turboquant_vllm.vllm.previous import PreviousSlots


@dataclass
class Step:
    """A step of sequences of ``lengths`` (query tokens, keys), whose earlier tokens are in the pages already.

    ``q [T, H_q, D]``, ``k, v [T, H_kv, D]`` and ``slots [T]`` are the step's own; ``keys, values`` all tokens of each sequence.
    """

    layer: PagedLayer | DenseLayer
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

    @property
    def page_size(self) -> int:
        return self.kv_cache.shape[2] * _place_of(self.layer)[0]

    @property
    def where(self) -> dict[str, torch.Tensor]:
        """Where the step's own tokens go."""
        totals = torch.tensor([keys for _, keys in self.lengths], dtype=torch.int32)
        find = PreviousSlots(len(self.slots), self.page_size, self.q.device).find
        previous = find(torch.from_numpy(self.starts), totals, self.block_table, self.slots)
        return {"slot_mapping": self.slots, "previous_slots": previous}

    def store(self) -> None:
        self.layer.store(self.k, self.v, self.kv_cache, **self.where)

    def expected(self, index: int, *, exact: bool) -> torch.Tensor:
        """The result ``[tokens, H_q, D]`` of one sequence in float64."""
        layer, keys, values = self.layer, self.keys[index], self.values[index]
        if not exact and isinstance(layer, PagedLayer):
            codec = layer.codec_on(self.q.device)
            # What a sequence reads is what was written for it, rounded to no dtype.
            values = oracle.decompress(*codec.compress(values), codec.centroids, codec.rotation)
            if layer.key_offsets:
                keys = written_alone(layer, keys, [self.lengths[index][1] - self.lengths[index][0]])
            else:
                keys = oracle.decompress(*codec.compress(keys), codec.centroids, codec.rotation)
        first, stop = self.starts[index], self.starts[index + 1]
        q, keys, values = (x.transpose(0, 1)[None] for x in (self.q[first:stop], keys, values))
        masks = (layer.sliding_window, layer.softcap, layer.sinks)
        return oracle.attention(q, keys, values, layer.sm_scale, True, *masks)[0][0].transpose(0, 1)

    def check(self, out: torch.Tensor, index: int, *, exact: bool) -> None:
        oracle.assert_close(out[self.starts[index] : self.starts[index + 1]], self.expected(index, exact=exact))


def written_alone(layer: PagedLayer, keys: torch.Tensor, cuts: Sequence[int]) -> torch.Tensor:
    """Keys ``[n, H_kv, D]`` as they read back, in float64, in a cache with offsets of their own, whose pages are in order,
    written in pieces that end at ``cuts``."""
    codec, count = layer.codec_on(keys.device), len(keys)
    sizes = {"page_size": 64, "num_kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim}
    cache = PagedTQ4Cache.allocate(-(-count // 64), **sizes, has_offsets=True, device=keys.device)
    slots = torch.arange(count, device=keys.device)
    ends = [0, *cuts, count]
    for some in (slice(first, stop) for first, stop in itertools.pairwise(ends)):
        own = (keys[some], keys[some], cache, codec, slots[some])
        tq4_store(*own, previous_slots=slots[some] - 1, backend="reference")
    whole = cache.keys.each(lambda x: x.transpose(0, 1).flatten(1, 2)[None]).tokens(0, count)
    return codec.decompress(TQ4Keys(*(x[0] for x in whole)), torch.float64).transpose(0, 1)


def _place_of(layer: PagedLayer | DenseLayer) -> tuple[int, int]:
    """Tokens that a layer's cache has in one place of a head, and elements of such a place."""
    return (1, 2 * layer.head_dim) if isinstance(layer, DenseLayer) else place_of(layer.head_dim, layer.key_offsets)


def random_step(
    generator: torch.Generator,
    lengths: Sequence[tuple[int, int]],
    layer: PagedLayer | DenseLayer,
    *,
    page_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """A step whose sequences' pages lie in random order; unused slots and the rest of the block table are poison."""
    heads, head_dim = layer.num_kv_heads, layer.head_dim
    tokens_of_place, width = _place_of(layer)
    page_size = page_size or max(16, tokens_of_place)
    used = [-(-keys // page_size) for _, keys in lengths]
    num_pages = sum(used) + 2
    shape = (num_pages, heads, page_size // tokens_of_place, width)
    dense = isinstance(layer, DenseLayer)
    kv_cache = torch.full(shape, float("nan"), dtype=dtype) if dense else torch.full(shape, 255, dtype=torch.uint8)
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
        previous = torch.cat([slot[:1] * 0 - 1, slot[:-1]])
        layer.store(keys[-1][:past], values[-1][:past], kv_cache, slot[:past], previous)
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


@dataclass
class Request:
    """A request of :class:`Server`: its tokens' keys ``[n, H_kv, D]``, its pages, how many of its tokens are stored, a cache of
    its own with pages in order, to which the same is written; and whose pages its first ones are to be."""

    keys: torch.Tensor
    pages: list[int]
    length: int
    alone: PagedTQ4Cache
    prefix: Request | None = None


class Server:
    """Steps of a server as vLLM schedules them, written to one layer's cache; and a model of them in plain Python."""

    def __init__(self, generator: torch.Generator, layer: PagedLayer, *, page_size: int = 64, num_pages: int = 40) -> None:
        self.generator, self.layer, self.page_size = generator, layer, page_size
        tokens, width = place_of(layer.head_dim, True)
        shape = (num_pages, layer.num_kv_heads, page_size // tokens, width)
        self.kv_cache = torch.full(shape, 255, dtype=torch.uint8)
        self.free = torch.randperm(num_pages, generator=generator).tolist()
        self.previous = PreviousSlots(2048, page_size, torch.device("cpu"))

    def random(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both among them."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def request(self, count: int, prefix: Request | None = None, shared: int = 0) -> Request:
        """One of ``count`` tokens, of which the first ``shared``, whole pages, are those of ``prefix``."""
        layer = self.layer
        keys = torch.randn(count, layer.num_kv_heads, layer.head_dim, generator=self.generator)
        keys += 6 * torch.randn(1, layer.num_kv_heads, layer.head_dim, generator=self.generator)
        sizes = {"page_size": self.page_size, "num_kv_heads": layer.num_kv_heads, "head_dim": layer.head_dim}
        alone = PagedTQ4Cache.allocate(-(-count // self.page_size), **sizes, has_offsets=True)
        alone.buffer.fill_(255)
        one = Request(keys, [], 0, alone)
        if prefix is not None:
            keys[:shared], one.length, one.prefix = prefix.keys[:shared], shared, prefix
        return one

    def untied(self, request: Request, count: int) -> int:
        """``count`` or one less: not two tokens in a group that begins, both as far from their mean, so that rounding decides
        which is left out of it."""
        return count - 1 if count > 1 and (request.length + count) % 64 == 2 else count

    def slot(self, request: Request, position: int) -> int:
        """-1 before the first."""
        page, place = divmod(position, self.page_size)
        return request.pages[page] * self.page_size + place if position >= 0 else -1

    def step(self, *chunks: tuple[Request, int], padded: int = 0) -> None:
        """Store the next tokens of each request, as many as are given; sequences and tokens are padded as for a graph."""
        in_order = sorted(chunks, key=lambda chunk: chunk[0].prefix is not None)  # as they were scheduled
        for request, count in in_order:
            if request.prefix is not None:
                request.pages = request.prefix.pages[: request.length // self.page_size]
            while len(request.pages) * self.page_size < request.length + count:
                request.pages.append(self.free.pop())
        starts, rows, slots = [0], [], []
        for request, count in chunks:
            stop = request.length + count
            rows.append(request.keys[request.length : stop])
            slots += [self.slot(request, position) for position in range(request.length, stop)]
            starts.append(starts[-1] + count)
        table = torch.full((len(chunks) + padded, 16), -1, dtype=torch.int32)
        for index, (request, _) in enumerate(chunks):
            table[index, : len(request.pages)] = torch.tensor(request.pages)
        totals = torch.tensor([request.length + count for request, count in chunks] + [0] * padded, dtype=torch.int32)
        cu_seqlens = torch.tensor(starts + starts[-1:] * padded, dtype=torch.int32)
        mapping = torch.tensor(slots + [-1] * padded)
        keys = torch.cat([*rows, rows[0].new_full((padded, *rows[0].shape[1:]), float("nan"))])
        found = self.previous.find(cu_seqlens, totals, table.clamp(0) if padded else table, mapping)
        assert found is not None
        assert found[: len(slots)].tolist() == self.expected_previous(chunks)
        self.layer.store(keys, keys, self.kv_cache, mapping, found)
        for request, count in in_order:
            if request.prefix is not None:
                pages = request.length // self.page_size
                request.alone.buffer[:pages], request.prefix = request.prefix.alone.buffer[:pages], None
            self.store_alone(request, request.length + count, set(slots))

    def expected_previous(self, chunks: Sequence[tuple[Request, int]]) -> list[int]:
        """Token by token: the slot of the one before; -1 where there is none, or another request of the step writes it."""
        written, before = {}, []
        for number, (request, count) in enumerate(chunks):
            written |= {self.slot(request, request.length + i): number for i in range(count)}
        for number, (request, count) in enumerate(chunks):
            for position in range(request.length, request.length + count):
                slot = self.slot(request, position - 1)
                before.append(slot if written.get(slot, number) == number else -1)
        return before

    def store_alone(self, request: Request, stop: int, written: set[int]) -> None:
        position = torch.arange(request.length, stop)
        previous = position - 1
        if len(position) and self.slot(request, request.length - 1) in written:
            previous[0] = -1
        keys = request.keys[request.length : stop]
        codec = self.layer.codec_on(keys.device)
        tq4_store(keys, keys, request.alone, codec, position, previous_slots=previous, backend="reference")
        request.length = stop

    def reject(self, request: Request, count: int) -> None:
        """The last tokens were drafts: others will be in their places."""
        request.length -= count
        places = request.keys[request.length : request.length + count]
        places.copy_(torch.randn(places.shape, generator=self.generator))

    def preempt(self, request: Request, kept: int = 0) -> None:
        """Take a request's pages but for the first ``kept``, and begin behind these again."""
        self.free[:0] = request.pages[kept:]
        request.pages, request.length = request.pages[:kept], min(request.length, kept * self.page_size)
        request.alone.buffer[kept:] = 255

    def check(self, *requests: Request) -> None:
        """What is in a request's pages is what is in its own cache."""
        for request in requests:
            pages, count = torch.tensor(request.pages), request.length
            there = self.layer.pages(self.kv_cache).keys.each(lambda x, pages=pages: x[pages])
            got, want = (
                operand.each(lambda x: x.transpose(0, 1).flatten(1, 2)[None]).tokens(0, count)
                for operand in (there, request.alone.keys)
            )
            # Rounding differs with the number of rows of a product: few codes flip, by one level, and their keys' norms change.
            assert (got.data != want.data).float().mean() < 1e-3
            for a, b in ((got.norms, want.norms), (got.steps[..., :3], want.steps[..., :3])):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)
            assert (got.groups.int() - want.groups.int()).abs().max() <= 1
            assert (got.groups != want.groups).float().mean() < 1e-2
