"""Every variant of the native kernels, lane by lane on a CPU: what compute-sanitizer looks for, where there is no GPU.

    PYTHONPATH=src python benchmarks/sanitize_lanes.py

Needs g++. Results are compared with float64, and a lane that leaves its tensors or its shared memory, reads a copy that has
not landed, what no barrier orders or what a kernel before may still write, or overflows, ends the run: see
``tests/lane_memory.h``. Keys plain and with offsets; calls of several launches, of one, and of both where lengths decide which
serves; a step's store before its attention. Before all of that, the same with one line of the sources broken at a time, which
must be found.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from common import RESULTS, environment, write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import kernel_lanes
from attention_cases import check, poisoned_memory, random_case
from kernel_lanes import small_variant
from paged_cases import check_batch, random_batch
from store_cases import StoreCase, check_store, random_store
from turboquant_vllm import ops
from turboquant_vllm.cuda import cluster, decode, store
from turboquant_vllm.cuda.store import New
from turboquant_vllm.cuda.variants import ALWAYS, Cluster, Even, Variant, cluster_variants
from turboquant_vllm.limits import most_rows_over_pages
from turboquant_vllm.vllm.layer import PagedLayer
from vllm_cases import random_step

HALF, BF16 = torch.float16, torch.bfloat16
# Bytes of shared memory of a block: compute capability 9.0 and 10.0; 8.0; 8.6, 8.9 and 12.0.
SHARED = (232448, 166912, 101376)
# Query heads of a key/value head, query tokens: 1, 2, 4 and 8 tiles of rows.
ROWS = ((1, 1), (4, 1), (5, 1), (7, 2), (8, 4))
MASKS: tuple[dict[str, Any], ...] = (
    {}, {"sliding_window": 37}, {"softcap": 2.0}, {"sinks": True}, {"sliding_window": 1, "sinks": True, "softcap": 1.5},
)  # fmt: skip
STORES = tuple(itertools.product(("norm", "least_squares", "unbiased"), (torch.int32, torch.int64)))
# How a call is done: its kernels, whether keys have offsets, and of one launch the blocks of a pass, what these are, and over
# pages for which lengths they serve. Every other call of several launches rotates by additions.
KINDS = (
    *((kind, offsets, None, "", ALWAYS) for offsets in (False, True) for kind in ("dense", "pages")),
    ("dense", False, 2, "cluster", ALWAYS), ("pages", False, 4, "cluster", ALWAYS), ("dense", True, 4, "cluster", ALWAYS),
    ("pages", True, 2, "cluster", ALWAYS), ("dense", False, 5, "spread", ALWAYS), ("pages", True, 3, "spread", ALWAYS),
    ("pages", False, 2, "cluster", Even(4, 1, 24, 1)), ("pages", True, 2, "cluster", Even(1, 1, 24, 4)),
    ("dense", False, 1, "teams", ALWAYS), ("pages", True, 1, "teams", ALWAYS),
)  # fmt: skip

LAYOUTS = ("cluster", "spread", "teams")
# Of a step: blocks of a cluster, and what they do; "step": they store first, in the same launch.
STEPS: tuple[tuple[int | None, str], ...] = ((None, "cluster"), (2, "cluster"), (2, "step"))

BARRIER, LANDED = "no barrier between", "where a copy has not landed"
BEFORE, OUTSIDE = "without having waited for it", "where there is no tensor"
UNKNOWN = "a block that may not have begun"
# Where a line of the sources is broken, what it becomes, and what is said of that.
FAULTS = (
    ("dense", "wait_copies<STAGES - 2>();\n      __syncwarp();", "wait_copies<STAGES - 2>();", LANDED),
    ("dense", "wait_copies<STAGES - 2>();", "wait_copies<STAGES - 1>();", LANDED),
    ("dense", "row[D] = largest;\n    }\n    __syncthreads();", "row[D] = largest;\n    }", BARRIER),
    ("dense", "      }\n    }\n    __syncthreads();\n  }\n}", "      }\n    }\n  }\n}", BARRIER),
    ("dense", "__syncthreads();\n  }\n#if PAGED && !CLUSTER", "}\n#if PAGED && !CLUSTER", BARRIER),
    ("dense", "make_float2(top, total);\n  __syncthreads();", "make_float2(top, total);", BARRIER),
    ("dense", "__syncthreads();\n#if HADAMARD\n  for (int i", "#if HADAMARD\n  for (int i", BARRIER),
    ("dense", "back = min(row, there - 1) - copy_row", "back = row - copy_row", OUTSIDE),
    ("dense", "#define RING 65536", "#define RING 81920", "of shared memory, of which the launch has"),
    ("dense", "#define ROW_PITCH (D + 16) ", "#define ROW_PITCH (D + 15) ", "not aligned"),
    ("dense", "merged[i] = 0;\n#endif\n  wait_for_previous();", "merged[i] = 0;\n#endif", BEFORE),
    ("pages", "merged[i] = 0;\n#endif\n  wait_for_previous();", "merged[i] = 0;\n#endif", BEFORE),
    ("pages", "#if PAGED && !CLUSTER\n  wait_for_previous();\n#endif", "", BEFORE),
    ("pages", "if (left < pass_left) ahead = *++entry;", "ahead = *++entry;", OUTSIDE),
    ("pages", "len) * p.heads.kv_heads;\n  }\n  __syncthreads();", "len) * p.heads.kv_heads;\n  }", BARRIER),
    ("pages", "__syncthreads();\n  if (blockIdx.x == 0)\n", "if (blockIdx.x == 0)\n", BARRIER),
    ("cluster", "  if (p.blocks > 1) cluster_wait();  // all have begun\n", "", UNKNOWN),
    (
        "cluster",
        "    cluster_arrive();\n    cluster_wait();\n",
        "    __syncthreads();\n",
        "no barrier|may yet write|may have ended",
    ),
    ("cluster", "// all have begun\n  meet();  // all warps have left theirs\n", "// all have begun\n", BARRIER),
    ("teams", "team_barrier(1 + team_of_thread(),", "team_barrier(1,", "of others than come"),
    ("teams", "SENT + team * PART * 4;", "SENT;", BARRIER),
    ("spread", "  meet();  // all rows are there\n", "", "another block wrote"),
    ("spread", "  meet();  // which block is the last\n", "", BARRIER),
    ("spread", "  if (*(const u32*)smem != p.blocks - 1) return;\n", "", "that another block (wrote|read)"),
    ("step", "  wait_for_previous();  // the store of the step's own", "  ;  // the store of the step's own", BEFORE),
    ("one launch", "wait_for_count(p.stored, p.store_blocks);", ";", "that another block wrote"),
    ("one launch", "  __syncthreads();  // all lanes have written theirs\n", "", "that another block wrote"),
    ("store", "  meet();", "", BARRIER),
    ("store", "live = slot[v] < p.num_slots", "live = true", OUTSIDE),
    ("store", "min(tile * 8 + g, p.rows - 1)", "tile * 8 + g", OUTSIDE),
    ("store", "min(first + c, p.rows - 1), token", "first + c, token", OUTSIDE),
    ("store", "first + c < p.rows && there < p.num_slots", "first + c < p.rows", OUTSIDE),
)


def run_dense(
    generator: torch.Generator, head_dim: int, rows: tuple[int, int], masks: dict[str, Any], turn: int, offsets: bool, one: bool
) -> None:
    layout, kv_len = ("contiguous", "transposed", "sliced", "expanded")[turn % 4], (77, 1, 130)[turn % 3]
    sizes: dict[str, Any] = {"batch": 2, "num_kv_heads": 3, "group": rows[0], "q_len": rows[1], "kv_len": kv_len}
    sizes |= {"head_dim": head_dim, "layout": layout, "offsets": offsets}
    case = random_case(generator, dtype=(HALF, BF16)[turn % 2], is_causal="sliding_window" in masks, **sizes)
    case = case.replace(**with_sinks(masks, case.q.shape[1], generator))
    for split_len in (None,) if one else (None, 32):
        check(functools.partial(decode.decode, split_len=split_len, hadamard=one or turn % 2 == 0), case, gate=False)


def run_pages(
    generator: torch.Generator, head_dim: int, rows: tuple[int, int], masks: dict[str, Any], turn: int, offsets: bool, one: bool
) -> None:
    most = min(rows[1], most_rows_over_pages(head_dim) // rows[0])
    few = [(1, 5)] * (2 if one else 26)  # more sequences in all than a warp has lanes
    lengths = few + [(min(n, most), keys) for n, keys in ((1, 90), (0, 20), (1, 16), (2, 3), (1, 0), (3, 47), (1, 1), (4, 133))]
    sizes: dict[str, Any] = {"num_kv_heads": 2 + turn // 2 % 2, "group": rows[0], "head_dim": head_dim, "offsets": offsets}
    sizes["page_size"] = (64, 128)[turn % 2] if offsets else (16, 48, 64)[turn % 3]
    batch = random_batch(generator, lengths, dtype=(HALF, BF16)[turn % 2], causal="sliding_window" in masks, **sizes)
    batch = batch.replace(**with_sinks(masks, batch.q.shape[1], generator))
    if batch.sliding_window == 37 and turn % 2:
        windows = torch.randint(100, (len(lengths),), generator=generator, dtype=torch.int32)
        batch = batch.replace(sliding_window=None, windows=windows)
    # The whole table, as where lengths have grown to its end.
    batch = batch.replace(block_table=batch.block_table[:, :-2].contiguous())
    check_batch(functools.partial(kernel_lanes.run_pages, hadamard=one or turn % 2 == 0), batch, gate=False)


def with_sinks(masks: dict[str, Any], heads: int, generator: torch.Generator) -> dict[str, Any]:
    return {**masks, "sinks": torch.randn(heads, generator=generator)} if "sinks" in masks else masks


def run_store(generator: torch.Generator, head_dim: int, dtype: torch.dtype, scale: str, slot: torch.dtype, turn: int) -> None:
    def run(case: StoreCase) -> None:
        rotation, _, companding, _, centroids, scale = case.codec.writing
        tables = (rotation, companding, centroids, scale, case.cache.page_size)
        New(case.k, case.v, case.slot_mapping, case.cache.buffer, *tables).laid_out().store(leaves_room=turn % 2 == 0)

    for tokens, heads, page_size in ((1, 1, 16), (3, 2, 48), (67, 5, 48)):
        sizes = {"tokens": tokens, "heads": heads, "page_size": page_size, "head_dim": head_dim, "dtype": dtype}
        layout = ("contiguous", "sliced", "transposed")[turn % 3]
        check_store(run, random_store(generator, scale=scale, slot_dtype=slot, layout=layout, **sizes))


def run_step(generator: torch.Generator, head_dim: int, dtype: torch.dtype, key_offsets: bool) -> None:
    """One call stores a step's keys and values and attends: the bits of two calls."""
    layer = PagedLayer(4, 2, head_dim, head_dim**-0.5, exact=None, key_offsets=key_offsets)
    step = random_step(generator, [(1, 70), (2, 65), (1, 2), (3, 130)], layer, dtype=dtype)
    before, runs, found = step.kv_cache.clone(), step.runs(decode_len=3), []
    for at_once in (False, True):
        step.kv_cache.copy_(before)
        if not at_once:
            step.store()
        out = torch.full_like(step.q, float("nan"))
        layer.attend(step.q, step.k, step.v, step.kv_cache, runs, out, **(step.where if at_once else {}))
        found.append((out, step.kv_cache.clone()))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


RUN: dict[str, Callable[..., None]] = {"dense": run_dense, "pages": run_pages}


@contextlib.contextmanager
def emulated(
    shared_limit: int, blocks: int | None = None, even: Even = ALWAYS, one: str = "cluster"
) -> Iterator[pytest.MonkeyPatch]:
    """Inside, the kernels run on a CPU, as on a GPU of three multiprocessors with so much shared memory for a block, and
    memory that nobody has written is NaN. ``blocks``: of a cluster, spread or of teams, by ``one``, that serve each call, or
    those that are ``even``; else the line of tiles does."""

    def choose(passes: int, tiles: int, variant: Variant, *rest: Any) -> Cluster | None:
        if blocks is None:
            return None
        teams = cluster_variants(variant).teams if one == "teams" and rest[-1] else None
        return Cluster(blocks, teams or dataclasses.replace(variant, spread=one == "spread"), even)

    with pytest.MonkeyPatch.context() as patch, kernel_lanes.settled(), poisoned_memory():
        kernel_lanes.emulate_decode(patch, shared_limit)
        kernel_lanes.emulate_store(patch)
        patch.setattr(cluster, "has_clusters", lambda index: blocks is not None)
        patch.setattr(cluster, "choose_cluster", choose)
        if one == "step":  # room for all blocks, a team's warps in those that store, and tokens few for both ways
            patch.setattr(cluster, "_fit", lambda *_: 1000)
            patch.setattr(store, "_kernels", kernel_lanes.store_kernels(100))
            patch.setattr(cluster, "choose_variant", lambda *sizes: dataclasses.replace(small_variant(*sizes), warps=4))
        patch.setattr(ops, "why_not_cuda", lambda device: "")
        yield patch


def run_one(generator: torch.Generator, kind: str) -> None:
    """A call of a kind of :data:`FAULTS`."""
    if kind == "store":
        run_store(generator, 64, HALF, "norm", torch.int64, 0)
    elif kind in ("step", "one launch"):
        run_step(generator, 64, HALF, key_offsets=True)
    else:
        one = kind in LAYOUTS
        turn = 0 if one else 1  # of a rotation by matrix products
        run = run_pages if kind in ("pages", "teams") else run_dense
        run(generator, 128 if one else 64, (4, 1), {}, turn, offsets=False, one=one)


def find(generator: torch.Generator, kind: str, old: str, new: str, words: str) -> str:
    """What is said of kernels with this fault."""
    stores = kind == "one launch"
    clusters = kind in LAYOUTS or stores
    blocks = 1 if kind == "teams" else 2 if clusters else None
    with emulated(SHARED[0 if clusters else 2], blocks, one="step" if stores else kind) as patch:
        name = "store_source" if kind == "store" else "decode_source"
        text = getattr(kernel_lanes, name)
        assert old in text(*((True, stores) if clusters else ())), old
        patch.setattr(kernel_lanes, name, lambda *which: text(*which).replace(old, new))
        with pytest.raises(kernel_lanes.LaneError, match=words) as found:
            run_one(generator, kind)
    return str(found.value)


def jobs() -> Iterator[Callable[[torch.Generator], dict[str, Any]]]:
    """Each gives a row: what was run, and with which faults."""
    yield from (functools.partial(run_fault, fault=fault) for fault in FAULTS)
    for (kind, offsets, blocks, one, even), shared, head_dim in itertools.product(KINDS, SHARED, (64, 128, 256)):
        if shared != SHARED[1] or not (offsets or blocks):  # no clusters there, and keys with offsets as with more
            how: dict[str, Any] = {"kind": kind, "offsets": offsets, "blocks": blocks, "one": one, "even": even}
            yield functools.partial(run_calls, **how, shared=shared, head_dim=head_dim)
    for head_dim, dtype, (blocks, one) in itertools.product((64, 128, 256), (HALF, BF16), STEPS):
        yield functools.partial(run_steps, head_dim=head_dim, dtype=dtype, blocks=blocks, one=one)
    for head_dim, dtype in itertools.product((64, 128, 256), (HALF, BF16)):
        yield functools.partial(run_stores, head_dim=head_dim, dtype=dtype)


def run_fault(generator: torch.Generator, fault: tuple[str, str, str, str]) -> dict[str, Any]:
    kind, broken, instead, _ = fault
    return {"kernels": kind, "broken": broken.strip(), "instead": instead.strip(), "found": find(generator, *fault)}


def run_calls(
    generator: torch.Generator, kind: str, offsets: bool, blocks: int | None, one: str, even: Even, shared: int, head_dim: int
) -> dict[str, Any]:
    calls = list(itertools.product(MASKS, ROWS))
    is_plain = not offsets and blocks is None
    turns = range(len(calls)) if is_plain else range(head_dim // 64 % 2, len(calls), 2)
    with emulated(shared, blocks, even, one):
        for turn in turns:
            masks, size = calls[turn]
            RUN[kind](generator, head_dim, size, masks, turn, offsets, blocks is not None)
    what: dict[str, Any] = {"head_dim": head_dim, "shared_bytes": shared, "offsets": offsets, one or "cluster": blocks}
    what |= {} if even == ALWAYS else {"even": even}
    return {"kernels": kind, **what, "calls": len(turns), "errors": 0}


def run_steps(generator: torch.Generator, head_dim: int, dtype: torch.dtype, blocks: int | None, one: str) -> dict[str, Any]:
    with emulated(SHARED[0], blocks, one=one):
        for key_offsets in (False, True):
            run_step(generator, head_dim, dtype, key_offsets)
    what = {"head_dim": head_dim, "dtype": str(dtype), one: blocks}
    return {"kernels": "store, then attention", **what, "calls": 2, "errors": 0}


def run_stores(generator: torch.Generator, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    with emulated(SHARED[0]):
        for turn, (scale, slot) in enumerate(STORES):
            run_store(generator, head_dim, dtype, scale, slot, turn)
    what = {"head_dim": head_dim, "dtype": str(dtype), "variants": len(STORES)}
    return {"kernels": "store", **what, "calls": 2 * len(STORES), "errors": 0}


def run_job(seed: int) -> dict[str, Any]:
    """Row number ``seed``."""
    torch.set_num_threads(1)
    return next(itertools.islice(jobs(), seed, None))(torch.Generator().manual_seed(seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(parser.parse_args().jobs, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(run_job, range(sum(1 for _ in jobs()))):
            rows.append(row)
            print(row, flush=True)
    write_results(RESULTS / "sanitizer-lanes.json", environment(), rows)


if __name__ == "__main__":
    main()
