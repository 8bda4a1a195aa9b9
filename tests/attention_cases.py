"""Random attention calls, their float64 results, and the accuracy gate: for every backend's tests.

A backend under test is a function ``run(q, k, v, tables, sm_scale, masks) -> (out, lse)`` with the arguments and results of
:func:`turboquant_vllm.reference.attention`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from turboquant_vllm import lloyd_max, reference
from turboquant_vllm.limits import why_not_decode
from turboquant_vllm.records import GROUP, Masks, Operand, Tables
from turboquant_vllm.rotation import haar, randomized_hadamard

Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# The largest error of an element, relative to the largest magnitude in the result. In half precision: one unit in the
# last place for each of the four things that are rounded once (queries, levels, weights, result). In float32 the only
# matter is the length of sums, whose rounding errors grow like the square root of some hundreds of terms.
TOLERANCE = {torch.float32: 32 * 2.0**-23, torch.float16: 4 * 2.0**-10, torch.bfloat16: 4 * 2.0**-7}

# What the gate allows beside twice PyTorch's error, in units in the last place of the result's magnitude. One in half
# precision: PyTorch may be exact there by luck. In float32 the two rotations count, sums of head_dim products each, which
# PyTorch is not asked for.
GATE_FLOOR = {torch.float32: 8.0, torch.float16: 1.0, torch.bfloat16: 1.0}

_OPERANDS = ("k", "k_norms", "v", "v_norms", "k_groups", "k_steps")
LAYOUTS = ("contiguous", "transposed", "sliced", "odd", "strided", "expanded")


@dataclass(frozen=True)
class Case:
    """The arguments of one attention call."""

    q: torch.Tensor
    k: torch.Tensor
    k_norms: torch.Tensor | None
    v: torch.Tensor
    v_norms: torch.Tensor | None
    centroids: torch.Tensor
    rotation: torch.Tensor
    sm_scale: float
    is_causal: bool
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    k_groups: torch.Tensor | None = None
    k_steps: torch.Tensor | None = None
    key_scales: torch.Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of :func:`turboquant_vllm.reference.attention`."""
        masks = Masks(self.is_causal, self.sliding_window, self.softcap, self.sinks)
        return self.q, self.keys, Operand(self.v, self.v_norms), self.tables, self.sm_scale, masks

    @property
    def keys(self) -> Operand:
        return Operand(self.k, self.k_norms, self.k_groups, self.k_steps)

    @property
    def tables(self) -> Tables:
        return Tables(self.centroids, self.rotation, self.key_scales)

    @property
    def operator_arguments(self) -> tuple[Any, ...]:
        """Those of the operators ``turboquant::triton_attention`` and ``turboquant::cuda_decode``."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def batch_entry(self, index: int) -> Case:
        """One sequence of the batch, alone."""
        tensors = {name: getattr(self, name) for name in ("q", *_OPERANDS)}
        return self.replace(**{name: None if x is None else x[index : index + 1] for name, x in tensors.items()})

    def visible(self) -> torch.Tensor:
        """Which key each query sees, bool ``[N_q, N_kv]``."""
        q_len, kv_len = self.q.shape[2], self.k.shape[2]
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=self.q.device)
        if self.is_causal:
            mask = mask.tril(kv_len - q_len)
        if self.sliding_window is not None:
            mask = mask.triu(kv_len - q_len - self.sliding_window + 1)
        return mask


def random_case(
    generator: torch.Generator,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    batch: int = 1,
    num_kv_heads: int = 2,
    group: int = 2,
    q_len: int = 1,
    kv_len: int = 33,
    head_dim: int = 64,
    packed: tuple[bool, bool] = (True, True),
    is_causal: bool = False,
    sm_scale: float | None = None,
    layout: str = "contiguous",
    offsets: bool = False,
) -> Case:
    """A call whose scores are about normal with variance 1 or 2, with every byte value among the codes.

    With ``offsets`` keys have these, some groups an outlier, and key scales.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def keys_or_values(packed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = (batch, num_kv_heads, kv_len)
        if not packed:
            return place(normal(*rows, head_dim).to(dtype)), None
        codes = torch.randint(256, (*rows, head_dim // 2), generator=generator, dtype=torch.uint8)
        return place(codes), place(math.sqrt(head_dim) * torch.exp(0.3 * normal(*rows)))

    def place(x: torch.Tensor) -> torch.Tensor:
        return lay_out(x.to(device), layout)

    q = place(normal(batch, num_kv_heads * group, q_len, head_dim).to(dtype))
    k, k_norms = keys_or_values(packed[0])
    v, v_norms = keys_or_values(packed[1])
    centroids, rotation = levels_and_rotation(head_dim, device)
    scale = default_scale(head_dim, offsets) if sm_scale is None else sm_scale
    case = Case(q, k, k_norms, v, v_norms, centroids, rotation, scale, is_causal)
    if not offsets:
        return case
    assert k_norms is not None
    shared = [x.to(device) for x in random_groups(generator, (batch, num_kv_heads, kv_len), head_dim)]
    signs, groups, steps = (lay_out(x, layout) for x in (shared[0], shared[1].flatten(-2), shared[2]))
    # Marks that overlap in memory would meet.
    norms = k_norms.copysign(signs) if layout == "expanded" else k_norms.mul_(signs)
    scales = torch.exp(0.5 * normal(num_kv_heads, head_dim)).to(device)
    return case.replace(k_norms=norms, k_groups=groups.unflatten(-1, (2, head_dim)), k_steps=steps, key_scales=scales)


def default_scale(head_dim: int, offsets: bool) -> float:
    """Of scores, such that random ones have a variance of 1 to 2. Offsets and key scales make it 3, and of a score of 9, which
    has half of all weight, rounding alone makes errors beyond the gate now and then."""
    return (0.7 if offsets else 1.0) / math.sqrt(head_dim)


def random_groups(
    generator: torch.Generator, rows: tuple[int, ...], head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signs ``[*rows]``, -1 for the outliers of most groups; groups int8 ``[..., ceil(N / 64), 2, D]``; steps, NaN to spare."""
    *lead, count = rows
    groups = -(-count // GROUP)
    place = torch.randint(GROUP + 8, (*lead, groups, 1), generator=generator)
    signs = torch.where(torch.arange(GROUP) == place, -1.0, 1.0).flatten(-2)[..., :count]
    shared = torch.randint(-127, 128, (*lead, groups, 2, head_dim), generator=generator).to(torch.int8)
    steps = torch.rand((*lead, groups, 4), generator=generator) * 0.02
    steps[..., 2:] = float("nan")  # no reader's
    return signs, shared, steps


def levels_and_rotation(head_dim: int, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    centroids = torch.tensor(lloyd_max(head_dim).centroids, dtype=torch.float32, device=device)
    rotation = haar(head_dim) if head_dim & (head_dim - 1) else randomized_hadamard(head_dim)
    return centroids, torch.tensor(rotation, device=device)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x [B, H, N, ...]`` in other strides, in a buffer whose other bytes are poison.

    "sliced" keeps rows aligned; "odd" begins them at an odd element; "strided" takes every second element; "expanded"
    repeats the first head, with stride 0.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:, :1].expand_as(x)
    batch, heads, tokens, *rest = x.shape
    if layout == "strided":
        view = _poison((batch, heads, 2 * tokens, *(2 * n for n in rest)), x)[:, :, ::2]
        view = view[..., ::2] if rest else view
    elif layout == "sliced":
        view = _poison((batch + 1, heads + 2, tokens + 70, *(n + 32 for n in rest)), x)[1:, 1:-1, 3 : 3 + tokens]
        view = view[..., 16:-16] if rest else view
    elif layout == "odd":
        view = _poison((batch, heads, tokens + 70, *(n + 3 for n in rest)), x)[:, :, 1 : 1 + tokens]
        view = view[..., 1:-2] if rest else view
    else:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return view.copy_(x)


def _poison(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    if not like.dtype.is_floating_point:
        return torch.randint(256, shape, dtype=torch.uint8, device=like.device).view(like.dtype)
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty hands out memory full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all(), "torch.utils.deterministic.fill_uninitialized_memory is off"
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64."""
    return reference.attention(case.q.double(), *case.arguments[1:])


def pytorch_attention(case: Case) -> torch.Tensor:
    """PyTorch's own attention in the queries' dtype, given the decompressed keys and values rounded to that dtype."""
    dtype, head_dim = case.q.dtype, case.q.shape[-1]

    def dense(x: torch.Tensor, norms: torch.Tensor | None, groups: torch.Tensor | None = None) -> torch.Tensor:
        if groups is not None:
            x = reference.decompress_keys(case.keys, case.tables, torch.float64).to(dtype)
        elif norms is not None:
            x = reference.decompress(x, norms, case.centroids, case.rotation, torch.float64).to(dtype)
        return x.repeat_interleave(case.group, 1)

    # Zeros up to a multiple of eight keep PyTorch on the kernel that it uses for common head dimensions.
    tensors = [case.q, dense(case.k, case.k_norms, case.k_groups), dense(case.v, case.v_norms)]
    q, k, v = (torch.nn.functional.pad(x, (0, -head_dim % 8)) for x in tensors)
    mask = case.visible() if case.is_causal else None
    exact = dtype == torch.float32
    assert not torch.backends.cuda.matmul.allow_tf32
    if case.softcap is not None or case.sinks is not None:
        return _eager_attention(q, k, v, case)[..., :head_dim]
    with sdpa_kernel(SDPBackend.MATH) if exact else contextlib.nullcontext():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.sm_scale)
    return out[..., :head_dim]


def _eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    """What models that cap scores or have sinks do step by step: everything in q's dtype, the softmax in float32."""
    score = q @ k.mT * case.sm_scale
    if case.softcap is not None:
        score = case.softcap * torch.tanh(score / case.softcap)
    score = score.masked_fill(~case.visible(), float("-inf"))
    sinks = torch.full_like(case.q[0, :, 0, 0], float("-inf")) if case.sinks is None else case.sinks.to(score.dtype)
    score = torch.cat([score, sinks[None, :, None, None].expand(*score.shape[:-1], 1)], -1)
    return torch.softmax(score, -1, dtype=torch.float32)[..., :-1].to(q.dtype) @ v


def check(run: Run, case: Case, *, gate: bool = True, slack: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a case and compare it with float64: as close as PyTorch is, or, without ``gate``, within :data:`TOLERANCE`.

    The gate: both the largest and the root-mean-square error are at most twice those of PyTorch in the same dtype.
    ``slack`` adds to the tolerance.

    Returns:
        What ``run`` returned.
    """
    out, lse = run(*case.arguments)
    want, want_lse = expected(case)
    assert out.shape == case.q.shape
    assert out.dtype == case.q.dtype
    assert lse.shape == case.q.shape[:-1]
    assert lse.dtype == torch.float32
    seen = want_lse != float("-inf")
    assert (out[~seen] == 0).all(), "a query that sees no key must give zeros"
    assert (lse[~seen] == float("-inf")).all(), "a query that sees no key must have the log-sum-exp -inf"
    if not seen.any():
        return out, lse
    compare(lse[seen], want_lse[seen], case.q.dtype, at_least=1.0, what="lse")
    if gate:
        check_gate(out[seen], want[seen], pytorch_attention(case)[seen], out.dtype)
    else:
        compare(out[seen], want[seen], case.q.dtype, slack=slack)
    return out, lse


def compare(
    out: torch.Tensor,
    want: torch.Tensor,
    dtype: torch.dtype,
    *,
    at_least: float = 0.0,
    slack: float = 0.0,
    what: str = "out",
) -> None:
    """Every element of ``out`` is within ``dtype``'s tolerance of ``want``, relative to want's largest magnitude."""
    largest = max(want.abs().max().item(), at_least)
    # A result below the normal range is spaced by its smallest subnormal.
    limit = (TOLERANCE[dtype] + slack) * largest + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (out.double() - want).abs().max().item()
    assert error <= limit, f"{what}: error {error:.3e} above {limit:.3e}, largest magnitude {largest:.3e}"  # NaN fails too


def skip_if_refused(q: torch.Tensor, k: Operand, v: Operand, *_: Any) -> None:
    """Skip a test whose call the native kernels do not serve."""
    if why_not_decode(q.dtype, q.shape[-1], q.shape[2] * q.shape[1] // k.data.shape[1], (k.data, v.data)):
        pytest.skip("the native kernels refuse this call")


def check_replays(run: Run, case: Case, other: Case) -> None:
    """A CUDA graph of ``run(*case.operator_arguments)`` gives what its arguments hold at each replay: case's, then other's."""
    run(*case.operator_arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(*case.operator_arguments)
    for contents in (case, other):
        for name in ("q", "k", "k_norms", "v", "v_norms"):
            getattr(case, name).copy_(getattr(contents, name))
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        want, want_lse = expected(contents)
        compare(out, want, case.q.dtype)
        compare(lse, want_lse, case.q.dtype, at_least=1.0, what="lse")


def check_gate(out: torch.Tensor, want: torch.Tensor, pytorch: torch.Tensor, dtype: torch.dtype) -> None:
    """The error of ``out`` is at most twice that of ``pytorch``, both computed in ``dtype``; ``want`` in float64."""
    floor = GATE_FLOOR[dtype] * torch.finfo(dtype).eps
    ours, theirs = out.double() - want, pytorch.double() - want
    for name, size in (("largest", lambda x: x.abs().max().item()), ("RMS", lambda x: x.square().mean().sqrt().item())):
        limit = 2 * size(theirs) + floor * size(want)
        assert size(ours) <= limit, f"{name} error {size(ours):.3e} above {limit:.3e}, PyTorch's {size(theirs):.3e}"
