"""Saving and loading a filled TurboQuantCache."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from safetensors import safe_open
from safetensors.torch import save_file

from hf_models import VOCABULARY, WINDOW, assert_same, make_config, make_model, one_thread, plain_cache  # noqa: F401
from saved_codec import checksum
from turboquant_vllm import TQ4Codec
from turboquant_vllm.files import read_tensors, write_tensors
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache


def contents(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def saved(tmp_path, generator):
    """A model, a text of 25 tokens, a cache of its first 15, and its file."""
    model = make_model("gemma3")
    ids = torch.randint(3, VOCABULARY, (2, 25), generator=generator)
    cache = plain_cache(model.config, seed=3)
    with torch.no_grad():
        model(ids[:, :15], **{CACHE_ARGUMENT: cache})
    path = tmp_path / "prompt.safetensors"
    cache.save(path)
    return model, ids, cache, path


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("skipped", [(), (0,)])
def test_a_loaded_cache_goes_on_where_it_was(family, skipped, tmp_path, generator):
    model = make_model(family)
    ids = torch.randint(3, VOCABULARY, (2, 25), generator=generator)
    cache = TurboQuantCache(model.config, skip_layers=skipped)
    for start, stop in ((0, 12), (12, 15)):
        model(ids[:, start:stop], **{CACHE_ARGUMENT: cache})
    cache.save(tmp_path / "prompt.safetensors")
    loaded = TurboQuantCache.load(tmp_path / "prompt.safetensors", model.config)
    assert loaded.packed_layers == cache.packed_layers
    assert loaded.get_seq_length() == 15
    for start, stop in ((15, 16), (16, 25)):
        want = model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}).logits
        assert torch.equal(model(ids[:, start:stop], **{CACHE_ARGUMENT: loaded}).logits, want)


def filled(kind, model, ids, skipped=(), **options):
    """A cache of two calls."""
    make = {"growing": TurboQuantCache, "static": lambda *args, **options: TurboQuantStaticCache(*args, 30, **options)}[kind]
    cache = make(model.config, skip_layers=skipped, **options)
    for start, stop in ((0, 12), (12, 15)):
        model(ids[:, start:stop], **{CACHE_ARGUMENT: cache})
    return cache


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "skipped", "offsets"),
    [
        *(("gemma3", skipped, False) for skipped in ((), (0,))),
        *(("gemma3", skipped, True) for skipped in ((), (0,), (1,), (0, 1))),
        *((family, (0,), True) for family in ("llama", "mistral", "gpt_oss", "llama4", "deepseek_v3", "gemma3n")),
    ],
)
@pytest.mark.parametrize("writer", ["growing", "static"])
def test_either_kind_of_cache_reads_what_the_other_wrote(writer, family, skipped, offsets, tmp_path, generator):
    model = make_model(family)
    ids = torch.randint(3, VOCABULARY, (2, 25), generator=generator)
    expected = filled("growing", model, ids, skipped, key_offsets=offsets)
    filled(writer, model, ids, skipped, key_offsets=offsets).save(tmp_path / "file")
    loaded = [
        TurboQuantStaticCache.load(tmp_path / "file", model.config, max_cache_len=40),
        TurboQuantCache.load(tmp_path / "file", model.config),
    ]
    assert [cache.packed_layers for cache in loaded] == [expected.packed_layers] * 2
    loaded[0].save(tmp_path / "again")
    loaded.append(TurboQuantCache.load(tmp_path / "again", model.config))
    for start, stop in ((15, 16), (16, 25)):
        want = model(ids[:, start:stop], **{CACHE_ARGUMENT: expected}).logits
        for cache in loaded:
            assert_same(model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("skipped", [(), (0,)])
def test_a_window_is_not_cropped_to_tokens_that_no_file_had(skipped, tmp_path, generator):
    model = make_model("gemma3")
    ids = torch.randint(3, VOCABULARY, (2, 25), generator=generator)
    filled("growing", model, ids, skipped, key_offsets=False).save(tmp_path / "file")
    layer = TurboQuantStaticCache.load(tmp_path / "file", model.config, max_cache_len=40).layers[0]
    layer.crop(0)
    with pytest.raises(RuntimeError, match="cannot remove 1 tokens behind a window of 8"):
        layer.crop(-1)
    keys = torch.zeros(2, 2, 5, 32, dtype=torch.float64)
    layer.update(keys, keys)
    layer.crop(-5)
    with pytest.raises(RuntimeError, match="cannot remove 14 tokens behind a window of 8"):
        layer.crop(-14)
    layer.crop(-15)
    layer.update(keys, keys)
    layer.crop(-3)
    assert layer.get_seq_length() == 2


def as_version_1(path):
    """The same file as version 1 had it: the checksum is of the tensors alone."""
    tensors, metadata = contents(path)
    metadata.update(version="1", sha256=checksum(tensors))
    save_file(tensors, path, metadata)


@torch.no_grad()
@pytest.mark.parametrize("skipped", [(), (0,)])
@pytest.mark.parametrize("reader", [TurboQuantCache, TurboQuantStaticCache])
def test_files_of_version_1_are_read(reader, skipped, tmp_path, generator):
    model = make_model("gemma3")
    ids = torch.randint(3, VOCABULARY, (2, 25), generator=generator)
    path, expected = tmp_path / "file", filled("growing", model, ids, skipped, key_offsets=False)
    static = filled("static", model, ids, skipped, key_offsets=False)
    for cache in (expected, static):
        cache.save(path)
        if cache is static and skipped:  # of a dense layer of a cache of fixed size it had all tokens, and no window
            tensors, metadata = contents(path)
            tensors.update({f"0.{name}": getattr(static.layers[0], name)[:, :, :15].clone() for name in ("keys", "values")})
            metadata["cache"] = metadata["cache"].replace(f'"window": {WINDOW}', '"window": null')
            save_file(tensors, path, metadata)
        as_version_1(path)
        options = {} if reader is TurboQuantCache else {"max_cache_len": 40}
        loaded = reader.load(path, model.config, **options)
        want = model(ids[:, 15:], **{CACHE_ARGUMENT: expected}).logits
        assert_same(model(ids[:, 15:], **{CACHE_ARGUMENT: loaded}).logits, want)
        expected = filled("growing", model, ids, skipped, key_offsets=False)


def test_a_file_that_is_too_long_is_refused(tmp_path, generator):
    for family in ("llama", "gemma3"):  # also by layers that keep less than they have seen
        config = make_config(family)
        cache = TurboQuantCache(config)
        for layer in range(2):
            cache.update(*torch.randn(2, 1, 2, 70, 32, generator=generator), layer)
        cache.save(tmp_path / "long")
        with pytest.raises(ValueError, match=r"long: layer 0: expected at most 64 tokens, got 70"):
            TurboQuantStaticCache.load(tmp_path / "long", config, max_cache_len=19)


def test_a_file_is_as_small_as_the_cache(saved):
    path = saved[3]
    vectors = 2 * 2 * 2 * (15 + 7)  # keys and values, sequences, heads, tokens of both layers
    tables = 4 * (32 * 32 + 16)
    assert vectors * (32 // 2 + 4) + tables <= path.stat().st_size <= vectors * (32 // 2 + 4) + tables + 2000


def test_files_state_what_they_hold(saved):
    tensors, metadata = contents(saved[3])
    assert metadata["format"] == "turboquant-hf-cache"
    header = json.loads(metadata["cache"])
    assert header["seed"] == 3
    assert header["layers"][0] == {"kind": "packed", "window": 8, "length": 15, "dtype": "float64"}
    assert tensors["0.codes"].shape == (2, 2, 2, 7, 16)
    assert torch.equal(tensors["rotation.32"], TQ4Codec(32, seed=3).rotation)


def test_files_of_keys_with_offsets_state_what_they_hold(tmp_path, generator):
    config, path = make_config("gemma3"), tmp_path / "file"
    cache = TurboQuantCache(config, key_scales={1: torch.rand(2, 32, generator=generator) + 0.5})
    for layer in range(2):
        cache.update(*torch.randn(2, 2, 2, 75, 32, generator=generator), layer)
    cache.save(path)
    tensors, metadata = contents(path)
    layer = {"kind": "packed", "window": 8, "length": 75, "offsets": True, "dtype": "float32"}
    assert json.loads(metadata["cache"])["layers"] == [layer, {**layer, "window": None}]
    shapes = {name: list(x.shape) for name, x in tensors.items() if name[0] in "01"}
    assert shapes == {
        "0.codes": [2, 2, 2, 11, 16], "0.norms": [2, 2, 2, 11], "0.groups": [2, 2, 1, 2, 32], "0.steps": [2, 2, 1, 4],
        "1.codes": [2, 2, 2, 75, 16], "1.norms": [2, 2, 2, 75], "1.groups": [2, 2, 2, 2, 32], "1.steps": [2, 2, 2, 4],
        "1.key_scales": [2, 32],
    }  # fmt: skip


def test_an_empty_cache_can_be_saved(tmp_path):
    config = make_config("gemma3")
    TurboQuantCache(config).save(tmp_path / "empty")
    assert TurboQuantCache.load(tmp_path / "empty", config).get_seq_length() == 0


def test_other_options_are_the_callers(saved):
    model, ids, _, path = saved
    cache = TurboQuantCache.load(path, model.config, exact_prefill=False)
    cache.reset()
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
    assert all(not layer.exact_prefill for layer in cache.layers)
    assert cache.seed == 3


LAYERS = [
    (lambda t, h: h.update(layers={}), r"expected layers to be a list, got \{\}"),
    (lambda t, h: h["layers"].pop(), "expected tensors of 1 layers, got .'1.codes', '1.norms'. beside them"),
    (lambda t, h: h["layers"].append({"kind": "none", "length": 0}), "expected 2 layers, got 3"),
    (lambda t, h: h.update(layers=[1, 2]), "layer 0: expected kind packed, dense, states, none, got 1"),
    (lambda t, h: h["layers"][1].update(kind="other"), "layer 1: expected kind packed, dense, states, none, got 'other'"),
    (lambda t, h: h["layers"][1].update(kind=["packed"]), "layer 1: expected kind packed, dense, states, none, got "),
    (lambda t, h: h["layers"][1].update(kind="dense"), "expected keys and values of 15 tokens, got"),
    (lambda t, h: h["layers"][0].update(length=14.0), "layer 0: expected length to be a whole number from 0 to .*, got 14.0"),
    (lambda t, h: h["layers"][0].update(length=2**63), "layer 0: expected length to be a whole number from 0 to "),
    (lambda t, h: h["layers"][0].pop("length"), "layer 0: expected length to be a whole number from 0 to .*, got None"),
    (lambda t, h: h["layers"][1].update(length=14), "layer 1: expected 14 of 14 tokens, got 15"),
    (lambda t, h: h["layers"][0].update(window=9), "layer 0: expected 8 of 15 tokens, got 7"),
    (lambda t, h: h["layers"][0].update(window=9, length=7), "layer 0: expected window 8, got 9"),
    (lambda t, h: h["layers"][0].update(window=0), "layer 0: expected window to be positive, got 0"),
    (lambda t, h: h["layers"][0].update(window="8"), "layer 0: expected window to be a whole number .*, got '8'"),
    (lambda t, h: h["layers"][0].update(dtype="float99"), "layer 0: expected dtype float16, .*float64, got 'float99'"),
    (lambda t, h: h["layers"][0].update(dtype="nn"), "layer 0: expected dtype float16, .*float64, got 'nn'"),
    (lambda t, h: h["layers"][0].update(dtype=["float16"]), r"layer 0: expected dtype .*, got \['float16'\]"),
    (lambda t, h: h["layers"][0].pop("dtype"), "layer 0: expected dtype float16, .*float64, got None"),
    (lambda t, h: h.update(seed=4), "expected the rotation of seed 4"),
    (lambda t, h: h.update(seed=3.5), "expected seed to be a whole number that is not negative, got 3.5"),
    (lambda t, h: h.update(seed=-3), "expected seed to be a whole number that is not negative, got -3"),
    (lambda t, h: h.pop("layers"), "expected seed and layers, got"),
    (lambda t, h: h.update(more=1), "expected seed and layers, got"),
    (lambda t, h: t["centroids.32"].neg_(), "expected the centroids of seed 3"),
    (lambda t, h: t.update({"rotation.32": t["rotation.32"].double()}), "expected the rotation of seed 3"),
    (lambda t, h: t.pop("rotation.32"), "expected the rotation of seed 3"),
    (lambda t, h: t.update({"rotation.64": torch.zeros(1)}), "expected tensors of 2 layers, got .'rotation.64'. beside them"),
    (lambda t, h: t.update({"2.codes": torch.zeros(1)}), "expected tensors of 2 layers, got .'2.codes'. beside them"),
    (lambda t, h: t.pop("1.norms"), "layer 1: expected codes and norms of 15 tokens, got .'1.codes'."),
    (lambda t, h: t.update({"1.norms": t["1.norms"].half()}), "layer 1: expected uint8 codes and float32 norms"),
    (lambda t, h: t.update({"1.norms": t["1.norms"][..., :-1].clone()}), "layer 1: expected uint8 codes"),
    (lambda t, h: narrow(t, "1.codes", 4, 3), "layer 1: expected codes of keys and values of head dimension 16 to 512"),
    (lambda t, h: [narrow(t, name, 0, 1) for name in ("1.codes", "1.norms")], "layer 1: expected codes of keys and values"),
]


def narrow(tensors, name, dim, count):
    tensors[name] = tensors[name].narrow(dim, 0, count).clone()


DENSE = [
    (lambda t, h: t.pop("0.values"), "layer 0: expected keys and values of 15 tokens, got .'0.keys'."),
    (lambda t, h: narrow(t, "0.keys", 2, 6), "layer 0: expected floating keys and values of 4 dimensions, got"),
    (lambda t, h: [narrow(t, f"0.{name}", 2, 6) for name in ("keys", "values")], "layer 0: expected 7 of 15 tokens, got 6"),
    (lambda t, h: t.update({"0.keys": t["0.keys"].int()}), "layer 0: expected floating keys and values of 4 dimensions, got"),
    (lambda t, h: t.update({"0.keys": t["0.keys"][0].clone()}), "layer 0: expected floating keys and values of 4 dimensions"),
    (lambda t, h: h["layers"][0].update(window=None), "layer 0: expected 15 of 15 tokens, got 7"),
    (lambda t, h: h["layers"][0].update(length=6), "layer 0: expected 6 of 6 tokens, got 7"),
]


# Of 75 tokens, of which a window of 8 is in the second group.
OFFSETS = [
    (lambda t, h: t.pop("1.groups"), "layer 1: expected groups torch.int8 .2, 2, 2, 2, 32., got none"),
    (lambda t, h: t.pop("0.steps"), "layer 0: expected steps torch.float32 .2, 2, 1, 4., got none"),
    (
        lambda t, h: t.update({"0.groups": t["0.groups"].char().int()}),
        "layer 0: expected groups torch.int8 .*, got torch.int32",
    ),
    (lambda t, h: narrow(t, "1.steps", 2, 1), "layer 1: expected steps torch.float32 .2, 2, 2, 4., got .*2, 2, 1, 4"),
    (lambda t, h: t.update({"1.key_scales": torch.ones(2, 16)}), "layer 1: expected key_scales torch.float32 .2, 32., got"),
    (lambda t, h: t.update({"1.key_scales": torch.zeros(2, 32)}), "layer 1: expected key_scales to be positive and finite"),
    (lambda t, h: h["layers"][0].pop("offsets"), "layer 0: expected 7 of 75 tokens, got 11"),
    (lambda t, h: h["layers"][0].update(length=76), "layer 0: expected 12 of 76 tokens, got 11"),
    (lambda t, h: [narrow(t, f"0.{name}", 3, 8) for name in ("codes", "norms")], "layer 0: expected 11 of 75 tokens, got 8"),
]


@pytest.mark.parametrize(
    ("skipped", "tokens", "change", "message"),
    [
        *(((), 15, *case) for case in LAYERS),
        *(((0,), 15, *case) for case in DENSE),
        *(((), 75, *case) for case in OFFSETS),
    ],
)
@pytest.mark.parametrize("reader", [TurboQuantCache, TurboQuantStaticCache])
def test_files_that_do_not_fit_are_refused(reader, skipped, tokens, change, message, tmp_path):
    config = make_config("gemma3")
    cache = TurboQuantCache(config, seed=3, skip_layers=skipped, key_offsets=tokens == 75)
    for layer in range(2):
        cache.update(torch.ones(2, 2, tokens, 32), torch.ones(2, 2, tokens, 32), layer)
    path = tmp_path / "file"
    cache.save(path)
    tensors, metadata = contents(path)
    header = json.loads(metadata["cache"])
    change(tensors, header)
    write_tensors(path, tensors, {**metadata, "cache": json.dumps(header)})
    with pytest.raises(ValueError, match=f"file: .*{message}"):
        reader.load(path, config, **({} if reader is TurboQuantCache else {"max_cache_len": 80}))


def test_a_changed_byte_is_noticed(saved):
    model, _, _, path = saved
    tensors, metadata = contents(path)
    tensors["0.codes"][0, 0, 0, 0, 0] ^= 1
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="expected checksum"):
        TurboQuantCache.load(path, model.config)


def test_a_changed_description_is_noticed(saved):
    model, _, _, path = saved
    tensors, metadata = contents(path)
    metadata["cache"] = metadata["cache"].replace('"dtype": "float64"', '"dtype": "float32"')
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="expected checksum"):
        TurboQuantCache.load(path, model.config)


def test_other_files_are_refused(tmp_path):
    config = make_config("gemma3")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TurboQuantCache.load(tmp_path / "nowhere", config)
    codec = TQ4Codec(32)
    codec.save(tmp_path / "keys", codec.compress(torch.randn(3, 32)))
    with pytest.raises(ValueError, match="expected format 'turboquant-hf-cache', got 'turboquant-tq4'"):
        TurboQuantCache.load(tmp_path / "keys", config)
    save_file({"x": torch.zeros(1)}, tmp_path / "new", {"format": "turboquant-hf-cache", "version": "3"})
    with pytest.raises(ValueError, match="expected format version 1 or 2, got 3"):
        read_tensors(tmp_path / "new", "turboquant-hf-cache")


def test_a_cache_of_another_model_is_refused(saved):
    with pytest.raises(ValueError, match="layer 0: expected window None, got 8"):
        TurboQuantCache.load(saved[3], make_config("llama"))
