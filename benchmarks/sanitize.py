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
from itertools import cycle, islice, product
from typing import Any

import torch

from turboquant_vllm import (
    PagedTQ4Cache,
    TQ4Codec,
    TQ4Keys,
    TQ4Tensor,
    reference,
    tq4_attention,
    tq4_paged_attention,
    tq4_store,
)
from turboquant_vllm.cuda.decode import decode
from turboquant_vllm.records import Masks, Operand

ROWS = ((1, 1), (4, 1), (8, 1), (5, 3), (8, 4))  # heads of a group, query tokens
MASKS: tuple[dict[str, Any], ...] = ({}, {"sliding_window": 37}, {"softcap": 2.0, "sinks": True})
HEADS = 3

Run = Callable[[str, str], torch.Tensor]  # of a device and a backend


def moved(x: Any, device: str) -> Any:
    """Copies of tensors: what a copy has written is known to initcheck, which follows the kernels of this project alone."""
    if isinstance(x, torch.Tensor | TQ4Tensor | TQ4Keys):
        return x.to(device)
    return {name: moved(value, device) for name, value in x.items()} if isinstance(x, dict) else x


def with_sinks(masks: dict[str, Any], num_heads: int) -> dict[str, Any]:
    return {**masks, "sinks": torch.randn(num_heads)} if "sinks" in masks else masks


def dense(head_dim: int, group: int, q_len: int, dtype: torch.dtype, masks: dict[str, Any], offsets: bool) -> Run:
    """Attention over a dense cache."""
    codec, x = TQ4Codec(head_dim), torch.randn(2, 2, HEADS, 77, head_dim)
    k = codec.compress_keys(x[0]) if offsets else codec.compress(x[0])
    inputs: dict[str, Any] = {"q": torch.randn(2, HEADS * group, q_len, head_dim).to(dtype), "k": k, "v": codec.compress(x[1])}
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


def pages(head_dim: int, group: int, q_len: int, dtype: torch.dtype, masks: dict[str, Any], scale: str, offsets: bool) -> Run:
    """Storing into pages, and a step that stores its own tokens and attends: sequences of several lengths, one of them empty;
    tokens left out."""
    if head_dim == 256:
        q_len = min(q_len, 16 // group)
    lengths, page_size = (77, 0, 16, 133), 64 if offsets else 16
    used = [-(-length // page_size) for length in lengths]
    tokens = [min(q_len, length) for length in lengths]
    order = torch.randperm(sum(used)).tolist()
    table = torch.zeros(len(lengths), max(used), dtype=torch.int32)
    earlier, own = [], []  # slots of tokens, and of those before them
    for row, (length, count) in enumerate(zip(lengths, used, strict=True)):
        of_row, order = order[:count], order[count:]
        table[row, :count] = torch.tensor(of_row, dtype=torch.int32)
        slots = [-1, *(of_row[i // page_size] * page_size + i % page_size for i in range(length))]
        both = list(zip(slots[1:], slots, strict=False))
        earlier += [*both[: length - tokens[row]], (-1, -1)]
        own += both[length - tokens[row] :]

    def new(slots: list[tuple[int, int]]) -> dict[str, Any]:
        found: dict[str, Any] = {name: torch.randn(len(slots), HEADS, head_dim).to(dtype) for name in "kv"}
        found["slot_mapping"], previous = torch.tensor(slots).T.contiguous()
        return {**found, "previous_slots": previous} if offsets else found

    before, step = new(earlier), new(own)
    step |= {
        "q": torch.randn(sum(tokens), HEADS * group, head_dim).to(dtype),
        "block_table": table,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *tokens]).cumsum(0).int(),
        **with_sinks(masks, HEADS * group),
    }

    def run(device: str, backend: str) -> torch.Tensor:
        codec = TQ4Codec(head_dim, device=device, scale=scale)
        page_bytes = PagedTQ4Cache.page_bytes(page_size, HEADS, head_dim, offsets)
        memory = moved(torch.zeros(sum(used), page_bytes, dtype=torch.uint8), device)
        cache = PagedTQ4Cache(memory, page_size, HEADS, head_dim, offsets)
        tq4_store(**moved(before, device), cache=cache, codec=codec, backend=backend)
        return tq4_paged_attention(**moved(step, device), cache=cache, codec=codec, max_query_len=q_len, backend=backend)

    return run


def cases() -> Iterator[Run]:
    dtypes = cycle((torch.float16, torch.bfloat16, torch.bfloat16, torch.float16))
    for head_dim, (group, q_len) in product((64, 128, 256), ROWS):
        yield split(head_dim, group, q_len)
        for masks, offsets in product(MASKS, (False, True)):
            dtype = next(dtypes)
            yield dense(head_dim, group, q_len, dtype, masks, offsets)
            yield pages(head_dim, group, q_len, dtype, masks, "norm" if dtype == torch.bfloat16 else "unbiased", offsets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", default="1/1", help="which of how many")
    options = parser.parse_args()
    device, (part, parts) = options.device, map(int, options.part.split("/"))
    torch.manual_seed(0)
    worst, count = 0.0, 0
    for run in islice(cases(), part - 1, None, parts):
        want = run("cpu", "reference").float()
        out = run(device, "cuda" if device == "cuda" else "reference").float().cpu()
        worst, count = max(worst, ((out - want).abs().max() / want.abs().max()).item()), count + 1
    print(f"{count} calls; largest difference from the reference, relative to the largest magnitude: {worst:.1e}")


if __name__ == "__main__":
    main()
