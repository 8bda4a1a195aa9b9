"""Specifications, layers and builders of the vLLM plugin, for tests against vLLM's own classes."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
)

from turboquant_vllm.vllm.backend import TQ4Backend
from turboquant_vllm.vllm.impl import Settings
from turboquant_vllm.vllm.layer import exact_attention
from turboquant_vllm.vllm.metadata import TQ4MetadataBuilder
from turboquant_vllm.vllm.options import Options

FORMATS = {"plain": {"key_offsets": False}, "offsets": {}}


@contextlib.contextmanager
def configured(**options):
    """vLLM with these options of the plugin."""
    config = VllmConfig(device_config=DeviceConfig("cpu"), additional_config={"turboquant": options})
    with set_current_vllm_config(config):
        yield config


@pytest.fixture(autouse=True)
def no_layers_yet(monkeypatch):
    monkeypatch.setattr("turboquant_vllm.vllm.impl._latest", Settings(Options()))


@pytest.fixture(params=FORMATS)
def form(request):
    """The plugin's options for one of its formats, in force."""
    with configured(**FORMATS[request.param]):
        yield request.param


def spec(kind=FullAttentionSpec, **sizes):
    sizes = {"block_size": 16, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16, **sizes}
    return kind(**sizes)


def builder(one, num_speculative_tokens=0, cls=TQ4MetadataBuilder, **options):
    drafts = SimpleNamespace(num_speculative_tokens=num_speculative_tokens, parallel_drafting=False)
    config = SimpleNamespace(
        speculative_config=drafts if num_speculative_tokens else None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        use_v2_model_runner=True,
        model_config=None,
        additional_config={},
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=16),
        compilation_config=SimpleNamespace(static_forward_context={"layer": SimpleNamespace(impl=make_impl(**options))}),
    )
    return cls(one, ["layer"], config, torch.device("cpu"))


def make_impl(**options):
    sizes = {"num_heads": 4, "head_size": 64, "scale": 64**-0.5, "num_kv_heads": 2}
    impl = TQ4Backend.get_impl_cls()(**{**sizes, **options})
    if impl.layer.exact is not None:
        impl.layer.exact = exact_attention  # on a GPU vLLM's FlashAttention, which takes no tensors on a CPU
    return impl
