"""The attention function "tq4": that it reads the codes, every mask and argument it takes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    padding_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hf_models import FAMILIES, make_model, one_thread, oracle_attention, plain_cache, reference_cache  # noqa: F401
from oracle import assert_close
from turboquant_vllm import TQ4Codec
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, attention_forward
from turboquant_vllm.hf.masks import attention_mask
from turboquant_vllm.hf.tensors import CausalMask, PackedTensor, find_parts

DIM, HEADS, KV_HEADS = 32, 4, 2
CODEC = TQ4Codec(DIM)


class Layer(torch.nn.Module):
    is_causal = True
    layer_idx = 0


def pack(x):
    return PackedTensor.of(CODEC.compress(x), CODEC, x.dtype)


@pytest.fixture
def operands(randn):
    """``operands(q_len, kv_len)``: queries, keys and values of three sequences."""

    def make(q_len, kv_len, batch=3):
        return randn(batch, HEADS, q_len, DIM), *(randn(batch, KV_HEADS, kv_len, DIM) for _ in range(2))

    return make


def expected(q, k, v, sees, **options):
    """Attention over compressed keys and values in float64; ``sees`` is bool, broadcast to ``[B, 1, N_q, N_kv]``."""
    k, v = (CODEC.decompress(CODEC.compress(x), torch.float64) for x in (k, v))
    bias = torch.zeros((), dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
    return oracle_attention(Layer(), q.double(), k, v, bias, **options)[0]


def mask_for(function, q_len, kv_len, padding=None, offset=None, kv_offset=0, batch=3):
    """What our mask function makes of a mask, and transformers' own as bools."""
    offset = kv_len - q_len + kv_offset if offset is None else offset
    options = {"q_offset": offset, "kv_offset": kv_offset, "mask_function": function, "attention_mask": padding}
    lengths = {"batch_size": batch, "q_length": q_len, "kv_length": kv_len}
    own = sdpa_mask(**lengths, **options, allow_is_causal_skip=False)
    return attention_mask(**lengths, **options, device="cpu", use_vmap=False), own


def real_queries(own, padding):
    """Bool ``[B, N_q]``: the queries whose results count, which are those that are not padding."""
    q_len = own.shape[2]
    return torch.ones(3, q_len, dtype=torch.bool) if padding is None else padding[:, -q_len:]


PADDINGS = {
    "none": None,
    "ones": torch.ones(3, 40, dtype=torch.bool),
    "left": torch.arange(40) >= torch.tensor([[7], [0], [36]]),
    "right": ~((torch.arange(40) >= torch.tensor([[3], [9], [20]])) & (torch.arange(40) < torch.tensor([[30], [9], [31]]))),
    "nothing": torch.arange(40) >= torch.tensor([[40], [2], [2]]),
}
FUNCTIONS = {
    "causal": causal_mask_function,
    "sliding": sliding_window_causal_mask_function(9),
    "wide": sliding_window_causal_mask_function(64),
    "chunked": chunked_causal_mask_function(16, torch.zeros(3, dtype=torch.long)),
    # Such as transformers makes for images, for packed texts and for models that add a function; those are written out.
    "blocks": or_masks(causal_mask_function, blockwise_overlay((torch.arange(40) // 10 % 2 - 1).repeat(3, 1))),
    "added": and_masks(causal_mask_function, padding_mask_function((torch.arange(40) % 7 < 5).repeat(3, 1))),
    "twice": and_masks(*[causal_mask_function] * 2),
    "not_causal": and_masks(masking_utils.sliding_window_overlay(9), bidirectional_mask_function),
    "bidirectional_window": sliding_window_bidirectional_mask_function(4),
    "foreign": lambda batch, head, query, key: key <= query,
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_attention_follows_the_mask(kind, padding, q_len, operands):
    q, k, v = operands(q_len, 40)
    mask, own = mask_for(FUNCTIONS[kind], q_len, 40, PADDINGS[padding])
    out, weights = attention_forward(Layer(), q, pack(k), pack(v), mask)
    assert weights is None
    assert out.dtype == q.dtype
    sees = real_queries(own, PADDINGS[padding])
    want = expected(q, k, v, own)
    assert_close(out[sees], want[sees])
    if padding == "left" and kind in ("causal", "sliding", "wide"):
        assert (out[~sees] == 0).all()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("q_len", [1, 40])
def test_dense_layers_follow_the_mask_too(padding, q_len, operands):
    for kind in FUNCTIONS:
        q, k, v = operands(q_len, 40)
        mask, own = mask_for(FUNCTIONS[kind], q_len, 40, PADDINGS[padding])
        out, _ = attention_forward(Layer(), q, k, v, mask)
        sees = real_queries(own, PADDINGS[padding])
        bias = torch.zeros(()).double().masked_fill(~own, torch.finfo(torch.float64).min)
        want = oracle_attention(Layer(), q.double(), k.double(), v.double(), bias)[0]
        assert_close(out[sees], want[sees])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("width", [DIM - 12, DIM + 8])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"s_aux": torch.tensor([0.5, -2.0, 3.0, 0.0])}], ids=str)
def test_values_may_be_shorter_or_longer_than_keys(padding, kind, width, options, operands, randn):
    for q_len in (1, 3, 40):
        q, k, _ = operands(q_len, 40)
        v = randn(3, KV_HEADS, 40, width)
        mask, own = mask_for(FUNCTIONS[kind], q_len, 40, PADDINGS[padding])
        out, _ = attention_forward(Layer(), q, k, v, mask, **options)
        sees = real_queries(own, PADDINGS[padding])
        bias = torch.zeros(()).double().masked_fill(~own, torch.finfo(torch.float64).min)
        want = oracle_attention(Layer(), q.double(), k.double(), v.double(), bias, **options)[0]
        assert_close(out[sees], want[sees])


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_the_mask_written_out_is_transformers_own(kind, padding):
    for q_len, kv_len, kv_offset in ((1, 40, 0), (5, 40, 0), (40, 40, 0), (3, 10, 30)):
        mask, own = mask_for(FUNCTIONS[kind], q_len, kv_len, PADDINGS[padding], kv_offset=kv_offset)
        assert mask.shape == own.shape
        bias = torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min)
        assert torch.equal(mask + 0, bias)
        for last in {1, q_len - 1, q_len} - {0}:  # as some models cut it
            assert torch.equal(mask[:, :, -last:, :] + 0, bias[:, :, -last:])


def test_a_long_causal_mask_takes_no_memory():
    mask = attention_mask(1, 10**6, 10**6, device="cpu", dtype=torch.float16)
    for x, queries in ((mask, 10**6), (mask[:, :, -2:], 2)):
        assert isinstance(x, CausalMask)
        assert x.shape == (1, 1, queries, 10**6)
        assert x.dtype == torch.float16


@pytest.mark.parametrize("kind", ["causal", "sliding"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_last_queries_alone(kind, padding, operands):
    q, k, v = operands(9, 40)
    mask, own = mask_for(FUNCTIONS[kind], 9, 40, PADDINGS[padding])
    out, _ = attention_forward(Layer(), q[:, :, -4:], pack(k), pack(v), mask[:, :, -4:, :])
    assert_close(out, expected(q[:, :, -4:], k, v, own[:, :, -4:]))


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize(
    "options",
    [{"softcap": 1.5}, {"s_aux": torch.tensor([0.5, -2.0, 3.0, 0.0])}, {"scaling": 0.4}, {"softcap": 2.0, "scaling": 0.3}],
    ids=["softcap", "sinks", "scaling", "softcap_scaling"],
)
def test_arguments_that_change_the_result_are_followed(q_len, options, operands):
    for kind in ("causal", "sliding"):
        for padding in ("none", "left"):
            q, k, v = operands(q_len, 40)
            mask, own = mask_for(FUNCTIONS[kind], q_len, 40, PADDINGS[padding])
            out, _ = attention_forward(Layer(), q, pack(k), pack(v), mask, **options)
            sees = real_queries(own, PADDINGS[padding])
            assert_close(out[sees], expected(q, k, v, own, **options)[sees])


def test_without_a_mask_attention_is_causal_with_the_window_given(operands):
    q, k, v = operands(7, 40)
    for window, function in ((None, causal_mask_function), (9, sliding_window_causal_mask_function(9))):
        out, _ = attention_forward(Layer(), q, pack(k), pack(v), None, sliding_window=window)
        assert_close(out, expected(q, k, v, mask_for(function, 7, 40)[1]))


def test_a_layer_that_is_not_causal_sees_everything(operands):
    q, k, v = operands(7, 12)
    everything = torch.ones(1, 1, 7, 12, dtype=torch.bool)
    out, _ = attention_forward(Layer(), q, pack(k), pack(v), None, is_causal=False, sliding_window=3)
    assert_close(out, expected(q, k, v, everything))
    assert (mask_for(bidirectional_mask_function, 7, 12)[0] == 0).all()


@pytest.mark.parametrize("additive", [False, True])
def test_any_other_mask_is_followed(additive, operands, generator):
    q, k, v = operands(7, 12)
    sees = torch.rand(3, 1, 7, 12, generator=generator) < 0.6
    sees[..., 0] = True
    mask = torch.zeros(sees.shape).masked_fill(~sees, float("-inf")) if additive else sees
    out, _ = attention_forward(Layer(), q, pack(k), pack(v), mask)
    assert_close(out, expected(q, k, v, sees))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, operands):
    q, k, v = (x.to(dtype) for x in operands(5, 40))
    mask, own = mask_for(causal_mask_function, 5, 40)
    out, _ = attention_forward(Layer(), q, pack(k), pack(v), mask)
    assert_close(out, expected(q, k, v, own))


@pytest.mark.parametrize(
    ("visible", "parts"),
    [
        (["0111", "0111", "1111"], [(0, 2, 1, 4), (2, 3, 0, 4)]),
        (["0000", "0000", "0001"], [(0, 2, 0, 0), (2, 3, 3, 4)]),
        (["1100", "1011", "1011"], [(0, 1, 0, 2), (1, 2, [0, 2, 3]), (2, 3, [0, 2, 3])]),
    ],
)
def test_sequences_with_the_same_padding_go_together(visible, parts):
    found = find_parts(torch.tensor([[c == "1" for c in row] for row in visible]))
    shown = [(s.start, s.stop, *((k.start, k.stop) if isinstance(k, slice) else (k.tolist(),))) for s, k in found]
    assert shown == parts


# Reading the codes


@pytest.fixture
def no_decompression(monkeypatch):
    def refuse(self):
        raise AssertionError("keys or values were decompressed")

    monkeypatch.setattr(PackedTensor, "dense", refuse)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"deepseek_v3"}))
def test_decoding_decompresses_nothing(family, no_decompression):
    model = make_model(family, dtype=torch.float32)
    ids, mask = torch.arange(3, 33).repeat(2, 1), torch.ones(2, 30, dtype=torch.long)
    mask[1, :4] = 0
    cache = TurboQuantCache(model.config)
    model(ids[:, :20], attention_mask=mask[:, :20], **{CACHE_ARGUMENT: cache})
    for step in range(20, 23):
        model(ids[:, step : step + 1], attention_mask=mask[:, : step + 1], **{CACHE_ARGUMENT: cache})


@torch.no_grad()
def test_stock_attention_decompresses(no_decompression):
    model = make_model("llama", "sdpa", dtype=torch.float32)
    cache = TurboQuantCache(model.config)
    model(torch.arange(3, 12)[None], **{CACHE_ARGUMENT: cache})
    with pytest.raises(AssertionError, match="decompressed"):
        model(torch.tensor([[5]]), **{CACHE_ARGUMENT: cache})


@torch.no_grad()
def test_logits_in_single_precision():
    oracle, ours = (make_model("llama", name, torch.float32) for name in ("oracle", "tq4"))
    ids = torch.arange(3, 33).repeat(2, 1)
    logits = []
    for model, cache in ((oracle, reference_cache(oracle)), (ours, plain_cache(ours.config))):
        model(ids[:, :20], **{CACHE_ARGUMENT: cache})
        logits.append(model(ids[:, 20:21], **{CACHE_ARGUMENT: cache}).logits)
    want, got = logits
    # fp32 rounding; where it moves a coordinate over the boundary between two codes, that code's share of the result.
    assert (got - want).abs().max() < 2e-3 * want.abs().max()


@torch.no_grad()
def test_layers_left_dense_work_beside_packed_ones(generator):
    oracle, ours = (make_model("gemma3", name) for name in ("oracle", "tq4"))
    ids, mask = torch.randint(3, 90, (2, 30), generator=generator), torch.ones(2, 30, dtype=torch.long)
    mask[1, :6] = 0
    for skipped in (0, 1):
        caches = reference_cache(oracle, skip_layers=(skipped,)), plain_cache(ours.config, skip_layers=(skipped,))
        for start, stop in ((0, 12), (12, 13), (13, 30)):
            arguments = {"attention_mask": mask[:, :stop]}
            want = oracle(ids[:, start:stop], **{CACHE_ARGUMENT: caches[0]}, **arguments).logits
            got = ours(ids[:, start:stop], **{CACHE_ARGUMENT: caches[1]}, **arguments).logits
            real = mask[:, start:stop].bool()
            assert (got - want)[real].abs().max() < 1e-6 * want.abs().max()


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, r"dropout: expected 0 .*, got 0\.1"),
        ({"output_attentions": True}, "output_attentions: expected False"),
        ({"position_bias": torch.zeros(1)}, "position_bias: expected None, got Tensor"),
        ({"cache": object()}, "cache: expected None, got object"),
        ({"sinks": torch.zeros(1)}, "sinks: expected None, got Tensor"),
        ({"indices": torch.zeros(1)}, "indices: expected None, got Tensor"),
        ({"cache": torch.zeros(1)}, 'cache: expected None, got Tensor; attn_implementation="eager"'),
        ({"cache": DynamicCache()}, "cache: expected None, got DynamicCache; .* calls it past_key_values"),
        ({"block_indices": torch.zeros(1)}, 'block_indices: expected None, got Tensor; attn_implementation="eager"'),
    ],
)
def test_attention_refuses_what_it_cannot_follow(options, message, operands):
    q, k, v = operands(3, 3)
    with pytest.raises(ValueError, match=message):
        attention_forward(Layer(), q, pack(k), pack(v), None, **options)


def test_what_stands_for_keys_or_a_mask_cannot_be_written_to(operands):
    _, k, _ = operands(3, 12)
    for x in (pack(k), mask_for(causal_mask_function, 3, 12)[0]):
        ones = torch.ones(x.shape)
        for write in (
            lambda x=x: x.mul_(2),
            lambda x=x: x.__setitem__(0, 1.0),
            lambda x=x, ones=ones: x.copy_(ones),
            lambda x=x, ones=ones: torch.add(ones, ones, out=x),
        ):
            with pytest.raises(RuntimeError, match=rf"{type(x).__name__} cannot be written to: .* write to a copy"):
                write()


def test_what_stands_for_keys_or_a_mask_moves_as_it_is(operands):
    _, k, _ = operands(3, 12)
    padding = torch.arange(12) >= torch.tensor([[2], [0], [0]])
    for x in (pack(k), mask_for(causal_mask_function, 3, 12, padding)[0]):
        for moved in (x.to("meta"), x.to("meta", non_blocking=True), x.to(torch.empty(0, device="meta"))):
            assert type(moved) is type(x)
            assert (moved.shape, moved.dtype, moved.device.type) == (x.shape, x.dtype, "meta")
        for other in (x.to("meta", torch.float64), x.to("cpu", copy=True)):  # one with elements to write to
            assert type(other) is torch.Tensor


def test_a_mask_for_other_sizes_is_refused(operands):
    q, k, v = operands(3, 12)
    mask, _ = mask_for(causal_mask_function, 3, 13)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[3, 13\] queries and keys, got \[3, 12\]"):
        attention_forward(Layer(), q, pack(k), pack(v), mask)


@torch.no_grad()
def test_a_model_refuses_weights_and_training():
    model = make_model("gemma3", dtype=torch.float32)
    ids = torch.arange(3, 12)[None]
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, **{CACHE_ARGUMENT: TurboQuantCache(model.config)}, output_attentions=True)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout"):
        model.train()(ids, **{CACHE_ARGUMENT: TurboQuantCache(model.config)})
