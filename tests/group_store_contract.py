"""What every backend that stores keys with offsets must do, as tests to inherit."""

from __future__ import annotations

import pytest
import torch

from compression_checks import special_vectors
from group_store_cases import GroupedPages
from turboquant_vllm import PagedTQ4Cache, TQ4Codec
from turboquant_vllm.paged import chunk_bytes
from turboquant_vllm.records import GROUP

HEADS = 2


def keys_like_a_models(generator: torch.Generator, count: int, head_dim: int, heads: int = HEADS) -> torch.Tensor:
    """``[H_kv, count, D]``: a large common part, and a first key unlike all others."""
    k = torch.randn(heads, count, head_dim, generator=generator) + 6 * torch.randn(heads, 1, head_dim, generator=generator)
    k[:, :1] = 20 * torch.randn(heads, 1, head_dim, generator=generator)
    return k


class GroupStoreContract:
    """Fixtures: ``store(k, v, cache, codec, slots, previous_slots)``, ``device``, ``generator``."""

    @pytest.fixture
    def dtype(self):
        return torch.bfloat16

    @pytest.fixture
    def wide_dtype(self):
        """One of float32's range."""
        return torch.bfloat16

    @pytest.fixture
    def codec(self, generator, device):
        scales = torch.exp(0.4 * torch.randn(HEADS, 64, generator=generator))
        return TQ4Codec(64, device=device).with_key_scales(scales)

    @pytest.mark.parametrize(("page_size", "pad"), [(64, 0.0), (192, 1.5)])
    @pytest.mark.parametrize("chunks", [[150], [64, 70], [20, 1, 1, 50], [63, 1, 1, 63, 3], [1, 1, 2, 3, 5, 70], [130, 1]])
    def test_chunks(self, store, codec, generator, dtype, chunks, page_size, pad):
        k = keys_like_a_models(generator, sum(chunks), 64)
        pages = GroupedPages(generator, codec, [sum(chunks)], page_size=page_size, dtype=dtype)
        for chunk in k.split(chunks, 1):
            pages.write(store, chunk, pad=pad)

    @pytest.mark.parametrize(
        ("head_dim", "is_wide", "scale", "layout", "slot_dtype", "scaled"),
        [
            (64, False, "norm", "contiguous", torch.int64, False),
            (128, True, "unbiased", "sliced", torch.int32, True),
            (128, False, "least_squares", "transposed", torch.int64, True),
            (256, True, "norm", "contiguous", torch.int32, True),
            (256, False, "unbiased", "contiguous", torch.int64, False),
        ],
    )
    def test_a_batch(self, store, device, generator, wide_dtype, head_dim, is_wide, scale, layout, slot_dtype, scaled):
        dtype = wide_dtype if is_wide else torch.float16
        codec = TQ4Codec(head_dim, scale=scale, device=device)
        if scaled:
            codec = codec.with_key_scales(torch.exp(0.4 * torch.randn(3, head_dim, generator=generator)))
        lengths = [90, 5, 70, 140]
        options = {"heads": 3, "page_size": 128, "dtype": dtype, "layout": layout, "slot_dtype": slot_dtype}
        pages = GroupedPages(generator, codec, lengths, **options)
        left = [keys_like_a_models(generator, n, head_dim, 3) for n in lengths]
        for counts in ((60, 0, 66, 64), (4, 1, 1, 3), (1, 1, 3, 70)):
            chunks = [k[:, :n] if n else None for k, n in zip(left, counts, strict=True)]
            left = [k[:, n:] for k, n in zip(left, counts, strict=True)]
            pages.write(store, *chunks, pad=0.3)

    def test_without_previous_slots(self, store, codec, generator, dtype):
        # One page for each sequence, as long as the memory: the token before is in the slot before.
        pages = GroupedPages(generator, codec, [200, 200], page_size=320, dtype=dtype, has_previous=False)
        left = [keys_like_a_models(generator, 200, 64) for _ in range(2)]
        for count in (70, 57, 1, 1, 1, 66):
            pages.write(store, *(k[:, :count] for k in left))
            left = [k[:, count:] for k in left]
        # Or just as long as the sequence: then its last group lacks places.
        pages = GroupedPages(generator, codec, [72, 84, 4], page_size=84, dtype=dtype, has_previous=False)
        pages.write(store, *(keys_like_a_models(generator, n, 64) for n in (70, 60, 3)), pad=0.3)
        pages.write(store, *(keys_like_a_models(generator, n, 64) for n in (2, 24, 1)))
        short = GroupedPages(generator, codec, [140], page_size=64, dtype=dtype, has_previous=False)
        for count in (67, 61, 4):  # where a page begins nothing is before it
            short.write(store, keys_like_a_models(generator, count, 64))

    def test_previous_slots_that_are_elsewhere(self, store, codec, generator, dtype):
        # Groups begin behind a group that the same call leaves alone, with few of its keys left in place, and behind nothing.
        pages = GroupedPages(generator, codec, [64, 64, 64], dtype=dtype)
        pages.write(store, keys_like_a_models(generator, 40, 64), keys_like_a_models(generator, 64, 64), None)
        k = keys_like_a_models(generator, 30, 64).transpose(0, 1).to(dtype).to(codec.device)
        slots = torch.tensor([pages.slot(2, i) for i in range(30)], device=codec.device)
        for before in (pages.slot(0, 39), pages.slot(0, 0), pages.slot(1, 63), -1, pages.num_pages * 64, 2**31 - 1):
            previous = torch.cat([torch.tensor([before], device=slots.device), slots[:-1]])
            pages.check(store, k, k, slots, previous)

    def test_every_few_keys(self, store, codec, generator, dtype):
        # Runs with places left out, and more of them than a warp has lanes.
        pages = GroupedPages(generator, codec, [64 * 5], page_size=64, dtype=dtype)
        k = keys_like_a_models(generator, 320, 64)
        pages.write(store, k[:, :300])
        # Groups that begin have their own tests: behind one that is written in the same call, places must not be left out.
        for some in (range(1, 320, 7), range(16, 320, 16)):
            positions = [i for i in some if i % GROUP]
            slots, previous = (torch.tensor([pages.slot(0, i - n) for i in positions], device=codec.device) for n in (0, 1))
            new = k[:, positions].transpose(0, 1).to(dtype).to(codec.device)
            pages.check(store, new, new, slots, previous)

    def test_a_later_key_that_lies_farther_takes_the_place(self, store, codec, generator, dtype):
        k = torch.randn(HEADS, 64, 64, generator=generator)
        k[:, 3] *= 5
        k[0, 40] *= 20
        pages = GroupedPages(generator, codec, [64], dtype=dtype)
        pages.write(store, k[:, :20])
        pages.write(store, k[:, 20:38])
        assert (pages.cache_in(pages.memory).k_norms < 0).nonzero()[:, 1:].tolist() == [[0, 3], [1, 3]]
        for n in range(38, 42):
            pages.write(store, k[:, n : n + 1])
        pages.write(store, k[:, 42:])
        assert (pages.cache_in(pages.memory).k_norms < 0).nonzero()[:, 1:].tolist() == [[0, 40], [1, 3]]

    def test_drafts_that_are_written_over(self, store, codec, generator, dtype):
        k = torch.randn(HEADS, 70, 64, generator=generator)
        k[:, 20] *= 30
        pages = GroupedPages(generator, codec, [70], dtype=dtype)
        pages.write(store, k[:, :18])
        pages.write(store, k[:, 18:22])
        pages.write(store, torch.randn(HEADS, 4, 64, generator=generator), first=20)  # the outlier's place among them
        pages.write(store, k[:, 24:62])
        pages.write(store, torch.randn(HEADS, 6, 64, generator=generator))  # beyond the group's end, rejected whole
        pages.write(store, k[:, 62:63], first=62)
        pages.write(store, k[:, 63:70])
        pages.write(store, k[:, 64:65], first=64)

    def test_bad_keys_do_not_touch_their_neighbours(self, store, codec, generator, dtype):
        k = keys_like_a_models(generator, 140, 64)
        bad = [(5, "nan"), (70, "inf"), (71, "-inf"), (72, "nan"), (128, "nan")]
        for place, what in bad:
            k[:, place, 3 + place % 7] = float(what)
        for chunks in ([140], [3, 63, 3, 1, 1, 69], [5, 1, 134]):
            pages = GroupedPages(generator, codec, [140], dtype=dtype)
            for chunk in k.split(chunks, 1):
                pages.write(store, chunk)

    def test_nothing_but_bad_keys(self, store, codec, generator, dtype):
        pages = GroupedPages(generator, codec, [70], dtype=dtype)
        pages.write(store, torch.full((HEADS, 66, 64), float("nan")))
        pages.write(store, torch.randn(HEADS, 4, 64, generator=generator))

    @pytest.mark.parametrize("count", [1, 2, 66])
    def test_zeros_and_equal_keys(self, store, codec, generator, dtype, count):
        for value in (0.0, 1.0, -3.0):
            pages = GroupedPages(generator, codec, [count + 1], dtype=dtype)
            pages.write(store, torch.full((HEADS, count, 64), value))
            pages.write(store, torch.full((HEADS, 1, 64), value))

    @pytest.mark.parametrize("magnitude", [1e-38, 1e-25, 1e25])
    def test_magnitudes(self, store, codec, generator, wide_dtype, magnitude):
        k = keys_like_a_models(generator, 70, 64).double() * magnitude
        pages = GroupedPages(generator, codec, [70], dtype=wide_dtype)
        for chunk in k.split([2, 1, 67], 1):
            pages.write(store, chunk)

    def test_extreme_keys(self, store, codec, generator, dtype):
        k = special_vectors(64, dtype, generator)
        k = (
            torch.cat([k, torch.randn(3, 64, generator=generator).to(dtype)])
            .repeat(1, HEADS)
            .view(12, HEADS, 64)
            .transpose(0, 1)
        )
        for chunks in ([12], [1] * 12, [3, 9]):
            pages = GroupedPages(generator, codec, [12], dtype=dtype)
            for chunk in k.split(chunks, 1):
                pages.write(store, chunk)

    def test_sums_beyond_float32(self, store, device, generator, wide_dtype):
        # No number is asked of such a group, but that the call ends, and that no other key is touched.
        codec, k = TQ4Codec(64, device=device), torch.randn(HEADS, 130, 64, generator=generator)
        k[:, 64:] = 3e38 * torch.sign(k[:, 64:])
        pages = GroupedPages(generator, codec, [130], dtype=wide_dtype)
        pages.write(store, k, check=False)
        cache, first = pages.cache_in(pages.memory), pages.slot(0, 0) // 64
        assert cache.k_norms[first].isfinite().all()
        good = GroupedPages(generator, codec, [64], dtype=wide_dtype)
        good.write(store, k[:, :64], check=False)
        same = good.cache_in(good.memory).keys
        for a, b in zip(cache.keys, same, strict=True):
            assert torch.equal(a[first], b[good.slot(0, 0) // 64])

    @pytest.mark.parametrize("value", [1.0, 30000.0])
    def test_one_key_outweighs_all_others(self, store, codec, generator, dtype, value):
        # Its size must not be lost from the others' mean, to which it does not belong.
        k = torch.randn(HEADS, GROUP, 64, generator=generator) + 1
        k[:, 17] = value * torch.randn(HEADS, 64, generator=generator)
        pages = GroupedPages(generator, codec, [GROUP], dtype=dtype)
        pages.write(store, k)

    def untouched(self, size: int, device: torch.device | str) -> torch.Tensor:
        """So many bytes that nobody has written."""
        return torch.empty(size, dtype=torch.uint8, device=device)

    @pytest.mark.parametrize("page_size", [64, 2**26])
    def test_places_beyond_32_bits(self, store, device, generator, dtype, page_size):
        # The last of 2^26 places of 76 bytes: of many pages, or of one. On a CPU what nobody touches takes no memory.
        codec, num_pages = TQ4Codec(64, device=device), 2**26 // page_size
        width = chunk_bytes(page_size, 64, True)
        if device != "cpu" and torch.cuda.mem_get_info()[0] < num_pages * width + 2**30:
            pytest.skip("needs 6 GiB of free GPU memory")
        memory = self.untouched(num_pages * width, device).view(num_pages, width)
        far = PagedTQ4Cache.of_checked(memory, page_size, 1, 64, True)
        near = PagedTQ4Cache.allocate(2, page_size=64, num_kv_heads=1, head_dim=64, has_offsets=True, device=device)
        k = keys_like_a_models(generator, 101, 64, 1).transpose(0, 1).to(dtype).to(device)
        place = torch.arange(101, device=device)
        for some in (slice(0, 66), slice(66, 67), slice(67, 101)):
            for cache in (near, far):
                slots = place + cache.num_slots - 128
                store(k[some], k[some], cache, codec, slots[some], torch.where(place > 0, slots - 1, -1)[some])

        def found(cache: PagedTQ4Cache) -> list[torch.Tensor]:
            """Both groups, and of each tensor of tokens the 101 that have been written."""
            parts = [x for part in (cache.keys, cache.values) for x in part if x is not None]
            last = [x[-2:].transpose(0, 1).flatten(1, 2) for x in parts]
            return [x[:, -128:-27] if i in (0, 1, 4, 5) else x[:, -2:] for i, x in enumerate(last)]

        for x, y in zip(found(far), found(near), strict=True):
            assert torch.equal(x, y)

    def test_runs_begin_anywhere(self, store, codec, generator, dtype):
        pages = GroupedPages(generator, codec, [30], dtype=dtype)
        pages.write(store, keys_like_a_models(generator, 10, 64))
        for before in (25, 28, 30, 31, 33):  # a warp looks at 32 rows at a time
            positions = [*[-1] * before, *range(10, 17), *[-1] * 50]
            k = torch.randn(len(positions), HEADS, 64, generator=generator).to(dtype).to(codec.device)
            slots, previous = (torch.tensor([pages.slot(0, i - back) for i in positions]) for back in (0, 1))
            pages.check(store, k, k, slots.to(k.device), previous.to(k.device))

    def test_long_padding(self, store, codec, generator, dtype):
        pages = GroupedPages(generator, codec, [80], dtype=dtype)
        positions = [*[-1] * 250, *range(40), *[-1] * 140, *range(40, 80), *[-1] * 180]
        k = keys_like_a_models(generator, 80, 64)[:, positions].transpose(0, 1).to(dtype)
        k[torch.tensor(positions) < 0] = float("nan")
        slots, previous = (torch.tensor([pages.slot(0, i - back) for i in positions]) for back in (0, 1))
        k, slots, previous = (x.to(codec.device) for x in (k, slots, previous))
        pages.check(store, k, k, slots, previous)
