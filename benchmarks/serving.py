"""Speed of attention as a server calls it, against PyTorch's best dense attention over caches of the same lengths.

    PYTHONPATH=src python benchmarks/serving.py [--out benchmarks/results]

Rows are those of ``benchmarks/triton_attention.py``: each checks the answer against the reference in float64 before it times
it, both sides run in one process with a cold L2, medians of the whole public call replayed from a CUDA graph, and ``ratio``
is the best dense time over ours. A chunk's queries are the last tokens of prefix and chunk together. PyTorch has no causal
mask for that, so dense attention runs without one there: up to a chunk's half square more work, under 1 % of the whole.
Rows about pages are those of ``benchmarks/paged.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import common
import paged
from triton_attention import HEAD_DIM, attention_row
from turboquant_vllm import TQ4Codec

# id, batch, query heads, kv heads, query tokens, kv tokens, causal
PREFILL = [
    ("prefill", 1, 32, 8, 8192, 8192, True),
    ("chunk512", 1, 32, 8, 512, 32768 + 512, True),
    ("chunk2048", 1, 32, 8, 2048, 131072 + 2048, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    out = parser.parse_args().out
    torch.manual_seed(0)
    bandwidth = common.read_bandwidth()
    codec = TQ4Codec(HEAD_DIM, device="cuda")
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        for case in PREFILL:
            rows.append(attention_row(case, codec, dtype, bandwidth))
            torch.cuda.empty_cache()
    rows += paged.rows(codec, bandwidth)
    common.write_results(out / "serving-h200.json", common.environment(read_bandwidth_gb_per_s=round(bandwidth, 1)), rows)
    for row in rows:
        print(f"{row['id']:20} {row['ours_ms']:9.4f} ms  ratio {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
