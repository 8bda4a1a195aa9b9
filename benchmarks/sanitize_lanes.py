"""Every variant of the native kernels, lane by lane on a CPU: what compute-sanitizer looks for, where there is no GPU.

    PYTHONPATH=src python benchmarks/sanitize_lanes.py

Needs g++. Results are compared with float64, and a lane that leaves its tensors or its shared memory, reads a copy that has
not landed, what no barrier orders or what a kernel before may still write, or overflows, ends the run: see
``tests/lane_memory.h``. Then the same with one line of the sources broken at a time, which must be found.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common import RESULTS, environment, write_results

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import kernel_lanes
from attention_cases import check, poisoned_memory, random_case
from paged_cases import check_batch, random_batch
from store_cases import StoreCase, check_store, random_store
from turboquant_vllm.cuda import decode, store
from turboquant_vllm.cuda.variants import choose_variant
from turboquant_vllm.limits import most_rows_over_pages

HALF, BF16 = torch.float16, torch.bfloat16
# Bytes of shared memory of a block: compute capability 9.0 and 10.0; 8.0; 8.6, 8.9 and 12.0.
SHARED = (232448, 166912, 101376)
# Query heads of a key/value head, query tokens: 1, 2, 4 and 8 tiles of rows.
ROWS = ((1, 1), (4, 1), (5, 1), (7, 2), (8, 4))
MASKS: tuple[dict[str, Any], ...] = (
    {}, {"sliding_window": 37}, {"softcap": 2.0}, {"sinks": True}, {"sliding_window": 1, "sinks": True, "softcap": 1.5},
)  # fmt: skip
STORES = tuple(itertools.product(("norm", "least_squares", "unbiased"), (torch.int32, torch.int64)))

BARRIER, LANDED = "no barrier between", "where a copy has not landed"
BEFORE, OUTSIDE = "without having waited for it", "where there is no tensor"
# Where a line of the sources is broken, what it becomes, and what is said of that.
FAULTS = (
    ("dense", "wait_copies<STAGES - 2>();\n      __syncwarp();", "wait_copies<STAGES - 2>();", LANDED),
    ("dense", "wait_copies<STAGES - 2>();", "wait_copies<STAGES - 1>();", LANDED),
    ("dense", "row[D] = largest;\n    }\n    __syncthreads();", "row[D] = largest;\n    }", BARRIER),
    ("dense", "      }\n    }\n    __syncthreads();\n  }\n}", "      }\n    }\n  }\n}", BARRIER),
    ("dense", "__syncthreads();\n#if PAGED && !CLUSTER\n  wait", "#if PAGED && !CLUSTER\n  wait", BARRIER),
    ("dense", "make_float2(top, total);\n  __syncthreads();", "make_float2(top, total);", BARRIER),
    ("dense", "__syncthreads();\n#if HADAMARD\n  for (int i", "#if HADAMARD\n  for (int i", BARRIER),
    ("dense", "back = min(row, there - 1) - copy_row", "back = row - copy_row", OUTSIDE),
    ("dense", "#define RING 65536", "#define RING 81920", "of shared memory, of which the launch has"),
    ("dense", "#define ROW_PITCH (D + 16) ", "#define ROW_PITCH (D + 15) ", "not aligned"),
    ("dense", "merged[i] = 0;\n#endif\n  wait_for_previous();", "merged[i] = 0;\n#endif", BEFORE),
    ("pages", "merged[i] = 0;\n#endif\n  wait_for_previous();", "merged[i] = 0;\n#endif", BEFORE),
    ("pages", "#if PAGED && !CLUSTER\n  wait_for_previous();\n#endif", "", BEFORE),
    ("pages", "if (left < pass_left) ahead = *++entry;", "ahead = *++entry;", OUTSIDE),
    ("pages", "tiles * p.heads.kv_heads : 0;\n  }\n  __syncthreads();", "tiles * p.heads.kv_heads : 0;\n  }", BARRIER),
    ("pages", "__syncthreads();\n  if (blockIdx.x == 0)\n", "if (blockIdx.x == 0)\n", BARRIER),
    ("store", "  __syncthreads();", "", BARRIER),
    ("store", "live = slot[v] < p.num_slots", "live = true", OUTSIDE),
    ("store", "min(tile * 8 + g, p.rows - 1)", "tile * 8 + g", OUTSIDE),
)


def run_dense(generator: torch.Generator, head_dim: int, rows: tuple[int, int], masks: dict[str, Any], turn: int) -> None:
    layout, kv_len = ("contiguous", "transposed", "sliced", "expanded")[turn % 4], (77, 1, 130)[turn % 3]
    sizes = {"batch": 2, "num_kv_heads": 3, "group": rows[0], "q_len": rows[1], "kv_len": kv_len, "head_dim": head_dim}
    case = random_case(generator, dtype=(HALF, BF16)[turn % 2], is_causal="sliding_window" in masks, layout=layout, **sizes)
    case = case.replace(**with_sinks(masks, case.q.shape[1], generator))
    for split_len in (None, 32):
        check(lambda *args, n=split_len: decode.decode(*args, split_len=n), case, gate=False)


def run_pages(generator: torch.Generator, head_dim: int, rows: tuple[int, int], masks: dict[str, Any], turn: int) -> None:
    most = min(rows[1], most_rows_over_pages(head_dim) // rows[0])
    few = [(1, 5)] * 26  # more sequences in all than a warp has lanes
    lengths = few + [(min(n, most), keys) for n, keys in ((1, 90), (0, 20), (1, 16), (2, 3), (1, 0), (3, 47), (1, 1), (4, 133))]
    sizes = {"num_kv_heads": 3, "group": rows[0], "head_dim": head_dim, "page_size": (16, 48, 64)[turn % 3]}
    batch = random_batch(generator, lengths, dtype=(HALF, BF16)[turn % 2], causal="sliding_window" in masks, **sizes)
    batch = batch.replace(**with_sinks(masks, batch.q.shape[1], generator))
    if batch.sliding_window == 37 and turn % 2:
        windows = torch.randint(100, (len(lengths),), generator=generator, dtype=torch.int32)
        batch = batch.replace(sliding_window=None, windows=windows)
    # The whole table, as where lengths have grown to its end.
    batch = batch.replace(block_table=batch.block_table[:, :-2].contiguous())
    check_batch(kernel_lanes.run_pages, batch, gate=False)


def with_sinks(masks: dict[str, Any], heads: int, generator: torch.Generator) -> dict[str, Any]:
    return {**masks, "sinks": torch.randn(heads, generator=generator)} if "sinks" in masks else masks


def run_store(generator: torch.Generator, head_dim: int, dtype: torch.dtype, scale: str, slot: torch.dtype, turn: int) -> None:
    def run(case: StoreCase) -> None:
        rotation, _, companding, _, centroids, scale = case.codec.writing
        tables = (rotation, companding, centroids, scale, case.cache.page_size)
        store.store(case.k, case.v, case.cache.buffer, case.slot_mapping, *tables)

    for tokens, heads, page_size in ((1, 1, 16), (67, 5, 48)):
        sizes = {"tokens": tokens, "heads": heads, "page_size": page_size, "head_dim": head_dim, "dtype": dtype}
        layout = ("contiguous", "sliced", "transposed")[turn % 3]
        check_store(run, random_store(generator, scale=scale, slot_dtype=slot, layout=layout, **sizes))


RUN: dict[str, Callable[..., None]] = {"dense": run_dense, "pages": run_pages, "store": run_store}


@contextlib.contextmanager
def emulated(shared_limit: int) -> Iterator[pytest.MonkeyPatch]:
    """Inside, the kernels run on a CPU, as on a GPU of three multiprocessors with so much shared memory for a block, and
    memory that nobody has written is NaN."""
    with pytest.MonkeyPatch.context() as patch, kernel_lanes.settled(), poisoned_memory():
        kernel_lanes.emulate_decode(patch, shared_limit)
        kernel_lanes.emulate_store(patch)
        yield patch


def find(generator: torch.Generator, kind: str, old: str, new: str, words: str) -> str:
    """What is said of kernels with this fault."""

    options: tuple[Any, ...] = (HALF, "norm", torch.int64) if kind == "store" else ((4, 1), {})
    with emulated(SHARED[2]) as patch:
        name = "store_source" if kind == "store" else "decode_source"
        sound = getattr(kernel_lanes, name)()
        assert old in sound, old
        patch.setattr(kernel_lanes, name, lambda *_: sound.replace(old, new))
        with pytest.raises(kernel_lanes.LaneError, match=words) as found:
            RUN[kind](generator, 64, *options, 0)
    return str(found.value)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []

    def count(**what: Any) -> None:
        rows.append(what)
        print(what, flush=True)

    for fault in FAULTS:
        count(kernels=fault[0], broken=fault[1].strip(), instead=fault[2].strip(), found=find(generator, *fault))
    for shared, head_dim in itertools.product(SHARED, (64, 128, 256)):
        with emulated(shared):
            calls = list(itertools.product(MASKS, ROWS))
            for kind in ("dense", "pages"):
                for turn, (masks, size) in enumerate(calls):
                    RUN[kind](generator, head_dim, size, masks, turn)
                variants = {choose_variant(head_dim, a * b, shared, m) for a, b in ROWS for m in (False, True)}
                count(kernels=kind, head_dim=head_dim, shared_bytes=shared, variants=len(variants), calls=len(calls), errors=0)
    for head_dim, dtype in itertools.product((64, 128, 256), (HALF, BF16)):
        with emulated(SHARED[0]):
            for turn, (scale, slot) in enumerate(STORES):
                run_store(generator, head_dim, dtype, scale, slot, turn)
        count(kernels="store", head_dim=head_dim, dtype=str(dtype), variants=len(STORES), calls=2 * len(STORES), errors=0)
    write_results(RESULTS / "sanitizer-lanes.json", environment(), rows)


if __name__ == "__main__":
    main()
