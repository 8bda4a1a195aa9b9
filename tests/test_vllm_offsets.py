"""The vLLM plugin's keys with offsets, without vLLM: what a server writes in steps of any kind, and each rank's scales."""

from __future__ import annotations

import pytest
import torch

from turboquant_vllm import TQ4Keys
from turboquant_vllm.vllm.layer import PagedLayer
from turboquant_vllm.vllm.previous import PreviousSlots
from turboquant_vllm.vllm.scales import layer_number, own_heads
from vllm_cases import Server, random_step, written_alone

CPU = torch.device("cpu")


@pytest.fixture
def layer(generator):
    one = PagedLayer(4, 2, 64, 64**-0.5)
    one.use_key_scales(torch.exp(0.4 * torch.randn(2, 64, generator=generator)), CPU)
    return one


@pytest.fixture(params=[64, 128])
def server(request, generator, layer):
    return Server(generator, layer, page_size=request.param, num_pages=40 if request.param == 64 else 24)


class TestSteps:
    def test_chunks_of_any_size_beside_decoding(self, server):
        some = [server.request(count) for count in (200, 70, 300, 129, 64)]
        for _ in range(12):
            chunks = [(one, min(server.random(1, 90), len(one.keys) - one.length)) for one in some]
            chunks = [(one, server.untied(one, count)) for one, count in chunks if count > 0]
            if chunks:
                server.step(*chunks, padded=server.random(0, 2))
        server.check(*some)

    def test_decoding_token_by_token_across_pages(self, server):
        some = [server.request(count) for count in (150, 140)]
        server.step((some[0], 120), (some[1], 127))
        for _ in range(12):
            server.step((some[0], 1), (some[1], 1), padded=2)
        server.check(*some)

    def test_a_cached_prefix_is_read_and_not_written(self, server):
        first = server.request(3 * server.page_size)
        server.step((first, 2 * server.page_size + 5))
        before = server.kv_cache[first.pages[:2]].clone()
        others = [server.request(count, first, 2 * server.page_size) for count in (320, 290)]
        for count in (1, 2, 3, 20):
            server.step(*((one, count) for one in others), (first, 1))
        assert torch.equal(server.kv_cache[first.pages[:2]], before)
        assert others[0].pages[:2] == first.pages[:2]
        server.check(first, *others)

    @pytest.mark.parametrize("is_first", [False, True])
    def test_a_prefix_that_the_same_step_writes(self, server, is_first):
        """vLLM knows a block before its tokens are there; whoever comes first in the batch, the bytes are the same."""
        first = server.request(2 * server.page_size)
        second = server.request(320, first, server.page_size)
        chunks = [(first, server.page_size + 7), (second, 9)]
        server.step(*(chunks[::-1] if is_first else chunks))
        server.check(first, second)

    def test_preempted_requests_come_back(self, server):
        some = [server.request(count) for count in (200, 180)]
        server.step((some[0], 150), (some[1], 140))
        for kept in (0, 1):
            server.preempt(some[0], kept)
            server.step((some[1], 3), (some[0], 20))
            server.step((some[0], 50), (some[1], 1))
        server.check(*some)

    def test_rejected_drafts_are_written_over(self, server):
        one, other = server.request(200), server.request(100)
        server.step((one, 58), (other, 60))
        while one.length < 150:
            server.step((one, server.untied(one, 5)), (other, 1), padded=1)
            server.reject(one, server.random(0, 4))
            if other.length > 90:
                server.reject(other, 30)
        server.check(one, other)

    def test_without_previous_slots_it_is_another_cache(self, server, monkeypatch):
        """The test would notice."""
        one = server.request(200)
        server.step((one, server.page_size))
        monkeypatch.setattr(server.layer, "store", lambda k, v, c, s, _: PagedLayer.store(server.layer, k, v, c, s))
        server.step((one, 3))
        with pytest.raises(AssertionError):
            server.check(one)


class TestPreviousSlots:
    def test_no_room(self):
        find = PreviousSlots(8, 64, CPU).find
        batch = (torch.tensor([0, 9]), torch.tensor([9]), torch.zeros(1, 1, dtype=torch.int32))
        assert find(*batch, torch.arange(9)) is None

    def test_the_memory_stays_where_it_is(self):
        slots = PreviousSlots(8, 64, CPU)
        batch = [torch.tensor([0, 1, 2]), torch.tensor([65, 3]), torch.tensor([[7, 2], [5, 0]], dtype=torch.int32)]
        batch[:2] = [x.int() for x in batch[:2]]
        found = slots.find(*batch, torch.tensor([128, 322]))
        assert found[:2].tolist() == [7 * 64 + 63, 321]
        again = slots.find(batch[0], torch.tensor([1, 1], dtype=torch.int32), batch[2], torch.tensor([7 * 64, 5 * 64]))
        assert again.data_ptr() == found.data_ptr()
        assert again[:2].tolist() == [-1, -1]

    def test_sequences_without_tokens_anywhere(self):
        starts, totals = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32), torch.tensor([9, 65, 0, 4, 0], dtype=torch.int32)
        table = torch.tensor([[1, 1], [2, 3], [9, 9], [4, 0], [0, 0]], dtype=torch.int32)
        found = PreviousSlots(8, 64, CPU).find(starts, totals, table, torch.tensor([191, 192, 259, -1]))
        assert found[:3].tolist() == [190, 191, 258]


class TestAgainstOtherCaches:
    def test_a_prompt_is_as_the_codec_compresses_it(self, generator, layer):
        step = random_step(generator, [(150, 150), (64, 64)], layer)
        step.store()
        codec = layer.codec_on(CPU)
        for index, count in enumerate((150, 64)):
            keys = step.keys[index]
            want = codec.decompress(codec.compress_keys(keys.transpose(0, 1)), torch.float64).transpose(0, 1)
            pages = layer.pages(step.kv_cache).keys.each(lambda x, index=index: x[step.block_table[index, : 3 - 2 * index]])
            whole = pages.each(lambda x: x.transpose(0, 1).flatten(1, 2)[None]).tokens(0, count)
            got = codec.decompress(TQ4Keys(*(x[0] for x in whole)), torch.float64).transpose(0, 1)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("counts", [[150], [64, 64, 30], [20, 1, 1, 70, 1, 60], [100, 28, 1, 1, 1]])
    def test_one_prompt_is_as_in_transformers_cache(self, generator, layer, counts):
        pytest.importorskip("transformers")
        from transformers import LlamaConfig

        from turboquant_vllm.hf import TurboQuantCache

        config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64, hidden_size=256)
        scales = {0: layer.codec_on(CPU).key_scales}
        cache = TurboQuantCache(config, exact_prefill=False, key_offsets=True, key_scales=scales)
        keys, first = torch.randn(sum(counts), 2, 64, generator=generator), 0
        for count in counts:
            own = keys[first : first + count].transpose(0, 1)[None]
            read, _ = cache.update(own, own, 0)
            first += count
        want = written_alone(layer, keys, torch.tensor(counts).cumsum(0)[:-1].tolist())
        torch.testing.assert_close((read + 0.0)[0].transpose(0, 1).double(), want, rtol=1e-4, atol=1e-4)


class TestScales:
    @pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
    def test_ranks_take_their_heads(self, size):
        scales = torch.arange(8.0)[:, None].expand(8, 16)
        heads = max(8 // size, 1)
        got = [own_heads(scales, heads, rank, size)[:, 0].int().tolist() for rank in range(size)]
        # As vLLM shards keys: where there are more ranks than heads, neighbours have the same.
        assert got == [list(range(rank * heads, (rank + 1) * heads)) if size <= 8 else [rank // 2] for rank in range(size)]

    def test_undivided_layers_have_all(self):
        assert own_heads(torch.ones(8, 16), 8, 3, 4).shape == (8, 16)

    def test_other_heads_are_refused(self):
        with pytest.raises(ValueError, match="key scales must be of 12 kv heads, 3 on each of 4 ranks, got 8"):
            own_heads(torch.ones(8, 16), 3, 0, 4)

    @pytest.mark.parametrize(
        ("name", "number"), [("model.layers.3.self_attn.attn", 3), ("transformer.h.11.attn", 11), ("attn", None)]
    )
    def test_numbers_of_layers(self, name, number):
        assert layer_number(name) == number

    @pytest.mark.parametrize("kind", ["ours", "inference tensors"])
    def test_scales_come_in_any_mode(self, generator, kind):
        """vLLM makes builders twice: in inference mode while it looks how much memory there is, then outside."""
        layer = PagedLayer(4, 2, 64, 0.125, exact=None, key_offsets=True)
        for inference in (True, False, True):
            with torch.inference_mode(inference or kind != "ours"):
                w = torch.exp(torch.randn(2, 64, generator=generator))
            with torch.inference_mode(inference):
                layer.use_key_scales(w, CPU)
            assert torch.equal(layer.codec_on(CPU).key_scales, w)
        assert not layer.codec_on(CPU).key_scales.is_inference()

    def test_new_scales_are_written_in_place(self, generator, layer):
        w = layer.codec_on(CPU).key_scales
        new = torch.exp(torch.randn(2, 64, generator=generator))
        for given, expected in ((new, new), (None, torch.ones(2, 64))):
            layer.use_key_scales(given, CPU)
            assert layer.codec_on(CPU).key_scales is w
            assert torch.equal(w, expected)
        with pytest.raises(ValueError, match=r"key_scales must have shape \[2, 64\], got \[3, 64\]"):
            layer.use_key_scales(torch.ones(3, 64), CPU)
