"""Native decoding in one launch on a GPU, with clusters of every size, blocks that are spread and teams of a block's warps:
contracts, odd lengths, graphs, streams, bits that repeat."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from attention_cases import check, check_replays, compare, expected, poisoned_memory, random_case, skip_if_refused
from attention_contract import AttentionContract
from mask_contract import MaskContract
from offset_contract import OffsetContract, PagedOffsetContract
from paged_cases import check_batch, random_batch
from turboquant_vllm import TQ4Codec, TQ4Tensor, ops, tq4_attention

pytestmark = pytest.mark.gpu

HALF, BF16 = torch.float16, torch.bfloat16
SIZES = (1, 2, 3, 4, 8, "spread 2", "spread 5", "spread 16", "teams 1")


@pytest.fixture(autouse=True)
def needs_clusters():
    if reason := ops.why_not_cuda(torch.device("cuda")):
        pytest.skip(reason)
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture(params=[HALF, BF16], ids=["fp16", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=(1, 4, 8, "spread 5", "teams 1"))
def blocks(request, monkeypatch):
    """Blocks of every pass: a cluster, spread or, where there may be such, with teams; a call that takes the line fails."""
    force(monkeypatch, request.param)


def force(monkeypatch, size):
    from turboquant_vllm.cuda import cluster, decode, paged
    from turboquant_vllm.cuda.variants import Cluster, cluster_variants

    *kind, blocks = str(size).split()

    def choose(passes, tiles, variant, multiprocessors, fit, sequences, in_twos):
        teams = cluster_variants(variant).teams if kind == ["teams"] and in_twos else None
        return Cluster(int(blocks), teams or dataclasses.replace(variant, spread=kind == ["spread"]))

    cluster.plan.cache_clear()
    monkeypatch.setattr(cluster, "plan", functools.lru_cache(cluster.plan.__wrapped__))  # what is forced is forgotten
    monkeypatch.setattr(cluster, "choose_cluster", choose)
    for module in (decode, paged):
        monkeypatch.setattr(module.Call, "plan", None)


def decode(*args, **options):
    from turboquant_vllm.cuda.decode import decode

    skip_if_refused(*args)
    with poisoned_memory():
        return decode(*args, hadamard=True, **options)


def decode_pages(batch, longest=None):
    from turboquant_vllm.cuda.paged import decode_pages

    longest = int(batch.cu_seqlens_q.diff().max()) if longest is None else longest
    q, cache, sequences, *how = batch.arguments
    out = torch.full_like(batch.q, float("nan"))
    lse = torch.full(q.shape[:2], float("nan"), device=q.device)
    sequences = sequences._replace(max_query_len=longest, max_seq_len=int(batch.seq_lens.max()))
    decode_pages(q, cache, sequences, *how, out, lse, hadamard=True)
    return out, lse


class TestContract(AttentionContract):
    @pytest.fixture
    def run(self, blocks):
        return decode


class TestMasks(MaskContract):
    @pytest.fixture
    def run(self, blocks):
        return decode


class TestOffsets(OffsetContract):
    @pytest.fixture
    def run(self, blocks):
        return decode


class TestOffsetsInPages(PagedOffsetContract):
    LENGTHS = ((1, 37), (3, 170), (4, 90), (0, 0), (1, 1), (1, 64), (5, 3), (1, 129), (2, 700))
    LONG = ((1, 4300), (2, 600), (1, 256))

    @pytest.fixture
    def run(self, blocks):
        return decode_pages


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lengths(monkeypatch, generator, head_dim, group, size):
    force(monkeypatch, size)
    for i, kv_len in enumerate((1, 15, 16, 17, 255, 513, 1021, 4099)):
        q_len = 1 + i % max(1, min(8, 32 // group))
        sizes = {"batch": 2, "group": group, "q_len": q_len, "kv_len": kv_len, "head_dim": head_dim, "is_causal": q_len > 1}
        check(decode, random_case(generator, dtype=(HALF, BF16)[i % 2], device="cuda", **sizes))


@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
@pytest.mark.parametrize(("head_dim", "group"), [(64, 8), (128, 1), (128, 4), (128, 16), (256, 4)])
def test_pages(blocks, generator, head_dim, group, page_size):
    sizes = {"dtype": HALF, "device": "cuda", "head_dim": head_dim, "group": group, "page_size": page_size}
    lengths = [(1, n) for n in (1, 15, 16, 17, 300, 0, 1021, 64, 33, 2000)]
    check_batch(decode_pages, random_batch(generator, lengths, **sizes))
    lengths = [(2, 700), (1, 90), (2, 2), (0, 50), (2, 1500)]
    # Of few rows the gate is a draw: the largest of PyTorch's errors is a third of ours in one of 60 such batches.
    check_batch(decode_pages, random_batch(generator, lengths, spare_tokens=2, **sizes), gate=group > 1)


@pytest.mark.parametrize("options", [{"sliding_window": 20}, {"softcap": 2.0, "sliding_window": 100}, {"sinks": True}])
def test_masks_over_pages(blocks, generator, options):
    if "sinks" in options:
        options = {"sinks": torch.randn(8, generator=generator).cuda() + 1}
    lengths = [(1, 90), (1, 40), (3, 150), (5, 64), (1, 16), (4, 3), (2, 1700)]
    check_batch(decode_pages, random_batch(generator, lengths, dtype=HALF, device="cuda", group=4, **options))


@pytest.mark.parametrize("size", SIZES)
def test_bits_repeat(monkeypatch, generator, size):
    force(monkeypatch, size)
    case = random_case(generator, dtype=HALF, device="cuda", batch=5, num_kv_heads=8, group=4, kv_len=3000, head_dim=128)
    out, lse = decode(*case.arguments)
    for _ in range(20):
        again, lse_again = decode(*case.arguments)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)
    torch.cuda.synchronize()


@pytest.mark.parametrize("q_len", [1, 5])
def test_graph_replays_with_other_contents(blocks, generator, q_len):
    sizes = {"dtype": HALF, "device": "cuda", "batch": 2, "group": 4, "q_len": q_len, "kv_len": 1299, "is_causal": True}
    case, other = random_case(generator, **sizes), random_case(generator, **sizes)
    check_replays(functools.partial(torch.ops.turboquant.cuda_decode, hadamard=True), case, other)


def test_calls_on_several_streams(monkeypatch, generator):
    """Each counts its blocks for itself."""
    force(monkeypatch, "spread 16")
    sizes = {"dtype": HALF, "device": "cuda", "batch": 1, "num_kv_heads": 8, "group": 4, "head_dim": 128}
    cases = [random_case(generator, kv_len=kv_len, **sizes) for kv_len in (300, 5000, 20000)]
    wanted = [decode(*case.arguments) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    found = []
    for _ in range(100):
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(torch.ops.turboquant.cuda_decode(*case.operator_arguments, hadamard=True))
    torch.cuda.synchronize()
    for i, (out, lse) in enumerate(found):
        assert torch.equal(out, wanted[i % 3][0])
        assert torch.equal(lse, wanted[i % 3][1])


@pytest.mark.parametrize(("batch", "kv_len"), [(1, 1024), (1, 8192), (1, 40001), (4, 8192), (32, 4096), (64, 1024)])
def test_what_is_chosen(generator, batch, kv_len):
    """The public function, and the same call over a rotation that no cluster serves."""
    case = random_case(generator, dtype=HALF, device="cuda", batch=batch, num_kv_heads=8, group=4, kv_len=kv_len, head_dim=128)
    operands = TQ4Tensor(case.k, case.k_norms), TQ4Tensor(case.v, case.v_norms)
    got, line = (
        tq4_attention(case.q, *operands, TQ4Codec.reader(case.rotation, case.centroids, kind), backend="cuda")
        for kind in ("hadamard", "haar")
    )
    some = case.batch_entry(batch - 1)
    compare(got[-1:], expected(some)[0], HALF)
    compare(got, line.double(), HALF)
