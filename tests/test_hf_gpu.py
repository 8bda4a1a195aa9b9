"""TurboQuantCache on a GPU: accuracy against attention over the decompressed cache, memory, offloading, several devices."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from flips import assert_as_near, neighbour
from hf_models import VOCABULARY, generated, make_model, reference_cache, stock_attention
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache
from turboquant_vllm.hf.layers import PackedLayer, PackedSlidingLayer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# The rest are made of the same parts.
ON_GPU = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4", "deepseek_v3")


def padded_batch(generator):
    ids = torch.randint(3, VOCABULARY, (3, 40), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :13], mask[2, :5] = 0, 0
    return ids, mask


@torch.no_grad()
def logits_of(model, cache, ids, mask):
    """Logits of a prompt, six single tokens and a chunk, ``[B, N, vocabulary]``, float64 on the CPU."""
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for start, stop in ((0, 20), *((i, i + 1) for i in range(20, 26)), (26, 40)):
        arguments = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop], CACHE_ARGUMENT: cache}
        found.append(model(ids[:, start:stop], **arguments).logits.double().cpu())
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("family", "offsets"), [*((family, False) for family in ON_GPU), *((family, True) for family in ("llama", "gemma3"))]
)
def test_logits_are_as_good_as_those_of_stock_attention(family, offsets, dtype, generator):
    ids, mask = padded_batch(generator)
    oracle = make_model(family, "oracle")
    if offsets:  # the keys of padding have a part in these, and attentions differ in what they make of padding
        mask = torch.ones_like(mask)
    want = logits_of(oracle, TurboQuantCache(oracle.config) if offsets else reference_cache(oracle), ids, mask)
    errors = []
    for attention in ("tq4", stock_attention(family)):
        model = make_model(family, attention, dtype).to(DEVICE)
        got = logits_of(model, TurboQuantCache(model.config, key_offsets=offsets), ids, mask)
        errors.append((got - want)[mask.bool()].abs().flatten())
    largest = want.abs().max()
    # Both models' own rounding, and the codes that it changes, are the same kind of noise.
    assert errors[0].square().mean().sqrt() < 1.5 * errors[1].square().mean().sqrt() + 1e-6 * largest
    assert errors[0].max() < 2 * errors[1].max() + 1e-5 * largest


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 8}, {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "chunks", "lookup"],
)
def test_generate_runs_in_every_way(family, options, generator):
    model = make_model(family, "tq4", torch.bfloat16).to(DEVICE)
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=generator).repeat(1, 4).to(DEVICE)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_ARGUMENT: TurboQuantCache(model.config)},
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        **options,
    )
    assert out.shape[1] == 36


def test_generate_compiles_into_cuda_graphs(generator):
    model = make_model("llama", "tq4", torch.float32).to(DEVICE)
    ids = torch.randint(3, VOCABULARY, (2, 20), generator=generator).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache = TurboQuantStaticCache(model.config, max_cache_len=64)
    results = []
    for compiled in (False, True, True):
        results.append(generated(model, cache, ids, attention_mask=mask, max_new_tokens=12, disable_compile=not compiled))
        cache.reset()
    for again in results[1:]:
        assert torch.equal(again.sequences, results[0].sequences)
        for got, want in zip(again.logits, results[0].logits, strict=True):
            # fp32 rounding, and codes that it changes.
            assert (got - want).abs().max() < 5e-3 * want.abs().max()


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("kind", ["growing", "static", "compiled"])
def test_the_trained_model_in_half_precision(kind, padding, generator):
    """Head dimension 64 in fp16, which native kernels store and, but for windows and padding over pages, decode."""
    ids = torch.randint(3, VOCABULARY, (6, 32), generator=generator)
    mask = torch.ones_like(ids)[:, :20]
    mask[1::2, :padding] = 0

    def logits(model, kind="growing"):
        cache = TurboQuantCache(model.config) if kind == "growing" else TurboQuantStaticCache(model.config, max_cache_len=64)
        prompt, given = ids[:, :20].to(model.device), ids.tolist()
        options = {
            "attention_mask": mask.to(model.device),
            "max_new_tokens": 12,
            "disable_compile": kind != "compiled",
            "prefix_allowed_tokens_fn": lambda row, seen: [given[row][len(seen)]],  # the same tokens for all
        }
        return torch.stack(generated(model, cache, prompt, **options).logits, 1).double().cpu()

    stock = make_model("trained", stock_attention("trained"), torch.float16).to(DEVICE)
    right = [stock, *(neighbour(stock, seed) for seed in range(1, 6))]
    exact = [logits(copy.deepcopy(model).double().cpu()) for model in right]
    theirs = torch.stack([logits(model) - want for model, want in zip(right, exact, strict=True)], 1)
    ours = logits(make_model("trained", "tq4", torch.float16).to(DEVICE), kind) - exact[0]
    assert_as_near(list(ours), [list(errors) for errors in theirs])


@pytest.mark.parametrize("exact_prefill", [True, False])
def test_no_dense_copy_hides_anywhere(exact_prefill):
    tokens, heads, dim = 32768, 8, 128
    k, v = (torch.randn(1, heads, tokens, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    layer = PackedLayer(0, seed=0, exact_prefill=exact_prefill)
    layer.update(k[:, :, :8], v[:, :, :8])
    layer.reset()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer.update(k, v)
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    rounding = 2**22  # PyTorch hands out large tensors in whole multiples of 2 MiB
    assert kept <= 0.275 * (k.nbytes + v.nbytes) + rounding
    assert peak - kept <= 0.28 * k.nbytes + rounding  # the codes of one of the two, on their way
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        layer.update(k[:, :, :1], v[:, :, :1])
    assert torch.cuda.max_memory_allocated() - before < 2**20


@torch.no_grad()
def test_decoding_needs_little_memory_beside_the_cache():
    model = make_model("llama", "tq4", torch.bfloat16).to(DEVICE)
    cache = TurboQuantCache(model.config)
    k = torch.randn(4, 2, 60000, 32, device=DEVICE, dtype=torch.bfloat16)
    for layer in range(2):
        cache.update(k, k, layer)
    token = torch.full((4, 1), 5, device=DEVICE)
    model(token, **{CACHE_ARGUMENT: cache})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(token, **{CACHE_ARGUMENT: cache})
    assert torch.cuda.max_memory_allocated() - before < k.nbytes / 4


@torch.no_grad()
def test_offloading_changes_nothing(generator):
    ids, mask = padded_batch(generator)
    model = make_model("gemma3", "tq4", torch.bfloat16).to(DEVICE)
    want = logits_of(model, TurboQuantCache(model.config), ids, mask)
    cache = TurboQuantCache(model.config, offloading=True)
    assert torch.equal(logits_of(model, cache, ids, mask), want)
    # The layer that comes next, which is the first again, is on its way back.
    assert [layer.storage.device.type for layer in cache.layers] == ["cuda", "cpu"]


def test_what_was_fetched_is_not_overwritten_while_it_is_read():
    layer, states = PackedLayer(0, seed=0), torch.randn(1, 8, 4096, 128, device=DEVICE, dtype=torch.bfloat16)
    layer.update(states, states)
    layer.offload()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer.prefetch()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # as if attention were about to read the buffer
    address, size = layer.storage.buffer.data_ptr(), layer.nbytes
    layer.offload()
    with torch.cuda.stream(stream):
        assert torch.empty(size, dtype=torch.uint8, device=DEVICE).data_ptr() != address


@pytest.mark.parametrize("layer_class", [PackedLayer, PackedSlidingLayer])
def test_layers_follow_their_states_to_another_device(layer_class):
    layer = layer_class(0, seed=0) if layer_class is PackedLayer else layer_class(0, 9, seed=0)
    k = torch.randn(1, 2, 20, 32)
    layer.update(k, k)
    keys, _ = layer.update(k.to(DEVICE), k.to(DEVICE))
    assert keys.device.type == keys.dense().device.type == DEVICE


@torch.no_grad()
def test_layers_on_several_devices(generator):
    accelerate = pytest.importorskip("accelerate")
    ids, mask = padded_batch(generator)
    second = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    model = make_model("llama", "tq4", torch.float32)
    want = logits_of(model, TurboQuantCache(model.config), ids, mask)
    if second == "cpu":  # where dispatch_model would leave the weights and compute on the GPU nevertheless
        last = model.to(DEVICE).model.layers[1].to(second)
        hook = accelerate.hooks.AlignDevicesHook(second, io_same_device=True, skip_keys=CACHE_ARGUMENT)
        accelerate.hooks.add_hook_to_module(last, hook)
    else:
        first = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
        devices = {**dict.fromkeys(first, 0), **dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), second)}
        model = accelerate.dispatch_model(model, devices, main_device=0)
    cache = TurboQuantCache(model.config)
    got = logits_of(model, cache, ids, mask)
    assert [str(layer.device) for layer in cache.layers] == ["cuda:0", second]
    # Codes that rounding changes, and nothing else.
    assert (got - want)[mask.bool()].abs().max() < 5e-3 * want.abs().max()
