"""Layers left dense beside packed ones, in the pieces of vLLM's GPU model runner, on a CPU; how FlashAttention is called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", exc_type=ImportError)

from vllm_runner_cases import WINDOW, Runner  # isort: skip  (skips where vLLM has not these pieces)
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention

import oracle
from turboquant_vllm import PagedTQ4Cache
from turboquant_vllm.vllm import flash
from turboquant_vllm.vllm.backend import TQ4Backend
from turboquant_vllm.vllm.dense import DenseLayer, reference_ops
from turboquant_vllm.vllm.layer import PagedLayer
from vllm_backend_cases import no_layers_yet  # noqa: F401  (fixture)
from vllm_cases import random_step

pytestmark = pytest.mark.vllm

FULL, WINDOWED = (64, None), (64, WINDOW)
MODELS = {
    "full": ([FULL] * 4, [0, 3]),
    "windows": ([WINDOWED] * 4, [1]),
    "full ones of both": ([FULL, WINDOWED, WINDOWED, FULL, WINDOWED, FULL], [3]),
    "windowed ones of both": ([FULL, WINDOWED, WINDOWED, FULL], ["sliding_window"]),
}
PACKED_PAGE, DENSE_PAGE = PagedTQ4Cache.page_bytes(64, 2, 64, True), 2 * 64 * 2 * 64 * 2  # of 64 tokens, two heads; bf16


@pytest.mark.parametrize("model", MODELS)
class TestSteps:
    @pytest.fixture(autouse=True)
    def runner(self, model):
        kinds, self.dense = MODELS[model]
        self.runner = Runner(kinds, dense=self.dense)

    def test_which_layers(self):
        for index, layer in enumerate(self.runner.layers):
            is_dense = index in self.dense or ("sliding_window" in self.dense and layer.sliding_window is not None)
            assert isinstance(layer.impl.layer, DenseLayer if is_dense else PagedLayer)
            assert layer.kv_cache.dtype == (torch.bfloat16 if is_dense else torch.uint8)
            assert layer.kv_cache.shape[1:] == ((2, 64, 128) if is_dense else (2, 1, 64 * 297 // 4))

    def test_a_mixed_step(self, generator):
        for layer in self.runner.layers:
            is_dense = isinstance(layer.impl.layer, DenseLayer)
            lengths = [(1, 65), (1, 17), (20, 20), (9, 30), (3, 131)]
            dtype = torch.bfloat16 if is_dense else torch.float32
            step = random_step(generator, lengths, layer.impl.layer, page_size=64, dtype=dtype)
            self.runner.stage(layer, step)
            metadata, slots = self.runner.eager(layer, step)
            out = self.runner.run(layer, step, metadata, slots, len(step.q))
            for index in range(len(lengths)):
                step.check(out, index, exact=is_dense or index == 2)

    def test_a_graphs_replay(self, generator):
        assert self.runner.support.min_cg_support.name == "UNIFORM_BATCH"
        metadata, slots = self.runner.capture(4, 1)
        for layer in self.runner.layers:
            is_dense = isinstance(layer.impl.layer, DenseLayer)
            dtype = torch.bfloat16 if is_dense else torch.float32
            step = random_step(generator, [(1, 70), (1, 17), (1, 65)], layer.impl.layer, page_size=64, dtype=dtype)
            self.runner.stage(layer, step)
            self.runner.eager(layer, step)
            out = self.runner.run(layer, step, metadata, slots, 4)
            for index in range(3):
                step.check(out, index, exact=is_dense)


class TestBlocks:
    """Nothing is padded: the sum of what layers take is what a block takes."""

    @pytest.mark.parametrize(("kinds", "dense"), [MODELS["full"], MODELS["windows"]], ids=["full", "windows"])
    def test_one_group(self, kinds, dense):
        runner = Runner(kinds, dense=dense, memory=2**23)
        (group,) = runner.cache.kv_cache_groups
        assert len(group.layer_names) == 4
        assert group.kv_cache_spec.block_size == 64  # what is dense does not make blocks larger
        assert runner.cache.num_blocks == 2**23 // ((4 - len(dense)) * PACKED_PAGE + len(dense) * DENSE_PAGE)

    def test_two_groups(self):
        kinds, dense = MODELS["full ones of both"]
        runner = Runner(kinds, dense=dense, memory=2**23)
        # Full attention: two packed layers and a dense one. Beside them there is room for all three with windows.
        assert [len(group.layer_names) for group in runner.cache.kv_cache_groups] == [3, 3]
        assert runner.cache.num_blocks == 2**23 // (2 * PACKED_PAGE + DENSE_PAGE)

    def test_two_head_dimensions(self):
        """Windows of one, full attention of the other: where two of the larger pages are, three of the smaller."""
        runner = Runner([(128, None), *[(64, WINDOW)] * 6, (128, None)], memory=2**23)
        assert runner.cache.num_blocks == 2**23 // (2 * PagedTQ4Cache.page_bytes(64, 2, 128, True))
        assert sorted(len(group.layer_names) for group in runner.cache.kv_cache_groups) == [2, 3, 3]

    def test_some_of_a_window_beside_others(self):
        with pytest.raises(ValueError, match="of the layers with a sliding window of 40, all or none must be left dense"):
            Runner([FULL, WINDOWED, WINDOWED, FULL], dense=[1])

    def test_layers_that_share_caches(self):
        with pytest.raises(ValueError, match=r"a layer that reads the cache of model\.layers\.1\."):
            Runner([FULL] * 4, dense=[0], sharing={3: 1})
        Runner([(64, WINDOW), (128, None), (64, WINDOW), (128, None)], sharing={2: 0, 3: 1})  # two head dimensions

    def test_recurrent_states(self):
        with pytest.raises(ValueError, match="no layer can be left dense beside recurrent states"):
            Runner([FULL] * 2, dense=[0], is_hybrid=True)

    def test_without_a_name_for_the_cache(self):
        config = VllmConfig(device_config=DeviceConfig("cpu"))
        config.cache_config.kv_cache_dtype_skip_layers = ["0", "31"]
        with set_current_vllm_config(config), pytest.raises(ValueError, match="0, 31 must come with --kv-cache-dtype tq4"):
            Attention(
                4, 64, 0.125, num_kv_heads=2, cache_config=config.cache_config, prefix="layers.0", attn_backend=TQ4Backend
            )


class TestFlashAttention:
    """vLLM's operators written in Python, with their contracts, in place of those of a GPU."""

    @pytest.fixture
    def ops(self, monkeypatch):
        def write(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
            assert kv_cache_dtype == "auto"
            assert k_scale == v_scale == 1.0
            assert key_cache.stride(3) == value_cache.stride(3) == 1
            pages = torch.cat([key_cache, value_cache], -1).transpose(1, 2)
            reference_ops().write(key, value, pages, slot_mapping)
            key_cache.copy_(pages.transpose(1, 2)[..., : key.shape[2]])
            value_cache.copy_(pages.transpose(1, 2)[..., key.shape[2] :])

        def read(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k, block_table, softmax_scale, causal, out, **rest):
            assert causal
            assert rest.pop("fa_version") == 3
            assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
            assert max_seqlen_k >= int(seqused_k.max())
            left, right = rest.pop("window_size", [None, 0])
            assert right == 0
            for index, length in enumerate(seqused_k.tolist()):
                own = slice(*cu_seqlens_q[index : index + 2].tolist())
                pages = block_table[index, : -(-length // k.shape[1])].long()
                keys, values = (x[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k, v))
                masks = (None if left is None else left + 1, rest.get("softcap"), rest.get("s_aux"))
                result, _ = oracle.attention(q[own].transpose(0, 1)[None], keys, values, softmax_scale, True, *masks)
                out[own] = result[0].transpose(0, 1)
            assert set(rest) <= {"softcap", "s_aux"}

        served = {"reshape_and_cache_flash": write, "flash_attn_varlen_func": read, "get_flash_attn_version": lambda **_: 3}
        monkeypatch.setitem(__import__("sys").modules, "vllm.v1.attention.backends.fa_utils", SimpleNamespace(**served))
        platform = SimpleNamespace(is_cuda=lambda: True, is_cuda_alike=lambda: True, device_name="a GPU")
        monkeypatch.setattr(flash, "current_platform", platform)
        return lambda head_dim=64, has_sinks=False: flash.choose_dense(head_dim, has_sinks)

    @pytest.mark.parametrize("masks", [{}, {"sliding_window": 20}, {"softcap": 3.0, "sinks": torch.tensor([0.5, -1, 2, 0])}])
    def test_a_mixed_step(self, ops, generator, masks):
        layer = DenseLayer(4, 2, 64, 64**-0.5, ops=ops(has_sinks="sinks" in masks), **masks)
        runner = Runner([FULL] * 2, dense=[0])
        attention = runner.layers[0]
        attention.impl.layer = layer
        step = random_step(generator, [(1, 65), (20, 20), (9, 30), (3, 131)], layer, page_size=64, dtype=torch.bfloat16)
        runner.stage(attention, step)
        metadata, slots = runner.eager(attention, step)
        out = runner.run(attention, step, metadata, slots, len(step.q))
        for index in range(4):
            step.check(out, index, exact=True)

    def test_where_it_does_not_serve(self, ops):
        with pytest.raises(ValueError, match="does not serve head size 512 on a GPU: take the layer off"):
            ops(head_dim=512)
