"""A step that stores its own keys and values and attends in one call, on a GPU: the bits of two calls, also replayed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turboquant_vllm import ops
from turboquant_vllm.vllm.layer import PagedLayer
from vllm_cases import random_step

pytestmark = pytest.mark.gpu

# Query tokens and keys of each sequence: few, which clusters serve, and many; groups begin and go on.
FEW = [(1, 1000), (2, 65), (1, 2), (3, 130)]
MANY = FEW * 16


@pytest.fixture(autouse=True)
def needs_native():
    if reason := ops.why_not_cuda(torch.device("cuda")):
        pytest.skip(reason)


@pytest.mark.parametrize("lengths", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("head_dim", "key_offsets"), [(64, True), (128, True), (128, False), (256, True)])
def test_the_bits_of_two_calls(generator, lengths, dtype, head_dim, key_offsets):
    layer = PagedLayer(8, 2, head_dim, head_dim**-0.5, exact=None, key_offsets=key_offsets)
    on_cpu = random_step(generator, lengths, layer, dtype=dtype)
    where = {name: x.cuda() for name, x in on_cpu.where.items()}
    q, k, v, kv_cache = (x.cuda() for x in (on_cpu.q, on_cpu.k, on_cpu.v, on_cpu.kv_cache))
    tensors = ("block_table", "seq_lens", "cu_seqlens_q")
    runs = [replace(run, **{name: getattr(run, name).cuda() for name in tensors}) for run in on_cpu.runs(decode_len=3)]
    layer.use_key_scales(torch.exp(0.4 * torch.randn(2, head_dim, generator=generator)) if key_offsets else None, q.device)
    before, out = kv_cache.clone(), torch.full_like(q, float("nan"))

    def one_call():
        kv_cache.copy_(before)
        layer.attend(q, k, v, kv_cache, runs, out, **where)

    layer.store(k, v, kv_cache, **where)
    layer.attend(q, k, v, kv_cache, runs, out)
    want, stored = out.clone(), kv_cache.clone()
    one_call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_call()
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(kv_cache, stored)


def test_operator_is_registered_right(generator):
    layer = PagedLayer(8, 2, 64, 0.125, exact=None)
    step = random_step(generator, FEW, layer, dtype=torch.float16)
    (run,), codec, cache = step.runs(decode_len=3), layer.codec_on(torch.device("cuda")), layer.pages(step.kv_cache.cuda())
    q, k, v, *where = (x.cuda() for x in (step.q, step.k, step.v, run.block_table, run.seq_lens, run.cu_seqlens_q))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    args = (q, cache.buffer, 64, 2, *where, codec.centroids, codec.rotation, 0.125, True, 3, 1000, out, lse)
    options = {"k": k, "v": v, "slot_mapping": step.slots.cuda(), "companding": codec.companding, "scale": codec.scale}
    options |= {"has_offsets": True, "previous_slots": step.where["previous_slots"][: len(k)].cuda()}
    operator = torch.ops.turboquant.cuda_store_paged.default
    torch.library.opcheck(operator, args, options, test_utils=("test_schema", "test_faketensor"))
    assert operator._schema.arguments[1].alias_info.is_write
