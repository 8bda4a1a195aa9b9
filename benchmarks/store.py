"""Speed of storing new keys and values into pages, against copying memory.

    PYTHONPATH=src python benchmarks/store.py [--out benchmarks/results]

Each row checks the answer against the reference before it times the call, which is replayed from a CUDA graph with a cold
L2; medians. Tokens go to random slots of pages of 16. Bytes are those of keys and values read plus those of codes and norms
written, `ratio` the share of the bandwidth of a large copy. A few tokens are a matter of latency, not of bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import common
from turboquant_vllm import PagedTQ4Cache, TQ4Codec, reference, tq4_store

HEADS, PAGE_SIZE = 8, 16
# id, backend, tokens, head_dim, rotation, dtype
CASES = [
    (f"{name}-{backend}-d{head_dim}-{rotation}-{dtype}", backend, tokens, head_dim, rotation, dtype)
    for name, tokens in (("prefill", 8192), ("decode", 32))
    for backend, head_dim, rotation, dtype in (
        ("cuda", 128, "hadamard", "float16"),
        ("cuda", 128, "hadamard", "bfloat16"),
        ("cuda", 64, "hadamard", "bfloat16"),
        ("cuda", 256, "hadamard", "bfloat16"),
        ("triton", 128, "hadamard", "bfloat16"),
        ("triton", 96, "haar", "bfloat16"),
    )
]


def check(k: torch.Tensor, cache: PagedTQ4Cache, codec: TQ4Codec, slots: torch.Tensor) -> float:
    """Largest relative error of the norms of the keys; AssertionError where codes or norms differ beyond rounding."""
    codes, norms = reference.compress(k.double(), codec.rotation, codec.boundaries, codec.centroids.double(), codec.scale)
    page, place = slots // cache.page_size, slots % cache.page_size
    same = (cache.k_codes[page, :, place] == codes).all(-1)
    # A coordinate on a boundary may go either way, and with it what the scale makes of it.
    worst = ((cache.k_norms[page, :, place] - norms).abs() / norms)[same].max().item()
    if (~same).float().mean() > 0.02 or not worst <= 2e-6:
        raise AssertionError(f"wrong answer: codes differ in {(~same).sum()} vectors, norms by {worst}")
    return worst


def row(case: tuple[Any, ...], copy: float) -> dict[str, Any]:
    name, backend, tokens, head_dim, rotation, dtype = case
    codec = TQ4Codec(head_dim, rotation=rotation, device="cuda")
    cache = PagedTQ4Cache.allocate(4096, page_size=PAGE_SIZE, num_kv_heads=HEADS, head_dim=head_dim, device="cuda")
    k, v = (torch.randn(tokens, HEADS, head_dim, dtype=getattr(torch, dtype), device="cuda") for _ in range(2))
    slots = torch.randperm(cache.num_slots, device="cuda")[:tokens]

    def run() -> None:
        tq4_store(k, v, cache, codec, slots, backend=backend)

    run()
    worst = check(k, cache, codec, slots)
    ms = common.median_ms(common.graphed(run), 40)
    speed = 2 * tokens * HEADS * (2 * head_dim + head_dim // 2 + 4) / ms / 1e6
    return {
        "id": name,
        "scope": "call",
        "backend": backend,
        "shape": {"tokens": tokens, "kv_heads": HEADS, "head_dim": head_dim},
        "dtype": dtype,
        "ours_ms": round(ms, 5),
        "gb_per_s": round(speed, 1),
        "copy_bandwidth_gb_per_s": round(copy, 1),
        "ratio": round(speed / copy, 3),
        "max_norm_err": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    out = parser.parse_args().out
    torch.manual_seed(0)
    copy = common.copy_bandwidth()
    rows = [row(case, copy) for case in CASES]
    common.write_results(out / "store-h200.json", common.environment(copy_bandwidth_gb_per_s=round(copy, 1)), rows)
    for r in rows:
        print(f"{r['id']:42} {1e3 * r['ours_ms']:8.2f} us {r['gb_per_s']:8.1f} GB/s  ratio {r['ratio']:.3f}")


if __name__ == "__main__":
    main()
