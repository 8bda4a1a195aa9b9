"""What the vLLM plugin tells vLLM of itself, against vLLM's own classes: names, sizes, what is served and what refused."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", exc_type=ImportError)

import vllm
from vllm.config import DeviceConfig, KVTransferConfig, VllmConfig, cache, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    is_quantized_kv_cache,
)

import turboquant_vllm.vllm as plugin
from turboquant_vllm import PagedTQ4Cache
from turboquant_vllm.vllm.backend import TQ4Backend
from vllm_backend_cases import builder, configured, form, make_impl, no_layers_yet, spec  # noqa: F401  (fixtures)

pytestmark = pytest.mark.vllm


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
        with configured(key_offsets=False):
            self.check_blocks(kind, head_size, at_least, block_size, 8 * block_size * (head_size + 8))

    @pytest.mark.parametrize("kind", [FullAttentionSpec, SlidingWindowSpec])
    @pytest.mark.parametrize(("head_size", "at_least"), [(64, 3.44), (80, 3.52), (128, 3.65), (256, 3.75)])
    @pytest.mark.parametrize("block_size", [64, 128, 512])
    def test_blocks_of_keys_with_offsets(self, kind, head_size, at_least, block_size):
        page = PagedTQ4Cache.page_bytes(64, 8, head_size, True) * (block_size // 64)
        self.check_blocks(kind, head_size, at_least, block_size, page)

    def check_blocks(self, kind, head_size, at_least, block_size, page):
        extra = {"sliding_window": 100} if kind is SlidingWindowSpec else {}
        dense = spec(kind, head_size=head_size, block_size=block_size, **extra)
        packed = TQ4Backend.customize_spec(dense)
        assert type(packed) is kind
        assert packed.page_size_bytes == page
        memory = 10**9
        assert (memory // packed.page_size_bytes) / (memory // dense.page_size_bytes) >= at_least
        assert TQ4Backend.customize_spec(packed) == packed

    @pytest.mark.parametrize("head_size", [16, 64, 128])
    def test_one_token_alone_is_rounded_down(self, head_size):
        """vLLM asks so what windows and other states take; a block is not smaller than it believes."""
        one = TQ4Backend.customize_spec(spec(head_size=head_size, block_size=1))
        block = TQ4Backend.customize_spec(spec(head_size=head_size, block_size=64))
        exact = block.page_size_bytes / 64
        assert one.page_size_bytes <= exact * (1 if head_size > 16 else 1.02)
        assert one.page_size_bytes > 0.97 * exact
        assert TQ4Backend.get_supported_kernel_block_sizes(one) == [64, 128, 192, 256]

    def test_named_dtype(self, form):  # noqa: F811
        packed = TQ4Backend.customize_spec(spec(dtype=torch.uint8, block_size=64))
        assert packed == TQ4Backend.customize_spec(spec(block_size=64))

    def test_the_format_is_the_configurations_or_the_last_layers(self):
        """vLLM asks for the caches of layers outside of any configuration."""
        with configured(key_offsets=False):
            make_impl()
            assert TQ4Backend.get_supported_kernel_block_sizes()[0] == 16
        plain = TQ4Backend.customize_spec(spec())
        assert plain.page_size_bytes == 8 * 16 * 136
        make_impl()
        assert TQ4Backend.get_supported_kernel_block_sizes()[0] == 64
        assert TQ4Backend.get_supported_kernel_block_sizes(plain)[0] == 16  # a cache's own format is known by its size
        with configured(key_offsets=False):
            packed = spec(block_size=64, state_content_bytes=64 * 561 // 4, tokens_per_state=64)
            assert TQ4Backend.get_supported_kernel_block_sizes(packed)[0] == 64

    def test_values_of_another_length_are_refused(self):
        with pytest.raises(ValueError, match="head sizes 128 and 64"):
            TQ4Backend.customize_spec(spec(head_size_v=64))

    def test_the_builder_refuses_another_cache(self):
        with pytest.raises(ValueError, match="must have 8976 bytes for 64 tokens of a head, got 512 for 1"):
            builder(spec(block_size=64))
        with configured(key_offsets=False), pytest.raises(ValueError, match="136 bytes for 1 tokens of a head, got 512 for 1"):
            builder(spec())
        with configured(key_offsets=False):
            plain = TQ4Backend.customize_spec(spec(block_size=64))
        with pytest.raises(ValueError, match="must have 8976 bytes for 64 tokens of a head, got 136 for 1"):
            builder(plain)

    @pytest.mark.parametrize("block_size", [16, 48, 512])
    def test_block_sizes(self, block_size):
        with configured(key_offsets=False):
            assert TQ4Backend.supports_block_size(block_size)
            assert not TQ4Backend.supports_block_size(block_size + 8)
            assert TQ4Backend.get_preferred_block_size(16) == 16

    @pytest.mark.parametrize("block_size", [64, 192, 512])
    def test_block_sizes_with_offsets(self, block_size):
        assert TQ4Backend.supports_block_size(block_size)
        assert not TQ4Backend.supports_block_size(block_size + 16)
        assert TQ4Backend.get_preferred_block_size(16) == 64  # what vLLM takes where none is asked for
        with pytest.raises(ValueError, match=r"a multiple of 64, got 48: set --block-size 64 or leave"):
            TQ4Backend.customize_spec(spec(block_size=48))


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
            {"use_kv_connector": True},
        ]
        + [{"head_size": size} for size in (64, 80, 96, 192, 256, 512)],
    )
    def test_accepted(self, accepted):
        assert self.reasons(**accepted) == []

    @pytest.mark.parametrize(
        ("refused", "reason"),
        [
            ({"use_mla": True}, "MLA"),
            ({"head_size": 72}, "head_size"),
            ({"head_size": 528}, "head_size"),
            ({"dtype": torch.float32}, "dtype"),
            ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
            ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype"),
            ({"use_sparse": True}, "sparse"),
            ({"use_mm_prefix": True}, "multimodal"),
            ({"use_per_head_quant_scales": True}, "quant scales"),
            ({"attn_type": AttentionType.ENCODER_ONLY}, "attention type"),
            ({"attn_type": AttentionType.ENCODER_DECODER}, "attention type"),
            ({"use_non_causal": True}, "non-causal"),
            ({"use_batch_invariant": True}, "batch invariance"),
            ({"use_pcp": True}, "PCP"),
            ({"use_dcp": True}, "DCP"),
            ({"use_adaptive_verification": True}, "mismatch"),
        ],
    )
    def test_refused(self, refused, reason):
        (only,) = self.reasons(**refused)
        assert reason in only

    @pytest.mark.parametrize(
        ("key_offsets", "block_size", "what_to_do"),
        [
            (True, 16, "multiple of 64, got 16: set --block-size 64 or leave it out"),
            (True, 24, "a multiple of 16, got 24"),
            (False, 24, "a multiple of 16, got 24"),
        ],
    )
    def test_refused_block_sizes(self, key_offsets, block_size, what_to_do):
        with configured(key_offsets=key_offsets):
            short, long = self.reasons(block_size=block_size)
        assert short == "block_size not supported"
        assert what_to_do in long

    @pytest.mark.parametrize(
        ("connector", "several", "refused"),
        [
            ("OffloadingConnector", [], ""),
            ("SimpleCPUOffloadConnector", [], ""),
            ("NixlConnector", [], ""),
            ("MultiConnector", ["NixlConnector", "OffloadingConnector"], ""),
            ("LMCacheConnectorV1", [], "LMCacheConnectorV1"),
            ("ExampleConnector", [], "ExampleConnector"),
            ("MultiConnector", ["NixlConnector", "LMCacheConnectorV1", "MooncakeConnector"], "LMCacheConnectorV1, Mooncake"),
        ],
    )
    def test_connectors(self, connector, several, refused):
        extra = {"connectors": [{"kv_connector": one, "kv_role": "kv_both"} for one in several]}
        with configured() as config:
            config.kv_transfer_config = KVTransferConfig(
                kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
            )
            reasons = self.reasons(use_kv_connector=True)
        assert len(reasons) == bool(refused)
        assert all(f"of these; got {refused}" in reason for reason in reasons)

    def test_what_only_the_layer_knows(self):
        with pytest.raises(ValueError, match="no ALiBi"):
            make_impl(alibi_slopes=[1.0] * 4)
        with pytest.raises(ValueError, match="serves decoders"):
            make_impl(attn_type=AttentionType.ENCODER_ONLY)
        with pytest.raises(TypeError, match="chunk_lookback"):
            make_impl(chunk_lookback=3)

    def test_a_file_of_scales_that_would_be_taken_for_weights(self, tmp_path):
        with configured() as config:
            config.model_config = SimpleNamespace(model=str(tmp_path))
            make_impl()
            (tmp_path / "model.safetensors").touch()
            (tmp_path / "turboquant.safetensors").touch()
            with pytest.raises(
                ValueError, match=r"without a model.safetensors.index.json to tell them apart: expected the index"
            ):
                make_impl()
            (tmp_path / "model.safetensors.index.json").touch()
            make_impl()

    @pytest.mark.parametrize("dtype", ["auto", "tq4"])
    def test_layers_to_be_skipped(self, dtype):
        config = VllmConfig(device_config=DeviceConfig("cpu"))
        config.cache_config.kv_cache_dtype_skip_layers, config.cache_config.cache_dtype = ["0", "31"], dtype
        with set_current_vllm_config(config):
            if dtype == "auto":
                with pytest.raises(ValueError, match="kv_cache_dtype_skip_layers 0, 31 must come with --kv-cache-dtype tq4"):
                    make_impl(kv_cache_dtype=dtype)
            else:
                make_impl(kv_cache_dtype=dtype)
