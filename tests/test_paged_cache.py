"""PagedTQ4Cache: where each byte of a page is, that views are views, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant_vllm import PagedTQ4Cache

SIZES = {"page_size": 16, "num_kv_heads": 2, "head_dim": 64}
PAGE_BYTES = 2 * 16 * 72


@given(
    num_pages=st.integers(0, 4),
    page_size=st.sampled_from([16, 32, 48, 256]),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 192, 256, 512]),
    gap=st.sampled_from([0, 16, 4096]),
    first=st.sampled_from([0, 16, 48]),
    seed=st.integers(0, 2**31),
)
def test_views_are_where_the_layout_says(num_pages, page_size, num_kv_heads, head_dim, gap, first, seed):
    width = PagedTQ4Cache.page_bytes(page_size, num_kv_heads, head_dim)
    assert width == num_kv_heads * page_size * (head_dim + 8)
    stride = width + gap
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(256, (first + num_pages * stride + width,), dtype=torch.uint8, generator=generator)
    buffer = memory.as_strided((num_pages, width), (stride, 1), first)
    cache = PagedTQ4Cache(buffer, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    assert cache.num_pages == num_pages
    assert cache.num_slots == num_pages * page_size

    data = memory.numpy().tobytes()
    codes = page_size * head_dim // 2
    for page in range(num_pages):
        for head in range(num_kv_heads):
            at = first + page * stride + head * page_size * (head_dim + 8)
            for name, begin, size in (
                ("k_codes", 0, codes),
                ("v_codes", codes, codes),
                ("k_norms", 2 * codes, 4 * page_size),
                ("v_norms", 2 * codes + 4 * page_size, 4 * page_size),
            ):
                part = getattr(cache, name)[page, head].numpy().tobytes()
                assert part == data[at + begin : at + begin + size], name
    for name in ("k_codes", "v_codes"):
        assert getattr(cache, name).shape == (num_pages, num_kv_heads, page_size, head_dim // 2)
        assert getattr(cache, name).dtype == torch.uint8
    for name in ("k_norms", "v_norms"):
        assert getattr(cache, name).shape == (num_pages, num_kv_heads, page_size)
        assert getattr(cache, name).dtype == torch.float32


def test_views_write_into_the_buffer_and_cover_it():
    buffer = torch.zeros(3, PAGE_BYTES, dtype=torch.uint8)
    cache = PagedTQ4Cache(buffer, **SIZES)
    for view in (cache.k_codes, cache.v_codes, cache.k_norms.view(torch.uint8), cache.v_norms.view(torch.uint8)):
        assert (view == 0).all(), "two parts share a byte"
        view.fill_(1)
    assert (buffer == 1).all()


def test_allocate():
    cache = PagedTQ4Cache.allocate(5, **SIZES)
    assert cache.buffer.shape == (5, PAGE_BYTES)
    assert cache.device == torch.device("cpu")
    assert (
        repr(cache) == "PagedTQ4Cache(num_pages=5, page_size=16, num_kv_heads=2, head_dim=64, has_offsets=False, device='cpu')"
    )
    assert PagedTQ4Cache.allocate(0, **SIZES).k_norms.shape == (0, 2, 16)
    assert PagedTQ4Cache.allocate(5, **SIZES, device="meta").k_norms.shape == (5, 2, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"page_size": 8}, ValueError, "page_size must be a multiple of 16, from 16 to 256, got 8"),
        ({"page_size": 24}, ValueError, "page_size must be a multiple of 16, from 16 to 256, got 24"),
        ({"page_size": 272}, ValueError, "page_size must be .*, got 272"),
        ({"page_size": 16.0}, TypeError, "page_size must be an int, got float"),
        ({"page_size": True}, TypeError, "page_size must be an int, got bool"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"num_kv_heads": None}, TypeError, "num_kv_heads must be an int, got NoneType"),
        ({"head_dim": 72}, ValueError, "head_dim must be a multiple of 16, from 16 to 512, got 72"),
        ({"head_dim": 528}, ValueError, "head_dim must be .*, got 528"),
        ({"num_kv_heads": 4}, ValueError, r"buffer must have shape \[num_pages, 4608\], got \[3, 2304\]"),
    ],
)
def test_wrong_sizes(changes, error, message):
    with pytest.raises(error, match=message):
        PagedTQ4Cache(torch.zeros(3, PAGE_BYTES, dtype=torch.uint8), **{**SIZES, **changes})


def misplaced() -> torch.Tensor:
    """A buffer that begins 4 bytes past a 16-byte boundary, at storage offset 0."""
    memory = np.zeros(PAGE_BYTES + 32, np.uint8)
    begin = -memory.ctypes.data % 16 + 4
    return torch.from_numpy(memory[begin : begin + PAGE_BYTES]).view(1, PAGE_BYTES)


@pytest.mark.parametrize(
    ("buffer", "error", "message"),
    [
        (None, TypeError, "buffer must be a torch.Tensor, got NoneType"),
        (torch.zeros(3, PAGE_BYTES, dtype=torch.int8), TypeError, "buffer must be torch.uint8, got torch.int8"),
        (torch.zeros(3 * PAGE_BYTES, dtype=torch.uint8), ValueError, r"buffer must have shape \[num_pages, 2304\]"),
        (torch.zeros(3, PAGE_BYTES + 16, dtype=torch.uint8), ValueError, r"got \[3, 2320\]"),
        (torch.zeros(3, 2 * PAGE_BYTES, dtype=torch.uint8)[:, ::2], ValueError, "bytes of a page contiguous, got stride 2"),
        (torch.zeros(3, PAGE_BYTES + 8, dtype=torch.uint8)[:, :-8], ValueError, "16 bytes apart and at least 2304, got 2312"),
        (torch.zeros(1, PAGE_BYTES, dtype=torch.uint8).expand(3, -1), ValueError, "16 bytes apart and at least 2304, got 0"),
        (torch.zeros(3, PAGE_BYTES + 16, dtype=torch.uint8)[:, 8:-8], ValueError, "begin on a 16-byte boundary, got address 8"),
        (misplaced(), ValueError, "begin on a 16-byte boundary, got address 4 past one"),
    ],
)
def test_wrong_buffers(buffer, error, message):
    with pytest.raises(error, match=message):
        PagedTQ4Cache(buffer, **SIZES)


def test_pages_of_a_larger_buffer():
    larger = torch.zeros(3, 4 * PAGE_BYTES, dtype=torch.uint8)
    layers = [PagedTQ4Cache(larger[:, i * PAGE_BYTES : (i + 1) * PAGE_BYTES], **SIZES) for i in range(4)]
    layers[2].v_norms.fill_(1.0)
    assert all((layer.v_norms == (i == 2)).all() for i, layer in enumerate(layers))


def test_compiles_into_one_graph():
    def step(buffer):
        cache = PagedTQ4Cache(buffer, **SIZES)
        return cache.k_codes[1], cache.v_norms

    buffer = torch.randint(256, (3, PAGE_BYTES), dtype=torch.uint8)
    torch._dynamo.reset()
    for got, want in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(buffer), step(buffer), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
