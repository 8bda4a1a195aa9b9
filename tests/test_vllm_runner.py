"""The vLLM plugin in the pieces of vLLM's own GPU model runner (V2): layers, cache groups, allocation, metadata, padded graphs.

What a CUDA graph replays is a call with the metadata of its capture, after the runner has changed its persistent tensors:
that is done here without a graph, on a CPU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", exc_type=ImportError)

from vllm_runner_cases import CPU, WINDOW, Runner, hf_config  # isort: skip  (skips where vLLM has not these pieces)
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import init_attn_backend
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.utils import clear_layer_kv_caches, select_common_block_size

from turboquant_vllm.calibration import save_key_scales
from turboquant_vllm.vllm.backend import TQ4Backend
from turboquant_vllm.vllm.batch import Kind
from vllm_cases import random_step

pytestmark = pytest.mark.vllm


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
