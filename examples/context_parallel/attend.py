"""Attention over a context that is split over several processes, one a GPU: context parallelism.

    torchrun --nproc-per-node 2 examples/context_parallel/attend.py                        # two GPUs, NCCL
    torchrun --nproc-per-node 2 examples/context_parallel/attend.py --device cpu           # gloo

Each process keeps a part of the compressed keys and values, and all have the queries. Each attends to its own part; the
results and their log-sum-exps are exchanged (D + 2 half-precision numbers a query row and process, however long the context
is) and joined, so that every process ends with attention over the whole. The newest tokens are the last process's: with a
causal mask only its part holds keys that some query must not see.

The first process also compares with attention over the whole context in one piece, in float64.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from turboquant_vllm import TQ4Codec, TQ4Tensor, merge_attention_states, reference, tq4_attention
from turboquant_vllm.records import Masks, Operand


def bounds(tokens: int, rank: int, world: int) -> tuple[int, int]:
    """First token of a process, and the one after its last; parts differ by one token at most."""
    return tokens * rank // world, tokens * (rank + 1) // world


def context_parallel_attention(
    q: torch.Tensor, k: TQ4Tensor, v: TQ4Tensor, codec: TQ4Codec, *, is_causal: bool = False
) -> torch.Tensor:
    """Attention over the parts of all processes, in every process.

    Args:
        q: ``[B, H_q, N_q, D]``, the same everywhere.
        k, v: this process's part, ``[B, H_kv, n, D]``; n may differ, and be 0.
        codec: the same everywhere.
        is_causal: the queries are the last N_q tokens, all of which the last process holds.
    """
    last = dist.get_rank() == dist.get_world_size() - 1
    out, lse = tq4_attention(q, k, v, codec, is_causal=is_causal and last, return_lse=True)
    outs, lses = (torch.empty((dist.get_world_size(), *x.shape), dtype=x.dtype, device=x.device) for x in (out, lse))
    dist.all_gather(list(outs), out)
    dist.all_gather(list(lses), lse)
    return merge_attention_states(outs, lses)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=2001, help="of the whole context")
    parser.add_argument("--queries", type=int, default=4, help="the last tokens of the context")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--save", type=Path, help="folder for the inputs and every process's result")
    args = parser.parse_args()

    if "RANK" not in os.environ:
        raise SystemExit("expected to be started by torchrun (see --help), found no RANK in the environment")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    if args.queries > args.tokens - bounds(args.tokens, world - 1, world)[0]:
        raise SystemExit(f"--queries must fit the last of {world} parts of {args.tokens} tokens, got {args.queries}")
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        generator = torch.Generator().manual_seed(0)  # every process makes the whole context, and keeps its part
        codec = TQ4Codec(128, device=device)
        q = torch.randn(1, 8, args.queries, 128, generator=generator).to(device, getattr(torch, args.dtype))
        k, v = (codec.compress(torch.randn(1, 2, args.tokens, 128, generator=generator).to(device)) for _ in range(2))
        first, stop = bounds(args.tokens, rank, world)
        mine = [TQ4Tensor(x.codes[:, :, first:stop].clone(), x.norms[:, :, first:stop].clone()) for x in (k, v)]
        out = context_parallel_attention(q, mine[0], mine[1], codec, is_causal=True)
        if args.save:
            inputs = {"q": q, "k": tuple(k), "v": tuple(v), "centroids": codec.centroids, "rotation": codec.rotation}
            torch.save({"out": out, **inputs}, args.save / f"rank{rank}.pt")
        if rank == 0:
            whole = (Operand(*k), Operand(*v), codec.tables, 128**-0.5, Masks(is_causal=True))
            want, _ = reference.attention(q.double(), *whole)
            error = ((out - want).abs().max() / want.abs().max()).item()
            print(f"{world} processes, {args.tokens} tokens, {args.dtype}: largest error {error:.1e} of the largest magnitude")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
