"""Rows of ``benchmarks/serving.py`` about pages: decode against our own dense call, prompts whose lengths the host knows
against PyTorch's best dense attention, a mixed batch against its two parts, and a step that stores its own keys and values
against two calls, and against one call that leaves lengths aside.

Both sides of a row read the same bytes, the pages in random order. Answers are checked against the reference in float64, and
whole public calls are timed, replayed from CUDA graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import common
from triton_attention import HEAD_DIM, error, random_cache
from turboquant_vllm import PagedTQ4Cache, TQ4Codec, TQ4Tensor, reference, tq4_attention, tq4_paged_attention, tq4_store
from turboquant_vllm.cuda import cluster
from turboquant_vllm.records import GROUP, Masks, Sequences

# id, sequences, query heads, kv heads, keys of each sequence
DECODE = [
    ("paged-a", 16, 32, 8, 32768),
    ("paged-b", 1, 32, 8, 131072),
    ("paged-c", 8, 32, 32, 8192),
    ("paged-d", 32, 32, 8, 4096),
    ("paged-e", 16, 64, 8, 32768),
    ("paged-f", 1, 32, 8, 8192),
    ("paged-f1", 1, 32, 8, 1024),
]
# Of a step that stores a token of each sequence first: id, sequences, query heads, kv heads, keys of the shortest and of the
# longest sequence, in a cache that has room for more.
STEPS = [
    ("step-1x1024", 1, 32, 8, 1024, 1024),
    ("step-1x32768", 1, 32, 8, 32768, 32768),
    ("step-12x8192", 12, 32, 8, 8192, 8192),
    ("step-32x1024", 32, 32, 8, 1024, 1024),
    ("step-32x8192", 32, 32, 8, 8192, 8192),
    ("step-32x4096-8192", 32, 32, 8, 4096, 8192),
    ("step-32x256-16384", 32, 32, 8, 256, 16384),
    ("step-8x32768", 8, 32, 8, 32768, 32768),
    ("step-8x1024-32768", 8, 32, 8, 1024, 32768),
    ("step-64x1024", 64, 32, 8, 1024, 1024),
]
ALLOWED = 33792  # keys of a sequence that steps have room for
# id, query heads, kv heads, query tokens, keys
PROMPTS = [("prefill", 32, 8, 8192, 8192), ("chunk512", 32, 8, 512, 32768 + 512)]
# Sequences, query tokens and keys of each.
DECODES, CHUNKS = (56, 1, 8192), (8, 512, 8192 + 512)


class Batch:
    """Sequences of some lengths in pages in random order, and the call over them; ``known``: with the lengths for the host."""

    def __init__(
        self,
        codec: TQ4Codec,
        caches: list[tuple[TQ4Tensor, TQ4Tensor]],
        tokens: list[int],
        heads: int,
        page: int,
        *,
        known: bool = False,
        offsets: bool = False,
    ) -> None:
        counts = [k.codes.shape[0] * -(-k.codes.shape[2] // page) for k, _ in caches]
        kv_heads = caches[0][0].codes.shape[1]
        self.codec = codec
        self.cache = PagedTQ4Cache.allocate(
            sum(counts), page_size=page, num_kv_heads=kv_heads, head_dim=HEAD_DIM, has_offsets=offsets, device="cuda"
        )
        order = torch.randperm(sum(counts), device="cuda").int().split(counts)
        tables = [_fill(self.cache, k, v, pages) for (k, v), pages in zip(caches, order, strict=True)]
        if offsets:
            self._put_offsets()
        width = max(table.shape[1] for table in tables)
        self.block_table = torch.cat([torch.nn.functional.pad(table, (0, width - table.shape[1])) for table in tables])
        lengths = [k.codes.shape[2] for k, _ in caches for _ in range(k.codes.shape[0])]
        queries = [n for (k, _), n in zip(caches, tokens, strict=True) for _ in range(k.codes.shape[0])]
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.cu_seqlens_q = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
        self.bounds: dict[str, Any] = {"max_query_len": max(queries), "max_seq_len": max(lengths)}
        if known:
            self.bounds = {"seq_lens_cpu": self.seq_lens.tolist(), "cu_seqlens_q_cpu": self.cu_seqlens_q.tolist()}
        self.q = torch.randn(sum(queries), heads, HEAD_DIM, dtype=torch.float16, device="cuda")

    def __call__(self, **new: Any) -> torch.Tensor:
        index, options = (self.block_table, self.seq_lens, self.cu_seqlens_q), {**self.bounds, **new}
        return tq4_paged_attention(self.q, self.cache, self.codec, *index, **options)

    def _put_offsets(self) -> None:
        """Random ones, as long as keys are, and an outlier in most groups."""
        keys = self.cache.keys
        assert keys.norms is not None
        assert keys.groups is not None
        assert keys.steps is not None
        keys.groups.random_(-127, 128)
        keys.steps.fill_(1 / 73.3)  # the root mean square of such bytes
        of_groups = keys.norms.unflatten(2, (-1, GROUP))
        place = torch.randint(GROUP, of_groups.shape[:3], device="cuda").unsqueeze(3)
        of_groups.scatter_(3, place, -of_groups.gather(3, place))

    def allow(self, tokens: int) -> None:
        """Let the block table, and what the host knows of lengths, have room for so many keys of each sequence."""
        missing = tokens // self.cache.page_size - self.block_table.shape[1]
        self.block_table = torch.nn.functional.pad(self.block_table, (0, missing))
        self.bounds["max_seq_len"] = tokens

    def error(self) -> float:
        """The largest error over the first and the last sequence, one query token of each, against float64."""
        found, worst = self(), 0.0
        for s in (0, len(self.seq_lens) - 1):
            own = slice(s, s + 1)
            starts = self.cu_seqlens_q[:2]
            sequences = Sequences(self.block_table[own], self.seq_lens[own], starts, 1, int(self.seq_lens[s]))
            how = (sequences, self.codec.key_tables, HEAD_DIM**-0.5, Masks(True))
            want, _ = reference.paged_attention(self.q[own].double(), self.cache, *how)
            worst = max(worst, (found[own].double() - want).abs().max().item() / want.abs().max().item())
        if not worst < 4 * 2.0**-10:
            raise AssertionError(f"wrong answer: error {worst} of the largest magnitude")
        return worst


def _fill(cache: PagedTQ4Cache, k: TQ4Tensor, v: TQ4Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Write k and v, whose length is a multiple of the page size, into these pages; returns the block table."""
    table = pages.view(k.codes.shape[0], -1)
    views = (cache.k_codes, cache.k_norms, cache.v_codes, cache.v_norms)
    for view, x in zip(views, (*k, *v), strict=True):
        view[table.long()] = x.unflatten(2, (table.shape[1], cache.page_size)).transpose(1, 2)
    return table


def decode_row(case: tuple[str, int, int, int, int], page: int, codec: TQ4Codec, bandwidth: float) -> dict[str, Any]:
    """``ratio`` is the time of our dense call over that of the paged one."""
    name, sequences, heads, kv_heads, kv_len = case
    k, v = (random_cache(sequences, kv_heads, kv_len, HEAD_DIM) for _ in range(2))
    batch = Batch(codec, [(k, v)], [1], heads, page)
    q = batch.q.unsqueeze(2)
    worst = error(q, k, v, codec, True, batch().unsqueeze(2))
    dense = common.median_ms(common.graphed(lambda: tq4_attention(q, k, v, codec)))
    ours = common.median_ms(common.graphed(batch))
    speed = common.BYTES_PER_TOKEN[HEAD_DIM] * sequences * kv_heads * kv_len / ours / 1e6
    row: dict[str, Any] = {
        "id": f"{name}-page{page}",
        "scope": "call",
        "shape": {"sequences": sequences, "heads": heads, "kv_heads": kv_heads, "kv_len": kv_len, "head_dim": HEAD_DIM},
        "page_size": page,
        "dtype": "fp16",
        "ours_ms": round(ours, 5),
        "our_dense_ms": round(dense, 5),
        "ratio": round(dense / ours, 3),
        "gb_per_s": round(speed, 1),
        "read_bandwidth_share": round(speed / bandwidth, 3),
        "max_abs_err": worst,
    }
    if page % GROUP == 0:
        row |= offsets_part(Batch(codec, [(k, v)], [1], heads, page, offsets=True), batch)
    return row


def offsets_part(batch: Batch, plain: Batch) -> dict[str, Any]:
    """Of a row: the time over keys with offsets, and how many times that over plain ones it is, timed in turns."""
    worst = batch.error()
    run = [common.graphed(plain), common.graphed(batch)]
    turns = [[common.median_ms(call) for call in run] for _ in range(3)]
    plain_ms, ours = (sorted(times)[1] for times in zip(*turns, strict=True))
    return {"offsets_ms": round(ours, 5), "offsets_ratio": round(ours / plain_ms, 3), "offsets_max_err": worst}


def prompt_row(case: tuple[str, int, int, int, int], page: int, codec: TQ4Codec) -> dict[str, Any]:
    """``ratio`` is the best dense time over ours; PyTorch's dense attention has a causal mask for whole prompts alone."""
    name, heads, kv_heads, q_len, kv_len = case
    k, v = (random_cache(1, kv_heads, kv_len, HEAD_DIM) for _ in range(2))
    batch = Batch(codec, [(k, v)], [q_len], heads, page, known=True)
    q = batch.q.transpose(0, 1)[None]
    worst = error(q, k, v, codec, True, batch().transpose(0, 1)[None])
    ours, eager = common.median_ms(common.graphed(batch), 60), common.median_ms(batch, 60)
    k_dense, v_dense = (torch.randn(1, kv_heads, kv_len, HEAD_DIM, dtype=q.dtype, device="cuda") for _ in range(2))
    best, backend, _ = common.best_dense_ms(q.contiguous(), k_dense, v_dense, q_len == kv_len, rep=60, graph=True)
    return {
        "id": f"{name}-page{page}",
        "scope": "call",
        "shape": {"heads": heads, "kv_heads": kv_heads, "q_len": q_len, "kv_len": kv_len, "head_dim": HEAD_DIM},
        "page_size": page,
        "dtype": "fp16",
        "ours_ms": round(ours, 5),
        "ours_eager_ms": round(eager, 5),
        "best_fp16_ms": round(best, 5),
        "best_backend": backend,
        "ratio": round(best / ours, 3),
        "max_abs_err": worst,
    }


def mixed_row(page: int, codec: TQ4Codec, known: bool) -> dict[str, Any]:
    """Decodes and chunks of prompts in one call; ``ratio`` is the time of two calls, one for each kind, over it."""
    heads, kv_heads = 32, 8
    caches = [
        (random_cache(count, kv_heads, kv_len, HEAD_DIM), random_cache(count, kv_heads, kv_len, HEAD_DIM))
        for count, _, kv_len in (DECODES, CHUNKS)
    ]
    tokens = [DECODES[1], CHUNKS[1]]
    together = Batch(codec, caches, tokens, heads, page, known=known)
    apart = [Batch(codec, [cache], [count], heads, page, known=known) for cache, count in zip(caches, tokens, strict=True)]
    out, first = together(), 0
    worst = 0.0
    for (k, v), (count, n, _) in zip(caches, (DECODES, CHUNKS), strict=True):
        rows = slice(first, first + count * n)
        q, result = (x[rows].unflatten(0, (count, n)).transpose(1, 2) for x in (together.q, out))
        worst = max(worst, error(q, k, v, codec, True, result))
        first += count * n
    ours = common.median_ms(common.graphed(together))
    parts = [common.median_ms(common.graphed(part)) for part in apart]
    return {
        "id": f"mixed{'-known' if known else ''}-page{page}",
        "scope": "call",
        "shape": {"decodes": DECODES, "chunks": CHUNKS, "heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM},
        "page_size": page,
        "dtype": "fp16",
        "ours_ms": round(ours, 5),
        "decodes_ms": round(parts[0], 5),
        "chunks_ms": round(parts[1], 5),
        "ratio": round(sum(parts) / ours, 3),
        "max_abs_err": worst,
    }


@contextlib.contextmanager
def the_line_alone() -> Iterator[None]:
    """Inside, the native kernels divide the keys of all sequences over all warps, whatever the lengths are."""
    cluster.plan.cache_clear()
    with mock.patch.object(cluster, "choose_cluster", return_value=None):
        yield
    cluster.plan.cache_clear()


StepCase = tuple[str, int, int, int, int, int]


@dataclass(frozen=True)
class Step:
    """A case of ``STEPS``: its sequences, and the step that stores a token of each first, in one call or in two."""

    batch: Batch
    one_call: Callable[[], torch.Tensor]
    two_calls: Callable[[], torch.Tensor]


def step_of(case: StepCase, codec: TQ4Codec) -> Step:
    """Keys with offsets; the bits of one call are those of two, or AssertionError."""
    name, sequences, heads, kv_heads, shortest, longest = case
    lengths = [GROUP * round(n / GROUP) for n in torch.linspace(shortest, longest, sequences).tolist()]
    caches = [(random_cache(1, kv_heads, n, HEAD_DIM), random_cache(1, kv_heads, n, HEAD_DIM)) for n in lengths]
    batch = Batch(codec, caches, [1] * sequences, heads, GROUP, offsets=True)
    batch.allow(ALLOWED)
    last = batch.seq_lens.long() - 1  # goes on in a group
    slots = batch.block_table.gather(1, (last // GROUP)[:, None])[:, 0].long() * GROUP + last % GROUP
    keys, values = torch.randn(2, sequences, kv_heads, HEAD_DIM, dtype=torch.float16, device="cuda")
    new: dict[str, Any] = {"slot_mapping": slots, "previous_slots": slots - 1}

    def one_call() -> torch.Tensor:
        return batch(k=keys, v=values, **new)

    def two_calls() -> torch.Tensor:
        tq4_store(keys, values, batch.cache, codec, **new)
        return batch()

    before = batch.cache.buffer.clone()
    results = []
    for call in (two_calls, one_call):
        batch.cache.buffer.copy_(before)
        results.append((call(), batch.cache.buffer.clone()))
    if not all(torch.equal(x, y) for x, y in zip(*results, strict=True)):
        raise AssertionError(f"{name}: one call does not give the bits of two")
    return Step(batch, one_call, two_calls)


def step_row(case: StepCase, codec: TQ4Codec) -> dict[str, Any]:
    """``ratio`` is the time of a store and of attention behind it over that of one call, ``against_line`` that of one call
    which leaves lengths aside, timed in turns."""
    name, sequences, heads, kv_heads, shortest, longest = case
    step = step_of(case, codec)
    worst = step.batch.error()
    with the_line_alone():
        worst = max(worst, step.batch.error())
        line = common.graphed(step.one_call)
    calls = [common.graphed(step.two_calls), common.graphed(step.one_call), line]
    turns = [[common.median_ms(call) for call in calls] for _ in range(3)]
    apart, ours, alone = (sorted(times)[1] for times in zip(*turns, strict=True))
    shape = {"sequences": sequences, "heads": heads, "kv_heads": kv_heads, "kv_len": [shortest, longest], "head_dim": HEAD_DIM}
    return {
        "id": name,
        "scope": "call",
        "shape": shape,
        "page_size": GROUP,
        "dtype": "fp16",
        "ours_ms": round(ours, 5),
        "two_calls_ms": round(apart, 5),
        "line_ms": round(alone, 5),
        "ratio": round(apart / ours, 3),
        "against_line": round(alone / ours, 3),
        "max_abs_err": worst,
    }


def rows(codec: TQ4Codec, bandwidth: float) -> list[dict[str, Any]]:
    """All rows, for page sizes 16 and 64."""
    result = [step_row(case, codec) for case in STEPS]
    for page in (16, 64):
        for case in DECODE:
            result.append(decode_row(case, page, codec, bandwidth))
            torch.cuda.empty_cache()
        for prompt in PROMPTS:
            result.append(prompt_row(prompt, page, codec))
            torch.cuda.empty_cache()
        for known in (False, True):
            result.append(mixed_row(page, codec, known))
            torch.cuda.empty_cache()
    return result
