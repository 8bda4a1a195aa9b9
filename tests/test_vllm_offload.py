"""Blocks that leave the cache and come back, in vLLM's engine with its own connectors: the same bytes, the same answers."""

from __future__ import annotations

import hashlib
import time

import pytest
import torch

from vllm_engine_cases import (  # isort: skip  (skips where there is no engine)
    DEVICE,
    Engine,
    held_out_prompts,  # noqa: F401  (fixture "prompts")
    one_process,  # noqa: F401  (fixture)
)
from vllm.config import KVTransferConfig

pytest.importorskip("vllm.v1.simple_kv_offload.worker", exc_type=ImportError)

from vllm.v1.simple_kv_offload import worker

import host_offload
from host_offload import HostWorker
from turboquant_vllm import PagedTQ4Cache

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PAGE = PagedTQ4Cache.page_bytes(64, 2, 64, True)
DENSE = 2 * 64 * 2 * 64 * 2


@pytest.fixture(params=["OffloadingConnector", "SimpleCPUOffloadConnector"])
def connector(request, monkeypatch):
    extra = {"cpu_bytes_to_use": 2**27}
    if DEVICE == "cpu":
        extra |= {"spec_name": "HostOffloadingSpec", "spec_module_path": "host_offload"}
        monkeypatch.setattr("vllm.v1.simple_kv_offload.worker.DmaCopyBackend", host_offload.HostCopies)
        monkeypatch.setattr("vllm.v1.simple_kv_offload.worker.torch", host_offload.TorchWithoutGPU())
    monkeypatch.setattr(HostWorker, "moved", (0, 0))
    pinned, pin = [], worker.pin_tensor
    monkeypatch.setattr(worker, "pin_tensor", lambda tensor: (pin(tensor), pinned.append(tensor)))
    yield KVTransferConfig(kv_connector=request.param, kv_role="kv_both", kv_connector_extra_config=extra)
    for tensor in pinned:  # vLLM leaves that to the end of the process; other tensors may get these pages before
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def caches(engine):
    """The cache of each layer, by name."""
    context = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {name: layer.kv_cache for name, layer in context.items()}


def digests(engine):
    """Of each block that holds anything, what all layers have in it."""
    tensors = [kv_cache.detach().view(torch.uint8).flatten(1).cpu().numpy() for kv_cache in caches(engine).values()]
    used = [index for index in range(len(tensors[0])) if any((x[index] != 255).any() for x in tensors)]
    return {hashlib.sha256(b"".join(x[index].tobytes() for x in tensors)).hexdigest() for index in used}


def evict(engine, short):
    """No block is cached any more, and what was in them is poison. ``short``: a prompt of less than a block, for steps in which
    the engine hears that copies have ended: until then their blocks are in use."""
    for _ in range(100):
        if engine.llm.reset_prefix_cache():
            break
        time.sleep(0.02)
        engine.answers([short])
    else:
        pytest.fail("blocks stay in use")
    for kv_cache in caches(engine).values():
        kv_cache.view(torch.uint8).fill_(255)


@pytest.mark.parametrize("dense", [(), ("0", "5")])
@pytest.mark.parametrize("lost", [False, True])
def test_blocks_come_back(connector, dense, prompts, lost, monkeypatch):
    if lost:
        if DEVICE != "cpu":
            pytest.skip("the copies are vLLM's own")
        # A copy that leaves out one layer's pages.
        whole = HostWorker._pages
        monkeypatch.setattr(HostWorker, "_pages", lambda *args: iter([*whole(*args)][1:]))
        pairs = host_offload.HostCopies.init
        monkeypatch.setattr(
            host_offload.HostCopies, "init", lambda self, *args: (pairs(self, *args), setattr(self, "pairs", self.pairs[1:]))
        )
    names = {"kv_cache_dtype": "tq4", "kv_cache_dtype_skip_layers": list(dense)} if dense else {}
    options = {"kv_transfer_config": connector, "enable_prefix_caching": True, "kv_cache_memory_bytes": 2**24, "block_size": 64}
    some = [prompts[index] for index in (0, 3, 8, 6)]  # 320, 210, 180 and 100 tokens
    with Engine(exact_prefill=False, key_offsets=True, **options, **names) as engine:
        for kv_cache in caches(engine).values():
            kv_cache.view(torch.uint8).fill_(255)
        for _ in range(2):  # the second time behind prefixes that are still cached, as after the reload
            first = [engine.answers([one])[0] for one in some]
        engine.answers([prompts[1]])  # what the last step has stored is on its way by now
        before = digests(engine)
        evict(engine, prompts[1])
        again = [engine.answers([one])[0] for one in some]
        after = digests(engine)
        hits = engine.counter("vllm:external_prefix_cache_hits")
    block = len(dense) * DENSE + (6 - len(dense)) * PAGE
    blocks = 4 + 3 + 2 + 1  # whole ones of these prompts, but for the block of a prompt's last token
    same = all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(first, again, strict=True))
    if lost:
        assert not same
        return
    assert same
    assert hits >= 64 * blocks
    if DEVICE == "cpu":
        stored, loaded = HostWorker.moved
        assert loaded >= blocks * block
        assert loaded % block == stored % block == 0
    assert len(before & after) >= blocks  # what came back is what went, byte for byte, of all layers
