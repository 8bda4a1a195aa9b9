"""TurboQuantCache by itself: what its layers keep, how storage grows, and each method that transformers may call."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

pytest.importorskip("transformers")

from transformers import BartConfig, DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface

from hf_models import make_config, make_model, one_thread  # noqa: F401
from turboquant_vllm import TQ4Codec
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, attention_forward, register
from turboquant_vllm.hf.layers import PackedLayer, PackedSlidingLayer
from turboquant_vllm.hf.tensors import PackedTensor

HEADS, DIM, WINDOW = 2, 32, 6
CODEC = TQ4Codec(DIM)


def full(**options):
    return PackedLayer(0, **{"seed": 0, **options})


def sliding(**options):
    return PackedSlidingLayer(0, WINDOW, **{"seed": 0, **options})


def stored(x):
    return CODEC.decompress(CODEC.compress(x), x.dtype)


@pytest.fixture
def states(randn):
    """``states(batch, count)``: keys and values of new tokens."""
    return lambda batch, count: (randn(batch, HEADS, count, DIM), randn(batch, HEADS, count, DIM))


def dense_layer(layer):
    """transformers' own layer of the same kind."""
    return DynamicSlidingWindowLayer(WINDOW) if layer.is_sliding else DynamicLayer()


# What is kept


@pytest.mark.parametrize("make", [full, sliding])
@pytest.mark.parametrize("counts", [(1,) * 15, (4, 1, 9, 1, 2), (20, 3, 1), (6, 6), (5, 1, 1)])
def test_layers_return_and_keep_what_transformers_own_do(make, counts, states):
    layer, twin = make(), dense_layer(make())
    for step, count in enumerate(counts):
        k, v = states(2, count)
        assert layer.get_mask_sizes(count) == twin.get_mask_sizes(count)
        returned = layer.update(k, v)
        expected = twin.update(stored(k), stored(v))
        for got, want, exact in zip(returned, expected, (k, v), strict=True):
            if step == 0:
                assert got is exact
            else:
                assert isinstance(got, PackedTensor)
                assert torch.equal(got.dense(), want)
        assert layer.get_seq_length() == twin.get_seq_length() == sum(counts[: step + 1])
        for name in ("keys", "values"):
            assert getattr(layer, name).shape[-2] >= getattr(twin, name).shape[-2]
    assert layer.get_max_length() == twin.get_max_length()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_come_back_in_their_dtype(dtype, states):
    layer = full(exact_prefill=False)
    k, v = (x.to(dtype) for x in states(1, 3))
    for got, want in zip(layer.update(k, v), (k, v), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got.dense(), stored(want))


def test_seed_chooses_the_rotation(states):
    k, v = states(1, 3)
    layer = full(seed=7, exact_prefill=False)
    keys, _ = layer.update(k, v)
    codec = TQ4Codec(DIM, seed=7)
    assert torch.equal(keys.dense(), codec.decompress(codec.compress(k)))
    assert not torch.equal(keys.dense(), stored(k))


# The contract


def test_no_method_is_left_to_a_base_class():
    contract = {name for name in vars(CacheLayerMixin) if not name.startswith("_")} | {
        name for name in vars(DynamicLayer) if not name.startswith("_")
    }
    contract -= {"supports_early_init", "get_max_cache_shape"}  # a constant; an older name of get_max_length
    assert {"crop", "reorder_cache", "batch_select_indices", "offload"} <= contract
    assert contract <= vars(PackedLayer).keys()


CHANGES = {
    "crop": lambda layer: layer.crop(-2),
    "crop_tensor": lambda layer: layer.crop(torch.tensor(-1)),
    "crop_nothing": lambda layer: layer.crop(0),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "select_last": lambda layer: layer.batch_select_indices(torch.tensor([-1, 0])),
    "select_mask": lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "offload": lambda layer: layer.offload(),
    "offload_and_back": lambda layer: (layer.offload(), layer.prefetch()),
}


@pytest.mark.parametrize("make", [full, sliding])
@pytest.mark.parametrize("before", [3, 5, 13])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_do_what_they_do_to_a_dense_layer(make, before, change, states):
    layer = make()
    twin = dense_layer(layer)
    if change.startswith("crop") and layer.is_sliding:
        if not hasattr(twin, "activate_past_recording"):
            pytest.skip("these releases of transformers cannot take tokens back from a full window")
        layer.activate_past_recording()
        twin.activate_past_recording()
    for count in (2, before):
        k, v = states(3, count)
        layer.update(k, v)
        twin.update(stored(k), stored(v))
    CHANGES[change](layer)
    CHANGES[change](twin)
    assert layer.get_seq_length() == twin.get_seq_length()
    assert layer.get_mask_sizes(2) == twin.get_mask_sizes(2)
    k, v = states(twin.keys.shape[0], 2)
    for got, want in zip(layer.update(k, v), twin.update(stored(k), stored(v)), strict=True):
        assert torch.equal(got.dense(), want[:, :, -got.shape[2] :])  # 5.17 returns more than its mask has room for


def test_crop_to_a_length_as_older_releases_ask_for(states):
    layer = full()
    layer.update(*states(1, 9))
    layer.crop(4)
    assert layer.get_seq_length() == 4
    layer.crop(20)
    assert layer.get_seq_length() == 4
    layer.crop(-20)
    assert layer.get_seq_length() == 0


def test_a_window_that_forgot_says_so(states):
    layer = sliding()
    layer.update(*states(1, 9))
    with pytest.raises(RuntimeError, match=r"layer 0: cannot remove 2 tokens.*window of 6.*activate_past_recording"):
        layer.crop(-2)


@pytest.mark.parametrize("make", [full, sliding])
def test_changes_to_an_empty_layer_are_harmless(make, states):
    for change in CHANGES.values():
        layer = make()
        change(layer)
        assert layer.get_seq_length() == 0
        assert layer.keys is None
        assert not layer.is_initialized
    layer.update(*states(2, 9))
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes, layer.is_initialized) == (0, 0, False)
    k, v = states(3, 4)
    assert layer.update(k, v)[0] is k
    assert torch.equal(layer.keys.dense(), stored(k)[:, :, -4:])


def test_layers_can_be_initialised_early(randn):
    cache = TurboQuantCache(make_config("mistral"))
    cache.early_initialization(2, HEADS, DIM, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    k = randn(2, HEADS, 3, DIM)
    assert cache.update(k, k, 0)[0] is k


def through_torch(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": through_torch}


@pytest.mark.parametrize("make", [full, sliding])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_copy_goes_its_own_way(make, way, inference, states):
    layer = make()
    layer.update(*states(2, 5))
    layer.update(*states(2, 1))
    with torch.inference_mode(inference):
        twin = COPIES[way](layer)
    new = [states(2, 1) for _ in range(4)]
    first = layer.keys.dense(), layer.values.dense()
    for x, ours, swap in ((layer, new[:2], [1, 0]), (twin, new[2:], [1, 1])):
        x.update(*ours[0])
        x.reorder_cache(torch.tensor(swap))
        returned = x.update(*ours[1])
        for part, got in enumerate(returned):
            before = torch.cat((first[part], stored(ours[0][part])), 2)[swap]
            want = torch.cat((before, stored(ours[1][part])), 2)
            assert torch.equal(got.dense(), want[:, :, -got.shape[2] :])


def test_a_layer_in_code_that_its_user_compiled(states):
    layer, twin = full(), full()
    compiled = torch.compile(lambda k, v: [x * 2 for x in layer.update(k, v)], backend="aot_eager")
    for count in (3, 1, 1, 300):  # more than the buffer has room for
        new = states(2, count)
        for got, want in zip(compiled(*new), twin.update(*new), strict=True):
            assert torch.equal(got, want * 2)
    torch._dynamo.reset()


def test_values_come_back_in_the_dtype_of_keys(states):
    k, v = states(2, 3)
    layer = full()
    for x in (v.half(), v[:, :, :1].half()):
        keys, values = layer.update(k[:, :, : x.shape[2]], x)
        assert (keys.dtype, values.dtype) == (torch.float32, torch.float32)
    assert torch.equal(values.dense(), stored(torch.cat((v, v[:, :, :1]), 2).half().float()))


# The cache


def test_every_layer_is_packed_unless_told_otherwise():
    config = make_config("gemma3")
    assert [type(layer) for layer in TurboQuantCache(config).layers] == [PackedSlidingLayer, PackedLayer]
    cache = TurboQuantCache(config, skip_layers=(-1,))
    assert [type(layer) for layer in cache.layers] == [PackedSlidingLayer, DynamicLayer]
    assert cache.packed_layers == [0]
    assert isinstance(cache, DynamicCache)


@torch.no_grad()
def test_bytes_are_those_of_all_layers():
    model = make_model("llama", dtype=torch.float32)
    group = 2 * DIM + 16  # offset, outlier and steps
    for offsets, expected in ((False, 2 * 20 * (DIM // 2 + 4)), (True, 2 * 20 * (DIM // 2 + 4) + group)):
        cache = TurboQuantCache(model.config, skip_layers=(1,), key_offsets=offsets)
        model(torch.arange(3, 23)[None], **{CACHE_ARGUMENT: cache})
        packed, dense = cache.layers
        assert packed.nbytes == HEADS * expected
        assert cache.nbytes == packed.nbytes + 2 * dense.keys.nbytes


# Before 5.24 the old name is the only one, and does not warn.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@torch.no_grad()
@pytest.mark.parametrize("name", sorted({CACHE_ARGUMENT, "past_key_values"}))
def test_models_and_generate_take_the_cache_by_either_name(name):
    model, ids = make_model("llama"), torch.arange(3, 12)[None]
    cache = TurboQuantCache(model.config)
    for part, seen in ((ids[:, :5], 5), (ids[:, 5:], 9)):
        model(part, **{name: cache})
        assert cache.get_seq_length() == seen
    cache = TurboQuantCache(model.config)
    model.generate(ids, **{name: cache}, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert cache.get_seq_length() == 11


@torch.no_grad()
def test_reset_forgets_dense_layers_too():
    model = make_model("llama")
    cache = TurboQuantCache(model.config, skip_layers=(0,))
    ids = torch.arange(3, 12)[None]
    first = model(ids, **{CACHE_ARGUMENT: cache}).logits
    cache.reset()
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0]
    assert torch.equal(model(ids, **{CACHE_ARGUMENT: cache}).logits, first)


def test_the_configuration_is_left_as_it_was():
    config = make_config("gemma3")
    before = copy.deepcopy(config.to_dict())
    for _ in range(2):
        TurboQuantCache(config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
        ({"skip_layers": (2,)}, ValueError, "skip_layers must hold numbers from -2 to 1, got 2"),
        ({"skip_layers": ("0",)}, TypeError, "skip_layers must hold ints, got str"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TurboQuantCache(make_config("llama"), **options)


def test_what_is_no_configuration_is_refused(tmp_path):
    TurboQuantCache(make_config("llama")).save(tmp_path / "empty")
    for make in (
        TurboQuantCache,
        lambda x: TurboQuantStaticCache(x, 64),
        lambda x: TurboQuantCache.load(tmp_path / "empty", x),
        lambda x: TurboQuantStaticCache.load(tmp_path / "empty", x, max_cache_len=64),
    ):
        for other, name in ((None, "NoneType"), ("gpt2", "str"), ({}, "dict"), (torch.nn.Linear(2, 2), "Linear")):
            with pytest.raises(TypeError, match=f"config must be a model's configuration, got {name}"):
                make(other)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 3, 48), (1, 2, 3, 32)), r"layer 0: expected keys and values of one shape.*skip_layers=\(0,\)"),
        (((1, 2, 3, 33), (1, 2, 3, 33)), r"layer 0: expected an even head dimension from 16 to 512, got 33"),
        (((1, 2, 3, 514), (1, 2, 3, 514)), r"expected an even head dimension from 16 to 512, got 514"),
    ],
)
def test_states_that_cannot_be_packed_are_refused(shapes, message):
    cache = TurboQuantCache(LlamaConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match=message):
        cache.update(*(torch.zeros(shape) for shape in shapes), 0)
    cache = TurboQuantCache(MistralConfig(num_hidden_layers=1), skip_layers=(0,))
    assert cache.update(*(torch.zeros(shape) for shape in shapes), 0)[0].shape == shapes[0]


UNFIT = [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", UNFIT, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_states_of_other_dtypes_are_refused(dtype, first):
    good, bad = torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32).to(dtype)
    for make in (TurboQuantCache, lambda config: TurboQuantStaticCache(config, 64)):
        cache = make(LlamaConfig(num_hidden_layers=1))
        if not first:
            cache.update(good, good, 0)
        for states, name in (((bad, good), "keys"), ((good, bad), "values")):
            with pytest.raises(TypeError, match=rf"layer 0: {name} must be torch.float16 or .*, got {dtype}"):
                cache.update(*states, 0)
        assert cache.get_seq_length() == (0 if first else 3)
        cache.update(good, good, 0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_no_sequences_at_all(family, exact, tmp_path):
    config = make_config(family)
    register()
    mask_of = AttentionMaskInterface()["tq4"]
    for make in (TurboQuantCache, lambda config, **options: TurboQuantStaticCache(config, 64, **options)):
        cache, length = make(config, exact_prefill=exact), 0
        for count in (5, 1, 3):
            kv_length, offset = cache.get_mask_sizes(count, 0)
            padding = torch.ones(0, length + count, dtype=torch.bool)
            mask = mask_of(0, count, kv_length, length, offset, attention_mask=padding, device="cpu")
            keys, values = cache.update(*torch.zeros(2, 0, 2, count, 32), 0)
            assert keys.shape == values.shape == (0, 2, kv_length, 32)
            query = torch.zeros(0, 4, count, 32)
            assert attention_forward(torch.nn.Module(), query, keys, values, mask)[0].shape == (0, count, 4, 32)
            length += count
        assert int(cache.get_seq_length()) == 9
        assert cache.nbytes == 0
        cache.save(tmp_path / "none")
        type(cache).load(tmp_path / "none", config, **({} if type(cache) is TurboQuantCache else {"max_cache_len": 64}))


def test_models_that_cannot_read_the_cache_are_refused():
    config = make_config("gemma3")
    config._attn_implementation = "flex_attention"
    for make in (TurboQuantCache, lambda config: TurboQuantStaticCache(config, 64)):
        with pytest.raises(ValueError, match=r'attn_implementation: expected .*"tq4" or "sdpa", got "flex_attention"'):
            make(config)
    with pytest.raises(ValueError, match=r"config: expected a model without an encoder .* EncoderDecoderCache"):
        TurboQuantStaticCache(BartConfig(), 64)


def test_gradients_are_refused():
    model = make_model("llama")
    with pytest.raises(RuntimeError, match=r"no gradients through a quantised cache: use torch\.no_grad"):
        model(torch.arange(3, 8)[None], **{CACHE_ARGUMENT: TurboQuantCache(model.config)})
