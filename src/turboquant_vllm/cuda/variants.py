"""What the native decode compiles for a call, and how it divides the call's work; arithmetic alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

__all__ = [
    "ALWAYS", "COMBINE_THREADS", "NEVER", "STORING_WARPS", "Cluster", "ClusterVariants", "Division", "Even", "Stored",
    "Variant", "choose_cluster", "choose_variant", "cluster_variants", "device_limits", "divisor", "fits_clusters",
    "has_clusters", "rows_at_once", "team_bytes",
]  # fmt: skip

COMBINE_THREADS = {64: 256, 128: 512, 256: 512}  # of a block of the second kernel, by head_dim

_TABLE_BYTES = 65536
MOST_BLOCKS = 8  # of a cluster, on every device that has clusters
MOST_SPREAD = 32  # blocks of a pass that are no cluster: each lane of a warp joins one
# Tiles of head_dim 128, of all passes, up to which clusters gain more by one launch than they lose to the line of tiles: where
# they leave multiprocessors idle, where they do not, and where two blocks share one and none joins another's results.
MOST_WORK_OF_FEW, MOST_WORK, MOST_WORK_OF_PAIRS = 10_000, 64_000, 140_000
# Over pages: tiles of head_dim 128 that each warp of a full device attends to while the line's other two launches take place.
ROUNDS_SAVED = 10
MOST_WAVES = 2  # over pages: where clusters do not serve, their blocks come and go after the line, wave by wave
# Tiles of head_dim 128 of a warp in the time that blocks need longer to join their results in global memory than as a cluster;
# and in the time that the line of tiles needs longer for its second launch.
ROUNDS_OF_JOIN, ROUNDS_OF_LAUNCH = 3, 4
_LEAST_TILES = 4  # a warp's fewest, where there are enough for all


SCALES = ("norm", "least_squares", "unbiased")
STORING_WARPS = 4  # of a team that stores


class Stored(NamedTuple):
    """What is compiled for keys and values that are stored.

    Attributes:
        dtype: theirs, fp16 or bf16.
        slots: int32 or int64.
        scale: one of ``SCALES``.
    """

    dtype: torch.dtype
    slots: torch.dtype
    scale: str

    @property
    def defines(self) -> dict[str, int | str]:
        """Macros that ``store.cuh`` asks for, of these."""
        return {
            "BF16": int(self.dtype == torch.bfloat16),
            "SLOT": "int" if self.slots == torch.int32 else "long long",
            "SCALE": SCALES.index(self.scale),
        }


def team_bytes(head_dim: int, has_offsets: bool) -> int:
    """Dynamic shared memory of a team that stores: ``Shared`` of ``key_rows.cuh``."""
    return (64 * 2 + 9 * 4) * head_dim + 1216 if has_offsets else 0


@dataclass(frozen=True)
class Variant:
    """Compile-time choices of ``decode.cu``.

    Attributes:
        head_dim: coordinates of a vector.
        row_tiles: tiles of four query rows in one pass over the keys.
        warps: of a block.
        stages: tiles of 16 tokens in each warp's ring.
        passes: that one block's range may touch; of a cluster's block, how many teams of its warps have one each.
        query_in_registers: or read from shared memory again for each tile.
        masked: whether calls have a sliding window, a soft cap or sinks.
        offsets: whether keys have offsets.
        cluster: whether a pass is one cluster's, which does all of it in one launch (``cluster.cuh``).
        hadamard: whether the rotation is a Hadamard matrix times signs (``hadamard.cuh``).
        resident: blocks that are to share a multiprocessor.
        spread: whether a pass's blocks need not be a cluster: they join what they found through global memory.
        stores: what the same launch stores first, of a cluster's over pages; or None.
    """

    head_dim: int
    row_tiles: int
    warps: int
    stages: int
    passes: int
    query_in_registers: bool
    masked: bool = False
    offsets: bool = False
    cluster: bool = False
    hadamard: bool = False
    resident: int = 1
    spread: bool = False
    stores: Stored | None = None

    @property
    def defines(self) -> dict[str, int | str]:
        """Macros that the sources ask for."""
        return {
            "HEAD_DIM": self.head_dim,
            "NT": self.row_tiles,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "PASSES": self.passes,
            "Q_IN_REGISTERS": int(self.query_in_registers),
            "PAGED": 0,
            "MASKED": int(self.masked),
            "OFFSETS": int(self.offsets),
            "CLUSTER": int(self.cluster),
            "HADAMARD": int(self.hadamard),
            "RESIDENT": self.resident,
            "SPREAD": int(self.spread),
            "STORES": int(self.stores is not None),
            **({} if self.stores is None else self._of_stores(self.stores)),
        }

    def _of_stores(self, stores: Stored) -> dict[str, int | str]:
        return {**stores.defines, "TEAM_BYTES": team_bytes(self.head_dim, self.offsets), "TEAMS": self.warps // STORING_WARPS}

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block of the first kernel: table, rings, query."""
        used = self.shared_bytes_without_query + self.passes * (self.fragment_bytes + self.row_tiles * 16)
        return max(used, self.part_bytes) if self.cluster else used

    @property
    def part_bytes(self) -> int:
        """What the results of a cluster's block take, in place of table, rings and query, or in the rings."""
        in_rings = 4 * self.row_floats * self.warps <= self.shared_bytes_without_query - _TABLE_BYTES
        return 0 if in_rings else self.warps * 4 * self.row_floats

    @property
    def row_floats(self) -> int:
        """What the results of all rows of a pass take."""
        return 4 * self.row_tiles * (self.head_dim + 4)

    def cluster_bytes(self, blocks: int) -> int:
        """Dynamic shared memory of a block of a cluster of ``blocks``: behind all that, the rows that are sent to it."""
        if self.spread:
            return self.shared_bytes
        return self.shared_bytes + self.passes * -(-4 * self.row_tiles // blocks) * blocks * 4 * (self.head_dim + 4)

    @property
    def team_warps(self) -> int:
        """Warps of a cluster's block that have a pass together."""
        return self.warps // self.passes

    @property
    def shared_bytes_without_query(self) -> int:
        """Of that, table, rings and the scores of offsets."""
        scores = 256 * self.row_tiles if self.offsets else 0
        return _TABLE_BYTES + self.warps * (self.stages * (16 * self.head_dim + 128) + scores)

    @property
    def fragment_bytes(self) -> int:
        """A pass's rotated queries, as the matrix instructions take them."""
        return (self.row_tiles + 1) // 2 * 16 * self.head_dim

    @property
    def _rows_loaded(self) -> int:
        if self.hadamard:
            return -(-4 * self.row_tiles // self.warps) * self.warps
        held = 2 if self.warps == 16 and self.head_dim < 256 else 4 if self.warps == 12 else 16 // self.warps
        return held * self.warps

    @property
    def passes_rotated(self) -> int:
        """Passes that a block of the rotation takes, where it is a kernel of its own."""
        return max(1, self._rows_loaded // (4 * self.row_tiles))

    @property
    def rotated_bytes(self) -> int:
        """Dynamic shared memory of such a block."""
        return 0 if self.hadamard else self._rows_loaded * (self.head_dim + 16) * 4


@cache
def choose_variant(
    head_dim: int,
    rows: int,
    shared_limit: int,
    masked: bool = False,
    offsets: bool = False,
    hadamard: bool = False,
    cluster: bool = False,
) -> Variant:
    """The variant for ``rows`` rows per key/value head, within ``shared_limit`` bytes of shared memory per block; ``cluster``
    only where :func:`fits_clusters` says that there is one."""
    return next(_fitting(head_dim, rows, shared_limit, masked, offsets, hadamard, cluster))


@cache
def fits_clusters(head_dim: int, rows: int, shared_limit: int, masked: bool, offsets: bool) -> bool:
    """Whether a variant for clusters fits ``shared_limit`` bytes: many wide rows and the table do not fit 99 KiB together."""
    return next(_fitting(head_dim, rows, shared_limit, masked, offsets, True, True), None) is not None


def _fitting(
    head_dim: int, rows: int, shared_limit: int, masked: bool, offsets: bool, hadamard: bool, cluster: bool
) -> Iterator[Variant]:
    """Variants that fit, the best first."""
    most = 4 if head_dim == 256 else 8  # the sums of more rows do not fit the registers
    row_tiles = next(n for n in (1, 2, 4, 8) if n == most or 4 * n >= rows)
    sums = row_tiles * head_dim  # what a warp keeps in registers
    many_warps = 16 if sums <= 256 else 12 if sums <= 512 and not (cluster and row_tiles == 8) else 8
    in_registers = head_dim < 256 and row_tiles <= 4
    candidates = (
        Variant(head_dim, row_tiles, warps, stages, passes, in_registers, masked, offsets, cluster, hadamard)
        for warps in (16, 12, 8, 4, 2)
        if warps <= many_warps
        for passes in ((1,) if cluster else (8, 6, 3, 2))
        for stages in range(max(3, 64 // warps * 64 // head_dim), 1, -1)
    )
    return (v for v in candidates if (v.cluster_bytes(MOST_BLOCKS) if cluster else v.shared_bytes) <= shared_limit)


@dataclass(frozen=True)
class Division:
    """How a call's passes are divided: blocks and working warps of each; keys and number of splits where those are fixed."""

    blocks: int
    warps: int
    split_len: int
    splits: int

    @classmethod
    def choose(cls, passes: int, kv_len: int, multiprocessors: int, variant: Variant, split_len: int | None) -> Division:
        """Equal ranges, as many as warps run at once; or, with ``split_len``, ranges of whole splits."""
        tiles = -(-kv_len // 16)
        splits = 0 if split_len is None else -(-kv_len // split_len)
        of_pass = splits or tiles
        pieces = passes * of_pass
        least = 1 if splits else _LEAST_TILES
        # A block holds the queries of so many passes; what its warps take, all in a row, may begin anywhere in one.
        most = (variant.passes - 1) * of_pass + 1
        for waves in itertools.count(-(-passes // ((variant.passes - 1) * multiprocessors))):
            blocks = min(waves * multiprocessors, pieces)
            warps = min(variant.warps, -(-pieces // (blocks * least)))
            share, more = divmod(pieces, blocks * warps)
            if share * warps + min(warps, more) <= most:
                break
        return cls(blocks, warps, split_len or 0, splits)


class Even(NamedTuple):
    """Which lengths of sequences clusters serve: with lengths in tiles and a pass for each head of each sequence, those where

        ceil(longest / warps) * waves <= 15 / 16 * sum over passes / line_warps + slack

    The more there is for all, the more a cluster loses: it waits for the slowest warp of its blocks. A cluster that has a short
    sequence helps none that has a long one; warps of the line share all evenly, for two launches more. Only the device knows
    the lengths: all kernels ask there, and the ones that do not serve return.

    Attributes:
        warps: of a cluster.
        waves: how many clusters one after the other a part of the device has.
        line_warps: of the line of tiles.
        slack: tiles of a warp in the time of those two launches.
    """

    warps: int
    waves: int
    line_warps: int
    slack: int

    def holds(self, longest: int, passes: int) -> bool:
        """For ``passes`` equally long."""
        share = passes * longest // self.line_warps
        return -(-longest // self.warps) * self.waves <= share - share // 16 + self.slack


ALWAYS, NEVER = Even(1, 1, 1, 1 << 30), Even(1, 1, 1, -(1 << 30))


@dataclass(frozen=True)
class Cluster:
    """Blocks that share a pass over the keys, what is compiled for them, and when they serve."""

    blocks: int
    variant: Variant
    even: Even = ALWAYS


class ClusterVariants(NamedTuple):
    """What may be compiled for clusters.

    Attributes:
        alone: of a block that has a multiprocessor to itself.
        few: the same with half as many warps, if these are many.
        pair: of a block of two that share a multiprocessor, if the table fits twice.
        teams: ``alone``, with two passes, if ``pair`` is there.
        spread: ``alone``, where blocks are spread.
    """

    alone: Variant
    few: Variant | None
    pair: Variant | None
    teams: Variant | None
    spread: Variant


def cluster_variants(alone: Variant) -> ClusterVariants:
    """What may be compiled for clusters, given what is for a block that has a multiprocessor to itself."""
    spread = dataclasses.replace(alone, spread=True)
    if alone.warps <= 8:
        return ClusterVariants(alone, None, None, None, spread)
    few = dataclasses.replace(alone, warps=8)
    if alone.head_dim == 256 or alone.row_tiles > 2:
        return ClusterVariants(alone, few, None, None, spread)
    pair = dataclasses.replace(few, stages=256 // alone.head_dim, resident=2)
    return ClusterVariants(alone, few, pair, dataclasses.replace(alone, passes=2), spread)


def choose_cluster(
    passes: int,
    tiles: int,
    variant: Variant,
    multiprocessors: int,
    fit: Callable[[Variant, int], int],
    sequences: int = 0,
    in_twos: bool = False,
) -> Cluster | None:
    """What serves ``passes`` of ``tiles`` tiles each in one launch; None where the line of tiles is as fast.

    Args:
        passes: over the keys.
        tiles: of each; over pages, of the longest that there may be.
        variant: the first of :func:`cluster_variants`.
        multiprocessors: of the device.
        fit: clusters of so many blocks that run at once.
        sequences: over pages, how many; else 0.
        in_twos: whether two passes, the first and the second, the third and the fourth and so on, are always of one sequence.

    The limits were measured on an H200 (``docs/performance.md``).
    """
    work, unit = passes * tiles * variant.head_dim // 128, 128 / variant.head_dim
    alone, few, pair, teams, spread = cluster_variants(variant)
    if passes > multiprocessors:
        chosen, blocks, most = pair, 1, MOST_WORK_OF_PAIRS
        if in_twos and teams is not None and passes <= 2 * fit(teams, 1):  # at once
            chosen = teams
    else:
        blocks = next((n for n in (MOST_BLOCKS, 4, 2, 1) if passes <= fit(alone, n)), 0)
        chosen = few if few is not None and tiles <= 32 * blocks else alone
        most = MOST_WORK if passes * blocks >= 0.9 * multiprocessors else MOST_WORK_OF_FEW
    at_once = 0 if chosen is None or blocks == 0 else fit(chosen, blocks) * chosen.passes
    if chosen is None or at_once == 0:
        return None
    waves, line_warps = -(-passes // at_once), variant.warps * multiprocessors
    of_one = passes // max(sequences, 1)  # what the longest sequence gives the line to do, if all others are empty
    even = Even(blocks * chosen.team_warps, waves, line_warps, int(ROUNDS_SAVED * unit))
    always = bool(sequences) and even.holds(tiles, of_one)
    wide = min(MOST_SPREAD, multiprocessors // passes)
    # Over pages clusters keep one sequence, if it may not be long: what short ones would lose is as much as others would gain.
    if wide > blocks and not (sequences == 1 and always):
        near = Even(blocks * chosen.team_warps, 1, passes * wide * spread.warps, int(ROUNDS_OF_JOIN * unit))
        far = Even(wide * spread.warps, 1, line_warps, int((ROUNDS_SAVED if sequences else ROUNDS_OF_LAUNCH) * unit))
        holds = far.holds(tiles, of_one)
        if not near.holds(tiles, passes):  # the blocks that clusters lack would take less time than joining takes more
            return Cluster(wide, spread, ALWAYS if holds else far) if sequences or holds else None
    if sequences:
        return Cluster(blocks, chosen, ALWAYS if always else even) if waves <= MOST_WAVES else None
    full = passes <= multiprocessors or passes >= 0.9 * at_once * waves
    return Cluster(blocks, chosen) if full and work <= most else None


@cache
def has_clusters(index: int) -> bool:
    """Whether blocks of the device can read each other's shared memory."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


@cache
def device_limits(index: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one block may have."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def divisor(number: int) -> tuple[int, int]:
    """``magic`` and ``shift`` with ``n // number == (n * magic >> 32) + n >> shift`` for n below 2^31."""
    shift = (number - 1).bit_length()
    return ((2**shift - number) << 32) // number + 1, shift


def rows_at_once(head_dim: int, rows: int, multiprocessors: int) -> int:
    """How many of ``rows`` rows a block of the second kernel joins together: few, until every multiprocessor has a block."""
    at_once = 1
    while at_once < 4 * COMBINE_THREADS[head_dim] // head_dim and at_once * multiprocessors < rows:
        at_once *= 2
    return at_once
