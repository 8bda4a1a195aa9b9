"""What tq4_attention refuses: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from turboquant_vllm import TQ4Codec, TQ4Tensor, checks, merge_attention_states, tq4_attention
from turboquant_vllm.limits import why_not_decode

B, H_Q, H_KV, N_Q, N_KV, D = 2, 4, 2, 3, 9, 64
Arguments = dict[str, Any]


def good() -> Arguments:
    return {"q": torch.zeros(B, H_Q, N_Q, D), "k": packed(), "v": packed(), "codec": TQ4Codec(D)}


def packed(*codes: int, norms: tuple[int, ...] | None = None, **options: Any) -> TQ4Tensor:
    codes = codes or (B, H_KV, N_KV, D // 2)
    rows = codes[:-1] if norms is None else norms
    return TQ4Tensor(torch.zeros(codes, dtype=torch.uint8), torch.zeros(rows, **options))


def codec_with(**tensors: torch.Tensor) -> TQ4Codec:
    codec = TQ4Codec(D)
    for name, x in tensors.items():
        setattr(codec, name, x)
    return codec


def q(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape or (B, H_Q, N_Q, D), **options)


# What changes in a good call; the error; what its message must say.
TYPES: list[tuple[Callable[[], Arguments], str]] = [
    (lambda: {"q": [1.0]}, "q must be a torch.Tensor, got list"),
    (lambda: {"q": None}, "q must be a torch.Tensor, got NoneType"),
    (lambda: {"q": q(dtype=torch.float64)}, "q must be torch.float16 or torch.bfloat16 or torch.float32, got torch.float64"),
    (lambda: {"q": q(dtype=torch.int32)}, "q must be torch.float16 or torch.bfloat16 or torch.float32, got torch.int32"),
    (lambda: {"k": torch.zeros(B, H_KV, N_KV, D)}, "k must be a TQ4Tensor or TQ4Keys, got Tensor"),
    (lambda: {"k": tuple(packed())}, "k must be a TQ4Tensor or TQ4Keys, got tuple"),
    (lambda: {"v": tuple(packed())}, "v must be a TQ4Tensor or a torch.Tensor, got tuple"),
    (lambda: {"v": None}, "v must be a TQ4Tensor or a torch.Tensor, got NoneType"),
    (lambda: {"k": TQ4Tensor(q(B, H_KV, N_KV, D // 2), packed().norms)}, "k.codes must be torch.uint8, got torch.float32"),
    (lambda: {"v": TQ4Tensor(packed().codes.char(), packed().norms)}, "v.codes must be torch.uint8, got torch.int8"),
    (lambda: {"k": packed(dtype=torch.float16)}, "k.norms must be torch.float32, got torch.float16"),
    (lambda: {"v": packed(dtype=torch.float64)}, "v.norms must be torch.float32, got torch.float64"),
    (lambda: {"k": TQ4Tensor(packed().codes, None)}, "k.norms must be a torch.Tensor, got NoneType"),
    (lambda: {"v": q(B, H_KV, N_KV, D, dtype=torch.float16)}, "v must be torch.float32, got torch.float16"),
    (lambda: {"codec": None}, "codec must be a TQ4Codec, got NoneType"),
    (lambda: {"codec": codec_with(centroids=torch.zeros(16).double())}, "centroids must be torch.float32, got torch.float64"),
    (lambda: {"codec": codec_with(rotation=torch.eye(D).half())}, "rotation must be torch.float32, got torch.float16"),
    (lambda: {"sm_scale": "0.1"}, "sm_scale must be a float or None, got str"),
    (lambda: {"sm_scale": torch.tensor(0.1)}, "sm_scale must be a float or None, got Tensor"),
    (lambda: {"sm_scale": True}, "sm_scale must be a float or None, got bool"),
    (lambda: {"is_causal": "False"}, "is_causal must be a bool, got str"),
]
VALUES: list[tuple[Callable[[], Arguments], str]] = [
    (lambda: {"q": q(H_Q, N_Q, D)}, "q must have shape [batch, num_heads, q_len, head_dim], got [4, 3, 64]"),
    (lambda: {"q": q(B, H_Q, N_Q, 63)}, "q must have an even head_dim from 2 to 512, got 63"),
    (lambda: {"q": q(B, H_Q, N_Q, 514)}, "q must have an even head_dim from 2 to 512, got 514"),
    (lambda: {"q": q(B, H_Q, N_Q, 0)}, "q must have an even head_dim from 2 to 512, got 0"),
    (lambda: {"q": q(B, 5, N_Q, D)}, "q must have a multiple of k.codes's 2 heads, got 5"),
    (lambda: {"q": q(B, 1, N_Q, D)}, "q must have a multiple of k.codes's 2 heads, got 1"),
    (lambda: {"q": q(B, 0, N_Q, D)}, "q must have a multiple of k.codes's 2 heads, got 0"),
    (lambda: {"sm_scale": math.nan}, "sm_scale must be finite in float32, from -1.7e+38 to 1.7e+38, got nan"),
    (lambda: {"k": packed(B, 0, N_KV, 32), "v": packed(B, 0, N_KV, 32)}, "q must have a multiple of k.codes's 0 heads, got 4"),
    (lambda: {"k": packed(3, H_KV, N_KV, 32)}, "k.codes must have shape [2, num_kv_heads, kv_len, 32], got [3, 2, 9, 32]"),
    (lambda: {"k": packed(B, H_KV, N_KV, 31)}, "k.codes must have shape [2, num_kv_heads, kv_len, 32], got [2, 2, 9, 31]"),
    (lambda: {"k": packed(H_KV, N_KV, 32)}, "k.codes must have shape [2, num_kv_heads, kv_len, 32], got [2, 9, 32]"),
    (lambda: {"v": packed(B, H_KV, N_KV - 1, 32)}, "v.codes must have shape [2, 2, 9, 32], got [2, 2, 8, 32]"),
    (lambda: {"v": packed(B, 4, N_KV, 32)}, "v.codes must have shape [2, 2, 9, 32], got [2, 4, 9, 32]"),
    (lambda: {"v": q(B, H_KV, N_KV - 1, D)}, "v must have shape [2, 2, 9, 64], got [2, 2, 8, 64]"),
    (lambda: {"v": q(B, H_KV, N_KV, 32)}, "v must have shape [2, 2, 9, 64], got [2, 2, 9, 32]"),
    (lambda: {"k": packed(norms=(B, H_KV, 8))}, "k.norms must have shape [2, 2, 9] or [2, 2, 9, 1], got [2, 2, 8]"),
    (lambda: {"k": packed(norms=(B, H_KV, N_KV, 2))}, "k.norms must have shape [2, 2, 9] or [2, 2, 9, 1], got [2, 2, 9, 2]"),
    (lambda: {"k": packed(norms=(B, N_KV, H_KV))}, "k.norms must have shape [2, 2, 9] or [2, 2, 9, 1], got [2, 9, 2]"),
    (lambda: {"v": packed(norms=(1,))}, "v.norms must have shape [2, 2, 9] or [2, 2, 9, 1], got [1]"),
    (lambda: {"codec": TQ4Codec(128)}, "rotation must have shape [64, 64], got [128, 128]"),
    (lambda: {"codec": codec_with(rotation=torch.zeros(D, 32))}, "rotation must have shape [64, 64], got [64, 32]"),
    (lambda: {"codec": codec_with(centroids=torch.zeros(15))}, "centroids must have shape [16], got [15]"),
    (lambda: {"q": q(device="meta")}, "k.codes must be on meta like q, got cpu"),
    (lambda: {"k": packed().to("meta")}, "k.codes must be on cpu like q, got meta"),
    (lambda: {"k": packed()._replace(norms=q(B, H_KV, N_KV, device="meta"))}, "k.norms must be on cpu like q, got meta"),
    (lambda: {"v": packed().to("meta")}, "v.codes must be on cpu like q, got meta"),
    (lambda: {"v": q(B, H_KV, N_KV, D, device="meta")}, "v must be on cpu like q, got meta"),
    (lambda: {"codec": TQ4Codec(D).to("meta")}, "centroids must be on cpu like q, got meta"),
    (lambda: {"codec": codec_with(rotation=torch.eye(D, device="meta"))}, "rotation must be on cpu like q, got meta"),
    (lambda: {"backend": "fast"}, "got 'fast'"),
    (lambda: {"backend": None}, "got None"),
]


def test_the_call_that_the_others_change_is_good() -> None:
    assert tq4_attention(**good()).shape == (B, H_Q, N_Q, D)


@pytest.mark.parametrize(("change", "message"), TYPES, ids=[message for _, message in TYPES])
def test_wrong_types_and_dtypes(change: Callable[[], Arguments], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        tq4_attention(**good() | change())


@pytest.mark.parametrize(("change", "message"), VALUES, ids=[message for _, message in VALUES])
def test_wrong_shapes_devices_and_names(change: Callable[[], Arguments], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tq4_attention(**good() | change())


def test_no_check_reads_a_tensor() -> None:
    # Tensors without contents pass them all: nothing waits for a device.
    meta = torch.device("meta")
    arguments = good()
    arguments = {name: value.to(meta) for name, value in arguments.items()}
    out, lse = tq4_attention(**arguments, return_lse=True, backend="reference")
    assert (out.device, out.shape, lse.shape) == (meta, (B, H_Q, N_Q, D), (B, H_Q, N_Q))


def test_sm_scale() -> None:
    assert checks.check_sm_scale(None, 64) == 1 / math.sqrt(64)
    scale = checks.check_sm_scale(2, 64)
    assert (scale, type(scale)) == (2.0, float)


@pytest.mark.parametrize(
    ("name", "norms"), [("k_packed", "k_norms"), ("k.codes", "k.norms"), ("t.codes", "t.norms"), ("v", "v_norms")]
)
def test_norms_are_called_after_their_codes(name: str, norms: str) -> None:
    assert checks.norms_name(name) == norms


def test_shape_of_a_call() -> None:
    arguments = good()
    k, codec = arguments["k"], arguments["codec"]
    shape, k_norms, v_norms = checks.check_attention(
        arguments["q"],
        k.codes,
        k.norms[..., None],
        torch.zeros(B, H_KV, N_KV, D),
        None,
        codec.centroids,
        codec.rotation,
        packed=(True, False),
    )
    assert shape == checks.AttentionShape(B, H_Q, H_KV, N_Q, N_KV, D)
    assert shape.group == 2
    assert k_norms is not None
    assert k_norms.shape == (B, H_KV, N_KV)
    assert v_norms is None


def test_dense_calls_need_neither_levels_nor_rotation() -> None:
    k = torch.zeros(B, H_KV, N_KV, D)
    shape, *norms = checks.check_attention(q(), k, None, k, None, None, None, packed=(False, False))
    assert shape.head_dim == D
    assert norms == [None, None]
    with pytest.raises(ValueError, match=r"k must have shape \[2, num_kv_heads, kv_len, 64\], got \[2, 2, 9, 32\]"):
        checks.check_attention(q(), k[..., :32], None, k, None, None, None, packed=(False, False))


HALF = torch.float16
CODES = torch.zeros(2, 8, 100, 64, dtype=torch.uint8)
ONE_HEAD = torch.zeros(1, 1, 100, 64 + 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((HALF, 128, 32, (CODES, CODES)), ""),
        ((torch.bfloat16, 64, 1), ""),
        ((HALF, 128, 4, (CODES[:, 1:, 5:], CODES.transpose(1, 2).contiguous().transpose(1, 2))), ""),
        ((HALF, 128, 4, (CODES[1:, :1], ONE_HEAD.as_strided((1, 1, 100, 64), (1, 3, 64, 1)))), ""),
        ((torch.float32, 128, 1), "fp16 or bf16, got torch.float32"),
        ((HALF, 80, 1), "head_dim 64, 128 or 256, got 80"),
        ((HALF, 128, 33), "up to 32 query rows per key/value head, got 33"),
        ((HALF, 128, 1, (CODES, CODES.half())), "packed keys and values, got torch.float16"),
        ((HALF, 128, 1, (CODES[..., ::2], CODES)), "16-byte multiples apart, got strides"),
        ((HALF, 128, 1, (CODES, ONE_HEAD[..., :64])), "16-byte multiples apart, got strides"),
    ],
)
def test_what_the_native_kernels_serve(arguments: tuple[Any, ...], reason: str) -> None:
    said = why_not_decode(*arguments)
    assert reason in said
    assert bool(said) == bool(reason)


def test_what_the_native_kernels_serve_can_be_traced() -> None:
    def step(q: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return q if why_not_decode(q.dtype, q.shape[-1], 4, (codes, codes)) else q + 1

    q = torch.zeros(1, 4, 1, 128, dtype=HALF)
    assert torch.compile(step, fullgraph=True, backend="eager")(q, CODES).sum() == q.numel()


OUTS, LSES = torch.zeros(3, 2, 4, 5, 8, dtype=torch.float16), torch.zeros(3, 2, 4, 5)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([OUTS], LSES, TypeError, "outs must be a torch.Tensor, got list"),
        (OUTS, 0.0, TypeError, "lses must be a torch.Tensor, got float"),
        (OUTS.int(), LSES, TypeError, "outs must have a floating dtype, got torch.int32"),
        (OUTS, LSES.long(), TypeError, "lses must have a floating dtype, got torch.int64"),
        (OUTS[0, 0, 0, 0], LSES, ValueError, "outs must have shape [parts, ..., head_dim], got [8]"),
        (OUTS, LSES[:2], ValueError, "lses must have shape [3, 2, 4, 5], got [2, 2, 4, 5]"),
        (OUTS, LSES[..., None], ValueError, "lses must have shape [3, 2, 4, 5], got [3, 2, 4, 5, 1]"),
        (OUTS, LSES.to("meta"), ValueError, "lses must be on cpu like outs, got meta"),
    ],
)
def test_what_merge_attention_states_refuses(outs: Any, lses: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        merge_attention_states(outs, lses)
