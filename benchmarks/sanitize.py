"""One small call of every variant of the native kernels, for NVIDIA's compute-sanitizer:

for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --kernel-name kernel_substring=tq4 --report-api-errors no \\
            python benchmarks/sanitize.py
done

With `--device cpu` the reference runs in the kernels' place, which tries this script and nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from turboquant_vllm import PagedTQ4Cache, TQ4Codec, TQ4Tensor, reference, tq4_attention, tq4_paged_attention, tq4_store
from turboquant_vllm.cuda.decode import decode
from turboquant_vllm.records import Masks, Operand

ROWS = ((1, 1), (4, 1), (8, 1), (5, 3), (8, 4))  # heads of a group, query tokens
MASKS: tuple[dict[str, Any], ...] = ({}, {"sliding_window": 37}, {"softcap": 2.0, "sinks": True})
HEADS, PAGE_SIZE = 3, 16

Run = Callable[[str, str], torch.Tensor]  # of a device and a backend


def moved(x: Any, device: str) -> Any:
    """Copies of tensors: what a copy has written is known to initcheck, which follows the kernels of this project alone."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, TQ4Tensor):
        return TQ4Tensor(x.codes.to(device), x.norms.to(device))
    return {name: moved(value, device) for name, value in x.items()} if isinstance(x, dict) else x


def with_sinks(masks: dict[str, Any], num_heads: int) -> dict[str, Any]:
    return {**masks, "sinks": torch.randn(num_heads)} if "sinks" in masks else masks


def dense(head_dim: int, group: int, q_len: int, dtype: torch.dtype, masks: dict[str, Any]) -> Run:
    """Attention over a dense cache."""
    k, v = (TQ4Codec(head_dim).compress(torch.randn(2, HEADS, 77, head_dim)) for _ in range(2))
    inputs: dict[str, Any] = {"q": torch.randn(2, HEADS * group, q_len, head_dim).to(dtype), "k": k, "v": v}
    inputs |= with_sinks(masks, HEADS * group)
    return lambda device, backend: tq4_attention(
        **moved(inputs, device), codec=TQ4Codec(head_dim, device=device), is_causal=True, backend=backend
    )


def split(head_dim: int, group: int, q_len: int) -> Run:
    """The same with ranges of fixed length."""
    k, v = (TQ4Codec(head_dim).compress(torch.randn(2, HEADS, 77, head_dim)) for _ in range(2))
    q = torch.randn(2, HEADS * group, q_len, head_dim).half()

    def run(device: str, backend: str) -> torch.Tensor:
        codec = TQ4Codec(head_dim, device=device)
        args = (q.to(device), Operand(*k.to(device)), Operand(*v.to(device)), codec.tables, 0.1, Masks(True))
        return decode(*args, split_len=32)[0] if backend == "cuda" else reference.attention(*args)[0]

    return run


def pages(head_dim: int, group: int, q_len: int, dtype: torch.dtype, masks: dict[str, Any], scale: str) -> Run:
    """Storing into pages, and attention over them: sequences of several lengths, one of them empty; tokens left out."""
    if head_dim == 256:
        q_len = min(q_len, 16 // group)
    lengths = [77, 0, 16, 133]
    used = [-(-length // PAGE_SIZE) for length in lengths]
    order = torch.randperm(sum(used)).tolist()
    table = torch.zeros(len(lengths), max(used), dtype=torch.int32)
    slots = []
    for row, (length, count) in enumerate(zip(lengths, used, strict=True)):
        own, order = order[:count], order[count:]
        table[row, :count] = torch.tensor(own, dtype=torch.int32)
        slots += [own[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(length)]
    tokens = [min(q_len, length) for length in lengths]
    new = {name: torch.randn(len(slots) + 2, HEADS, head_dim).to(dtype) for name in "kv"}
    new["slot_mapping"] = torch.tensor([*slots, -1, -1])
    inputs = {
        "q": torch.randn(sum(tokens), HEADS * group, head_dim).to(dtype),
        "block_table": table,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *tokens]).cumsum(0).int(),
        **with_sinks(masks, HEADS * group),
    }

    def run(device: str, backend: str) -> torch.Tensor:
        codec = TQ4Codec(head_dim, device=device, scale=scale)
        memory = moved(torch.zeros(sum(used), PagedTQ4Cache.page_bytes(PAGE_SIZE, HEADS, head_dim), dtype=torch.uint8), device)
        cache = PagedTQ4Cache(memory, PAGE_SIZE, HEADS, head_dim)
        tq4_store(**moved(new, device), cache=cache, codec=codec, backend=backend)
        return tq4_paged_attention(**moved(inputs, device), cache=cache, codec=codec, max_query_len=q_len, backend=backend)

    return run


def cases() -> Iterator[Run]:
    for head_dim, (group, q_len) in product((64, 128, 256), ROWS):
        yield split(head_dim, group, q_len)
        for dtype, masks in product((torch.float16, torch.bfloat16), MASKS):
            yield dense(head_dim, group, q_len, dtype, masks)
            yield pages(head_dim, group, q_len, dtype, masks, "norm" if dtype == torch.bfloat16 else "unbiased")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    worst, count = 0.0, 0
    for run in cases():
        want = run("cpu", "reference").float()
        out = run(device, "cuda" if device == "cuda" else "reference").float().cpu()
        worst, count = max(worst, ((out - want).abs().max() / want.abs().max()).item()), count + 1
    print(f"{count} calls; largest difference from the reference, relative to the largest magnitude: {worst:.1e}")


if __name__ == "__main__":
    main()
