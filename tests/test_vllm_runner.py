"""The vLLM plugin in the pieces of vLLM's own GPU model runner (V2): layers, cache groups, allocation, metadata, padded graphs.

What a CUDA graph replays is a call with the metadata of its capture, after the runner has changed its persistent tensors:
that is done here without a graph, on a CPU.
"""

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
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.utils import clear_layer_kv_caches, select_common_block_size

from turboquant_vllm.vllm.backend import TQ4Backend
from turboquant_vllm.vllm.batch import Kind
from vllm_cases import random_step

pytestmark = pytest.mark.vllm

MAX_REQS, MAX_TOKENS, MAX_LEN, WINDOW = 8, 256, 256, 40
CPU = torch.device("cpu")


class Runner:
    """As much of vLLM's runner as attention sees: layers of ``kinds`` (head dimension, sliding window) and their caches."""

    def __init__(self, kinds, block_size=16, drafts=0, layout=None):
        self.config = VllmConfig(device_config=DeviceConfig("cpu"), cache_config=CacheConfig(block_size=block_size))
        self.config.model_config = SimpleNamespace(
            max_model_len=MAX_LEN, hf_config=SimpleNamespace(model_type="llama"), dtype=torch.bfloat16, is_mm_prefix_lm=False
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
        specs = get_kv_cache_spec(self.config)
        names = [layout.name for layout in get_supported_kv_cache_layouts([TQ4Backend])]
        resolve_kv_cache_layout(self.config, [names], specs.values())
        cache_groups = get_kv_cache_groups(self.config, specs)
        self.cache = get_kv_cache_config_from_groups(self.config, cache_groups, available_memory=2**21)
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
            prefix=f"model.layers.{index}.self_attn.attn",
            attn_backend=TQ4Backend,
        )

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


UNIFORM = [(64, None), (64, None)]
WINDOWS = [(64, None), (64, WINDOW), (64, WINDOW)]
HEAD_DIMS = [(64, None), (128, None)]
BOTH = [(64, None), (128, WINDOW), (64, None)]  # pages of one size, by padding
MODELS = {"uniform": UNIFORM, "windows": WINDOWS, "head dims": HEAD_DIMS, "both": BOTH}
LAYOUTS = [None, "BLHNC"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
class TestSteps:
    def test_a_graphs_replay(self, generator, model, layout):
        runner = Runner(MODELS[model], layout=layout)
        assert runner.support.min_cg_support.name == "UNIFORM_BATCH"
        metadata, slots = runner.capture(4, 1)
        for layer in runner.layers:
            step = random_step(generator, [(1, 70), (1, 17), (1, 33)], layer.impl.layer)
            runner.stage(layer, step)
            out = runner.run(layer, step, metadata, slots, 4)
            for index in range(3):
                step.check(out, index, exact=False)

    def test_a_mixed_step(self, generator, model, layout):
        runner = Runner(MODELS[model], layout=layout)
        for layer in runner.layers:
            step = random_step(generator, [(1, 70), (1, 17), (20, 20), (9, 30)], layer.impl.layer)
            runner.stage(layer, step)
            metadata, slots = runner.eager(layer, step)
            out = runner.run(layer, step, metadata, slots, len(step.q))
            for index in range(4):
                step.check(out, index, exact=index == 2)


def test_a_graph_that_verifies_drafts(generator):
    runner = Runner(UNIFORM, drafts=3)
    metadata, slots = runner.capture(3, 4)
    layer, _ = runner.layers
    step = random_step(generator, [(4, 70), (4, 19)], layer.impl.layer)
    runner.stage(layer, step)
    out = runner.run(layer, step, metadata, slots, 12)
    step.check(out, 0, exact=False)
    step.check(out, 1, exact=False)


def test_a_piecewise_graphs_dummy_step_is_prompts(generator):
    runner = Runner(UNIFORM)
    batch = InputBatch.make_dummy(3, 24, runner.buffers)
    tables, slots = runner.get_dummy_block_tables(3), runner.get_dummy_slot_mappings(24)
    metadata = runner.prepare_attn(batch, CUDAGraphMode.NONE, tables, slots, runner.groups, runner.cache)
    (run,) = metadata[runner.layers[0].layer_name].runs
    assert (run.kind, run.tokens) == (Kind.EXACT, slice(0, 24))


@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
def test_blocks_are_not_split_needlessly(block_size):
    runner = Runner(WINDOWS, block_size=block_size)
    for layer in runner.layers:
        assert layer.kv_cache.shape[1:] == (2, block_size, 72)
    assert select_common_block_size(512, [TQ4Backend]) == 256


def test_vllm_can_take_the_cache_back(generator):
    """As between measuring graphs and serving, and at shutdown."""
    runner = Runner(UNIFORM)
    layer, other = runner.layers
    step = random_step(generator, [(1, 20)], layer.impl.layer)
    kept = other.kv_cache.untyped_storage()
    before = torch._C._storage_Use_Count(kept._cdata)
    runner.stage(layer, step)
    runner.run(layer, step, *runner.eager(layer, step), 1)
    clear_layer_kv_caches([layer])
    assert torch._C._storage_Use_Count(kept._cdata) == before - 1
