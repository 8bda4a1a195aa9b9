"""The paged kernels on a GPU: the contract, accuracy, and what only a real device shows."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from attention_cases import poisoned_memory
from offset_contract import PagedOffsetContract
from paged_cases import arguments, check_batch, operator_arguments, random_batch
from paged_contract import MIXED, PagedContract
from turboquant_vllm import PagedTQ4Cache, TQ4Codec, tq4_paged_attention

pytestmark = pytest.mark.gpu

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture
def run():
    def call(batch):
        with poisoned_memory():
            out = torch.empty(batch.q.shape, dtype=batch.q.dtype, device="cuda")
            lse = torch.empty(batch.q.shape[:2], device="cuda")
            torch.ops.turboquant.triton_paged(*operator_arguments(batch, out, lse))
        return out, lse

    return call


class TestContract(PagedContract):
    @pytest.fixture
    def dtype(self):
        return BF16


class TestOffsets(PagedOffsetContract):
    @pytest.fixture
    def dtype(self):
        return BF16


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "page_size"),
    [(HALF, 128, 4, 64), (BF16, 256, 8, 128), (BF16, 80, 5, 64), (FULL, 64, 2, 256), (BF16, 512, 8, 64)],
)
def test_accuracy_of_keys_with_offsets(run, generator, dtype, head_dim, group, page_size):
    sizes = {"dtype": dtype, "device": "cuda", "head_dim": head_dim, "group": group, "page_size": page_size, "offsets": True}
    check_batch(run, random_batch(generator, [(1, 9001), (300, 1001), (4, 1021), (17, 17), (1, 33)], **sizes))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "page_size"),
    [
        (HALF, 64, 7, 16),
        (BF16, 80, 5, 32),
        (HALF, 96, 4, 16),
        (HALF, 128, 4, 16),
        (BF16, 128, 8, 64),
        (BF16, 128, 32, 256),
        (FULL, 128, 4, 16),
        (BF16, 192, 8, 16),
        (BF16, 256, 4, 64),
        (BF16, 512, 8, 64),
    ],
)
def test_accuracy(run, generator, dtype, head_dim, group, page_size):
    sizes = {"dtype": dtype, "device": "cuda", "head_dim": head_dim, "group": group, "page_size": page_size}
    check_batch(run, random_batch(generator, [(1, 9001), (300, 3001), (4, 1021), (17, 17), (1, 33), (200, 200)], **sizes))


@hypothesis.given(data=st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_batch(run, data):
    draw = data.draw
    lengths = draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2000)), min_size=1, max_size=12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masks = {"sliding_window": draw(st.integers(1, 2500)), "softcap": draw(st.floats(0.5, 50))} if draw(st.booleans()) else {}
    spare = draw(st.integers(0, 9))
    check_batch(run, random_batch(generator, lengths, dtype=HALF, device="cuda", spare_tokens=spare, **masks), gate=False)


def grown(batch, lengths):
    """The same pages and queries, for fewer of the tokens."""
    starts = torch.tensor([0, *(tokens for tokens, _ in lengths)]).cumsum(0).int()
    lens = torch.tensor([keys for _, keys in lengths]).int()
    sequences = [
        {name: x[:, :, :keys] for name, x in sequence.items()}
        for sequence, (_, keys) in zip(batch.sequences, lengths, strict=True)
    ]
    return batch.replace(seq_lens=lens.cuda(), cu_seqlens_q=starts.cuda(), sequences=sequences)


@pytest.mark.parametrize("window", [None, 300])
def test_graph_replays_with_growing_lengths(generator, window):
    # Sequences decode, prefill and end, all in a graph that was captured for the largest of them.
    most = [(40, 1200), (24, 900), (30, 700)]
    batch = random_batch(generator, most, dtype=HALF, device="cuda", group=4, sliding_window=window)
    codec = TQ4Codec(64, device="cuda")
    lens, starts, table = batch.seq_lens.clone(), batch.cu_seqlens_q.clone(), batch.block_table.clone()
    bounds = {"max_query_len": 60, "max_seq_len": 1200, "sliding_window": window}

    def step():
        return tq4_paged_attention(batch.q, batch.cache, codec, table, lens, starts, return_lse=True, **bounds)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    turns = (
        [(1, 1), (1, 17), (1, 1)],
        [(40, 40), (1, 300), (4, 8)],
        [(1, 41), (60, 600), (0, 0)],
        [(1, 700), (1, 601), (30, 640)],
    )
    for lengths in (*turns, most):
        now = grown(batch, lengths)
        # The table may change as well: which row is whose.
        order = torch.randperm(3, generator=generator).cuda()
        if len({tokens for tokens, _ in lengths}) > 1:
            order = torch.arange(3).cuda()
        table.copy_(batch.block_table[order])
        lens.copy_(now.seq_lens[order])
        starts.copy_(now.cu_seqlens_q)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        now = now.replace(sequences=[now.sequences[i] for i in order.tolist()])
        check_batch(lambda _: (out, lse), now)


def test_nothing_waits_for_the_gpu(generator):
    batch = random_batch(generator, MIXED, dtype=HALF, device="cuda")
    q, cache, *index = arguments(batch)
    codec = TQ4Codec(64, device="cuda")
    tq4_paged_attention(q, cache, codec, *index)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = tq4_paged_attention(q, cache, codec, *index, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_batch(lambda _: (out, lse), batch)


def test_pages_with_offsets_beyond_32_bits(run, generator):
    size = 10 << 30
    if torch.cuda.mem_get_info()[0] < size + (4 << 30):
        pytest.skip("needs 14 GiB of free GPU memory")
    batch = random_batch(generator, [(1, 150), (20, 100)], dtype=HALF, device="cuda")
    pages, width = batch.cache.buffer.shape
    memory = torch.empty(size, dtype=torch.uint8, device="cuda")
    far = memory.as_strided((pages, width), (2**29 + 48, 1), 16)
    assert (pages - 1) * far.stride(0) > 2**32
    cache = PagedTQ4Cache(far.copy_(batch.cache.buffer), 16, 2, 64)
    check_batch(run, batch.replace(cache=cache))


@pytest.mark.parametrize("masks", [{}, {"sliding_window": 30, "softcap": 9.0}], ids=["plain", "masks"])
def test_operator_is_registered_right(generator, masks):
    batch = random_batch(generator, [(1, 40), (20, 30)], dtype=HALF, device="cuda", **masks)
    out, lse = torch.zeros_like(batch.q), torch.zeros(batch.q.shape[:2], device="cuda")
    torch.library.opcheck(torch.ops.turboquant.triton_paged.default, operator_arguments(batch, out, lse))


def test_compiles_into_one_graph(generator):
    batch = random_batch(generator, [(1, 40), (20, 30)], dtype=HALF, device="cuda")
    q, cache, *index = arguments(batch)
    codec = TQ4Codec(64, device="cuda")

    def step(q, buffer, table, lens, starts):
        pages = PagedTQ4Cache(buffer, cache.page_size, cache.num_kv_heads, cache.head_dim)
        return tq4_paged_attention(q, pages, codec, table, lens, starts, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out, lse = compiled(q, cache.buffer, *index)
    check_batch(lambda _: (out, lse), batch)
