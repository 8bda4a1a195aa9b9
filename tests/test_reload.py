"""Modules that are loaded again, as notebooks do it: one alone, all in order, or all anew after they left sys.modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys
import torch
import turboquant_vllm

def modules():
    return [name for name in sys.modules if name.split(".")[0] == "turboquant_vllm"]

def result():
    from turboquant_vllm import PagedTQ4Cache, TQ4Codec, tq4_attention, tq4_paged_attention, tq4_store
    codec, x = TQ4Codec(64), torch.linspace(-1, 1, 2 * 20 * 64).view(1, 2, 20, 64)
    k = codec.compress(x)
    cache = PagedTQ4Cache.allocate(2, page_size=16, num_kv_heads=2, head_dim=64)
    tq4_store(x[0].transpose(0, 1), x[0].transpose(0, 1), cache, codec, torch.arange(20))
    index = [torch.tensor(x, dtype=torch.int32) for x in ([[0, 1]], [20], [0, 20])]
    found = [tq4_attention(x, k, k, codec), codec.decompress(k)]
    found.append(tq4_paged_attention(x[0].transpose(0, 1), cache, codec, *index))
    if transformers:
        from transformers import LlamaConfig
        from turboquant_vllm.hf import TurboQuantCache, TurboQuantStaticCache, attention_forward
        config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=64, hidden_size=128)
        for cache in (TurboQuantCache(config), TurboQuantStaticCache(config, 64)):
            cache.update(x, x, 0)
            keys, values = cache.update(x[:, :, :1], x[:, :, :1], 0)
            found += [keys[:, :, :21].clone(), values[:, :, :21].clone()]
    return found

def check():
    assert all(torch.equal(a, b) for a, b in zip(result(), expected, strict=True))

transformers = importlib.util.find_spec("transformers") is not None
expected = result()
first = importlib.import_module("turboquant_vllm.codec").TQ4Codec(64)
"""
WAYS = {
    "operators": """
for name in ("turboquant_vllm.ops", "turboquant_vllm.hf.pages", "turboquant_vllm.reference", "turboquant_vllm"):
    if name in sys.modules:
        importlib.reload(sys.modules[name])
        check()
""",
    "all, twice": """
for _ in range(2):
    for name in modules():
        importlib.reload(sys.modules[name])
importlib.reload(turboquant_vllm)
check()
""",
    "anew": """
for _ in range(2):
    old = {name: sys.modules.pop(name) for name in modules()}
    check()
    torch.ops.turboquant.compress(torch.zeros(1, 64), *first.writing)
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_loading_again(way: str) -> None:
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", PROGRAM + WAYS[way]], check=True)
