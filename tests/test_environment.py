"""What a caller has set for all of PyTorch changes nothing: default devices, dtypes, autocast, patched constructors, fakes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from turboquant_vllm import (
    PagedTQ4Cache,
    TQ4Codec,
    merge_attention_states,
    tq4_attention,
    tq4_paged_attention,
    tq4_store,
)
from turboquant_vllm.fakes import has_elements
from turboquant_vllm.prefill import dense_attention
from turboquant_vllm.quality.formats import TQ4Format
from turboquant_vllm.quality.measure import bootstrap_interval, compare_windows, token_scores

D = 64


class Inputs:
    """Tensors on the CPU and what was made of them; ``seed`` is one that nothing was cached for."""

    def __init__(self, generator: torch.Generator, folder: Path) -> None:
        self.folder, self.seed = folder, int(torch.randint(2**31, (), generator=generator))
        randn = functools.partial(torch.randn, generator=generator, device="cpu")
        self.x = 2e4 * randn(200, D)
        self.q, self.key, self.value = randn(1, 4, 8, D), randn(1, 2, 70, D), randn(1, 2, 70, D)
        self.sinks = randn(4)
        self.codec = TQ4Codec(D)
        self.k, self.v = self.codec.compress(self.key), self.codec.compress(self.value)
        self.keys = self.codec.compress_keys(self.key)
        self.tokens = torch.randint(100, (4, 65), generator=generator)
        self.logits = randn(100, 100)
        self.index = [torch.tensor(x, dtype=torch.int32) for x in ([[2, 0, 1, 4, 3]], [70], [0, 8])]
        self.slots = torch.cat([torch.arange(first, first + 16) for first in (32, 0, 16, 64, 48)])[:70]
        self.pages = self.store()

    def store(self) -> torch.Tensor:
        """Keys and values in pages: a buffer."""
        cache = PagedTQ4Cache.allocate(5, page_size=16, num_kv_heads=2, head_dim=D, device=self.codec.device)
        cache.buffer.zero_()
        tq4_store(*(x[0].transpose(0, 1) for x in (self.key, self.value)), cache, self.codec, self.slots)
        return cache.buffer

    def store_keys(self) -> torch.Tensor:
        """Keys with offsets and values in pages: a buffer."""
        cache = PagedTQ4Cache.allocate(2, page_size=64, num_kv_heads=2, head_dim=D, has_offsets=True, device=self.codec.device)
        cache.buffer.zero_()
        slots = torch.arange(70, device=self.codec.device)
        tq4_store(*(x[0].transpose(0, 1) for x in (self.key, self.value)), cache, self.codec, slots, previous_slots=slots - 1)
        return cache.buffer

    def paged(self, **options: Any) -> Any:
        cache = PagedTQ4Cache(self.pages, page_size=16, num_kv_heads=2, head_dim=D)
        return tq4_paged_attention(self.q[0].transpose(0, 1), cache, self.codec, *self.index, return_lse=True, **options)

    def attend(self, **options: Any) -> Any:
        return tq4_attention(self.q, self.k, self.v, self.codec, return_lse=True, **options)

    def merged(self) -> Any:
        parts = [self.attend(), self.attend(softcap=3.0)]
        return merge_attention_states(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))

    def saved(self) -> Any:
        path = self.folder / "file"
        self.codec.save(path, self.k)
        return TQ4Codec(D, device="cpu").load(path)

    def caches(self) -> Any:
        """Keys of a growing cache and of one of fixed size, and attention to them; the layers are sliding, full and dense."""
        pytest.importorskip("transformers")
        from transformers import Gemma3TextConfig

        from turboquant_vllm.hf import TurboQuantCache, TurboQuantStaticCache, attention_forward

        config = Gemma3TextConfig(
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=D, hidden_size=D, sliding_window=32,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        )  # fmt: skip
        found, options = [], {"seed": self.seed, "skip_layers": (2,)}
        for name, cache in (
            ("growing", TurboQuantCache(config, **options)),
            ("static", TurboQuantStaticCache(config, 80, **options)),
        ):
            for layer in range(3):
                cache.update(self.key, self.value, layer)
            for layer in range(2):
                cache.layers[layer].batch_repeat_interleave(2)
                cache.layers[layer].batch_select_indices(torch.tensor([1], device="cpu"))
            cache.layers[1].crop(-3)
            cache.save(self.folder / name)
            more = {} if name == "growing" else {"max_cache_len": 80}
            again = type(cache).load(self.folder / name, config, **more)
            for layer in range(3):
                k, v = again.update(self.key[:, :, :1], self.value[:, :, :1], layer)
                found += [k[:, :, :60].clone(), v[:, :, :60].clone()]
                if name == "growing" and layer < 2:  # the dense layer has PyTorch's attention, as autocast has it
                    found.append(attention_forward(torch.nn.Module(), self.q[:, :, -1:], k, v, None)[0])
        return found

    def measured(self) -> Any:
        def model(ids: torch.Tensor) -> torch.Tensor:
            return self.logits[ids]

        scores = compare_windows(model, lambda ids: model(ids) * 1.1, [self.tokens])
        whole = token_scores(self.logits, 1.1 * self.logits, self.tokens[:, 0].repeat(25))
        return [
            *scores,
            *whole,
            torch.tensor(bootstrap_interval(scores.other, scores.exact), dtype=torch.float64, device="cpu"),
        ]

    def dense(self) -> Any:
        attend = dense_attention(torch.device("cpu"), torch.float32, D)
        assert attend is not None
        key, value = (x[:, :, :8].repeat_interleave(2, 1) for x in (self.key, self.value))
        return attend.run(self.q, key, value, True, 0.1)


USES: dict[str, Callable[[Inputs], Any]] = {
    "hadamard": lambda x: vars(TQ4Codec(D, seed=x.seed, device="cpu")),
    "haar": lambda x: vars(TQ4Codec(48, seed=x.seed, device="cpu")),
    **{
        f"compress {scale}": lambda x, scale=scale: TQ4Codec(D, seed=x.seed, scale=scale, device="cpu").compress(x.x)
        for scale in ("norm", "least_squares", "unbiased")
    },
    "decompress": lambda x: x.codec.decompress(x.k),
    "decompress float16": lambda x: x.codec.decompress(x.k, torch.float16),
    "compress keys": lambda x: x.codec.compress_keys(x.key),
    "decompress keys": lambda x: x.codec.decompress(x.keys),
    "attention": lambda x: x.attend(is_causal=True, sliding_window=20, softcap=2.0, sinks=x.sinks),
    "attention, all keys": lambda x: x.attend(sm_scale=1.0),
    "attention, dense values": lambda x: tq4_attention(x.q, x.k, x.value, x.codec),
    "attention, offsets": lambda x: tq4_attention(x.q, x.keys, x.v, x.codec),
    "pages": lambda x: x.paged(),
    "pages, masks": lambda x: x.paged(sliding_window=20, softcap=2.0, sinks=x.sinks),
    "pages, windows": lambda x: x.paged(sliding_window=torch.tensor([9], dtype=torch.int32, device=x.q.device)),
    "store": lambda x: x.store(),
    "store keys": lambda x: x.store_keys(),
    "merge": lambda x: x.merged(),
    "files": lambda x: x.saved(),
    "caches": lambda x: x.caches(),
    "format": lambda x: TQ4Format(seed=x.seed)(0, x.key, x.value),
    "scores": lambda x: x.measured(),
    "dense attention": lambda x: x.dense(),
}


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def empty_weights() -> Iterator[None]:
    """As accelerate's ``init_empty_weights(include_buffers=True)``: whatever device is asked for, nothing gets memory."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "zeros", "ones", "full"):
            patch.setattr(torch, name, functools.partial(_on_meta, getattr(torch, name)))
        yield


def _on_meta(make: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    return make(*args, **{**options, "device": torch.device("meta")})


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": default_device,
    "device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast without a cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
}


def tensors(found: Any) -> list[torch.Tensor]:
    """All tensors in a result."""
    if isinstance(found, torch.Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found
    return [x for value in values if isinstance(value, (torch.Tensor, tuple, list)) for x in tensors(value)]


@pytest.fixture
def inputs(generator: torch.Generator, tmp_path: Path) -> Inputs:
    return Inputs(generator, tmp_path)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("use", USES)
def test_nothing_changes(use: str, context: str, inputs: Inputs) -> None:
    with CONTEXTS[context]():
        got = tensors(USES[use](inputs))
    expected = tensors(USES[use](inputs))  # of what the call above may have cached, too
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("head_dim", [D, 48])
def test_codecs_are_made_within_empty_weights(head_dim: int, inputs: Inputs) -> None:
    with empty_weights():
        assert torch.zeros(1, device="cpu").is_meta
        codec = TQ4Codec(head_dim, seed=inputs.seed)
        again = TQ4Format(seed=inputs.seed)
    assert torch.equal(codec.rotation, TQ4Codec(head_dim, seed=inputs.seed).rotation)
    assert codec.device.type == "cpu"
    again(0, inputs.key, inputs.value)


def test_codecs_follow_the_default_device() -> None:
    for make in (default_device, lambda: torch.device("meta")):
        with make():
            codec = TQ4Codec(D)
        assert {x.device.type for x in tensors(vars(codec))} == {"meta"}
    assert TQ4Codec(D).device.type == "cpu"


# Tensors without elements: what the results will be, and nothing that is kept


def on_meta(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return found.to("meta")
    if isinstance(found, TQ4Codec):
        return found.to("meta")
    if isinstance(found, tuple):
        return type(found)(*map(on_meta, found))
    return [on_meta(x) for x in found] if isinstance(found, list) else found


@pytest.mark.parametrize(
    "use", [name for name in USES if name not in ("hadamard", "haar", "files", "caches", "scores") and "compress " not in name]
)
def test_meta_tensors_have_the_shape_of_the_result(use: str, inputs: Inputs) -> None:
    expected = tensors(USES[use](inputs))
    for name, value in vars(inputs).items():
        setattr(inputs, name, on_meta(value))
    got = tensors(USES[use](inputs))
    assert [(x.shape, x.dtype, x.device.type) for x in got] == [(x.shape, x.dtype, "meta") for x in expected]


@pytest.mark.parametrize("use", [name for name in USES if name not in ("files", "caches", "scores")])
def test_fake_tensors_have_the_shape_of_the_result(use: str, inputs: Inputs) -> None:
    expected = tensors(USES[use](inputs))
    inputs.seed += 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = tensors(USES[use](inputs))
    assert [(x.shape, x.dtype, x.device) for x in got] == [(x.shape, x.dtype, x.device) for x in expected]
    # What was made of fakes is not what later calls find.
    assert all(type(x) is torch.Tensor for x in tensors(USES[use](inputs)))


@torch.no_grad()
@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("skipped", [(), (0,)])
def test_models_without_elements(mode: Callable[[], Any], static: bool, skipped: tuple[int, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, register

    register()
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32,
    )  # fmt: skip
    with mode():
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="tq4")
        cache = (TurboQuantStaticCache if static else TurboQuantCache)(
            model.config, **{"max_cache_len": 64} if static else {}, skip_layers=skipped
        )
        for count in (5, 1, 3):
            logits = model(torch.zeros(2, count, dtype=torch.long), **{CACHE_ARGUMENT: cache}).logits
            assert logits.shape == (2, count, 97)
            assert not has_elements(logits)
    assert has_elements(torch.zeros(1))
