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

from turboquant_vllm.calibration import save_key_scales
from turboquant_vllm.vllm.backend import TQ4Backend
from turboquant_vllm.vllm.batch import Kind
from vllm_cases import random_step

pytestmark = pytest.mark.vllm

MAX_REQS, MAX_TOKENS, MAX_LEN, WINDOW = 8, 256, 256, 40
CPU = torch.device("cpu")


def hf_config(layers):
    """As much of a model's configuration as a file of scales is compared with."""
    sizes = {"hidden_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return SimpleNamespace(model_type="llama", head_dim=64, rope_theta=1e4, **sizes)


@pytest.fixture
def save_scales(tmp_path, generator):
    """Writes a file of scales for layers of these kinds, and returns its path and the scales."""

    def save(kinds):
        scales = {i: torch.exp(0.4 * torch.randn(2, dim, generator=generator)) for i, (dim, _) in enumerate(kinds)}
        save_key_scales(tmp_path / "scales.safetensors", scales, hf_config(len(kinds)), source="test")
        return str(tmp_path / "scales.safetensors"), scales

    return save


@pytest.fixture(params=["plain", "offsets", "scales"])
def options(request, save_scales):
    """The plugin's options for layers of these kinds, in one of its formats."""
    of = {
        "plain": lambda _: {"key_offsets": False},
        "offsets": lambda _: {},
        "scales": lambda k: {"key_scales": save_scales(k)[0]},
    }
    return of[request.param]


class Runner:
    """As much of vLLM's runner as attention sees: layers of ``kinds`` (head dimension, sliding window) and their caches."""

    def __init__(self, kinds, block_size=64, drafts=0, layout=None, sharing=None, **options):
        self.config = VllmConfig(
            device_config=DeviceConfig("cpu"),
            cache_config=CacheConfig(block_size=block_size),
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


UNIFORM = [(64, None), (64, None)]
WINDOWS = [(64, None), (64, WINDOW), (64, WINDOW)]
HEAD_DIMS = [(64, None), (128, None)]
BOTH = [(64, None), (128, WINDOW), (64, None)]  # pages of one size, by padding
MODELS = {"uniform": UNIFORM, "windows": WINDOWS, "head dims": HEAD_DIMS, "both": BOTH}
LAYOUTS = [None, "BLHNC"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
class TestSteps:
    def test_a_graphs_replay(self, generator, model, layout, options):
        runner = Runner(MODELS[model], layout=layout, **options(MODELS[model]))
        assert runner.support.min_cg_support.name == "UNIFORM_BATCH"
        metadata, slots = runner.capture(4, 1)
        for layer in runner.layers:
            step = random_step(generator, [(1, 70), (1, 17), (1, 65)], layer.impl.layer, page_size=64)
            runner.stage(layer, step)
            runner.eager(layer, step)  # what a replay reads is made anew for each step
            out = runner.run(layer, step, metadata, slots, 4)
            for index in range(3):
                step.check(out, index, exact=False)

    def test_a_mixed_step(self, generator, model, layout, options):
        runner = Runner(MODELS[model], layout=layout, **options(MODELS[model]))
        for layer in runner.layers:
            step = random_step(generator, [(1, 65), (1, 17), (20, 20), (9, 30), (3, 131)], layer.impl.layer, page_size=64)
            runner.stage(layer, step)
            metadata, slots = runner.eager(layer, step)
            out = runner.run(layer, step, metadata, slots, len(step.q))
            for index in range(5):
                step.check(out, index, exact=index == 2)


def test_a_graph_that_verifies_drafts(generator):
    runner = Runner(UNIFORM, drafts=3)
    metadata, slots = runner.capture(3, 4)
    layer, _ = runner.layers
    step = random_step(generator, [(4, 67), (4, 19)], layer.impl.layer)
    runner.stage(layer, step)
    runner.eager(layer, step)
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
    runner = Runner(WINDOWS, block_size=block_size, key_offsets=False)
    for layer in runner.layers:
        assert layer.kv_cache.shape[1:] == (2, block_size, 72)
    assert select_common_block_size(512, [TQ4Backend]) == 256


@pytest.mark.parametrize("block_size", [64, 192, 512])
def test_blocks_of_keys_with_offsets(block_size):
    runner = Runner(WINDOWS, block_size=block_size)
    for layer in runner.layers:
        assert layer.kv_cache.shape[1:] == (2, min(block_size, 256) // 64, 64 * 297 // 4)
    assert select_common_block_size(512, [TQ4Backend]) == 256


def test_block_sizes_that_no_group_fits():
    with pytest.raises(ValueError, match="need a block size that is a multiple of 64, got 48: set --block-size 64"):
        Runner(UNIFORM, block_size=48)


class TestScales:
    def test_each_layer_has_its_own_in_place(self, save_scales):
        path, scales = save_scales(WINDOWS)
        runner = Runner(WINDOWS, key_scales=path)
        held = [layer.impl.layer.codec_on(CPU).key_scales for layer in runner.layers]
        assert all(torch.equal(x, scales[i]) for i, x in enumerate(held))
        init_attn_backend(runner.cache, runner.config, CPU)  # as vLLM does for its measurements and again
        again = [layer.impl.layer.codec_on(CPU).key_scales for layer in runner.layers]
        assert [x.data_ptr() for x in again] == [x.data_ptr() for x in held]

    def test_a_layer_that_shares_a_cache_has_those_of_the_cache(self, save_scales, generator):
        path, scales = save_scales(UNIFORM)
        runner = Runner(UNIFORM, key_scales=path, sharing={1: 0})
        first, second = runner.layers
        assert torch.equal(second.impl.layer.codec_on(CPU).key_scales, scales[0])
        step = random_step(generator, [(1, 65), (3, 40)], first.impl.layer)
        runner.stage(first, step)
        metadata, slots = runner.eager(first, step)
        runner.run(first, step, metadata, slots, len(step.q))
        out = runner.run(second, step, metadata, slots, len(step.q))
        step.check(out, 0, exact=False)
        step.check(out, 1, exact=False)

    def test_parts_of_models_that_draft_have_ones(self, save_scales, caplog):
        path, _ = save_scales(UNIFORM)
        runner = Runner(UNIFORM, key_scales=path)
        runner.layers[1].is_draft_layer = True
        runner.layers[1].impl.layer._scaled = None
        init_attn_backend(runner.cache, runner.config, CPU)
        assert runner.layers[0].impl.layer.codec_on(CPU).key_scales is not None
        assert runner.layers[1].impl.layer.codec_on(CPU).key_scales is None
        assert "no channel scales for the keys of model.layers.1.self_attn.attn" in caplog.text

    def test_without_a_folder_the_log_says_so(self, caplog):
        runner = Runner(UNIFORM)
        assert runner.layers[0].impl.layer.codec_on(CPU).key_scales is None
        assert "no folder is no folder here; `turboquant calibrate MODEL` measures them from a text" in caplog.text

    def test_the_file_of_another_model_is_refused(self, save_scales):
        path, _ = save_scales(WINDOWS)
        with pytest.raises(ValueError, match="got those of another: num_hidden_layers: expected 2, got 3"):
            Runner(UNIFORM, key_scales=path)
        with pytest.raises(FileNotFoundError):
            Runner(UNIFORM, key_scales=f"{path}.gone")


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
