"""tq4_attention on a CPU: the definition, the choice of backend, what it refuses, and the operators under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from turboquant_vllm import TQ4Codec, TQ4Tensor, ops, tq4_attention
from turboquant_vllm import attention as attention_module
from turboquant_vllm.attention import BACKENDS, choose_backend, why_not
from turboquant_vllm.checks import AttentionShape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DECODE = AttentionShape(batch=1, num_heads=32, num_kv_heads=8, q_len=1, kv_len=4096, head_dim=128)
CPU = torch.device("cpu")
Randn = Callable[..., torch.Tensor]


def expected(
    q: torch.Tensor, k: TQ4Tensor, v: TQ4Tensor | torch.Tensor, codec: TQ4Codec, sm_scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    keys = oracle.decompress(*k, codec.centroids, codec.rotation)
    values = oracle.decompress(*v, codec.centroids, codec.rotation) if isinstance(v, TQ4Tensor) else v
    return oracle.attention(q, keys, values, sm_scale, is_causal)


# The definition


@given(
    batch=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 5, 7]),
    q_len=st.integers(0, 9),
    kv_len=st.integers(0, 30),
    head_dim=st.sampled_from([16, 18, 64, 80, 256, 512]),
    dtype=st.sampled_from(DTYPES),
    dense_values=st.booleans(),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, -2.0, 0.0, 0.3, 1.5]),
    seed=st.integers(0, 2**31 - 1),
)
def test_attention_over_compressed_tensors(
    batch: int,
    num_kv_heads: int,
    group: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype,
    dense_values: bool,
    is_causal: bool,
    scale: float | None,
    seed: int,
) -> None:
    codec, generator = TQ4Codec(head_dim), torch.Generator().manual_seed(seed)
    q = torch.randn(batch, num_kv_heads * group, q_len, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(batch, num_kv_heads, kv_len, head_dim, generator=generator).to(dtype) for _ in range(2))
    keys, values = codec.compress(k), v if dense_values else codec.compress(v)
    # Scores of variance 4 at most: a larger score is itself known less exactly, and so is its weight.
    sm_scale = None if scale is None else scale * head_dim**-0.5
    out, lse = tq4_attention(q, keys, values, codec, sm_scale=sm_scale, is_causal=is_causal, return_lse=True)
    want, want_lse = expected(q, keys, values, codec, head_dim**-0.5 if sm_scale is None else sm_scale, is_causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    oracle.assert_close(out, want)
    oracle.assert_lse_close(lse, want_lse)


def test_close_to_attention_over_the_original_tensors(randn: Randn) -> None:
    codec = TQ4Codec(128)
    q, k, v = randn(2, 8, 16, 128), randn(2, 2, 512, 128), randn(2, 2, 512, 128)
    out = tq4_attention(q, codec.compress(k), codec.compress(v), codec, is_causal=True).double()
    exact, _ = oracle.attention(q, k, v, 128**-0.5, True)
    # Each vector loses 0.9 % of its energy; a score of variance 1 then moves by 0.1, and a weighted mean of values by
    # about the root of twice that share.
    assert ((out - exact).square().sum() / exact.square().sum()).sqrt() < 0.2


def test_lse_is_returned_on_request_only(randn: Randn) -> None:
    codec = TQ4Codec(64)
    q, k = randn(1, 2, 3, 64), codec.compress(randn(1, 2, 9, 64))
    out = tq4_attention(q, k, k, codec)
    assert isinstance(out, torch.Tensor)
    with_lse = tq4_attention(q, k, k, codec, return_lse=True)
    assert isinstance(with_lse, tuple)
    assert torch.equal(with_lse[0], out)


def test_norms_may_have_a_trailing_one(randn: Randn) -> None:
    codec = TQ4Codec(64)
    q, k = randn(1, 2, 3, 64), codec.compress(randn(1, 2, 9, 64))
    again = TQ4Tensor(k.codes, k.norms[..., None])
    assert torch.equal(tq4_attention(q, again, again, codec), tq4_attention(q, k, k, codec))


def test_inputs_are_left_as_they_were(randn: Randn) -> None:
    codec = TQ4Codec(64)
    q, k, v = randn(1, 2, 3, 64), codec.compress(randn(1, 2, 9, 64)), codec.compress(randn(1, 2, 9, 64))
    tensors = (q, *k, *v, codec.rotation, codec.centroids)
    before = [x.clone() for x in tensors]
    tq4_attention(q, k, v, codec, is_causal=True)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


# Backends


def test_auto_takes_the_reference_on_a_cpu() -> None:
    assert choose_backend(torch.empty(1, 32, 1, 128), DECODE) == ("reference", "")
    assert [name for name in BACKENDS if not why_not(name, CPU, torch.float16, DECODE)] == ["reference"]


def test_named_backend_runs_or_raises(randn: Randn) -> None:
    codec = TQ4Codec(64)
    q, k = randn(1, 2, 3, 64), codec.compress(randn(1, 2, 9, 64))
    assert torch.equal(tq4_attention(q, k, k, codec, backend="reference"), tq4_attention(q, k, k, codec))
    for name in set(BACKENDS) - {"reference"}:
        with pytest.raises(RuntimeError, match=rf"backend='{name}' cannot run: .*(not run on cpu tensors|not installed)"):
            tq4_attention(q, k, k, codec, backend=name)
    for name in ("flash", "", "Triton"):
        with pytest.raises(ValueError, match=f"backend must be one of .*'auto', .*'reference'.*, got '{name}'"):
            tq4_attention(q, k, k, codec, backend=name)


def test_every_backend_but_the_reference_can_say_why_not() -> None:
    for name in BACKENDS:
        reason = why_not(name, CPU, torch.float16, DECODE)
        assert bool(reason) == (name != "reference")
        assert choose_backend(torch.empty(1, 32, 1, 128), DECODE, name) == (name, reason)


def test_triton_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    assert why_not("triton", torch.device("cuda"), torch.float16, DECODE) == "the triton package is not installed"


@pytest.mark.parametrize(
    ("q_shape", "dtype", "values", "picked"),
    [
        ((1, 32, 8, 128), torch.float16, torch.uint8, "cuda"),  # 32 rows per key/value head
        ((1, 32, 9, 128), torch.float16, torch.uint8, "triton"),
        ((1, 32, 1, 128), torch.float32, torch.uint8, "triton"),
        ((1, 32, 1, 96), torch.float16, torch.uint8, "triton"),
        ((1, 32, 1, 128), torch.bfloat16, torch.bfloat16, "triton"),
    ],
)
def test_on_a_gpu_the_native_kernel_gets_what_it_serves(
    monkeypatch: pytest.MonkeyPatch, q_shape: tuple[int, ...], dtype: torch.dtype, values: torch.dtype, picked: str
) -> None:
    for name in ("why_not_cuda", "why_not_triton"):
        monkeypatch.setattr(ops, name, lambda device: "")
    batch, heads, tokens, head_dim = q_shape
    shape = AttentionShape(batch=batch, num_heads=heads, num_kv_heads=8, q_len=tokens, kv_len=64, head_dim=head_dim)
    k = torch.empty(batch, 8, 64, head_dim // 2, dtype=torch.uint8)
    v = torch.empty(batch, 8, 64, head_dim // 2 if values == torch.uint8 else head_dim, dtype=values)
    assert choose_backend(torch.empty(q_shape, dtype=dtype), shape, "auto", (k, v)) == (picked, "")


def test_auto_takes_the_first_backend_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "why_not", lambda *_: "")
    assert choose_backend(torch.empty(1, 32, 1, 128), DECODE) == (BACKENDS[0], "")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_a_kernel_on_a_gpu(randn: Randn, dtype: torch.dtype) -> None:
    codec = TQ4Codec(128, device="cuda")
    q = randn(1, 8, 1, 128).to("cuda", dtype)
    k, v = (codec.compress(randn(1, 2, 100, 128).cuda()) for _ in range(2))
    shape = AttentionShape(batch=1, num_heads=8, num_kv_heads=2, q_len=1, kv_len=100, head_dim=128)
    name, reason = choose_backend(q, shape)
    assert name != "reference"
    assert reason == ""
    assert torch.equal(tq4_attention(q, k, v, codec), tq4_attention(q, k, v, codec, backend=name))


# Operators


def operator_arguments(name: str) -> tuple[Any, ...]:
    codec = TQ4Codec(64)
    x = torch.randn(2, 3, 64)
    if name == "compress":
        return x, *codec.writing
    t = codec.compress(x)
    return t.codes, t.norms, codec.centroids, codec.rotation, True, torch.float16


@pytest.mark.parametrize("name", ["compress", "decompress"])
def test_opcheck(name: str) -> None:
    checks = torch.library.opcheck(getattr(torch.ops.turboquant, name).default, operator_arguments(name))
    assert checks
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(randn: Randn, backend: str) -> None:
    codec = TQ4Codec(64)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keys, values = codec.compress(k), codec.compress(v)
        out, lse = tq4_attention(q, keys, values, codec, is_causal=True, return_lse=True)
        return out, lse, codec.decompress(keys), keys.codes, values.norms

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for q_len, kv_len in ((3, 9), (1, 10), (2, 2)):
            arguments = randn(1, 4, q_len, 64), randn(1, 2, kv_len, 64), randn(1, 2, kv_len, 64)
            for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
                assert torch.equal(got, want)


def test_fake_attention_has_the_shapes_of_the_real_one() -> None:
    codec = TQ4Codec(64, device="meta")
    q = torch.empty(2, 4, 3, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2).contiguous().transpose(1, 2)
    k = codec.compress(torch.empty(2, 2, 9, 64, device="meta"))
    arguments = (q, k.codes, k.norms, k.codes, k.norms, codec.centroids, codec.rotation, 0.1, True)
    out, lse = torch.ops.turboquant.triton_attention(*arguments)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "meta")
    assert out.is_contiguous()
    assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)


def test_compress_runs_under_grad_but_has_no_backward(randn: Randn) -> None:
    codec = TQ4Codec(64)
    x = randn(5, 64)
    plain = codec.compress(x)
    t = codec.compress(x.clone().requires_grad_())
    assert torch.equal(t.codes, plain.codes)
    assert torch.equal(t.norms, plain.norms)
    with pytest.raises(NotImplementedError, match="turboquant::compress has no backward: a quantised cache is for inference"):
        t.norms.sum().backward()


def test_decompress_runs_under_grad_but_has_no_backward(randn: Randn) -> None:
    codec = TQ4Codec(64)
    t = codec.compress(randn(5, 64))
    out = codec.decompress(TQ4Tensor(t.codes, t.norms.clone().requires_grad_()))
    assert torch.equal(out, codec.decompress(t))
    with pytest.raises(NotImplementedError, match="turboquant::decompress has no backward"):
        out.sum().backward()


def test_attention_runs_under_grad_and_inference_mode(randn: Randn) -> None:
    codec = TQ4Codec(64)
    q, x = randn(1, 2, 3, 64), randn(1, 2, 9, 64)
    k = codec.compress(x)
    plain = tq4_attention(q, k, k, codec)
    assert torch.equal(tq4_attention(q.clone().requires_grad_(), k, x.requires_grad_(), codec).detach(),
                       tq4_attention(q, k, x.detach(), codec))  # fmt: skip
    with torch.inference_mode():
        assert torch.equal(tq4_attention(q, codec.compress(x), k, codec), plain)
