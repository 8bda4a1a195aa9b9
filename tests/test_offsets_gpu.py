"""Keys with offsets on a GPU: the native kernels that read them and write them, against the definition."""

from __future__ import annotations

import pytest
import torch

from attention_cases import compare, poisoned_memory, skip_if_refused
from group_store_contract import GroupStoreContract
from offset_contract import OffsetContract, PagedOffsetContract
from paged_cases import check_batch, random_batch
from turboquant_vllm import PagedTQ4Cache, TQ4Codec, ops, tq4_paged_attention, tq4_store
from turboquant_vllm.records import GROUP

pytestmark = pytest.mark.gpu

HALF, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def needs_nvidia():
    if reason := ops.why_not_cuda(torch.device("cuda")):
        pytest.skip(reason)


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture(params=[HALF, BF16], ids=["fp16", "bf16"])
def dtype(request):
    return request.param


class TestOffsets(OffsetContract):
    @pytest.fixture
    def run(self):
        from turboquant_vllm.cuda.decode import decode

        def call(*args):
            skip_if_refused(*args)
            with poisoned_memory():
                return decode(*args)

        return call


class TestOffsetsInPages(PagedOffsetContract):
    LENGTHS = ((1, 37), (3, 170), (4, 90), (0, 0), (1, 1), (1, 64), (5, 3), (1, 129), (2, 700))  # few rows of each
    LONG = ((1, 4300), (2, 600), (1, 256))

    @pytest.fixture
    def run(self):
        from turboquant_vllm.cuda.paged import decode_pages

        def call(batch, longest=None):
            longest = int(batch.cu_seqlens_q.diff().max()) if longest is None else longest
            q, cache, sequences, *how = batch.arguments
            out = torch.full_like(batch.q, float("nan"))
            lse = torch.full(q.shape[:2], float("nan"), device=q.device)
            sequences = sequences._replace(max_query_len=longest, max_seq_len=int(batch.seq_lens.max()))
            decode_pages(q, cache, sequences, *how, out, lse)
            return out, lse

        return call


@pytest.mark.parametrize("page_size", [64, 128])
def test_many_groups_of_each_warp(page_size):
    # Every warp of the GPU comes to several times eight groups; pages are random, and some sequences compared.
    codec = TQ4Codec(128, device="cuda").with_key_scales(torch.rand(8, 128) + 0.5)
    table = torch.randperm(256 * 4096 // page_size, device="cuda").int().view(256, -1)
    lengths = 4096 - torch.randint(1000, (256,), device="cuda").int()
    cache = PagedTQ4Cache.allocate(
        table.numel(), page_size=page_size, num_kv_heads=8, head_dim=128, has_offsets=True, device="cuda"
    )
    cache.buffer.random_(0, 256)
    signs = torch.where(torch.rand_like(cache.k_norms) < 1 / GROUP, -1.0, 1.0)
    cache.k_norms.uniform_(8, 14).mul_(signs)
    cache.v_norms.uniform_(8, 14)
    cache.keys.steps.uniform_(0.001, 0.02)
    q = torch.randn(256, 32, 128, dtype=HALF, device="cuda")
    some = torch.tensor([0, 100, 255], device="cuda")
    starts = torch.arange(257, dtype=torch.int32, device="cuda")
    options = {"max_query_len": 1, "return_lse": True}
    out, lse = tq4_paged_attention(q, cache, codec, table, lengths, starts, backend="cuda", **options)
    few = (table[some], lengths[some], starts[:4])
    want, want_lse = tq4_paged_attention(q[some].float(), cache, codec, *few, backend="reference", **options)
    compare(out[some], want.double(), HALF)
    compare(lse[some], want_lse.double(), HALF, at_least=1.0, what="lse")


class TestStore(GroupStoreContract):
    @pytest.fixture
    def store(self):
        def call(k, v, cache, codec, slots, previous_slots):
            tq4_store(k, v, cache, codec, slots, previous_slots=previous_slots, backend="cuda")

        return call


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_replays_with_other_lengths(generator, backend):
    sizes = {"dtype": HALF, "device": "cuda", "group": 4, "page_size": 64, "offsets": True}
    batch = random_batch(generator, [(1, 400), (1, 390), (1, 380)], **sizes)
    codec = TQ4Codec.reader(batch.rotation, batch.centroids, "haar", batch.key_scales)
    index = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
    options = {"sm_scale": batch.sm_scale, "max_query_len": 1, "return_lse": True, "backend": backend}
    tq4_paged_attention(batch.q, batch.cache, codec, *index, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = tq4_paged_attention(batch.q, batch.cache, codec, *index, **options)
    for lengths in ([400, 390, 380], [17, 1, 64], [0, 65, 129]):
        now = batch.replace(
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            sequences=[
                {name: x[:, :, : -(-n // GROUP) if name in ("k_groups", "k_steps") else n] for name, x in s.items()}
                for s, n in zip(batch.sequences, lengths, strict=True)
            ],
        )
        batch.seq_lens.copy_(now.seq_lens)
        graph.replay()
        torch.cuda.synchronize()
        check_batch(lambda _: (out.clone(), lse.clone()), now)
