"""Random batches over paged caches, and what each of their sequences is alone: for the tests of every backend.

A backend under test is a function ``run(batch) -> (out, lse)``, see :class:`Batch`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attention_cases import (
    Case,
    check,
    check_gate,
    default_scale,
    expected,
    levels_and_rotation,
    pytorch_attention,
    random_groups,
)
from turboquant_vllm import PagedTQ4Cache, reference
from turboquant_vllm.checks import PagedShape
from turboquant_vllm.lengths import HostLengths
from turboquant_vllm.records import GROUP, Masks, Sequences, Tables

Run = Callable[["Batch"], tuple[torch.Tensor, torch.Tensor]]
HALF, FULL = torch.float16, torch.float32


@dataclass(frozen=True)
class Batch:
    """One call over pages, and the sequences that its pages hold: codes and norms ``[1, H_kv, N_kv, ...]`` each."""

    q: torch.Tensor
    cache: PagedTQ4Cache
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    centroids: torch.Tensor
    rotation: torch.Tensor
    sm_scale: float
    sequences: list[dict[str, torch.Tensor]]
    causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    windows: torch.Tensor | None = None
    key_scales: torch.Tensor | None = None
    host_knows: bool = True  # its lengths

    def replace(self, **changes: Any) -> Batch:
        return dataclasses.replace(self, **changes)

    @property
    def masks(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sliding_window", "softcap", "sinks", "windows")}

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of :func:`turboquant_vllm.reference.paged_attention`, with the bounds that the shapes give."""
        bounds = (self.q.shape[0], self.block_table.shape[1] * self.cache.page_size)
        sequences = Sequences(self.block_table, self.seq_lens, self.cu_seqlens_q, *bounds)
        masks = Masks(self.causal, *self.masks.values())
        return self.q, self.cache, sequences, Tables(self.centroids, self.rotation, self.key_scales), self.sm_scale, masks

    @property
    def tokens(self) -> list[slice]:
        """Each sequence's query tokens."""
        starts = self.cu_seqlens_q.tolist()
        return [slice(begin, end) for begin, end in itertools.pairwise(starts)]

    def alone(self, index: int) -> Case:
        """One sequence as a call of dense attention."""
        q = self.q[self.tokens[index]].transpose(0, 1)[None]
        shared = self.shared
        if (windows := shared.pop("windows")) is not None:
            shared["sliding_window"] = int(windows[index])
        return Case(q=q, **self.sequences[index], **shared, is_causal=self.causal)

    @property
    def shared(self) -> dict[str, Any]:
        tables = {"centroids": self.centroids, "rotation": self.rotation, "key_scales": self.key_scales}
        return {**tables, "sm_scale": self.sm_scale, **self.masks}

    def only(self, index: int) -> Batch:
        """A batch of one of the sequences, in the same pages."""
        length = self.q[self.tokens[index]].shape[0]
        return self.replace(
            q=self.q[self.tokens[index]],
            block_table=self.block_table[index : index + 1],
            seq_lens=self.seq_lens[index : index + 1],
            windows=None if self.windows is None else self.windows[index : index + 1],
            cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32, device=self.q.device),
            sequences=self.sequences[index : index + 1],
        )


def random_batch(
    generator: torch.Generator,
    lengths: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    spare_tokens: int = 0,
    offsets: bool = False,
    **options: Any,
) -> Batch:
    """Sequences of ``lengths`` (query tokens, keys), scattered over pages whose unused slots and gaps are poison.

    Entries of the block table that no sequence uses name no page, and ``spare_tokens`` query tokens belong to none.
    """
    used = [-(-keys // page_size) for _, keys in lengths]
    num_pages = sum(used) + 3
    width = PagedTQ4Cache.page_bytes(page_size, num_kv_heads, head_dim, offsets)
    # All bits set: NaN as a norm, the last level as a code.
    memory = torch.full((num_pages, width + 48), 255, dtype=torch.uint8, device=device)
    cache = PagedTQ4Cache(memory[:, 16:-32], page_size, num_kv_heads, head_dim, offsets)
    assert cache.k_norms.isnan().all()
    pages = torch.randperm(num_pages, generator=generator).tolist()
    table = torch.randint(-(2**31), 2**31, (len(lengths), max(used, default=0) + 2), generator=generator).int().to(device)
    table = torch.where((table >= 0) & (table < num_pages), -1, table)
    sequences = []
    for index, (_, keys) in enumerate(lengths):
        own, pages = pages[: used[index]], pages[used[index] :]
        table[index, : used[index]] = torch.tensor(own, dtype=torch.int32)
        rows = (num_kv_heads, keys)
        sequence = {}
        for name, view in zip(("k", "k_norms", "v", "v_norms"), _views(cache), strict=True):
            if name.endswith("norms"):
                x = math.sqrt(head_dim) * torch.exp(0.3 * torch.randn(rows, generator=generator))
            else:
                x = torch.randint(256, (*rows, head_dim // 2), generator=generator, dtype=torch.uint8)
            x = x.to(device)
            for number, page in enumerate(own):
                some = x[:, number * page_size : (number + 1) * page_size]
                view[page, :, : some.shape[1]] = some
            sequence[name] = x[None]
        if offsets:
            _put_groups(generator, cache, own, sequence)
        sequences.append(sequence)
    starts = [0]
    for tokens, _ in lengths:
        starts.append(starts[-1] + tokens)
    q = torch.randn(starts[-1] + spare_tokens, num_kv_heads * group, head_dim, generator=generator).to(device, dtype)
    centroids, rotation = levels_and_rotation(head_dim, device)
    return Batch(
        q=q,
        cache=cache,
        block_table=table,
        seq_lens=torch.tensor([keys for _, keys in lengths], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device),
        centroids=centroids,
        rotation=rotation,
        sm_scale=default_scale(head_dim, offsets),
        sequences=sequences,
        key_scales=torch.exp(0.5 * torch.randn(num_kv_heads, head_dim, generator=generator)).to(device) if offsets else None,
        **options,
    )


def _put_groups(generator: torch.Generator, cache: PagedTQ4Cache, own: list[int], sequence: dict[str, torch.Tensor]) -> None:
    """Give a sequence in pages ``own`` offsets and outliers."""
    rows, keys = sequence["k_norms"].shape, cache.keys
    signs, *shared = (x.to(cache.device) for x in random_groups(generator, rows, cache.head_dim))
    sequence["k_norms"] *= signs
    sequence["k_groups"], sequence["k_steps"] = shared
    parts = ((keys.norms, sequence["k_norms"], cache.page_size),)
    parts += tuple((to, x, cache.page_size // GROUP) for to, x in zip(keys[2:], shared, strict=True))
    for to, x, size in parts:
        for number, page in enumerate(own):
            some = x[0, :, number * size : (number + 1) * size]
            to[page, :, : some.shape[1]] = some


def _views(cache: PagedTQ4Cache) -> tuple[torch.Tensor, ...]:
    return cache.k_codes, cache.k_norms, cache.v_codes, cache.v_norms


def check_batch(run: Run, batch: Batch, *, gate: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a batch and compare each sequence with what it is alone in float64.

    With ``gate`` the error of the whole call must pass :func:`attention_cases.check_gate`, each sequence in units of its own
    largest magnitude: a sequence alone may be a handful of numbers, where PyTorch is exact by luck.
    """
    out, lse = run(batch)
    assert (out.shape, out.dtype) == (batch.q.shape, batch.q.dtype)
    assert (lse.shape, lse.dtype) == (batch.q.shape[:2], torch.float32)
    gated = []
    for index, tokens in enumerate(batch.tokens):
        if tokens.start < tokens.stop:
            case = batch.alone(index)
            check_sequence(case, out[tokens], lse[tokens])
            want, want_lse = expected(case)
            seen = want_lse != float("-inf")
            if gate and want[seen].any():
                unit = want.abs().max()
                results = (out[tokens].transpose(0, 1)[None].double(), want, pytorch_attention(case).double())
                gated.append([(x[seen] / unit).flatten() for x in results])
    if gated:
        ours, want, theirs = (torch.cat(list(x)) for x in zip(*gated, strict=True))
        check_gate(ours, want, theirs, batch.q.dtype)
    return out, lse


def check_sequence(case: Case, out: torch.Tensor, lse: torch.Tensor) -> None:
    """The rows ``[tokens, H_q, ...]`` that a batch gave for one of its sequences are within the dtype's tolerance."""
    check(lambda *_: (out.transpose(0, 1)[None], lse.T[None]), case, gate=False)


def run_reference(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.paged_attention(*batch.arguments)


def arguments(batch: Batch) -> tuple[Any, ...]:
    """Queries, pages and index, as :func:`turboquant_vllm.tq4_paged_attention` takes them."""
    return batch.q, batch.cache, batch.block_table, batch.seq_lens, batch.cu_seqlens_q


def operator_arguments(batch: Batch, out: torch.Tensor, lse: torch.Tensor) -> tuple[Any, ...]:
    """Those of ``turboquant::triton_paged``, with the bounds that the shapes give."""
    q, cache, sequences, tables, sm_scale, masks = batch.arguments
    pages = (cache.buffer, cache.page_size, cache.num_kv_heads)
    offsets = (cache.has_offsets, tables.key_scales)
    return (q, *pages, *sequences[:3], *tables[:2], sm_scale, masks[0], *sequences[3:5], out, lse, *masks[1:], *offsets)


def known_lengths(batch: Batch) -> tuple[Any, ...]:
    """``batch.arguments``, its lengths known to the host."""
    q, cache, sequences, *how = batch.arguments
    lens, starts = host_lengths(batch)
    return q, cache, sequences._replace(seq_lens_cpu=lens, cu_seqlens_q_cpu=starts), *how


def host_lengths(batch: Batch) -> tuple[list[int], list[int]] | tuple[None, None]:
    """The batch's lengths as ``seq_lens_cpu, cu_seqlens_q_cpu``; None if the host has not got them.

    That is so, too, for lengths that the public function refuses.
    """
    if not batch.host_knows:
        return None, None
    lens, starts = batch.seq_lens.tolist(), batch.cu_seqlens_q.tolist()
    shape = PagedShape(
        batch.q.shape[0], len(lens), batch.q.shape[1], batch.cache.num_kv_heads, batch.cache.head_dim, batch.cache.page_size,
        batch.block_table.shape[1],
    )  # fmt: skip
    try:
        HostLengths.check(lens, starts, shape)
    except ValueError:
        return None, None
    return lens, starts
