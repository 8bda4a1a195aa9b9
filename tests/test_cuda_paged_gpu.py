"""The native decode over pages on a GPU: the contract of every backend, and replays with other lengths."""

from __future__ import annotations

import pytest
import torch

from attention_cases import poisoned_memory
from paged_cases import check_batch, random_batch
from paged_contract import MIXED, PagedContract
from turboquant_vllm import TQ4Codec, tq4_paged_attention
from turboquant_vllm.checks import PagedShape
from turboquant_vllm.paged_attention import why_not_paged

pytestmark = pytest.mark.gpu

HALF, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def needs_nvidia():
    reason = why_not_paged("cuda", torch.device("cuda"), HALF, PagedShape(1, 1, 8, 2, 128, 16, 4))
    if reason:
        pytest.skip(reason)


@pytest.fixture
def device():
    return "cuda"


def attend(batch, **options):
    codec = TQ4Codec.reader(batch.rotation, batch.centroids, "haar")
    index = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
    masks = dict(batch.masks)
    windows = masks.pop("windows")
    masks["sliding_window"] = masks["sliding_window"] if windows is None else windows
    how = {"sm_scale": batch.sm_scale, "causal": batch.causal, **masks}
    options = {"backend": "cuda", "return_lse": True, **how, **options}
    return tq4_paged_attention(batch.q, batch.cache, codec, *index, **options)


@pytest.fixture
def run():
    def call(batch, **options):
        shape = PagedShape(*batch.q.shape[:1], 1, batch.q.shape[1], batch.cache.num_kv_heads, batch.q.shape[2], 16, 1)
        longest = options.get("max_query_len", batch.q.shape[0])
        if reason := why_not_paged("cuda", batch.q.device, batch.q.dtype, shape, longest):
            pytest.skip(reason)
        with poisoned_memory():
            return attend(batch, **options)

    return call


class TestContract(PagedContract):
    same_bits_alone = False  # where the keys are cut depends on the whole batch

    @pytest.fixture(params=[HALF, BF16], ids=["fp16", "bf16"])
    def dtype(self, request):
        return request.param


@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode(run, generator, head_dim, group, page_size):
    sizes = {"dtype": HALF, "device": "cuda", "head_dim": head_dim, "group": group, "page_size": page_size}
    lengths = [(1, n) for n in (1, 15, 16, 17, 300, 0, 1021, 64, 33, 2000)]
    check_batch(lambda batch: run(batch, max_query_len=1), random_batch(generator, lengths, **sizes))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_verification(run, generator, head_dim):
    sizes = {"dtype": BF16, "device": "cuda", "head_dim": head_dim, "group": 4, "page_size": 16}
    check_batch(run, random_batch(generator, [(5, 700), (1, 90), (8, 8), (3, 3), (0, 50), (8, 1500)], **sizes))


def test_many_sequences(run, generator):
    lengths = [(1, 1 + 7 * i % 90) for i in range(400)]
    check_batch(run, random_batch(generator, lengths, dtype=HALF, device="cuda", group=4))


def test_graph_replays_with_other_lengths(generator):
    sizes = {"dtype": HALF, "device": "cuda", "group": 4, "page_size": 16}
    batch = random_batch(generator, [(1, 400), (1, 390), (1, 380)], **sizes)
    attend(batch, max_query_len=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(batch, max_query_len=1)
    for lengths in ([400, 390, 380], [17, 1, 380], [0, 390, 64]):
        now = batch.replace(
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            sequences=[{name: x[:, :, :n] for name, x in s.items()} for s, n in zip(batch.sequences, lengths, strict=True)],
        )
        batch.seq_lens.copy_(now.seq_lens)
        graph.replay()
        torch.cuda.synchronize()
        check_batch(lambda _: (out.clone(), lse.clone()), now)


def test_operator_is_registered_right(generator):
    batch = random_batch(generator, [length for length in MIXED if length[0] <= 8], dtype=HALF, device="cuda", group=4)
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2], device="cuda")
    args = (
        batch.q, batch.cache.buffer, batch.cache.page_size, batch.cache.num_kv_heads, batch.block_table, batch.seq_lens,
        batch.cu_seqlens_q, batch.centroids, batch.rotation, batch.sm_scale, batch.causal, 8, 100, out, lse,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.turboquant.cuda_paged.default, args, test_utils=("test_schema", "test_faketensor"))
