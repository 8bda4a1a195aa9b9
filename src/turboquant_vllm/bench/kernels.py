"""Measurements of attention and of the store: random keys and values, public calls, the same sizes on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
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
from turboquant_vllm.bench.machine import Machine, best_dense_ms
from turboquant_vllm.bench.others import other_attentions
from turboquant_vllm.checks import AttentionShape
from turboquant_vllm.records import GROUP, Masks, Operand

__all__ = ["Shape", "WrongAnswerError", "decode", "paged", "paged_row", "prefill", "store"]

Row = dict[str, Any]
_PAGE = 64


class WrongAnswerError(Exception):
    """What was to be timed gives a wrong answer; says how wrong."""


class Shape(AttentionShape):
    """Of a call of attention."""

    @property
    def name(self) -> str:
        """What the call is known by in tables."""
        before = self.kv_len - self.q_len
        new = "" if self.q_len == 1 else f"{self.q_len} behind " if before else "prompt of "
        return f"{self.batch} x {new}{before if new and before else self.kv_len}"

    def cache_bytes(self, has_offsets: bool) -> float:
        """Bytes of keys and values in 4 bits, that decoding reads once."""
        each = self.head_dim + 8 + ((2 * self.head_dim + 16) / GROUP if has_offsets else 0)
        return self.batch * self.num_kv_heads * self.kv_len * each


def _decode_shapes(machine: Machine, quick: bool) -> list[Shape]:
    if machine.device == "cpu":
        return [Shape(1, 8, 2, 1, 1 << i, 64) for i in ((9, 11) if quick else (9, 11, 13, 15))]
    contexts = (13, 15) if quick else (10, 11, 12, 13, 14, 15, 16, 17)
    return [Shape(batch, 32, 8, 1, 1 << i, 128) for batch in (1, 16) for i in contexts if batch << i <= 1 << 20]


def decode(machine: Machine, quick: bool) -> Iterator[tuple[str, Any]]:
    """One token of each sequence."""
    for shape in _decode_shapes(machine, quick):
        yield shape.name, lambda shape=shape: _attention_row(machine, shape)


def prefill(machine: Machine, quick: bool) -> Iterator[tuple[str, Any]]:
    """Prompts whole, and chunks of them behind what came before."""
    heads = (8, 2) if machine.device == "cpu" else (32, 8)
    new, before = (256, 1024) if machine.device == "cpu" else (512, 8192 if quick else 32768)
    head_dim = 64 if machine.device == "cpu" else 128
    for q_len, kv_len in ((2 * new, 2 * new), (new, before + new)):
        shape = Shape(1, *heads, q_len, kv_len, head_dim)
        yield shape.name, lambda shape=shape: _attention_row(machine, shape)


def paged(machine: Machine, quick: bool) -> Iterator[tuple[str, Any]]:
    """One token of each sequence, over pages in random order."""
    for shape in _decode_shapes(machine, quick):
        yield shape.name, lambda shape=shape: paged_row(machine, shape)


def store(machine: Machine, quick: bool) -> Iterator[tuple[str, Any]]:
    """Keys and values of new tokens into pages."""
    sizes = (2, 64) if machine.device == "cpu" else (8, 128)
    for tokens in (32, 512) if machine.device == "cpu" or quick else (32, 512, 8192):
        yield f"{tokens} tokens", lambda tokens=tokens: _store_row(machine, tokens, *sizes)


def _vectors(machine: Machine, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TQ4Codec]:
    """Queries, and keys and values with a common part, as a model's have."""

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=machine.dtype, device=machine.device)

    q = drawn(shape.batch, shape.num_heads, shape.q_len, shape.head_dim)
    k, v = (drawn(shape.batch, shape.num_kv_heads, shape.kv_len, shape.head_dim) for _ in range(2))
    return q, k + 2 * drawn(1, shape.num_kv_heads, 1, shape.head_dim), v, TQ4Codec(shape.head_dim, device=machine.device)


def _check(
    out: torch.Tensor,
    q: torch.Tensor,
    k: TQ4Keys | TQ4Tensor,
    v: TQ4Tensor,
    codec: TQ4Codec,
    is_causal: bool,
    dtype: torch.dtype,
) -> float:
    """The largest error of the first sequence's first rows against float64, as a share of the largest number there.

    Raises:
        WrongAnswerError: it is beyond 4 units in the last place of the dtype (64 of float32's, whose products are not exact).
    """
    one, tables = slice(0, 1), codec.key_tables if isinstance(k, TQ4Keys) else codec.tables
    keys, values = Operand(*(x[one] for x in k)), Operand(*(x[one] for x in v))
    want, _ = reference.attention(q[one].double(), keys, values, tables, q.shape[-1] ** -0.5, Masks(is_causal))
    error = ((out[one].double() - want).abs().max() / want.abs().max()).item()
    limit = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    if not error <= limit:
        raise WrongAnswerError(f"off by {error:.1e} of the largest number, at most {limit:.1e} was expected")
    return error


def _attention_row(machine: Machine, shape: Shape) -> Row:
    q, k, v, codec = _vectors(machine, shape)
    is_causal = shape.q_len > 1
    keys, plain, values = codec.compress_keys(k), codec.compress(k), codec.compress(v)

    def ours() -> torch.Tensor:
        return tq4_attention(q, keys, values, codec, is_causal=is_causal)

    def without_offsets() -> torch.Tensor:
        return tq4_attention(q, plain, values, codec, is_causal=is_causal)

    error = _check(ours(), q, keys, values, codec, is_causal, machine.dtype)
    _check(without_offsets(), q, plain, values, codec, is_causal, machine.dtype)
    row = _row(machine, shape, machine.median_ms(ours), error)
    row["plain_ms"] = round(machine.median_ms(without_offsets), 5)
    return row | _dense(machine, row["ours_ms"], q, k, v)


def _dense(machine: Machine, ours: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Row:
    """What attention over dense keys and values takes; its mask is of another corner, so only whole prompts have one."""
    whole = 1 < q.shape[2] == k.shape[2]
    _, _, times = best_dense_ms(q, k, v, whole, rep=machine.rep, graph=machine.device == "cuda")
    times |= {library: machine.median_ms(call) for library, call in other_attentions(q, k, v, whole).items()}
    best, name = min((ms, name) for name, ms in times.items())
    rounded = {key: round(value, 5) for key, value in times.items()}
    return {"best_dense_ms": round(best, 5), "best_dense": name, "dense_ms": rounded, "ratio": round(best / ours, 3)}


def paged_row(machine: Machine, shape: Shape) -> Row:
    q, k, v, codec = _vectors(machine, shape)
    count = -(-shape.kv_len // _PAGE)
    sizes: dict[str, Any] = {"num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "has_offsets": True}
    cache = PagedTQ4Cache.allocate(shape.batch * count, page_size=_PAGE, device=machine.device, **sizes)
    table = torch.randperm(shape.batch * count, device=machine.device).int().view(shape.batch, count)
    place = torch.arange(shape.kv_len, device=machine.device)
    slots = table.long()[:, place // _PAGE] * _PAGE + place % _PAGE  # [B, N]
    previous = torch.nn.functional.pad(slots[:, :-1], (1, 0), value=-1)
    for i in range(shape.batch):
        new_keys, new_values = (x[i].transpose(0, 1).contiguous() for x in (k, v))
        tq4_store(new_keys, new_values, cache, codec, slots[i], previous_slots=previous[i])
    lengths = torch.full((shape.batch,), shape.kv_len, dtype=torch.int32, device=machine.device)
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=machine.device)

    def ours() -> torch.Tensor:
        queries = q.view(shape.batch, shape.num_heads, shape.head_dim)
        return tq4_paged_attention(queries, cache, codec, table, lengths, starts, max_query_len=1, max_seq_len=shape.kv_len)

    keys, values = codec.compress_keys(k), codec.compress(v)
    want = tq4_attention(q, keys, values, codec)
    got = ours().unsqueeze(2)
    difference = ((got - want).double().norm() / want.double().norm()).item()
    # The same vectors, but that rounding may move codes, and with them offsets: a hundredth of what 4 bits lose.
    if not difference <= 1e-2:
        raise WrongAnswerError(f"pages and the same cache without pages differ by {difference:.1e}")
    row = _row(machine, shape, machine.median_ms(ours), difference)
    row["without_pages_ms"] = round(machine.median_ms(lambda: tq4_attention(q, keys, values, codec)), 5)
    return row | _dense(machine, row["ours_ms"], q, k, v)


def _store_row(machine: Machine, tokens: int, heads: int, head_dim: int) -> Row:
    codec = TQ4Codec(head_dim, device=machine.device)
    dtype = torch.bfloat16 if machine.device == "cuda" else torch.float32
    k, v = (torch.randn(tokens, heads, head_dim, dtype=dtype, device=machine.device) for _ in range(2))
    pages = 2 * -(-tokens // _PAGE)
    sizes: dict[str, Any] = {"num_kv_heads": heads, "head_dim": head_dim, "has_offsets": True}
    cache = PagedTQ4Cache.allocate(pages, page_size=_PAGE, device=machine.device, **sizes)
    slots = torch.arange(tokens, device=machine.device) + _PAGE

    def ours() -> None:
        tq4_store(k, v, cache, codec, slots)

    ours()
    page, place = slots // _PAGE, slots % _PAGE
    norms = codec.compress(v).norms
    wrong = ((cache.v_norms[page, :, place] - norms).abs() / norms).max().item()
    if not wrong <= 1e-4:  # a code at a boundary moves a norm by about so much
        raise WrongAnswerError(f"norms of values are off by {wrong:.1e}")
    ms = machine.median_ms(ours)
    moved = 2 * k.nbytes + tokens * heads * (head_dim + 8)
    speed = moved / ms / 1e6
    return {
        "shape": {"tokens": tokens, "kv_heads": heads, "head_dim": head_dim},
        "dtype": str(dtype).removeprefix("torch."),
        "ours_ms": round(ms, 5),
        "gb_per_s": round(speed, 2),
        "copy_share": round(speed / machine.copy, 4),
        "error": wrong,
    }


def _row(machine: Machine, shape: Shape, ms: float, error: float) -> Row:
    size = shape.cache_bytes(True)
    row: Row = {
        "shape": asdict(shape),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "ours_ms": round(ms, 5),
        "error": error,
    }
    if shape.q_len == 1:  # what one token takes is reading the cache
        speed = size / ms / 1e6
        floor = {
            "gb_per_s": round(speed, 2),
            "read_share": round(speed / machine.read, 4),
            "floor_ms": size / machine.read / 1e6,
        }
        row |= floor
    return row
