"""Keys with offsets on a GPU: the native kernels that read them and write them, against the definition."""

from __future__ import annotations

import pytest
import torch

from attention_cases import poisoned_memory
from group_store_contract import GroupStoreContract
from offset_contract import OffsetContract, PagedOffsetContract
from paged_cases import check_batch, random_batch
from turboquant_vllm import TQ4Codec, ops, tq4_paged_attention, tq4_store
from turboquant_vllm.limits import why_not_decode
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
            q, k, v = args[0], args[1].data, args[2].data
            if why_not_decode(q.dtype, q.shape[-1], q.shape[2] * q.shape[1] // k.shape[1], (k, v)):
                pytest.skip("the native kernels refuse this call")
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
