"""A growing cache through the native kernels' own source, lane by lane on a CPU: what it stores, and attention over it."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers.masking_utils import sliding_window_causal_mask_function

from attention_cases import compare
from compression_checks import check_compress
from kernel_lanes import emulated_decode, emulated_store, few_objects, needs_compiler  # noqa: F401
from turboquant_vllm import ops, reference
from turboquant_vllm.cuda.store import TokenWriter, store
from turboquant_vllm.hf import attention
from turboquant_vllm.hf.layers import PackedLayer, PackedSlidingLayer
from turboquant_vllm.hf.masks import attention_mask
from turboquant_vllm.hf.static import PagedLayer
from turboquant_vllm.hf.storage import codec_for
from turboquant_vllm.hf.tensors import unpack
from turboquant_vllm.paged import page_views
from turboquant_vllm.records import Masks, Operand

pytestmark = [pytest.mark.slow, needs_compiler, pytest.mark.usefixtures("emulated_store", "emulated_decode", "native")]

BATCH, HEADS, GROUP, WINDOW = 2, 3, 4, 21


@pytest.fixture
def native(monkeypatch):
    """The native kernels say that they run here; nothing else may compress or attend."""

    def refuse(*args, **options):
        raise AssertionError("expected a native kernel")

    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    monkeypatch.setattr(ops, "_compress", refuse)
    monkeypatch.setattr(attention, "tq4_attention", refuse)
    attention._decodes.cache_clear()
    yield
    attention._decodes.cache_clear()


def as_models_make_them(x):
    """The same ``[B, H, n, D]``, laid out token by token, as projections leave it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


SINKS = torch.linspace(-1, 3, HEADS * GROUP)


@pytest.mark.parametrize(
    ("window", "head_dim", "dtype", "counts", "options"),
    [
        (None, 128, torch.bfloat16, (5, 1, 1, 3, 1), {}),
        (None, 64, torch.float16, (270, 1, 20, 1), {}),  # the buffer is replaced on the way
        (WINDOW, 128, torch.float16, (30, 1, 1, 2, 1), {"softcap": 2.0, "s_aux": SINKS.half()}),
    ],
)
def test_a_layer(window, head_dim, dtype, counts, options, generator):
    layer = PackedLayer(0, seed=3) if window is None else PackedSlidingLayer(0, window, seed=3)
    module = torch.nn.Module()
    codec, seen = codec_for(head_dim, 3, torch.device("cpu")), torch.empty(2, BATCH, HEADS, 0, head_dim, dtype=dtype)
    for step, count in enumerate(counts):
        draw = torch.randn(2, BATCH, HEADS, count, head_dim, generator=generator).to(dtype)
        key, value = (as_models_make_them(x) for x in draw)
        seen = torch.cat((seen, draw), 3)
        keys, values = layer.update(key, value)
        if step == 0:
            continue
        for got, want in zip((keys, values), seen[:, :, :, -keys.shape[2] :], strict=True):
            packed, _ = unpack(got)
            check_compress(lambda *_, packed=packed: packed, want, codec)

        query = torch.randn(BATCH, count, HEADS * GROUP, head_dim, generator=generator).to(dtype).transpose(1, 2)
        if count * GROUP > 32:
            continue  # not for these kernels
        kv_len = keys.shape[2]
        sliding = {} if window is None else {"mask_function": sliding_window_causal_mask_function(window)}
        mask = attention_mask(BATCH, count, kv_len, kv_len - count, device="cpu", **sliding)
        got, _ = attention.attention_forward(module, query, keys, values, mask, scaling=0.07, **options)
        (k, _), (v, _) = unpack(keys), unpack(values)
        sinks = options["s_aux"].double() if "s_aux" in options else None
        masks = Masks(True, window, options.get("softcap"), sinks)
        want, _ = reference.attention(query.double(), Operand(*k), Operand(*v), codec.tables, 0.07, masks)
        compare(got.transpose(1, 2), want, dtype)


def test_keys_and_values_that_a_model_changes_about(generator):
    layers = [PackedLayer(0, seed=0) for _ in range(2)]
    for layer in layers:
        for count in (3, 1):
            keys, values = torch.randn(2, BATCH, HEADS, count, 64, generator=generator).half()
            layer.update(as_models_make_them(keys), as_models_make_them(values))
    query = torch.randn(BATCH, HEADS * GROUP, 1, 64, generator=generator).half()
    (keys, values), (others, _) = ((layer.keys, layer.values) for layer in layers)
    for pair in ((keys, values), (values, keys), (keys, keys), (keys, others)):
        got, _ = attention.attention_forward(torch.nn.Module(), query, *pair, None, scaling=0.2)
        (k, codec), (v, _) = (unpack(x) for x in pair)
        want, _ = reference.attention(query.double(), Operand(*k), Operand(*v), codec.tables, 0.2)
        compare(got.transpose(1, 2), want, torch.float16)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_layer_whose_keys_have_offsets(head_dim, generator, monkeypatch):
    scales = torch.exp(0.4 * torch.randn(HEADS, head_dim, generator=generator))
    layer, other = (PackedLayer(0, seed=3, key_offsets=True, key_scales=scales) for _ in range(2))
    seen = torch.randn(2, BATCH, HEADS, 140, head_dim, generator=generator) + 6 * torch.randn(head_dim, generator=generator)
    seen, calls = seen.to(torch.bfloat16), []
    monkeypatch.setattr(TokenWriter, "__call__", _counted(TokenWriter.__call__, calls))
    for some in seen.split((61, 1, 1, 1, 1, 70, 1, 1, 3), 3):
        layer.update(*some)
        some = torch.cat((some, some), 4)[..., :head_dim]  # which lies otherwise, so that nothing is taken for known
        other.update(*(x.clone() if i % 2 else x for i, x in enumerate(some)))
    assert calls
    for got, want in zip(layer.export()[:2], other.export()[:2], strict=True):
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y)
    keys = layer.export()[0]
    codec = codec_for(head_dim, 3, torch.device("cpu")).with_key_scales(scales)
    error, best = ((codec.decompress(x, torch.float64) - seen[0]).square().sum() for x in (keys, codec.compress_keys(seen[0])))
    assert error < 2 * best


def _counted(call, calls):
    def run(self, *args):
        calls.append(args)
        call(self, *args)

    return run


def test_a_layer_of_fixed_size(generator):
    layer = PagedLayer(0, 300, seed=0)
    codec, seen = codec_for(128, 0, torch.device("cpu")), []
    for count in (70, 1, 3, 1):
        seen.append(torch.randn(2, BATCH, HEADS, count, 128, generator=generator).to(torch.bfloat16))
        layer.update(*(as_models_make_them(x) for x in seen[-1]))
    for found, want in zip(layer.export()[:2], torch.cat(seen, 3), strict=True):
        check_compress(lambda *_, found=found: found, want, codec)


def test_a_copy_is_written_for_itself(generator):
    layer, codec = PackedLayer(0, seed=0), codec_for(64, 0, torch.device("cpu"))
    draw = torch.randn(2, BATCH, HEADS, 9, 64, generator=generator).half()
    first, ours, others = draw.split((5, 2, 2), 3)
    for tokens in first.split(1, 3):
        layer.update(*tokens)
    twin = copy.deepcopy(layer)
    for x, seen in ((layer, ours), (twin, others)):
        for tokens in seen.split(1, 3):
            x.update(*tokens)
    for x, seen in ((layer, ours), (twin, others)):
        for found, want in zip(x.export()[:2], torch.cat((first, seen), 3), strict=True):
            check_compress(lambda *_, found=found: found, want, codec)


@pytest.mark.parametrize("make", [lambda: PackedLayer(0, seed=0), lambda: PagedLayer(0, 64, seed=0)])
def test_values_of_another_dtype(make, generator):
    layer, codec = make(), codec_for(64, 0, torch.device("cpu"))
    x = torch.randn(BATCH, HEADS, 5, 64, generator=generator).half()
    for tokens in (x[:, :, :3], x[:, :, 3:4], x[:, :, 4:]):
        layer.update(tokens, tokens.float())
    check_compress(lambda *_: layer.export()[1], x, codec)


def test_states_that_lie_badly_are_copied(generator):
    layer, codec = PackedLayer(0, seed=0), codec_for(64, 0, torch.device("cpu"))
    x = torch.randn(BATCH, HEADS, 6, 69, generator=generator).half()[..., 5:]
    for tokens in (slice(0, 4), slice(4, 5), slice(5, 6)):
        layer.update(x[:, :, tokens], x[:, :, tokens])
    check_compress(lambda *_: layer.export()[1], x, codec)


@pytest.mark.parametrize("make", [lambda: PackedLayer(0, seed=0), lambda: PagedLayer(0, 64, seed=0)])
def test_another_batch_is_refused(make):
    layer, x = make(), torch.zeros(BATCH, HEADS, 1, 64, dtype=torch.float16)
    layer.update(x, x)
    with pytest.raises(ValueError, match=r"expected sequences, heads and head dimension \[2, 3, 64\]"):
        layer.update(x[:1], x[:1])


def test_a_page_of_more_than_four_gib(generator):
    """As a cache has whose pages are whole sequences; no memory is used but where something is written."""
    heads, head_dim, page_size = 33, 64, 1_900_048
    k, v = torch.randn(2, 1, heads, head_dim, generator=generator).half()
    buffer = torch.empty(1, heads * page_size * (head_dim + 8), dtype=torch.uint8)
    codec = codec_for(head_dim, 0, buffer.device)
    rotation, _, companding, _, *scaling = codec.writing
    store(k, v, buffer, torch.tensor([page_size - 1]), rotation, companding, *scaling, page_size)
    capacity = buffer.shape[1] // (heads * (head_dim + 8))
    parts = (x for operand in page_views(buffer, capacity, heads, head_dim, False) for x in operand[:2])
    keys, key_norms, values, value_norms = (x[0, :, -1] for x in parts)
    check_compress(lambda *_: (keys, key_norms), k[0], codec)
    check_compress(lambda *_: (values, value_norms), v[0], codec)
