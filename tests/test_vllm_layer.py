"""The vLLM plugin's logic, without vLLM: runs of a batch, and one layer's attention over its pages, on a CPU."""

from __future__ import annotations

import sys
import tomllib
import weakref
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracle
import turboquant_vllm.vllm as plugin
from turboquant_vllm import PagedTQ4Cache
from turboquant_vllm.checks import PagedShape
from turboquant_vllm.cuda.variants import choose_variant
from turboquant_vllm.lengths import HostLengths
from turboquant_vllm.limits import MANY_PAIRS, MANY_ROWS
from turboquant_vllm.pieces import native_calls
from turboquant_vllm.vllm.batch import Kind, Run, plan_runs
from turboquant_vllm.vllm.dense import DenseLayer, reference_ops
from turboquant_vllm.vllm.layer import PagedLayer, chunks_of_all_kinds, codec_for, place_of
from turboquant_vllm.vllm.options import Options
from turboquant_vllm.vllm.previous import PreviousSlots
from vllm_cases import random_step, written_alone

DECODE, EXACT, CONTINUED = Kind

# (query tokens, keys): two decode; a prompt; a chunk behind a prefix whose total is the prompt's and whose length is another's;
# a prompt as long as that; a prefix hit of all but one token of a page; a one-token prompt.
# The same with sequences that begin groups of 64 tokens, and go on in begun ones.
MIXED = [(1, 40), (1, 65), (33, 33), (20, 33), (20, 20), (16, 48), (5, 5), (70, 140), (1, 129), (66, 66)]
KINDS = [DECODE, DECODE, EXACT, CONTINUED, EXACT, CONTINUED, EXACT, CONTINUED, DECODE, EXACT]


@pytest.fixture(params=["plain", "offsets", "scales"])
def layer(request, generator):
    """Makes layers of one of the formats."""

    def make(**options: object) -> PagedLayer:
        one = PagedLayer(4, 2, 64, 64**-0.5, key_offsets=request.param != "plain", **options)
        if request.param == "scales":
            one.use_key_scales(torch.exp(0.4 * torch.randn(2, 64, generator=generator)), torch.device("cpu"))
        return one

    return make


def attend(step, runs, k="own", v="own", *, at_once=False):
    """A step's attention behind its store, or with it in one call."""
    out = torch.full_like(step.q, float("nan"))
    if not at_once:
        step.store()
    k, v = (own if given == "own" else given for own, given in ((step.k, k), (step.v, v)))
    step.layer.attend(step.q, k, v, step.kv_cache, runs, out, **(step.where if at_once else {}))
    return out


class TestRuns:
    def plan(self, lengths, decode_len=1):
        starts = np.cumsum([0, *(tokens for tokens, _ in lengths)], dtype=np.int32)
        totals = np.array([keys for _, keys in lengths], dtype=np.int32)
        table = torch.arange(len(lengths), dtype=torch.int32)[:, None]
        return plan_runs(torch.from_numpy(starts), torch.from_numpy(totals), table, starts, totals, decode_len)

    @pytest.mark.parametrize("lengths", [MIXED, MIXED[::-1], MIXED[2:], MIXED[:1]])
    def test_each_sequence_is_in_one_run_in_order(self, lengths):
        runs = self.plan(lengths)
        assert torch.cat([run.block_table for run in runs]).flatten().tolist() == list(range(len(lengths)))
        kinds = [run.kind for run in runs for _ in range(len(run.seq_lens))]
        assert kinds == [dict(zip(MIXED, KINDS, strict=True))[one] for one in lengths]
        stop = 0
        for run in runs:
            assert run.tokens.start == stop
            stop = run.tokens.stop
            assert run.cu_seqlens_q[0] == 0
            assert run.cu_seqlens_q[-1] == stop - run.tokens.start
            assert run.cu_seqlens_q.diff().max() == run.max_query_len
            known = (None, None) if run.kind == DECODE else (tuple(run.seq_lens.tolist()), tuple(run.cu_seqlens_q.tolist()))
            assert (run.seq_lens_cpu, run.cu_seqlens_q_cpu) == known
        assert stop == sum(tokens for tokens, _ in lengths)

    def test_decoding_is_one_run_of_vllms_own_tensors(self):
        starts, totals = np.array([0, 1, 2, 2], dtype=np.int32), np.array([5, 9, 0], dtype=np.int32)
        cu_seqlens, seq_lens, table = torch.from_numpy(starts), torch.from_numpy(totals), torch.zeros(3, 4, dtype=torch.int32)
        (run,) = plan_runs(cu_seqlens, seq_lens, table, starts, totals, 1)
        assert run.kind == DECODE
        assert run.tokens == slice(0, 2)
        for own, given in ((run.cu_seqlens_q, cu_seqlens), (run.seq_lens, seq_lens), (run.block_table, table)):
            assert own.data_ptr() == given.data_ptr()
            assert own.shape == given.shape

    def test_an_empty_step_has_no_runs(self):
        assert self.plan([]) == []

    def test_drafts_decode_and_short_prompts_do_not(self):
        runs = self.plan([(4, 60), (4, 60), (2, 2), (4, 4), (3, 70)], decode_len=4)
        assert [(run.kind, len(run.seq_lens)) for run in runs] == [(DECODE, 2), (EXACT, 2), (DECODE, 1)]
        assert runs[0].max_query_len == 4

    def test_a_prompt_of_one_token_is_a_whole_prompt(self):
        runs = self.plan([(1, 9), (1, 1), (1, 2)])
        assert [(run.kind, len(run.seq_lens)) for run in runs] == [(DECODE, 1), (EXACT, 1), (DECODE, 1)]


class TestAttention:
    @pytest.mark.parametrize("pages", [1, 2])
    def test_mixed_batch(self, generator, pages, layer):
        one = layer()
        step = random_step(generator, MIXED, one, page_size=pages * max(16, place_of(64, one.key_offsets)[0]))
        out = attend(step, step.runs())
        for index, kind in enumerate(KINDS):
            step.check(out, index, exact=kind == EXACT)

    @pytest.mark.parametrize("numbers", [range(10), [2, 3, 0], [0, 8], [2], []])
    def test_a_store_and_attention_at_once(self, generator, numbers, layer):
        lengths, kinds = [MIXED[i] for i in numbers], [KINDS[i] for i in numbers]
        step = random_step(generator, [*lengths, (1, 2)][: max(len(numbers), 1)], layer())
        runs, before = step.runs() if numbers else [], step.kv_cache.clone()
        out = attend(step, runs, at_once=True)
        for index, kind in enumerate(kinds):
            step.check(out, index, exact=kind == EXACT)
        found = step.kv_cache.clone()
        step.kv_cache.copy_(before)
        step.store()
        assert torch.equal(found, step.kv_cache)
        assert not torch.equal(found, before)

    def test_exact_and_packed_differ_by_more_than_the_tolerance(self, generator, layer):
        step = random_step(generator, MIXED, layer())
        out = attend(step, step.runs())
        for index, kind in enumerate(KINDS):
            with pytest.raises(AssertionError):
                step.check(out, index, exact=kind != EXACT)

    @pytest.mark.parametrize("masks", [{"sliding_window": 9}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
    def test_masks(self, generator, masks, layer):
        step = random_step(generator, MIXED, layer(**masks))
        out = attend(step, step.runs())
        for index, kind in enumerate(KINDS):
            step.check(out, index, exact=kind == EXACT)

    def test_sinks_are_read_at_each_call_in_any_dtype(self, generator, layer):
        one = layer(sinks=torch.zeros(4, dtype=torch.bfloat16))
        step = random_step(generator, MIXED, one)
        attend(step, step.runs())
        one.sinks.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))  # as a server does that takes new weights
        out = attend(step, step.runs())
        for index, kind in enumerate(KINDS):
            step.check(out, index, exact=kind == EXACT)

    def test_without_exact_prefill_all_read_the_pages(self, generator, layer):
        step = random_step(generator, MIXED, layer(exact=None))
        out = attend(step, step.runs())
        for index in range(len(MIXED)):
            step.check(out, index, exact=False)

    def test_a_layer_that_shares_a_cache_reads_the_pages(self, generator, layer):
        step = random_step(generator, MIXED, layer())
        out = attend(step, step.runs(), k=None, v=None)
        for index in range(len(MIXED)):
            step.check(out, index, exact=False)

    def test_padding_has_no_slot_and_is_left_alone(self, generator, layer):
        step = random_step(generator, [(1, 30), (1, 65)], layer())
        runs = step.runs()
        padded = {name: torch.cat([getattr(step, name), torch.full_like(getattr(step, name), float("nan"))]) for name in "qkv"}
        before = step.kv_cache.clone()
        slots = torch.cat([step.slots, torch.tensor([-1, -1])])
        totals = torch.tensor([30, 65, 0, 0], dtype=torch.int32)
        starts = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
        table = torch.cat([step.block_table, torch.zeros_like(step.block_table)])
        previous = PreviousSlots(4, step.page_size, step.q.device).find(starts, totals, table, slots)
        step.layer.store(padded["k"], padded["v"], step.kv_cache, slots, previous)
        changed = (step.kv_cache != before).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) <= {int(slot) // step.page_size for slot in step.slots}
        out = torch.full_like(padded["q"], 7.0)
        step.layer.attend(padded["q"], padded["k"], padded["v"], step.kv_cache, runs, out)
        for index in range(2):
            step.check(out, index, exact=False)
        assert (out[2:] == 7.0).all()

    def test_decoding_sees_every_key_whatever_the_host_believes(self, generator, layer):
        step = random_step(generator, [(1, 70), (1, 33)], layer())
        lengths = np.array([60, 99], dtype=np.int32)  # drafts that were rejected, or accepted since
        seq_lens = torch.tensor([70, 33], dtype=torch.int32)
        out = attend(step, plan_runs(torch.from_numpy(step.starts), seq_lens, step.block_table, step.starts, lengths, 1))
        step.check(out, 0, exact=False)
        step.check(out, 1, exact=False)

    def test_verification_of_drafts(self, generator, layer):
        step = random_step(generator, [(4, 60), (4, 19), (6, 6)], layer())
        out = attend(step, step.runs(decode_len=4))
        for index, kind in enumerate([DECODE, DECODE, EXACT]):
            step.check(out, index, exact=kind == EXACT)

    @pytest.mark.parametrize("chunk", [1, 7, 16, 64])
    def test_chunks_without_exact_prefill(self, generator, chunk, layer):
        one = layer(exact=None)
        whole = random_step(generator, [(70, 70)], one)
        expected, keys = whole.expected(0, exact=False), whole.keys[0]
        codec = one.codec_on(keys.device)
        values = oracle.decompress(*codec.compress(whole.values[0]), codec.centroids, codec.rotation)
        for first in range(0, 70, chunk):
            stop = min(first + chunk, 70)
            part = type(whole)(**{**vars(whole), "lengths": [(stop - first, stop)]})
            for name in ("q", "k", "v", "slots"):
                setattr(part, name, getattr(whole, name)[first:stop])
            out = attend(part, part.runs())
            want = expected[first:stop]
            if one.key_offsets:  # a group's offset follows from the chunk that begins it
                read = written_alone(one, keys[:stop], range(chunk, stop, chunk))
                q, k, v = (x.transpose(0, 1)[None] for x in (part.q, read, values[:stop]))
                want = oracle.attention(q, k, v, one.sm_scale, True)[0][0].transpose(0, 1)
            torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


class TestDense:
    """Layers left dense: all of a step is one run, and every sequence sees exact keys and values."""

    def attend(self, layer, step):
        totals = torch.tensor([keys for _, keys in step.lengths], dtype=torch.int32)
        on_device = {"block_table": step.block_table, "seq_lens": totals, "cu_seqlens_q": torch.from_numpy(step.starts)}
        run = Run(kind=DECODE, tokens=slice(0, len(step.q)), max_query_len=70, **on_device)
        layer.store(step.k, step.v, step.kv_cache, step.slots)
        out = torch.full_like(step.q, float("nan"))
        layer.attend(step.q, None, None, step.kv_cache, [run], out)
        return out

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("masks", [{}, {"sliding_window": 9}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1, 2, 0])}])
    def test_mixed_batch(self, generator, masks, dtype):
        layer = DenseLayer(4, 2, 64, 64**-0.5, ops=reference_ops(), **masks)
        step = random_step(generator, MIXED, layer, page_size=32, dtype=dtype)
        out = self.attend(layer, step)
        for index in range(len(MIXED)):
            step.check(out, index, exact=True)

    def test_padding_has_no_slot(self, generator):
        layer = DenseLayer(4, 2, 64, 64**-0.5, ops=reference_ops())
        step = random_step(generator, [(3, 20)], layer)
        before = step.kv_cache.clone()
        layer.store(step.k, step.v, step.kv_cache, torch.full_like(step.slots, -1))
        assert torch.equal(before.isnan(), step.kv_cache.isnan())

    def test_another_cache_is_refused(self):
        layer = DenseLayer(4, 2, 64, 64**-0.5, ops=reference_ops())
        with pytest.raises(ValueError, match=r"\[num_pages, 2, page_size, 128\], got \[3, 2, 16, 72\]"):
            layer.attend(torch.zeros(1, 4, 64), None, None, torch.zeros(3, 2, 16, 72), [], torch.zeros(1, 4, 64))


class TestWarmUp:
    @pytest.mark.parametrize("head_dim", [64, 256])
    @pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
    def test_every_way_of_serving_a_chunk_is_taken(self, group, head_dim):
        def ways(tokens, keys):
            shape = PagedShape(tokens, 1, group, 1, head_dim, 16, 2000)
            calls = native_calls(shape, tokens, HostLengths([keys], [0, tokens]))
            native = {(choose_variant(head_dim, call.tokens * group, 227 << 10).row_tiles, call.pieces > 1) for call in calls}
            many = tokens * group >= MANY_ROWS
            return native, many, many and tokens * group * keys >= MANY_PAIRS

        taken = [ways(*chunk) for chunk in chunks_of_all_kinds(group, head_dim)]
        for tokens in range(2, 600):
            for keys in (tokens + 1, tokens + 300, 30_000):
                native, *rest = ways(tokens, keys)
                assert any(native <= have and rest == others for have, *others in taken), (tokens, keys)

    def test_it_runs(self, monkeypatch):
        monkeypatch.setattr("turboquant_vllm.vllm.layer.MANY_PAIRS", 1 << 12)  # fewer keys: nothing is compiled here
        one = PagedLayer(16, 1, 16, 0.25, sinks=torch.zeros(16))
        one.warm_up(64, torch.float32, torch.device("cpu"))
        plain = PagedLayer(16, 1, 16, 0.25, key_offsets=False)
        plain.warm_up(16, torch.float32, torch.device("cpu"))
        scaled = PagedLayer(16, 1, 16, 0.25)
        scaled.use_key_scales(torch.ones(1, 16), torch.device("cpu"))
        assert len({one.kind, plain.kind, scaled.kind, PagedLayer(16, 1, 16, 0.25).kind}) == 4


class TestPages:
    def test_a_page_is_136_bytes_a_token_and_head_and_nothing_is_copied(self):
        one = PagedLayer(32, 8, 128, 1.0, key_offsets=False)
        kv_cache = torch.zeros(3, 8, 16, 136, dtype=torch.uint8)
        pages = one.pages(kv_cache)
        assert pages.buffer.data_ptr() == kv_cache.data_ptr()
        assert pages.buffer.shape == (3, PagedTQ4Cache.page_bytes(16, 8, 128))
        assert one.pages(kv_cache) is pages
        assert one.pages(torch.zeros_like(kv_cache)).buffer.data_ptr() != kv_cache.data_ptr()

    def test_with_offsets_it_is_140_and_a_quarter(self):
        one = PagedLayer(32, 8, 128, 1.0)
        kv_cache = torch.zeros(3, 8, 2, 64 * 561 // 4, dtype=torch.uint8)
        pages = one.pages(kv_cache)
        assert pages.buffer.data_ptr() == kv_cache.data_ptr()
        assert pages.has_offsets
        assert pages.page_size == 128
        assert pages.buffer.shape == (3, PagedTQ4Cache.page_bytes(128, 8, 128, True))
        assert 512 * 8 * 128 / pages.buffer.shape[1] > 3.6  # bf16's bytes

    def test_pages_of_several_layers_in_one_block(self, generator, layer):
        step = random_step(generator, [(1, 20), (9, 9)], layer())
        num_pages, *page = step.kv_cache.shape
        blocks = torch.full((num_pages, 3, *page), 255, dtype=torch.uint8)
        blocks[:, 1] = step.kv_cache
        step.kv_cache = blocks[:, 1]
        out = attend(step, step.runs())
        step.check(out, 0, exact=False)
        step.check(out, 1, exact=True)

    def test_the_caches_memory_is_free_once_its_owner_lets_it_go(self, generator, layer):
        step = random_step(generator, [(1, 20)], layer())
        memory = np.full(step.kv_cache.numel() + 16, 255, dtype=np.uint8)
        at = -memory.ctypes.data % 16
        kv_cache = torch.from_numpy(memory)[at : at + step.kv_cache.numel()].view(step.kv_cache.shape)
        step.kv_cache = kv_cache.copy_(step.kv_cache)
        attend(step, step.runs())
        owner = weakref.ref(memory)
        del memory, kv_cache, step.kv_cache
        assert owner() is None

    def test_other_tensors_are_refused(self):
        plain, offsets = (PagedLayer(4, 2, 64, 1.0, key_offsets=x) for x in (False, True))
        with pytest.raises(ValueError, match=r"kv_cache must have shape \[num_pages, 2, page_size, 72\], got \[3, 2, 16, 64\]"):
            plain.pages(torch.zeros(3, 2, 16, 64, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"must have shape \[num_pages, 2, page_size / 64, 4752\], got \[3, 2, 64, 72\]"):
            offsets.pages(torch.zeros(3, 2, 64, 72, dtype=torch.uint8))
        with pytest.raises(ValueError, match="kv_cache must have contiguous pages"):
            plain.pages(torch.zeros(3, 16, 2, 72, dtype=torch.uint8).transpose(1, 2))

    def test_one_codec_for_all_layers_whatever_the_default_device(self):
        codec = codec_for(64, torch.device("cpu"))
        assert codec_for(64, torch.device("cpu")) is codec
        with torch.device("meta"):
            assert codec_for(32, torch.device("cpu")).rotation.device.type == "cpu"


class TestOptions:
    def test_defaults_and_values(self):
        assert Options.read({}) == Options.read(None) == Options(exact_prefill=True, key_offsets=True, key_scales=None)
        assert Options.read({"other": 1, "turboquant": {"exact_prefill": False}}) == Options(exact_prefill=False)
        assert Options.read({"turboquant": {"key_scales": "a/b.safetensors"}}) == Options(key_scales="a/b.safetensors")
        assert Options.read({"turboquant": {"key_offsets": False}}) == Options(key_offsets=False)

    def test_mistakes_are_named(self):
        with pytest.raises(ValueError, match="may have exact_prefill, key_offsets, key_scales, got exactprefill"):
            Options.read({"turboquant": {"exactprefill": True}})
        with pytest.raises(TypeError, match="exact_prefill must be true or false, got 'no'"):
            Options.read({"turboquant": {"exact_prefill": "no"}})
        with pytest.raises(TypeError, match="key_offsets must be true or false, got 1"):
            Options.read({"turboquant": {"key_offsets": 1}})
        with pytest.raises(TypeError, match="key_scales must be the path of a file, got 3"):
            Options.read({"turboquant": {"key_scales": 3}})
        with pytest.raises(ValueError, match=r"must not have dense_layers: vLLM .* --kv-cache-dtype-skip-layers .* got \[0\]"):
            Options.read({"turboquant": {"dense_layers": [0]}})
        with pytest.raises(ValueError, match="key_scales must come with key_offsets true, got false"):
            Options.read({"turboquant": {"key_scales": "a", "key_offsets": False}})
        with pytest.raises(TypeError, match="must be a dict of options, got str"):
            Options.read({"turboquant": "fast"})


class TestVersions:
    def test_the_entry_point_is_register(self):
        pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
        (target,) = pyproject["project"]["entry-points"]["vllm.general_plugins"].values()
        module, name = target.split(":")
        assert getattr(import_module(module), name) is plugin.register

    @pytest.mark.parametrize("supported", ["0.30.0", "0.31.2", "0.33.0", "0.33.1.dev4+g1234", "0.33.0rc1"])
    def test_supported(self, supported):
        assert plugin.why_not_version(supported) == ""

    @pytest.mark.parametrize("other", ["0.29.9", "0.34.0", "1.30.0", "dev"])
    def test_another_version_is_one_clear_line_and_no_error(self, other, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=other))
        with caplog.at_level("WARNING"):
            plugin.register()
        (record,) = caplog.records
        assert record.getMessage() == (
            f"--attention-backend CUSTOM is not available: turboquant-vllm supports vLLM 0.30 to 0.33, got {other}"
        )
