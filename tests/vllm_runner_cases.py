"""As much of vLLM's own GPU model runner (V2, from 0.33 on) as attention sees, on a CPU: for the tests of the vLLM plugin."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", exc_type=ImportError)
pytest.importorskip("einops")  # vLLM's attention layer imports it

import vllm
from vllm.platforms import current_platform

if current_platform.is_cuda_alike():
    pytest.skip("vLLM's operators for a GPU take no tensors on a CPU", allow_module_level=True)
if tuple(map(int, vllm.__version__.split(".")[:2])) < (0, 33):
    pytest.skip("these pieces have other names before vLLM 0.33", allow_module_level=True)

from vllm.config import CacheConfig, DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

import turboquant_vllm.vllm as plugin
from turboquant_vllm.vllm.backend import TQ4Backend

MAX_REQS, MAX_TOKENS, MAX_LEN, WINDOW = 8, 256, 256, 40
CPU = torch.device("cpu")


def hf_config(layers):
    """As much of a model's configuration as a file of scales is compared with."""
    sizes = {"hidden_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SimpleNamespace(model_type="llama", head_dim=64, rope_theta=1e4, **sizes)


class Runner:
    """As much of vLLM's runner as attention sees: layers of ``kinds`` (head dimension, sliding window) and their caches.

    ``dense``: what --kv-cache-dtype-skip-layers has. ``memory``: bytes of the cache.
    """

    def __init__(
        self, kinds, block_size=64, drafts=0, layout=None, sharing=None, dense=(), memory=2**21, is_hybrid=False, **options
    ):
        plugin.register()
        dtypes = {"cache_dtype": "tq4", "kv_cache_dtype_skip_layers": [str(one) for one in dense]} if dense else {}
        self.config = VllmConfig(
            device_config=DeviceConfig("cpu"),
            cache_config=CacheConfig(block_size=block_size, **dtypes),
            additional_config={"turboquant": options},
        )
        self.sharing = sharing or {}
        self.config.model_config = SimpleNamespace(
            max_model_len=MAX_LEN,
            hf_config=hf_config(len(kinds)),
            dtype=torch.bfloat16,
            is_mm_prefix_lm=False,
            model="no folder",
            revision=None,
            is_hybrid=is_hybrid,
            use_mla=False,
            get_num_kv_heads=lambda parallel_config: 2,
            get_head_size=lambda: kinds[0][0],
        )
        self.config.scheduler_config.disable_hybrid_kv_cache_manager = False
        self.config.scheduler_config.max_num_seqs = MAX_REQS
        self.config.cache_config.kv_cache_layout = layout
        if drafts:
            self.config.speculative_config = SimpleNamespace(
                num_speculative_tokens=drafts, parallel_drafting=False, enable_adaptive_verification=False
            )
        with set_current_vllm_config(self.config):
            self.layers = [self.layer(index, *kind) for index, kind in enumerate(kinds)]
        Platform.update_block_size_for_backend(self.config)  # as an executor does, once the layers are there
        specs = get_kv_cache_spec(self.config)
        names = [layout.name for layout in get_supported_kv_cache_layouts([TQ4Backend])]
        resolve_kv_cache_layout(self.config, [names], specs.values())
        cache_groups = get_kv_cache_groups(self.config, specs)
        self.cache = get_kv_cache_config_from_groups(self.config, cache_groups, available_memory=memory)
        self.groups, self.support, sizes = init_attn_backend(self.cache, self.config, CPU)
        self.context = self.config.compilation_config.static_forward_context
        every = [group for groups in self.groups for group in groups]
        init_kv_cache(self.context, self.cache, CPU, sizes, self.config, attn_groups=every)
        self.buffers = InputBuffers(MAX_REQS, MAX_TOKENS, CPU)
        self.tables = [torch.zeros(MAX_REQS, 32, dtype=torch.int32) for _ in self.groups]
        self.slots = torch.full((len(self.groups), MAX_TOKENS), -1, dtype=torch.int64)

    def layer(self, index, head_dim, window):
        return Attention(
            4,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=2,
            cache_config=self.config.cache_config,
            per_layer_sliding_window=window,
            prefix=self.name(index),
            attn_backend=TQ4Backend,
            kv_sharing_target_layer_name=self.name(self.sharing[index]) if index in self.sharing else None,
        )

    def name(self, index):
        return f"model.layers.{index}.self_attn.attn"

    def group_of(self, layer):
        return next(index for index, groups in enumerate(self.groups) for one in groups if layer.layer_name in one.layer_names)

    # What vLLM's functions ask of a model state and of block tables.
    cp_size, supports_mm_inputs, encoder_cache, max_model_len = 1, False, None, MAX_LEN

    def prepare_attn(self, *args, **options):
        return DefaultModelState.prepare_attn(self, *args, **options)

    @property
    def model_config(self):
        return self.config.model_config

    def get_dummy_block_tables(self, count):
        return tuple(table[:count].zero_() for table in self.tables)

    def get_dummy_slot_mappings(self, count):
        return self.slots.fill_(-1)[:, :count]

    def capture(self, count, query_len):
        """Metadata and slots of each layer for a graph of ``count`` sequences of ``query_len`` query tokens."""
        sizes = (count, count * query_len)
        return prepare_inputs_to_capture(
            *sizes, self, self.buffers, self, self.groups, self.cache, True, max_query_len=query_len
        )

    def stage(self, layer, step):
        """Put the step where the runner would: into its persistent tensors, padded, and the earlier tokens into the cache."""
        group, count = self.group_of(layer), len(step.lengths)
        assert len(step.kv_cache) <= len(layer.kv_cache)
        layer.kv_cache.fill_(255)
        layer.kv_cache[: len(step.kv_cache)] = step.kv_cache
        self.buffers.seq_lens.zero_()[:count] = torch.tensor([keys for _, keys in step.lengths])
        self.buffers.query_start_loc.fill_(len(step.q))[: count + 1] = torch.from_numpy(step.starts)
        self.tables[group].zero_()[:count, : step.block_table.shape[1]] = step.block_table.clamp(0)
        self.slots.fill_(-1)[group, : len(step.q)] = step.slots

    def eager(self, layer, step):
        """Metadata and slots of the staged step, outside graphs."""
        count, tokens = len(step.lengths), len(step.q)
        lengths = torch.tensor([keys for _, keys in step.lengths], dtype=torch.int32)
        batch = SimpleNamespace(
            num_reqs=count,
            num_tokens=tokens,
            query_start_loc_np=step.starts,
            query_start_loc=self.buffers.query_start_loc,
            max_query_len=None,
            num_scheduled_tokens=step.starts[1:] - step.starts[:-1],
            seq_lens=self.buffers.seq_lens,
            seq_lens_cpu_upper_bound=lengths,
            pcp=None,
            dcp_local_seq_lens=None,
            positions=self.buffers.positions,
            is_prefilling_np=step.starts[1:] > 0,
            prompt_lens=None,
            idx_mapping_np=None,
            fast_prefill=None,
            req_ids=[],
        )
        tables = tuple(table[:count] for table in self.tables)
        metadata = self.prepare_attn(batch, CUDAGraphMode.NONE, tables, self.slots[:, :tokens], self.groups, self.cache)
        return metadata, {layer.layer_name: self.slots[self.group_of(layer), :tokens]}

    def run(self, layer, step, metadata, slots, tokens):
        """The layer as the model calls it, for ``tokens`` tokens, those behind the step's own NaN."""

        def pad(x):
            return torch.cat([x, x.new_full((tokens - len(x), *x.shape[1:]), float("nan"))]).flatten(1)

        with set_forward_context(metadata, self.config, num_tokens=tokens, slot_mapping=slots):
            out = layer(*map(pad, (step.q, step.k, step.v)))
        return out.view(tokens, layer.num_heads, layer.head_size)[: len(step.q)]
