"""Numbers that float32, 64 bits or a bool cannot be, wherever a caller may give them: refused by name, or taken as meant."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from turboquant_vllm import PagedTQ4Cache, TQ4Codec, tq4_attention, tq4_paged_attention, tq4_store
from turboquant_vllm.triton.flash_attention import triton_flash_attention
from turboquant_vllm.triton.flash_attention_tq4 import triton_flash_attention_tq4
from turboquant_vllm.triton.flash_attention_tq4_kv import triton_flash_attention_tq4_kv

D, N = 64, 40
LARGEST, LEAST_CAP, LARGEST_CAP = 2.0**127, 2.0**-100, 2.0**100


class Calls:
    """One attention call by each of the public functions; the pages hold what the tensors do."""

    def __init__(self, generator: torch.Generator) -> None:
        randn = functools.partial(torch.randn, generator=generator)
        self.q, self.key, self.value = randn(1, 4, 3, D), randn(1, 2, N, D), randn(1, 2, N, D)
        self.codec = TQ4Codec(D)
        self.k, self.v = self.codec.compress(self.key), self.codec.compress(self.value)
        self.cache = PagedTQ4Cache.allocate(3, page_size=16, num_kv_heads=2, head_dim=D)
        tq4_store(*(x[0].transpose(0, 1) for x in (self.key, self.value)), self.cache, self.codec, torch.arange(N))
        self.index = [torch.tensor(x, dtype=torch.int32) for x in ([[0, 1, 2]], [N], [0, 3])]

    def dense(self, is_causal: Any = True, **options: Any) -> torch.Tensor:
        return tq4_attention(self.q, self.k, self.v, self.codec, is_causal=is_causal, **options)

    def paged(self, is_causal: Any = True, **options: Any) -> torch.Tensor:
        q = self.q[0].transpose(0, 1)
        out = tq4_paged_attention(q, self.cache, self.codec, *self.index, causal=is_causal, **options)
        return out.transpose(0, 1)[None]

    def model(self, is_causal: Any = True, **options: Any) -> torch.Tensor:
        pytest.importorskip("transformers")
        from turboquant_vllm.hf import attention_forward

        options["scaling"] = options.pop("sm_scale", None)
        values = (self.codec.decompress(x) for x in (self.k, self.v))
        out, _ = attention_forward(torch.nn.Module(), self.q, *values, None, is_causal=is_causal, **options)
        return out.transpose(1, 2)

    def served(self, is_causal: Any = True, sm_scale: float | None = None, **options: Any) -> torch.Tensor:
        from turboquant_vllm.vllm.batch import Kind, Run
        from turboquant_vllm.vllm.layer import PagedLayer

        sm_scale = 1 / math.sqrt(D) if sm_scale is None else sm_scale
        layer = PagedLayer(4, 2, D, sm_scale, exact=None, key_offsets=False, **options)
        out = torch.empty(3, 4, D)
        run = Run(Kind.CONTINUED, slice(0, 3), *self.index, max_query_len=3, seq_lens_cpu=(N,), cu_seqlens_q_cpu=(0, 3))
        pages = self.cache.buffer.view(3, 2, 16, D + 8)
        layer.attend(self.q[0].transpose(0, 1).contiguous(), None, None, pages, [run], out)
        return out.transpose(0, 1)[None]


@pytest.fixture
def calls(generator: torch.Generator) -> Calls:
    return Calls(generator)


functions = pytest.mark.parametrize("function", ["dense", "paged", "model", "served"])


@functions
@pytest.mark.parametrize("scale", [1e39, -1e39, LARGEST * 1.01, math.inf, math.nan, 10**400, np.float64(1e300)])
def test_scales_that_are_infinite_in_float32(function: str, scale: float, calls: Calls) -> None:
    with pytest.raises(ValueError, match=r"sm_scale must be finite in float32, from -1.7e\+38 to 1.7e\+38, got"):
        getattr(calls, function)(sm_scale=scale)


@functions
@pytest.mark.parametrize("cap", [1e39, LARGEST_CAP * 2, LEAST_CAP / 2, 1e-46, 5e-324, 0, -1.0, math.inf, math.nan, 10**400])
def test_caps_that_are_infinite_or_zero_in_float32(function: str, cap: float, calls: Calls) -> None:
    message = r"softcap must be positive and finite in float32, from 7.9e-31 to 1.3e\+30, got"
    with pytest.raises(ValueError, match=message):
        getattr(calls, function)(softcap=cap)


@functions
@pytest.mark.parametrize(
    "masks",
    [
        {"softcap": LARGEST_CAP},
        {"softcap": LEAST_CAP},
        {"softcap": 1},
        {"sm_scale": 0},
        {"sm_scale": -1 / math.sqrt(D)},
        {"sm_scale": 1e-45},
    ],
    ids=str,
)
def test_numbers_at_the_ends_of_their_ranges(function: str, masks: dict[str, float], calls: Calls) -> None:
    keys, values = (oracle.decompress(*t, calls.codec.centroids, calls.codec.rotation) for t in (calls.k, calls.v))
    scale, cap = masks.get("sm_scale", 1 / math.sqrt(D)), masks.get("softcap")
    want, _ = oracle.attention(calls.q, keys, values, scale, True, softcap=cap)
    oracle.assert_close(getattr(calls, function)(**masks), want)


@functions
@pytest.mark.parametrize("window", [2**31, 2**62, 2**63 - 1, 2**63, 2**64, 2**200])
def test_windows_wider_than_integers_hide_nothing(function: str, window: int, calls: Calls) -> None:
    run = getattr(calls, function)
    assert torch.equal(run(sliding_window=window), run(sliding_window=2**30))
    oracle.assert_close(run(sliding_window=window, softcap=2.0), run(softcap=2.0).double())


def test_wide_windows_with_values_shorter_than_keys(calls: Calls) -> None:
    from turboquant_vllm.hf.dense import dense_attention

    pytest.importorskip("transformers")
    operands = calls.q, calls.key.repeat_interleave(2, 1), calls.value[..., :32].repeat_interleave(2, 1)
    wide, without = (dense_attention(*operands, is_causal=True, sliding_window=window) for window in (2**70, None))
    oracle.assert_close(wide, without.double())


@pytest.mark.parametrize("flag", [1, 0, "False", None, np.True_, torch.tensor(True)], ids=str)
def test_flags_are_bools(flag: Any, calls: Calls) -> None:
    tables = calls.codec.centroids, calls.codec.rotation
    call = {
        "is_causal": [
            lambda: calls.dense(flag),
            lambda: triton_flash_attention(calls.q, calls.key, calls.value, None, flag),
            lambda: triton_flash_attention_tq4(calls.q, *calls.k, *tables, calls.value, None, flag),
            lambda: triton_flash_attention_tq4_kv(calls.q, *calls.k, *calls.v, *tables, None, flag),
        ],
        "causal": [lambda: calls.paged(flag)],
        "return_lse": [lambda: calls.dense(return_lse=flag), lambda: calls.paged(return_lse=flag)],
    }
    for name, functions in call.items():
        for function in functions:
            with pytest.raises(TypeError, match=f"{name} must be a bool, got {type(flag).__name__}"):
                function()


@pytest.mark.parametrize("flag", [1, "False", None], ids=str)
def test_flags_of_caches_are_bools(flag: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from turboquant_vllm.hf import TurboQuantCache, TurboQuantStaticCache

    makers: list[Callable[..., Any]] = [TurboQuantCache, functools.partial(TurboQuantStaticCache, max_cache_len=8)]
    for make in makers:
        with pytest.raises(TypeError, match=f"exact_prefill must be a bool, got {type(flag).__name__}"):
            make(transformers.LlamaConfig(), exact_prefill=flag)


def test_more_tokens_than_lengths_can_count() -> None:
    transformers = pytest.importorskip("transformers")
    from turboquant_vllm.hf import TurboQuantStaticCache

    for count in (2**31 - 63, 2**31, 2**64):
        with pytest.raises(ValueError, match=f"max_cache_len must be from 1 to 2147483584, got {count}"):
            TurboQuantStaticCache(transformers.LlamaConfig(), count)


# A flag in the environment


@pytest.mark.parametrize(
    ("value", "is_true"),
    [(value, True) for value in ("1", "true", "True", "YES", "on", " 1 ")]
    + [(value, False) for value in ("0", "false", "no", "OFF", "")],
)
def test_flags_of_the_environment(value: str, is_true: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_DEBUG", value)
    calls.index[0][0, 1] = 7
    if is_true:
        with pytest.raises(ValueError, match=r"block_table\[0, 1\] must be from 0 to 2, got 7"):
            calls.paged()
    else:
        calls.paged()


@pytest.mark.parametrize("value", ["2", "maybe", "-1"])
def test_flags_that_are_none_are_refused(value: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_DEBUG", value)
    with pytest.raises(ValueError, match=f"TURBOQUANT_DEBUG must be 1, true, .* got '{value}'"):
        calls.paged()
