"""The vLLM plugin's layers and metadata against vLLM's own classes, of whichever supported release is installed; no GPU."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", exc_type=ImportError)

from vllm.config import DeviceConfig, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend
from vllm.v1.kv_cache_interface import (
    KVCacheLayout,
    KVCacheTensor,
    create_kv_cache_views,
)

import oracle
from turboquant_vllm.vllm.backend import TQ4Backend
from turboquant_vllm.vllm.batch import Kind
from vllm_backend_cases import FORMATS, builder, configured, form, make_impl, no_layers_yet, spec  # noqa: F401  (fixtures)
from vllm_cases import random_step

pytestmark = pytest.mark.vllm

MIXED = [(1, 40), (1, 65), (33, 33), (20, 33), (20, 20), (16, 48), (5, 5), (70, 140)]
EXACT = [False, False, True, False, True, False, True, False]


def common_metadata(step, padded=0):
    """vLLM's description of the step, with ``padded`` sequences more than there are, as a CUDA graph has them."""
    starts = torch.from_numpy(step.starts)
    starts = torch.cat([starts, starts[-1:].expand(padded)])
    lengths = torch.tensor([keys for _, keys in step.lengths] + [0] * padded, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=torch.cat([step.block_table, torch.zeros(padded, step.block_table.shape[1], dtype=torch.int32)]),
        slot_mapping=step.slots,
    )


class TestMetadata:
    @pytest.fixture(autouse=True)
    def packed(self, form):  # noqa: F811
        self.packed = TQ4Backend.customize_spec(spec(num_kv_heads=2, head_size=64, block_size=64))

    def test_graphs_of_uniform_batches(self):
        plain, drafting = builder(self.packed), builder(self.packed, num_speculative_tokens=3)
        assert (plain.reorder_batch_threshold, drafting.reorder_batch_threshold) == (1, 4)
        assert plain.get_cudagraph_support(plain.vllm_config, self.packed) == AttentionCGSupport.UNIFORM_BATCH

    def test_a_captured_batch_is_one_run(self, generator):
        step = random_step(generator, [(4, 4), (4, 4)], make_impl().layer)
        (run,) = builder(self.packed, num_speculative_tokens=3).build_for_cudagraph_capture(common_metadata(step)).runs
        assert run.kind == Kind.DECODE
        assert run.max_query_len == 4
        assert run.tokens == slice(0, 8)
        with pytest.raises(ValueError, match="up to 1 query tokens, got 4"):
            builder(self.packed).build_for_cudagraph_capture(common_metadata(step))

    @pytest.mark.parametrize("causal", [False, torch.tensor([True, False])])
    def test_only_causal_steps(self, generator, causal):
        step = random_step(generator, [(1, 4), (1, 4)], make_impl().layer)
        with pytest.raises(ValueError, match="attends causally"):
            builder(self.packed).build(0, replace(common_metadata(step), causal=causal))


class TestForward:
    @pytest.fixture(autouse=True)
    def packed(self, form):  # noqa: F811
        self.packed = TQ4Backend.customize_spec(spec(num_kv_heads=2, head_size=64, block_size=64))

    def run(self, impl, step, kv_cache, padded=0, drafts=0):
        """One step as vLLM's attention layer makes it, tokens padded for a graph."""
        metadata = builder(self.packed, drafts).build(0, common_metadata(step, padded))

        def pad(x, value):
            return torch.cat([x, x.new_full((padded, *x.shape[1:]), value)])

        query, key, value = (pad(x, float("nan")) for x in (step.q, step.k, step.v))
        output = torch.full_like(query, 7.0)
        slots, config, layer = {"layer": pad(step.slots, -1)}, VllmConfig(device_config=DeviceConfig("cpu")), SimpleNamespace()
        layer.layer_name = "layer"
        with set_forward_context({"layer": metadata}, config, slot_mapping=slots):
            if impl.shares_cache:
                impl.do_kv_cache_update(layer, key, value, kv_cache, slots["layer"])
            assert impl.forward(layer, query, key, value, kv_cache, metadata, output=output) is output
        assert (output[len(step.q) :] == 7.0).all()
        return output[: len(step.q)]

    @pytest.mark.parametrize("layout", TQ4Backend.supported_kv_cache_layouts())
    def test_mixed_batch_in_vllms_own_views(self, generator, layout):
        impl = make_impl()
        step = random_step(generator, MIXED, impl.layer, page_size=64)
        num_blocks, page = len(step.kv_cache), self.packed.page_size_bytes
        raw = torch.full((3 * num_blocks * page,), -1, dtype=torch.int8)
        names = ["a", "b", "c"]
        layer_stride, block_stride = (num_blocks * page, page) if layout is KVCacheLayout.LBHNC else (page, 3 * page)
        tensor = kv_cache_tensor(raw.numel(), names, layer_stride, block_stride)
        views = create_kv_cache_views(raw, self.packed, num_blocks, layout, tensor)
        assert views[1].shape == step.kv_cache.shape
        views[1].copy_(step.kv_cache)
        out = self.run(impl, step, views[1])
        for index, exact in enumerate(EXACT):
            step.check(out, index, exact=exact)
        assert (views[0] == 255).all()
        assert (views[2] == 255).all()

    def test_padded_verification(self, generator):
        impl = make_impl()
        step = random_step(generator, [(4, 67), (4, 19)], impl.layer, page_size=64)
        out = self.run(impl, step, step.kv_cache, padded=3, drafts=3)
        step.check(out, 0, exact=False)
        step.check(out, 1, exact=False)

    def test_sinks_are_those_of_the_model(self, generator):
        sinks = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)
        impl = make_impl(sinks=sinks, sliding_window=9, logits_soft_cap=0.0)
        sinks.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        assert impl.layer.softcap is None
        step = random_step(generator, MIXED, impl.layer, page_size=64)
        out = self.run(impl, step, step.kv_cache)
        for index, exact in enumerate(EXACT):
            step.check(out, index, exact=exact)

    def test_a_shared_cache_is_read(self, generator):
        impl = make_impl(kv_sharing_target_layer_name="other")
        step = random_step(generator, MIXED, impl.layer, page_size=64)
        out = self.run(impl, step, step.kv_cache)
        for index in range(len(MIXED)):
            step.check(out, index, exact=False)

    def test_fast_prefill_of_layers_that_share_a_cache(self, generator):
        impl = make_impl(kv_sharing_target_layer_name="other")
        step = random_step(generator, MIXED, impl.layer, page_size=64)
        step.store()
        last = torch.from_numpy(step.starts[1:]).int() - 1
        fast = create_fast_prefill_custom_backend("FastPrefill", TQ4Backend).get_builder_cls()
        step_of_last = replace(common_metadata(step), logits_indices_padded=last, num_logits_indices=len(last))
        if "max_logits_per_req" in inspect.signature(CommonAttentionMetadata).parameters:
            step_of_last.max_logits_per_req = 1
        metadata = builder(self.packed, cls=fast).build(0, step_of_last)
        output = torch.empty(len(last), 4, 64)
        impl.forward(None, step.q[last], step.k, step.v, step.kv_cache, metadata, output=output)
        for index in range(len(MIXED)):
            oracle.assert_close(output[index : index + 1], step.expected(index, exact=False)[-1:])

    def test_options_come_from_the_configuration(self, generator, form):  # noqa: F811
        with configured(exact_prefill=False, **FORMATS[form]):
            impl = make_impl()
        step = random_step(generator, MIXED, impl.layer, page_size=64)
        out = self.run(impl, step, step.kv_cache)
        for index in range(len(MIXED)):
            step.check(out, index, exact=False)

    def test_while_memory_is_measured_the_result_is_zeros(self):
        impl = make_impl()
        query, output = torch.randn(5, 4, 64), torch.full((5, 4, 64), float("nan"))
        assert (impl.forward(None, query, None, None, torch.tensor([]), None, output=output) == 0).all()

    def test_quantized_output_is_refused(self):
        with pytest.raises(NotImplementedError, match="output_scale"):
            make_impl().forward(None, None, None, None, None, None, output=None, output_scale=torch.ones(1))


def kv_cache_tensor(size, names, layer_stride, block_stride):
    fields = inspect.signature(KVCacheTensor).parameters
    given = {"size": size, "layers": names, "offset": 0, "layer_stride": layer_stride, "block_stride": block_stride}
    return KVCacheTensor(**{name: value for name, value in given.items() if name in fields})
