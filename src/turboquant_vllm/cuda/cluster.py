"""Native decoding in one launch, several blocks for each pass over the keys: what is launched for a call's sizes.

``cluster.cuh`` says how the work is done, by the blocks of a cluster or by blocks that are spread. Rotations other than
Hadamard matrices, and ranges of fixed length, are left to the line of tiles, and so are GPUs before compute capability 9.0.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from turboquant_vllm.cuda.runtime import Kernel, compile_for, launch, load_kernel
from turboquant_vllm.cuda.sources import params_of, source
from turboquant_vllm.cuda.store import TeamDivision
from turboquant_vllm.cuda.variants import (
    ALWAYS,
    STORING_WARPS,
    Cluster,
    Stored,
    Variant,
    choose_cluster,
    choose_variant,
    cluster_variants,
    device_limits,
    divisor,
    fits_clusters,
    has_clusters,
    team_bytes,
)

__all__ = ["ClusterCall", "plan"]


class Counters:
    """Counters that kernels leave as they find them: zero. A call takes the next ones of many, so that calls which run at the
    same time, on other streams or in graphs, have others: a million is more than what some thousand calls take."""

    def __init__(self, zeros: torch.Tensor) -> None:
        self._zeros = zeros
        self._next = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> int:
        """The address of ``count`` of them."""
        with self._lock:
            first = self._next if self._next + count <= self._zeros.numel() else 0
            self._next = first + count
        return self._zeros.data_ptr() + 4 * first


@dataclass(frozen=True)
class Storing:
    """How a step's own keys and values are stored in attention's launch, by so many teams of a block."""

    division: TeamDivision
    teams: int

    @property
    def blocks(self) -> int:
        return -(-self.division.teams // self.teams)


@dataclass(frozen=True)
class ClusterCall:
    """What of a call follows from its sizes alone.

    Attributes:
        kernel: the one that is launched.
        passes: over the keys, each a cluster's.
        cluster: blocks of each, and what is compiled.
        layout: the numbers that the kernel takes about query rows and working warps.
        last: those that it takes last.
        part_floats: of what blocks that are spread leave in global memory for the last of them.
        counters: that they, or blocks that store, take from; else None.
        storing: what the first blocks do; None: they attend.
    """

    kernel: Kernel
    passes: int
    cluster: Cluster
    layout: tuple[int, ...]
    last: tuple[int, ...]
    part_floats: int
    counters: Counters | None
    storing: Storing | None = None

    def to_join(self, device: torch.device) -> tuple[torch.Tensor | None, int, int]:
        """Where blocks that are spread join their results, on ``device``: room for these, to be held until the launch, its
        address, and that of a counter for each pass, which is zero; else None, 0 and 0."""
        if self.counters is None or not self.cluster.variant.spread:
            return None, 0, 0
        room = torch.empty(self.part_floats, dtype=torch.float32, device=device)
        return room, room.data_ptr(), self.counters.take(self.passes)

    @property
    def first_block(self) -> int:
        """Of those that attend: what is stored first takes whole clusters."""
        return 0 if self.storing is None else -(-self.storing.blocks // self.cluster.blocks) * self.cluster.blocks

    def to_store(self) -> tuple[int, int, int]:
        """What the kernel takes last if it stores: the address of a counter that is zero, blocks that store, and the first that
        attends."""
        assert self.counters is not None
        assert self.storing is not None
        return self.counters.take(1), self.storing.blocks, self.first_block

    def launch(self, args: tuple[int | float, ...], *, pdl: bool = False) -> None:
        """Enqueue the kernel on PyTorch's current stream; ``pdl``: behind a native store, and to start while that runs."""
        blocks, variant = self.cluster.blocks, self.cluster.variant
        grid, together = self.first_block + self.passes // variant.passes * blocks, blocks > 1 and not variant.spread
        launch(
            self.kernel, (grid, 1, 1), (32 * variant.warps, 1, 1), variant.cluster_bytes(blocks), None, args,
            pdl=pdl, cluster=(blocks, 1, 1) if together else None,
        )  # fmt: skip


_counters: dict[int, Counters] = {}  # of each device


def _has_counters(index: int) -> bool:
    """Whether device ``index`` has counters, which are made unless a graph is being captured: it would set them to zero at each
    replay."""
    if index not in _counters and not torch.cuda.is_current_stream_capturing():
        _counters[index] = Counters(torch.zeros(1 << 20, dtype=torch.int32, device=f"cuda:{index}"))
        torch.cuda.synchronize(index)  # other streams may be the first to use them
    return index in _counters


def _source_of(variant: Variant) -> str:
    return source(variant.cluster, variant.stores is not None)


@cache
def _kernel(index: int, variant: Variant, pages: bool) -> Kernel:
    ((name, codes),) = params_of(variant, pages).items()
    defines = {**variant.defines, "PAGED": int(pages)}
    return load_kernel(_source_of(variant), name, device=index, params=codes, defines=defines)


@cache
def _fit(index: int, variant: Variant, pages: bool, blocks: int) -> int:
    """Clusters of so many blocks that a device runs at once."""
    return _kernel(index, variant, pages).clusters_at_once(32 * variant.warps, variant.cluster_bytes(blocks), blocks)


@cache
def _load_all(
    index: int, alone: Variant, line: Variant, pages: bool, kernels: Callable[[int, Variant], Any], stored: Stored | None
) -> None:
    """Load all that other lengths of the same call may take, so that a new length compiles nothing, in a graph's capture above
    all."""
    some = cluster_variants(alone)
    found = [variant for variant in some if variant is not None]
    if stored is not None:
        found += [dataclasses.replace(variant, stores=stored) for variant in (some.alone, some.few) if variant is not None]
    wanted = [(_source_of(variant), {**variant.defines, "PAGED": int(pages)}) for variant in (line, *found)]
    compile_for(index, "tq4_decode", wanted)
    kernels(index, line)
    for variant in found:
        _kernel(index, variant, pages)


def _with_store(
    index: int, cluster: Cluster, passes: int, num_kv_heads: int, stored: Stored, tokens: int
) -> tuple[Cluster, Storing] | None:
    """``cluster`` with a step's store in its launch, and how that is divided; None where both do not run at once."""
    variant, blocks = dataclasses.replace(cluster.variant, stores=stored), cluster.blocks
    if cluster.even is not ALWAYS or variant.spread or variant.passes > 1 or variant.resident > 1:
        return None
    most = variant.warps // STORING_WARPS
    if variant.warps % STORING_WARPS or most * team_bytes(variant.head_dim, variant.offsets) > variant.cluster_bytes(blocks):
        return None
    vectors = 2 * tokens * num_kv_heads  # a team for each, at most
    division = TeamDivision.choose(tokens, num_kv_heads, variant.head_dim, variant.offsets, vectors)
    for teams in range(1, most + 1):  # as few as there is room for: each is done sooner
        storing = Storing(division, teams)
        if passes + -(-storing.blocks // blocks) <= _fit(index, variant, True, blocks):
            return dataclasses.replace(cluster, variant=variant), storing
    return None


@lru_cache(maxsize=1024)
def plan(
    index: int,
    heads: int,
    num_kv_heads: int,
    group: int,
    rows: int,
    tiles: int,
    head_dim: int,
    masked: bool,
    offsets: bool,
    pages: bool,
    kernels: Callable[[int, Variant], Any],
    stored: Stored | None = None,
    tokens: int = 0,
) -> ClusterCall | None:
    """The launch for ``rows`` query rows of each of ``heads`` key/value heads of all sequences, over at most ``tiles`` tiles of
    16 keys each, on device ``index``; None where the line of tiles is to do it. ``kernels`` loads what the line takes. Over
    pages the launch may be for certain lengths alone: ``cluster.even``; else, and where there is room for the blocks of both,
    it stores ``tokens`` tokens of a step first."""
    if not has_clusters(index):
        return None
    multiprocessors, shared_limit = device_limits(index)
    if not fits_clusters(head_dim, rows, shared_limit, masked, offsets):
        return None
    line, alone = (choose_variant(head_dim, rows, shared_limit, masked, offsets, True, one) for one in (False, True))
    chunks = -(-rows // (4 * alone.row_tiles))
    if pages and chunks > 1:
        return None
    passes = heads * chunks
    _load_all(index, alone, line, pages, kernels, stored if passes < multiprocessors else None)
    counted = _has_counters(index)

    def fit(variant: Variant, blocks: int) -> int:
        return _fit(index, variant, pages, blocks) if variant.cluster_bytes(blocks) <= shared_limit else 0

    in_twos = (num_kv_heads * chunks) % 2 == 0
    cluster = choose_cluster(passes, tiles, alone, multiprocessors, fit, heads // num_kv_heads if pages else 0, in_twos)
    if cluster is None or (cluster.variant.spread and not counted):
        return None
    storing = None
    if stored is not None and counted and (found := _with_store(index, cluster, passes, num_kv_heads, stored, tokens)):
        cluster, storing = found
    variant, blocks = cluster.variant, cluster.blocks
    layout = (num_kv_heads, group, rows, chunks, *divisor(num_kv_heads), *divisor(group), *divisor(chunks), variant.team_warps)
    last = (blocks, *divisor(blocks), *divisor(blocks * variant.team_warps))
    counters = _counters[index] if variant.spread or storing is not None else None
    kernel, part_floats = _kernel(index, variant, pages), passes * blocks * variant.row_floats
    return ClusterCall(kernel, passes, cluster, layout, last, part_floats, counters, storing)
