"""Speed of the Triton kernels against PyTorch's best dense attention and against copying memory.

    PYTHONPATH=src python benchmarks/triton_attention.py [--out benchmarks/results]

Each row checks the answer against the reference before it times it; both sides run in the same process, cold L2, medians.
Attention is the whole public call, replayed from a CUDA graph on both sides; `ours_eager_ms` is the same call made from
Python, where three launches cost more host time than a short call takes on the GPU. `gb_per_s` counts 136 bytes a token
and kv head (codes and norms at D = 128), and `ratio` is the best dense time over ours. For compress and decompress,
bytes are those read plus those written, and `ratio` is the share of the copy bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import common
from turboquant_vllm import TQ4Codec, TQ4Tensor, reference, tq4_attention
from turboquant_vllm.records import Masks, Operand

# id, batch, query heads, kv heads, query tokens, kv tokens, causal
ATTENTION = [
    ("decode", 16, 32, 8, 1, 32768, False),
    ("decode-batch1", 1, 32, 8, 1, 131072, False),
    ("decode-mha", 8, 32, 32, 1, 8192, False),
    ("decode-group8", 16, 64, 8, 1, 32768, False),
    ("decode-short", 1, 32, 8, 1, 8192, False),
    ("verify4", 16, 32, 8, 4, 32768, True),
    ("prefill", 1, 32, 8, 8192, 8192, True),
    ("chunk512", 1, 32, 8, 512, 32768, True),
]
HEAD_DIM = 128


def random_cache(batch: int, heads: int, tokens: int, head_dim: int) -> TQ4Tensor:
    """Random codes, and norms like those of Gaussian vectors."""
    codes = torch.randint(0, 256, (batch, heads, tokens, head_dim // 2), dtype=torch.uint8, device="cuda")
    norms = head_dim**0.5 * (1 + 0.1 * torch.randn(batch, heads, tokens, device="cuda"))
    return TQ4Tensor(codes, norms)


def error(q: torch.Tensor, k: TQ4Tensor, v: TQ4Tensor, codec: TQ4Codec, causal: bool, out: torch.Tensor) -> float:
    """Largest error against float64 over the last query rows of the first sequence and its first kv head."""
    group, rows = q.shape[1] // k.codes.shape[1], min(q.shape[2], 8)
    some = (slice(0, 1), slice(0, group), slice(-rows, None))
    one = (slice(0, 1), slice(0, 1))
    expected, _ = reference.attention(
        q[some].double(), Operand(k.codes[one], k.norms[one]), Operand(v.codes[one], v.norms[one]), codec.tables,
        HEAD_DIM**-0.5, Masks(causal), block=4096,
    )  # fmt: skip
    worst = (out[some] - expected).abs().max().item()
    if not worst <= 2 * torch.finfo(q.dtype).eps * expected.abs().max().item():
        raise AssertionError(f"wrong answer: largest error {worst}, largest magnitude {expected.abs().max().item()}")
    return worst


def attention_row(case: tuple[Any, ...], codec: TQ4Codec, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    name, batch, heads, kv_heads, q_len, kv_len, causal = case
    q = torch.randn(batch, heads, q_len, HEAD_DIM, dtype=dtype, device="cuda")
    k, v = (random_cache(batch, kv_heads, kv_len, HEAD_DIM) for _ in range(2))

    def run() -> torch.Tensor:
        return tq4_attention(q, k, v, codec, is_causal=causal, backend="triton")

    worst = error(q, k, v, codec, causal, run())
    ours, eager = common.median_ms(common.graphed(run), 60), common.median_ms(run, 60)
    k_dense, v_dense = (torch.randn(batch, kv_heads, kv_len, HEAD_DIM, dtype=dtype, device="cuda") for _ in range(2))
    # With one query or as many queries as keys, PyTorch's top-left causal mask means the same work; else none is used.
    best, backend, times = common.best_dense_ms(q, k_dense, v_dense, causal and q_len == kv_len, rep=60, graph=True)
    speed = 136 * batch * kv_heads * kv_len / ours / 1e6
    suffix = "bf16" if dtype == torch.bfloat16 else "fp16"
    return {
        "id": name if dtype == torch.float16 else f"{name}-bf16",
        "scope": "call",
        "shape": {"batch": batch, "heads": heads, "kv_heads": kv_heads, "q_len": q_len, "kv_len": kv_len, "head_dim": HEAD_DIM},
        "dtype": suffix,
        "causal": causal,
        "ours_ms": round(ours, 5),
        "ours_eager_ms": round(eager, 5),
        f"best_{suffix}_ms": round(best, 5),
        "best_backend": backend,
        "backends_ms": {key: round(value, 5) for key, value in times.items()},
        "ratio": round(best / ours, 3),
        "gb_per_s": round(speed, 1),
        "read_bandwidth_share": round(speed / bandwidth, 3),
        "max_abs_err": worst,
    }


def codec_rows(head_dim: int, rotation: str, dtype: torch.dtype, copy: float) -> list[dict[str, Any]]:
    """Rows of compress for the cheapest scale and for the default one, and of decompress, which is the same for all."""
    x = torch.randn(8, 8, 32768, head_dim, dtype=dtype, device="cuda")
    suffix = f"d{head_dim}-{rotation}-{str(dtype).removeprefix('torch.')}"
    rows = []
    for scale in ("norm", "unbiased"):
        codec = TQ4Codec(head_dim, rotation=rotation, scale=scale, device="cuda")
        t = codec.compress(x)
        part = TQ4Tensor(t.codes[0, 0, :512], t.norms[0, 0, :512])
        want = reference.compress(
            x[0, 0, :512].double(), codec.rotation, codec.boundaries, codec.centroids.double(), codec.scale
        )
        same = (part.codes == want[0]).all(-1)
        # A coordinate on a boundary may go either way, and with it what the scale makes of it.
        wrong = ((part.norms - want[1]).abs() / want[1])[same].max().item()
        if (~same).float().mean() > 0.02 or not wrong <= 2e-6:
            raise AssertionError(f"wrong codes in {(~same).sum()} of 512 vectors, norms off by {wrong}")
        expected = reference.decompress(*part, codec.centroids, codec.rotation, torch.float64)
        worst = (codec.decompress(part, dtype) - expected).abs().max().item()
        if not worst <= expected.abs().max().item() * (2**-8 if dtype == torch.bfloat16 else 2**-10):
            raise AssertionError(f"wrong vectors: largest error {worst}")
        rows.append(_codec_row(f"compress-{scale}-{suffix}", partial(codec.compress, x), x, t, copy, worst))
    rows.append(_codec_row(f"decompress-{suffix}", partial(codec.decompress, t, dtype), x, t, copy, worst))
    return rows


def _codec_row(
    name: str, run: Callable[[], object], x: torch.Tensor, t: TQ4Tensor, copy: float, worst: float
) -> dict[str, Any]:
    ms = common.median_ms(run, 40)
    speed = (x.nbytes + t.nbytes) / ms / 1e6
    return {
        "id": name,
        "scope": "call",
        "shape": {"vectors": x.numel() // x.shape[-1], "head_dim": x.shape[-1]},
        "ours_ms": round(ms, 5),
        "gb_per_s": round(speed, 1),
        "copy_bandwidth_gb_per_s": round(copy, 1),
        "ratio": round(speed / copy, 3),
        "max_abs_err": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    out = parser.parse_args().out
    torch.manual_seed(0)
    bandwidth, copy = common.read_bandwidth(), common.copy_bandwidth()
    codec = TQ4Codec(HEAD_DIM, device="cuda")
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float16, torch.bfloat16):
        for case in ATTENTION:
            if dtype == torch.float16 or case[0] in ("decode", "prefill"):
                rows.append(attention_row(case, codec, dtype, bandwidth))
                torch.cuda.empty_cache()
    for head_dim, rotation, dtype in (
        (128, "hadamard", torch.float16),
        (128, "hadamard", torch.bfloat16),
        (128, "haar", torch.bfloat16),
        (64, "hadamard", torch.bfloat16),
        (256, "hadamard", torch.bfloat16),
    ):
        rows += codec_rows(head_dim, rotation, dtype, copy)
    env = common.environment(read_bandwidth_gb_per_s=round(bandwidth, 1), copy_bandwidth_gb_per_s=round(copy, 1))
    common.write_results(out / "triton-h200.json", env, rows)
    for row in rows:
        print(f"{row['id']:38} {row['ours_ms']:9.4f} ms {row['gb_per_s']:8.1f} GB/s  ratio {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
