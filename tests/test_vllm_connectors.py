"""What KV connectors need of the cache, by vLLM's own classes, on a CPU: regions of whole blocks, and that blocks may move."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm.v1.attention.backend", exc_type=ImportError)

from vllm_runner_cases import WINDOW, Runner  # isort: skip  (skips where vLLM has not these pieces)
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.utils import TransferTopology
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
from vllm.v1.kv_cache_interface import KVCacheLayout, UniformTypeKVCacheSpecs

from turboquant_vllm.vllm.backend import TQ4Backend
from turboquant_vllm.vllm.dense import DenseLayer
from vllm_backend_cases import no_layers_yet  # noqa: F401  (fixture)
from vllm_cases import random_step

pytestmark = pytest.mark.vllm

MODELS = {
    "full": ([(64, None)] * 3, ()),
    "some dense": ([(64, None)] * 3, (1,)),
    "windows": ([(64, None), (64, WINDOW), (64, WINDOW)], ()),
    "head dims": ([(64, None), (128, None)], ()),
}


def regions(runner):
    """As NIXL registers them, of each layer: its cache as bytes ``[blocks, bytes of a page]``."""
    found = {}
    for group in runner.cache.kv_cache_groups:
        for name in group.layer_names:
            spec = group.kv_cache_spec
            spec = spec.kv_cache_specs[name] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
            cache = runner.context[name].kv_cache
            assert cache.shape[0] == runner.cache.num_blocks
            assert cache[0].is_contiguous()
            assert cache[0].nbytes == spec.page_size_bytes
            size = cache.element_size()
            whole = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
            shape, strides = (len(cache), spec.page_size_bytes), (cache.stride(0) * size, 1)
            found[name] = whole.as_strided(shape, strides, cache.storage_offset() * size)
    return found


@pytest.mark.parametrize("layout", [None, "BLHNC"])
@pytest.mark.parametrize("model", MODELS)
def test_blocks_may_move(generator, model, layout):
    """From one engine to other places in another one of the same tensor-parallel size."""
    kinds, dense = MODELS[model]
    here, there = (Runner(kinds, dense=dense, layout=layout) for _ in range(2))
    sources, targets = regions(here), regions(there)
    assert len(sources) == len(kinds)
    for one, other in zip(here.layers, there.layers, strict=True):
        dtype = torch.bfloat16 if isinstance(one.impl.layer, DenseLayer) else torch.float32
        step = random_step(generator, [(1, 131), (3, 40), (1, 65)], one.impl.layer, page_size=64, dtype=dtype)
        here.stage(one, step)
        expected = here.run(one, step, *here.eager(one, step), len(step.q))
        moved = torch.randperm(len(step.kv_cache), generator=generator)
        there.stage(other, step)
        other.kv_cache.view(torch.uint8).fill_(255)
        targets[other.layer_name][moved] = sources[one.layer_name][: len(moved)]
        table = there.tables[there.group_of(other)]
        table.copy_(torch.where(table < len(moved), moved[table.long() % len(moved)], table))
        there.slots.fill_(-1)  # the last tokens came with the others
        got = there.run(other, step, *there.eager(other, step), len(step.q))
        assert torch.equal(got, expected)


def test_the_layout_that_nixl_wants(monkeypatch):
    runner = Runner([(64, None)] * 2)
    wanted = NixlConnector.get_required_kvcache_layout(runner.config)
    assert KVCacheLayout[wanted] in get_supported_kv_cache_layouts([TQ4Backend])
    assert KVCacheLayout[wanted].is_block_contiguous


def test_heads_as_nixl_counts_them():
    """A block's bytes are cut at heads where the number of ranks differs; here it must not."""
    runner = Runner([(64, None)] * 2)
    cache = runner.layers[0].kv_cache
    runner.config.kv_transfer_config = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both")
    with set_current_vllm_config(runner.config):
        topology = TransferTopology(
            tp_rank=0,
            tp_size=1,
            block_size=64,
            engine_id="one",
            is_mla=False,
            total_num_kv_heads=2,
            attn_backends=[TQ4Backend],
            tensor_shape=cache.shape,
            is_mamba=False,
        )
    assert topology.local_physical_heads == 2 == cache.shape[1]
