"""tq4_paged_attention on a CPU: the definition, the public function, what it refuses, and its checks of contents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paged_cases import arguments, check_batch, random_batch, run_reference
from paged_contract import PagedContract
from turboquant_vllm import PagedTQ4Cache, TQ4Codec, tq4_attention, tq4_paged_attention
from turboquant_vllm.paged_attention import choose_paged_backend, why_not_paged

FULL = torch.float32


class TestReference(PagedContract):
    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def dtype(self, request):
        return request.param

    @pytest.fixture
    def device(self):
        return "cpu"

    @pytest.fixture
    def run(self):
        return run_reference


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), max_size=5),
    page_size=st.sampled_from([16, 32, 48]),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.floats(0.5, 50),
    seed=st.integers(0, 2**31),
)
def test_any_batch(lengths, page_size, group, window, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    options = {"sliding_window": window, "softcap": softcap, "group": group, "page_size": page_size}
    check_batch(run_reference, random_batch(generator, lengths, dtype=FULL, head_dim=16, **options), gate=False)


def written(generator, lengths, **sizes):
    """A codec, a cache that holds sequences which it compressed, the batch's index tensors, and the sequences."""
    batch = random_batch(generator, lengths, dtype=FULL, **sizes)
    codec = TQ4Codec(batch.cache.head_dim)
    assert torch.equal(codec.rotation, batch.rotation)
    return codec, batch


def test_public_function(generator):
    codec, batch = written(generator, [(1, 37), (20, 30), (3, 50)])
    q, cache, *index = arguments(batch)
    out, lse = tq4_paged_attention(q, cache, codec, *index, return_lse=True)
    check_batch(lambda _: (out, lse), batch)
    assert torch.equal(tq4_paged_attention(q, cache, codec, *index), out)
    assert torch.equal(tq4_paged_attention(q, cache, codec, *index, max_query_len=20, max_seq_len=50), out)
    place = torch.empty(24, 4, 128)[..., ::2]
    assert tq4_paged_attention(q, cache, codec, *index, out=place) is place
    assert torch.equal(place, out)
    sinks = torch.randn(4, generator=generator)
    masks = {"sliding_window": 9, "softcap": 3.0, "sinks": sinks}
    result = tq4_paged_attention(q, cache, codec, *index, sm_scale=0.3, return_lse=True, backend="reference", **masks)
    check_batch(lambda _: result, batch.replace(sm_scale=0.3, **masks))
    windows = torch.arange(2, 2 + len(batch.seq_lens), dtype=torch.int32)
    result = tq4_paged_attention(q, cache, codec, *index, sliding_window=windows, return_lse=True, backend="reference")
    check_batch(lambda _: result, batch.replace(windows=windows))
    result = tq4_paged_attention(q, cache, codec, *index, causal=False, return_lse=True)
    check_batch(lambda _: result, batch.replace(causal=False))


def test_equals_dense_attention_over_what_was_written(generator):
    codec = TQ4Codec(64)
    cache = PagedTQ4Cache.allocate(4, page_size=16, num_kv_heads=2, head_dim=64)
    k, v = (codec.compress(torch.randn(1, 2, 40, 64, generator=generator)) for _ in range(2))
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    for token in range(40):
        page, place = table[0, token // 16], token % 16
        cache.k_codes[page, :, place], cache.k_norms[page, :, place] = k.codes[0, :, token], k.norms[0, :, token]
        cache.v_codes[page, :, place], cache.v_norms[page, :, place] = v.codes[0, :, token], v.norms[0, :, token]
    q = torch.randn(5, 4, 64, generator=generator)
    lens, starts = torch.tensor([40], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    out = tq4_paged_attention(q, cache, codec, table, lens, starts)
    dense = tq4_attention(q.transpose(0, 1)[None], k, v, codec, is_causal=True)
    assert torch.equal(out, dense[0].transpose(0, 1))


def test_backends():
    codec, batch = written(torch.Generator().manual_seed(0), [(1, 20)])
    q, cache, *index = arguments(batch)
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run: "):
            tq4_paged_attention(q, cache, codec, *index, backend=name)
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'flash'"):
        tq4_paged_attention(q, cache, codec, *index, backend="flash")
    assert choose_paged_backend(q, None) == ("reference", "")
    assert why_not_paged("reference", q.device, q.dtype, None) == ""


WRONG = {
    "cache": ({"cache": torch.zeros(3, 4608)}, TypeError, "cache must be a PagedTQ4Cache, got Tensor"),
    "codec": ({"codec": None}, TypeError, "codec must be a TQ4Codec, got NoneType"),
    "codec-dim": ({"codec": TQ4Codec(128)}, ValueError, "codec must have the cache's head_dim 64, got 128"),
    "q-dtype": ({"q": torch.zeros(24, 4, 64).double()}, TypeError, "q must be torch.float16 or .* got torch.float64"),
    "q-shape": ({"q": torch.zeros(24, 4, 32)}, ValueError, r"q must have shape \[total_tokens, num_heads, 64\], got"),
    "heads": ({"q": torch.zeros(24, 3, 64)}, ValueError, "q must have a multiple of the cache's 2 heads, got 3"),
    "no-heads": ({"q": torch.zeros(24, 0, 64)}, ValueError, "q must have a multiple of the cache's 2 heads, got 0"),
    "causal": ({"causal": 1}, TypeError, "causal must be a bool, got int"),
    "table-dtype": ({"block_table": torch.zeros(3, 4).long()}, TypeError, "block_table must be torch.int32, got torch.int64"),
    "table-shape": ({"block_table": torch.zeros(3).int()}, ValueError, r"block_table must have shape \[num_seqs, max_pages\]"),
    "lens": ({"seq_lens": torch.zeros(4).int()}, ValueError, r"seq_lens must have shape \[3\], got \[4\]"),
    "starts": ({"cu_seqlens_q": torch.zeros(3).int()}, ValueError, r"cu_seqlens_q must have shape \[4\], got \[3\]"),
    "device": ({"seq_lens": torch.zeros(3, device="meta").int()}, ValueError, "seq_lens must be on cpu like q, got meta"),
    "out-dtype": ({"out": torch.zeros(24, 4, 64).half()}, TypeError, "out must be torch.float32, got torch.float16"),
    "out-shape": ({"out": torch.zeros(4, 24, 64)}, ValueError, r"out must have shape \[24, 4, 64\], got \[4, 24, 64\]"),
    "window": ({"sliding_window": 3, "causal": False}, ValueError, "sliding_window must come with causal=True, got False"),
    "windows": ({"sliding_window": torch.ones(2).int()}, ValueError, r"sliding_window must have shape \[3\], got \[2\]"),
    "windows-dtype": ({"sliding_window": torch.ones(3)}, TypeError, "sliding_window must be torch.int32, got torch.float32"),
    "windows-causal": (
        {"sliding_window": torch.ones(3).int(), "causal": False},
        ValueError,
        "sliding_window must come with causal=True, got False",
    ),
    "sinks": ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \[4\], got \[2\]"),
    "query-bound": ({"max_query_len": 2.0}, TypeError, "max_query_len must be an int, got float"),
    "key-bound": ({"max_seq_len": -1}, ValueError, "max_seq_len must be at least 0, got -1"),
    "keys-alone": ({"k": torch.zeros(24, 2, 64)}, ValueError, "k, v and slot_mapping must come together, got k alone"),
    "no-slots": (
        {"k": torch.zeros(24, 2, 64), "v": torch.zeros(24, 2, 64)},
        ValueError,
        "k, v and slot_mapping must come together, got k, v alone",
    ),
    "new-shape": (
        {"k": torch.zeros(24, 3, 64), "v": torch.zeros(24, 2, 64), "slot_mapping": torch.zeros(24).int()},
        ValueError,
        r"k must have shape \[tokens, 2, 64\], got \[24, 3, 64\]",
    ),
    "scale": ({"sm_scale": "1"}, TypeError, "sm_scale must be a float or None, got str"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(change, error, message):
    codec, batch = written(torch.Generator().manual_seed(0), [(1, 37), (20, 30), (3, 50)])
    names = ("q", "cache", "block_table", "seq_lens", "cu_seqlens_q")
    good = dict(zip(names, arguments(batch), strict=True)) | {"codec": codec}
    with pytest.raises(error, match=message):
        tq4_paged_attention(**(good | change))


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("block_table", (1, 1), 99, r"block_table\[1, 1\] must be from 0 to 11, got 99"),
        ("block_table", (2, 0), -1, r"block_table\[2, 0\] must be from 0 to 11, got -1"),
        ("seq_lens", (0,), 97, r"seq_lens\[0\] must be from 0 to 96, got 97"),
        ("seq_lens", (2,), -1, r"seq_lens\[2\] must be from 0 to 96, got -1"),
        ("cu_seqlens_q", (0,), 1, r"cu_seqlens_q\[0\] must be 0, got 1"),
        ("cu_seqlens_q", (2,), 0, r"cu_seqlens_q\[2\] must be from 1 to 24, got 0"),
        ("cu_seqlens_q", (3,), 25, r"cu_seqlens_q\[3\] must be from 21 to 24, got 25"),
    ],
)
def test_wrong_contents_are_found_where_asked_for(monkeypatch, name, at, value, message):
    codec, batch = written(torch.Generator().manual_seed(0), [(1, 37), (20, 30), (3, 50)])
    assert batch.block_table.shape == (3, 6)
    assert batch.cache.num_pages == 12
    wrong = getattr(batch, name).clone()
    wrong[at] = value
    q, cache, *index = arguments(batch.replace(**{name: wrong}))
    tq4_paged_attention(q, cache, codec, *index)
    monkeypatch.setenv("TURBOQUANT_DEBUG", "1")
    tq4_paged_attention(*arguments(batch)[:2], codec, *arguments(batch)[2:5])
    with pytest.raises(ValueError, match=message):
        tq4_paged_attention(q, cache, codec, *index)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_query_len": 19}, r"cu_seqlens_q\[2\] must be from 1 to 20, got 21"),
        ({"max_seq_len": 49}, r"seq_lens\[2\] must be from 0 to 49, got 50"),
    ],
)
def test_bounds_that_do_not_hold_are_found_where_asked_for(monkeypatch, bounds, message):
    codec, batch = written(torch.Generator().manual_seed(0), [(1, 37), (20, 30), (3, 50)])
    monkeypatch.setenv("TURBOQUANT_DEBUG", "1")
    q, cache, *index = arguments(batch)
    with pytest.raises(ValueError, match=message):
        tq4_paged_attention(q, cache, codec, *index, **bounds)


def test_example_in_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    assert (names["out"] == 0).all()  # of a cache full of zeros
    assert names["out"].shape == names["q"].shape
