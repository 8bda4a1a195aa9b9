"""Time of the native decode against PyTorch's best dense attention: `python benchmarks/decode.py [--out FOLDER]`.

`--contexts` measures whole calls over context lengths instead (`docs/pictures/pictures.py` draws them), `--once` runs each
case once and measures nothing, for a profiler.

Scope "kernel": the first kernel alone, attending with queries that were rotated before, without joining and rotating back.
Scope "call": the whole operator; `offsets_ms` is that over keys with offsets, timed in turns with plain ones. Both sides run in
CUDA graphs, in the same dtype, with a cold L2. Each case is checked against float64 before it is timed. `empty_launch_ms` of
the environment is what the same clock says of a kernel that does nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import (
    BYTES_PER_TOKEN,
    RESULTS,
    best_dense_ms,
    environment,
    graphed,
    median_ms,
    read_bandwidth,
    write_results,
)
from turboquant_vllm import TQ4Codec, reference
from turboquant_vllm.cuda.decode import prepare
from turboquant_vllm.cuda.runtime import launch, load_kernel
from turboquant_vllm.records import GROUP, Masks, Operand

DTYPE = torch.float16
TOLERANCE = 4 * 2.0**-10


@dataclass(frozen=True)
class Case:
    id: str
    batch: int
    num_heads: int
    num_kv_heads: int
    kv_len: int
    q_len: int = 1
    head_dim: int = 128

    @property
    def bytes(self) -> int:
        """Codes and norms of the cache."""
        return self.batch * self.num_kv_heads * self.kv_len * BYTES_PER_TOKEN[self.head_dim]


CASES = [
    Case("a", 16, 32, 8, 32768),
    Case("b", 1, 32, 8, 131072),
    Case("c", 8, 32, 32, 8192),
    Case("d", 32, 32, 8, 4096),
    Case("e", 16, 64, 8, 32768),
    Case("f", 1, 32, 8, 8192),
    Case("f1", 1, 32, 8, 1024),
    Case("g", 64, 32, 8, 1024),
    Case("h", 16, 128, 8, 32768),
    Case("i", 16, 32, 8, 32768, q_len=4),
    Case("d64", 16, 32, 8, 32768 * 136 // 72, head_dim=64),
    Case("d256", 16, 32, 8, 32768 * 136 // 264, head_dim=256),
]


CONTEXTS = [Case(f"batch{b}", b, 32, 8, 1024 << i) for b, steps in ((1, 9), (16, 7)) for i in range(steps)]


def arguments(case: Case) -> tuple[Any, ...]:
    """Random arguments of the kernel: queries, keys, values, tables, the factor on the scores, masks."""
    rows = (case.batch, case.num_kv_heads, case.kv_len)
    codec = TQ4Codec(case.head_dim, device="cuda")

    def codes() -> torch.Tensor:
        return torch.randint(256, (*rows, case.head_dim // 2), dtype=torch.uint8, device="cuda")

    def norms() -> torch.Tensor:
        return torch.randn(rows, device="cuda").mul_(0.3).exp_().mul_(case.head_dim**0.5)

    q = torch.randn(case.batch, case.num_heads, case.q_len, case.head_dim, device="cuda").to(DTYPE)
    scale, is_causal = case.head_dim**-0.5, case.q_len > 1
    return q, Operand(codes(), norms()), Operand(codes(), norms()), codec.tables, scale, Masks(is_causal)


def with_offsets(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """These arguments, their keys around random offsets that are as long as they, and an outlier in every group."""
    q, k, *rest = args
    assert k.norms is not None
    shared = (*k.norms.shape[:2], -(-k.norms.shape[2] // GROUP))
    groups = torch.randint(-127, 128, (*shared, 2, q.shape[-1]), dtype=torch.int8, device="cuda")
    steps = torch.full((*shared, 4), 1 / 73.3, device="cuda")  # the root mean square of such bytes
    norms = k.norms.clone()
    first = torch.arange(shared[2], device="cuda") * GROUP
    place = first + (torch.rand(shared, device="cuda") * (norms.shape[2] - first).clamp(max=GROUP)).long()
    norms.scatter_(2, place, -norms.gather(2, place))
    return q, Operand(k.data, norms, groups, steps), *rest


def call(args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator on these arguments."""
    q, k, v, tables, scale, masks = args
    return torch.ops.turboquant.cuda_decode(
        q, *k[:2], *v[:2], *tables[:2], scale, *masks[:4], k_groups=k.groups, k_steps=k.steps, hadamard=True
    )


def check(args: tuple[Any, ...]) -> float:
    """Largest error over the first and the last sequence; raises where it is too large."""
    q, k, v, *rest = args
    out, lse = call(args)
    worst = 0.0
    for i in {0, q.shape[0] - 1}:
        one = slice(i, i + 1)
        want, want_lse = reference.attention(q[one].double(), k.sequences(one), v.sequences(one), *rest, block=2048)
        error = (out[i : i + 1] - want).abs().max().item()
        limit = TOLERANCE * want.abs().max().item()
        if not error <= limit or not torch.allclose(lse[i : i + 1].double(), want_lse, atol=0.01):
            raise RuntimeError(f"wrong result for sequence {i}: error {error:.3e}, limit {limit:.3e}")
        worst = max(worst, error)
    return worst


def measure(case: Case, bandwidth: float, rep: int, scopes: tuple[str, ...] = ("kernel", "call")) -> list[dict[str, Any]]:
    """One row for each scope."""
    args = arguments(case)
    error = check(args)
    out, lse = torch.empty_like(args[0]), torch.empty(args[0].shape[:-1], device="cuda")
    attend, _ = prepare(*(*args, out, lse), pre_rotated=True)
    run: dict[str, Callable[[], object]] = {
        "kernel": graphed(attend),
        "call": graphed(lambda: call(args)),
    }
    ours = {scope: median_ms(run[scope], rep) for scope in scopes}
    other = with_offsets(args)
    offsets_error = check(other)
    run["offsets"] = graphed(lambda: call(other))
    turns = [(median_ms(run["call"], rep), median_ms(run["offsets"], rep)) for _ in range(3)]
    plain_ms, offsets_ms = (sorted(times)[1] for times in zip(*turns, strict=True))
    q = args[0]
    # The dense side attends to every key: the same bytes, and its causal mask is aligned to the other corner.
    shape = (case.batch, case.num_kv_heads, case.kv_len, case.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))
    dense, backend, _ = best_dense_ms(q, k, v, False, rep=rep, graph=True)
    rows = []
    for scope in scopes:
        speed = case.bytes / ours[scope] / 1e6
        rows.append(
            {
                "id": case.id,
                "scope": scope,
                "shape": [case.batch, case.num_heads, case.num_kv_heads, case.q_len, case.kv_len, case.head_dim],
                "dtype": str(DTYPE).removeprefix("torch."),
                "ours_ms": round(ours[scope], 5),
                "best_fp16_ms": round(dense, 5),
                "best_backend": backend,
                "ratio": round(dense / ours[scope], 3),
                "gb_per_s": round(speed, 1),
                "read_bandwidth_share": round(speed / bandwidth, 4),
                "floor_ms": round(case.bytes / bandwidth / 1e6, 5),
                "max_abs_err": error,
            }
        )
        if scope == "call":
            rows[-1] |= {"offsets_ms": round(offsets_ms, 5), "offsets_ratio": round(offsets_ms / plain_ms, 3)}
            rows[-1] |= {"offsets_max_abs_err": offsets_error}
    return rows


def empty_launch_ms(rep: int) -> float:
    """Median time of a kernel that does nothing, one block, replayed from a graph as the calls are."""
    kernel = load_kernel(
        'extern "C" __global__ void nothing(int) {}', "nothing", device=torch.cuda.current_device(), params="i"
    )
    return median_ms(graphed(lambda: launch(kernel, (1, 1, 1), (32, 1, 1), 0, None, (0,))), rep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--cases", default=",".join(case.id for case in CASES), help="ids, separated by commas")
    parser.add_argument("--rep", type=int, default=60, help="milliseconds of each measurement")
    parser.add_argument("--contexts", action="store_true", help="whole calls over context lengths")
    parser.add_argument("--once", action="store_true", help="run each case once, measure nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = CONTEXTS if options.contexts else [case for case in CASES if case.id in options.cases.split(",")]
    if options.once:
        for case in cases:
            call(arguments(case))
        return
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    print(f"read bandwidth {bandwidth:.0f} GB/s")
    print("id     context scope   ours_ms  dense_ms  backend    ratio  share  error    offsets")
    rows: list[dict[str, Any]] = []
    for case in cases:
        for row in measure(case, bandwidth, options.rep, ("call",) if options.contexts else ("kernel", "call")):
            rows.append(row)
            print(
                f"{row['id']:7} {case.kv_len:6} {row['scope']:6} {row['ours_ms']:8.4f} {row['best_fp16_ms']:9.4f}  "
                f"{row['best_backend']:9} {row['ratio']:6.2f} {row['read_bandwidth_share']:6.3f}  {row['max_abs_err']:.1e}"
                f"  {row.get('offsets_ratio', '')}",
                flush=True,
            )
        torch.cuda.empty_cache()
    name = "decode-contexts-h200.json" if options.contexts else "decode-h200.json"
    floors = {"read_bandwidth_gb_per_s": round(bandwidth, 1), "empty_launch_ms": round(empty_launch_ms(options.rep), 5)}
    write_results(options.out / name, environment(**floors), rows)


if __name__ == "__main__":
    main()
