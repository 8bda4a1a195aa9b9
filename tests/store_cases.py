"""Calls of a paged store, and the check that all backends must pass: codes and norms in their slots, all else untouched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compression_checks import check_compress, special_vectors
from turboquant_vllm import PagedTQ4Cache, TQ4Codec


@dataclass(frozen=True)
class StoreCase:
    """Keys and values ``[tokens, heads, D]``, where they go, and the memory that the pages are a part of."""

    k: torch.Tensor
    v: torch.Tensor
    codec: TQ4Codec
    slot_mapping: torch.Tensor
    cache: PagedTQ4Cache
    memory: torch.Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What ``turboquant::store`` takes but for the backend."""
        where = (self.cache.buffer, self.slot_mapping)
        return (self.k, self.v, *where, *self.codec.writing, self.cache.page_size)

    @property
    def kernel_arguments(self) -> tuple[Any, ...]:
        """What the Triton kernel's caller takes."""
        rotation, _, *rest = self.codec.writing
        return (self.k, self.v, self.cache.buffer, self.slot_mapping, rotation, *rest, self.cache.page_size)


def random_store(
    generator: torch.Generator,
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_size: int = 16,
    rotation: str = "auto",
    scale: str = "norm",
    layout: str = "contiguous",
    slot_dtype: torch.dtype = torch.int64,
    gap: int = 48,
    device: str = "cpu",
) -> StoreCase:
    """Random vectors, extreme ones among them; a random half of the slots of a cache, some tokens left out."""
    num_pages = 2 * tokens // page_size + 2
    width = PagedTQ4Cache.page_bytes(page_size, heads, head_dim)
    memory = torch.randint(256, (16 + num_pages * (width + gap),), generator=generator, dtype=torch.uint8).to(device)
    buffer = memory.as_strided((num_pages, width), (width + gap, 1), 16)
    cache = PagedTQ4Cache(buffer, page_size=page_size, num_kv_heads=heads, head_dim=head_dim)
    slots = torch.randperm(cache.num_slots, generator=generator)[:tokens]
    left_out = torch.rand(tokens, generator=generator) < 0.2
    outside = torch.tensor([-1, cache.num_slots, -(2**31), 2**31 - 1])[torch.randint(4, (tokens,), generator=generator)]
    slots = torch.where(left_out, outside, slots).to(slot_dtype)

    def vectors() -> torch.Tensor:
        x = torch.randn(tokens * heads, head_dim, generator=generator).to(dtype)
        special = special_vectors(head_dim, dtype, generator)[: len(x)]
        x[torch.randperm(len(x), generator=generator)[: len(special)]] = special
        return lay_out_rows(x.view(tokens, heads, head_dim).to(device), layout)

    return StoreCase(
        vectors(), vectors(), TQ4Codec(head_dim, rotation=rotation, scale=scale, device=device), slots.to(device), cache, memory
    )


def lay_out_rows(x: torch.Tensor, layout: str) -> torch.Tensor:
    tokens, heads, head_dim = x.shape
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    # As a slice of one projection's output; rows on 16-byte boundaries ("sliced"), or beginning at an odd element ("odd").
    before, after = (16, 16) if layout == "sliced" else (1, 2)
    wide = torch.full((tokens, heads + 1, head_dim + before + after), float("nan"), dtype=x.dtype, device=x.device)
    return wide[:, 1:, before:-after].copy_(x)


def check_store(run: Callable[..., Any], case: StoreCase) -> None:
    """Run ``run(case)`` and look at every byte of the memory that the pages are in."""
    cache, before = case.cache, case.memory.clone()
    run(case)
    kept = (case.slot_mapping >= 0) & (case.slot_mapping < cache.num_slots)
    slot = case.slot_mapping[kept].long()
    page, place = slot // cache.page_size, slot % cache.page_size
    old = PagedTQ4Cache(
        before.as_strided(cache.buffer.shape, cache.buffer.stride(), 16),
        page_size=cache.page_size, num_kv_heads=cache.num_kv_heads, head_dim=cache.head_dim,
    )  # fmt: skip
    for name, x in (("k", case.k), ("v", case.v)):
        codes, norms = (getattr(cache, f"{name}_{part}") for part in ("codes", "norms"))
        stored = codes[page, :, place], norms[page, :, place]
        check_compress(lambda *_, stored=stored: stored, x[kept], case.codec)
        for part, view in (("codes", codes), ("norms", norms)):
            getattr(old, f"{name}_{part}")[page, :, place] = view[page, :, place]
    assert torch.equal(case.memory, before), "bytes outside of the slots have changed"
