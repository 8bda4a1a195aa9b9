"""The vLLM plugin against vLLM's own classes, of whichever supported release is installed; no GPU, no compiled extension."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", exc_type=ImportError)

import vllm
from vllm.config import DeviceConfig, VllmConfig, cache, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    SlidingWindowSpec,
    create_kv_cache_views,
    is_quantized_kv_cache,
)

import oracle
import turboquant_vllm.vllm as plugin
from turboquant_vllm.vllm.backend import TQ4Backend
from turboquant_vllm.vllm.batch import Kind
from turboquant_vllm.vllm.layer import exact_attention
from turboquant_vllm.vllm.metadata import TQ4MetadataBuilder
from vllm_cases import random_step

pytestmark = pytest.mark.vllm

MIXED = [(1, 40), (1, 17), (33, 33), (20, 33), (20, 20), (16, 48), (5, 5)]
EXACT = [False, False, True, False, True, False, True]


def spec(kind=FullAttentionSpec, **sizes):
    sizes = {"block_size": 16, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16, **sizes}
    return kind(**sizes)


def builder(one, num_speculative_tokens=0, cls=TQ4MetadataBuilder):
    drafts = SimpleNamespace(num_speculative_tokens=num_speculative_tokens, parallel_drafting=False)
    config = SimpleNamespace(
        speculative_config=drafts if num_speculative_tokens else None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        use_v2_model_runner=True,
        compilation_config=SimpleNamespace(static_forward_context={"layer": SimpleNamespace(impl=make_impl())}),
    )
    return cls(one, ["layer"], config, torch.device("cpu"))


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


def make_impl(**options):
    sizes = {"num_heads": 4, "head_size": 64, "scale": 64**-0.5, "num_kv_heads": 2}
    impl = TQ4Backend.get_impl_cls()(**{**sizes, **options})
    if impl.layer.exact is not None:
        impl.layer.exact = exact_attention  # on a GPU vLLM's FlashAttention, which takes no tensors on a CPU
    return impl


class TestRegistration:
    def test_custom_is_this_backend(self):
        plugin.register()
        assert AttentionBackendEnum.CUSTOM.get_class() is TQ4Backend
        assert AttentionBackendEnum[TQ4Backend.get_name()] is AttentionBackendEnum.CUSTOM

    @pytest.mark.parametrize("find", [TQ4Backend.get_impl_cls, TQ4Backend.get_builder_cls])
    def test_nothing_is_abstract(self, find):
        assert not inspect.isabstract(find())

    def test_cache_dtype(self, caplog):
        if not hasattr(cache, "register_kv_cache_dtype"):
            pytest.skip("this release has no cache dtypes but its own")
        plugin.register()
        plugin.register()  # vLLM may load plugins more than once
        assert "already exists" not in caplog.text
        assert cache.CacheConfig(cache_dtype="tq4").cache_dtype == "tq4"
        assert not is_quantized_kv_cache("tq4")  # by a kernel of vLLM's own
        assert kv_cache_dtype_str_to_dtype("tq4", None) is torch.uint8
        assert AttentionBackend.supports_kv_cache_dtype("auto")
        assert not AttentionBackend.supports_kv_cache_dtype("tq4")

    def test_this_release_is_supported(self):
        assert plugin.why_not_version(vllm.__version__) == ""


class TestSizes:
    @pytest.mark.parametrize("kind", [FullAttentionSpec, SlidingWindowSpec])
    @pytest.mark.parametrize(("head_size", "at_least"), [(64, 3.55), (80, 3.63), (128, 3.76), (256, 3.87)])
    @pytest.mark.parametrize("block_size", [16, 64])
    def test_blocks_against_bf16(self, kind, head_size, at_least, block_size):
        extra = {"sliding_window": 100} if kind is SlidingWindowSpec else {}
        dense = spec(kind, head_size=head_size, block_size=block_size, **extra)
        packed = TQ4Backend.customize_spec(dense)
        assert type(packed) is kind
        assert packed.page_size_bytes == 8 * block_size * (head_size + 8)
        memory = 10**9
        assert (memory // packed.page_size_bytes) / (memory // dense.page_size_bytes) >= at_least
        assert TQ4Backend.customize_spec(packed) == packed

    def test_named_dtype(self):
        packed = TQ4Backend.customize_spec(spec(dtype=torch.uint8))
        assert packed == TQ4Backend.customize_spec(spec())

    def test_values_of_another_length_are_refused(self):
        with pytest.raises(ValueError, match="head sizes 128 and 64"):
            TQ4Backend.customize_spec(spec(head_size_v=64))

    def test_the_builder_refuses_another_cache(self):
        with pytest.raises(ValueError, match="must have 136 bytes a token and head, got 512"):
            builder(spec())

    @pytest.mark.parametrize("block_size", [16, 48, 512])
    def test_block_sizes(self, block_size):
        assert TQ4Backend.supports_block_size(block_size)
        assert not TQ4Backend.supports_block_size(block_size + 8)


class TestValidation:
    def reasons(self, **changes):
        given = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None, **changes}
        selector = AttentionSelectorConfig(**given)
        return TQ4Backend.validate_configuration(device_capability=DeviceCapability(9, 0), **selector._asdict())

    @pytest.mark.parametrize(
        "accepted",
        [
            {},
            {"dtype": torch.float16},
            {"kv_cache_dtype": "tq4"},
            {"has_sink": True},
            {"has_sliding_window": True},
            {"block_size": 64},
        ]
        + [{"head_size": size} for size in (64, 80, 96, 192, 256)],
    )
    def test_accepted(self, accepted):
        assert self.reasons(**accepted) == []

    @pytest.mark.parametrize(
        ("refused", "reason"),
        [
            ({"use_mla": True}, "MLA"),
            ({"head_size": 72}, "head_size"),
            ({"head_size": 512}, "head_size"),
            ({"dtype": torch.float32}, "dtype"),
            ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
            ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype"),
            ({"block_size": 24}, "block_size"),
            ({"use_sparse": True}, "sparse"),
            ({"use_mm_prefix": True}, "multimodal"),
            ({"use_per_head_quant_scales": True}, "quant scales"),
            ({"attn_type": AttentionType.ENCODER_ONLY}, "attention type"),
            ({"attn_type": AttentionType.ENCODER_DECODER}, "attention type"),
            ({"use_non_causal": True}, "non-causal"),
            ({"use_batch_invariant": True}, "batch invariance"),
            ({"use_kv_connector": True}, "KV connector"),
            ({"use_pcp": True}, "PCP"),
            ({"use_dcp": True}, "DCP"),
            ({"use_adaptive_verification": True}, "mismatch"),
        ],
    )
    def test_refused(self, refused, reason):
        (only,) = self.reasons(**refused)
        assert reason in only

    def test_what_only_the_layer_knows(self):
        with pytest.raises(ValueError, match="no ALiBi"):
            make_impl(alibi_slopes=[1.0] * 4)
        with pytest.raises(ValueError, match="serves decoders"):
            make_impl(attn_type=AttentionType.ENCODER_ONLY)
        with pytest.raises(TypeError, match="chunk_lookback"):
            make_impl(chunk_lookback=3)

    @pytest.mark.parametrize("dtype", ["auto", "tq4"])
    def test_layers_to_be_skipped(self, dtype):
        config = VllmConfig(device_config=DeviceConfig("cpu"))
        config.cache_config.kv_cache_dtype_skip_layers = ["0", "31"]
        with set_current_vllm_config(config):
            if dtype == "auto":
                with pytest.raises(ValueError, match="got kv_cache_dtype_skip_layers 0, 31; leave layers"):
                    make_impl(kv_cache_dtype=dtype)
            else:
                make_impl(kv_cache_dtype=dtype)


class TestMetadata:
    packed = TQ4Backend.customize_spec(spec(num_kv_heads=2, head_size=64))

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
    packed = TQ4Backend.customize_spec(spec(num_kv_heads=2, head_size=64))

    def run(self, impl, step, kv_cache, padded=0, drafts=0):
        """One step as vLLM's attention layer makes it, tokens padded for a graph."""
        metadata = builder(self.packed, drafts).build(0, common_metadata(step, padded))

        def pad(x, value):
            return torch.cat([x, x.new_full((padded, *x.shape[1:]), value)])

        query, key, value = (pad(x, float("nan")) for x in (step.q, step.k, step.v))
        output = torch.full_like(query, 7.0)
        impl.do_kv_cache_update(None, key, value, kv_cache, pad(step.slots, -1))
        assert impl.forward(None, query, key, value, kv_cache, metadata, output=output) is output
        assert (output[len(step.q) :] == 7.0).all()
        return output[: len(step.q)]

    @pytest.mark.parametrize("layout", TQ4Backend.supported_kv_cache_layouts())
    def test_mixed_batch_in_vllms_own_views(self, generator, layout):
        impl = make_impl()
        step = random_step(generator, MIXED, impl.layer)
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
        step = random_step(generator, [(4, 60), (4, 19)], impl.layer)
        out = self.run(impl, step, step.kv_cache, padded=3, drafts=3)
        step.check(out, 0, exact=False)
        step.check(out, 1, exact=False)

    def test_sinks_are_those_of_the_model(self, generator):
        sinks = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16), requires_grad=False)
        impl = make_impl(sinks=sinks, sliding_window=9, logits_soft_cap=0.0)
        sinks.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        assert impl.layer.softcap is None
        step = random_step(generator, MIXED, impl.layer)
        out = self.run(impl, step, step.kv_cache)
        for index, exact in enumerate(EXACT):
            step.check(out, index, exact=exact)

    def test_a_shared_cache_is_read(self, generator):
        impl = make_impl(kv_sharing_target_layer_name="other")
        step = random_step(generator, MIXED, impl.layer)
        out = self.run(impl, step, step.kv_cache)
        for index in range(len(MIXED)):
            step.check(out, index, exact=False)

    def test_fast_prefill_of_layers_that_share_a_cache(self, generator):
        impl = make_impl(kv_sharing_target_layer_name="other")
        step = random_step(generator, MIXED, impl.layer)
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

    def test_options_come_from_the_configuration(self, generator):
        options = {"turboquant": {"exact_prefill": False}}
        with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"), additional_config=options)):
            impl = make_impl()
        step = random_step(generator, MIXED, impl.layer)
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
