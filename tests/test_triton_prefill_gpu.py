"""Slices decompressed for PyTorch's dense attention, on a GPU: accuracy, the contract, and what only a real device shows."""

from __future__ import annotations

import pytest
import torch

from attention_cases import check, check_replays, poisoned_memory, random_case
from attention_contract import AttentionContract, check_causal_sizes
from offset_contract import OffsetContract, PagedOffsetContract
from paged_cases import arguments, check_batch, host_lengths, operator_arguments, random_batch
from paged_contract import PagedContract
from turboquant_vllm import TQ4Codec, reference, tq4_paged_attention

pytestmark = pytest.mark.gpu

HALF, BF16 = torch.float16, torch.bfloat16


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture
def prefill(monkeypatch):
    """The module under test, on whose way calls are led whatever their size."""
    from turboquant_vllm.triton import prefill

    monkeypatch.setattr(prefill, "MANY_ROWS", 0)
    return prefill


@pytest.fixture
def run(prefill):
    from turboquant_vllm.triton.route import attention

    def poisoned(*args):
        with poisoned_memory():
            return attention(*args)

    return poisoned


class TestContract(AttentionContract):
    @pytest.fixture
    def dtype(self):
        return BF16

    @pytest.mark.parametrize("score", [-6e4, 6e4])
    @pytest.mark.parametrize(("q_len", "kv_len"), [(3, 300), (140, 150), (5, 3)])
    def test_scores_far_from_zero(self, run, device, dtype, generator, score, q_len, kv_len):
        # Keys are rounded in their own basis, where such a score magnifies the rounding. So all keys are one: whatever
        # its rounding is, every visible key has the same score.
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=kv_len, is_causal=True)
        q = case.q[:, :, :1].expand_as(case.q).contiguous()
        k = case.k[:, :1, :1].expand_as(case.k).contiguous()
        case = case.replace(q=q, k=k, k_norms=torch.ones_like(case.k_norms), sm_scale=1.0)
        scores = (
            q.double() @ reference.decompress(k, case.k_norms, case.centroids, case.rotation, torch.float64)[0, 0, 0]
        ).abs()
        case = case.replace(k_norms=case.k_norms * (6e4 / scores.max()).float(), q=q if score > 0 else -q)
        check(run, case, gate=False, slack=abs(score) * 2.0**-23)


class TestOffsets(OffsetContract):
    @pytest.fixture
    def dtype(self):
        return BF16


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "q_len"), [(HALF, 128, 4, 512), (BF16, 80, 5, 256), (BF16, 256, 4, 300)]
)
def test_accuracy_of_keys_with_offsets(run, generator, dtype, head_dim, group, q_len):
    for kv_len in (q_len, 1021, 3072):
        sizes = {"group": group, "q_len": q_len, "kv_len": kv_len, "head_dim": head_dim, "offsets": True}
        check(run, random_case(generator, dtype=dtype, device="cuda", is_causal=True, **sizes))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "q_len"),
    [
        (HALF, 64, 4, 300),
        (HALF, 80, 5, 256),
        (BF16, 96, 7, 300),
        (HALF, 128, 4, 512),
        (BF16, 128, 1, 640),
        (BF16, 192, 2, 300),
        (HALF, 256, 8, 128),
    ],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_accuracy(run, generator, dtype, head_dim, group, q_len, is_causal):
    for batch, kv_len in ((2, q_len - 2), (2, q_len), (1, 1021), (1, 3072)):
        case = random_case(
            generator, dtype=dtype, device="cuda", batch=batch, group=group, q_len=q_len, kv_len=kv_len,
            head_dim=head_dim, is_causal=is_causal,
        )  # fmt: skip
        check(run, case)


def test_causal_sizes(run, generator):
    check_causal_sizes(run, generator, HALF, "cuda", [1, 2, 63, 64, 127, 128, 129, 200, 256, 257])


@pytest.mark.parametrize(("q_len", "kv_len"), [(1000, 1000), (512, 1024), (300, 1000), (1000, 300)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])
def test_slices(prefill, monkeypatch, generator, dtype, is_causal, q_len, kv_len):
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", 256 * 2 * 2 * 128 * 2)  # keys; K and V; heads; head_dim; bytes
    case = random_case(generator, dtype=dtype, device="cuda", head_dim=128, q_len=q_len, kv_len=kv_len, is_causal=is_causal)
    with poisoned_memory():
        check(prefill.attention, case)


def test_batch_changes_no_bits_where_the_scratch_is_short(prefill, monkeypatch, generator):
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", 1536 * 2 * 2 * 64 * 2)  # two sequences at a time
    case = random_case(generator, dtype=BF16, device="cuda", batch=3, q_len=400, kv_len=500, is_causal=True)
    out, lse = prefill.attention(*case.arguments)
    for i in range(3):
        alone, lse_alone = prefill.attention(*case.batch_entry(i).arguments)
        assert torch.equal(alone, out[i : i + 1])
        assert torch.equal(lse_alone, lse[i : i + 1])


@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 512), (300, 1000)])
def test_graph_replays_with_other_contents(prefill, generator, q_len, kv_len):
    sizes = {"dtype": HALF, "device": "cuda", "group": 4, "q_len": q_len, "kv_len": kv_len, "is_causal": True}
    case, other = random_case(generator, **sizes), random_case(generator, **sizes)
    check_replays(torch.ops.turboquant.triton_attention, case, other)


def test_memory_does_not_grow_with_the_context(prefill, monkeypatch, generator):
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", 8 << 20)  # 2048 keys, so many slices that some are joined on the way
    peaks = []
    for kv_len in (32768, 131072):
        case = random_case(
            generator,
            dtype=HALF,
            device="cuda",
            num_kv_heads=8,
            group=4,
            q_len=256,
            kv_len=kv_len,
            head_dim=128,
            is_causal=True,
        )
        prefill.attention(*case.arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prefill.attention(*case.arguments)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0]
    # The scratch, and a handful of tensors of the queries' size.
    assert peaks[1] <= prefill.SCRATCH_BYTES + 8 * case.q.nbytes


@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 1000), (512, 512), (300, 200)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sinks(run, generator, is_causal, q_len, kv_len):
    case = random_case(generator, dtype=HALF, device="cuda", batch=2, q_len=q_len, kv_len=kv_len, is_causal=is_causal)
    check(run, case.replace(sinks=torch.randn(4, generator=generator).cuda() + 3))


def attend_pages(batch, host=None, **options):
    """The public function, with the batch's lengths for the host (``host``; None: as they are) where it takes them."""
    codec = TQ4Codec.reader(batch.rotation, batch.centroids, "haar").with_key_scales(batch.key_scales)
    q, cache, *index = arguments(batch)
    names = {"sliding_window": batch.sliding_window if batch.windows is None else batch.windows}
    names |= {"softcap": batch.softcap, "sinks": batch.sinks, "sm_scale": batch.sm_scale, "causal": batch.causal}
    lens, starts = host or host_lengths(batch)
    known = {"seq_lens_cpu": lens, "cu_seqlens_q_cpu": starts}
    return tq4_paged_attention(q, cache, codec, *index, return_lse=True, **names, **known, **options)


@pytest.fixture
def small_slices(prefill, monkeypatch):
    """Sequences of 9 rows and more go by slices of 512 keys."""
    monkeypatch.setattr(prefill, "MANY_ROWS", 9)
    monkeypatch.setattr(prefill, "MANY_PAIRS", 0)
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", 512 * 2 * 2 * 64 * 2)  # keys; K and V; heads; head_dim; bytes


class TestPages(PagedContract):
    """``auto`` leaves sequences of few rows to the native kernels or Triton."""

    same_bits_alone = False  # for the native kernels

    @pytest.fixture
    def dtype(self):
        return BF16

    @pytest.fixture
    def run(self, small_slices):
        def call(batch):
            with poisoned_memory():
                return attend_pages(batch)

        return call


class TestPagesWithOffsets(PagedOffsetContract):
    @pytest.fixture
    def dtype(self):
        return BF16

    @pytest.fixture
    def run(self, small_slices):
        def call(batch):
            with poisoned_memory():
                return attend_pages(batch, backend="triton")

        return call


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("dtype", "head_dim", "group"), [(HALF, 128, 4), (BF16, 128, 8), (HALF, 256, 4), (BF16, 64, 1)])
def test_long_prompts_over_pages(generator, dtype, head_dim, group, page_size):
    sizes = {"dtype": dtype, "device": "cuda", "head_dim": head_dim, "group": group, "page_size": page_size}
    lengths = [(1, 900), (512, 512), (301, 5003), (1, 33), (60, 4000), (700, 20011), (300, 200), (5, 5)]
    check_batch(attend_pages, random_batch(generator, lengths, **sizes))


def test_prompts_of_any_length_are_captured(generator):
    batch = random_batch(generator, [(1, 300), (130, 1029), (128, 128)], dtype=HALF, device="cuda", group=4)
    host = host_lengths(batch)  # waits for the GPU, which a capture must not
    attend_pages(batch, host)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend_pages(batch, host)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    check_batch(lambda _: (out, lse), batch)


def test_nothing_waits_for_the_gpu(generator):
    batch = random_batch(generator, [(1, 300), (130, 1029), (128, 128)], dtype=HALF, device="cuda", group=4)
    lens, starts = host_lengths(batch)
    codec = TQ4Codec.reader(batch.rotation, batch.centroids, "haar")
    q, cache, *index = arguments(batch)

    def call():
        return tq4_paged_attention(q, cache, codec, *index, return_lse=True, seq_lens_cpu=lens, cu_seqlens_q_cpu=starts)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_batch(lambda _: result, batch)


@pytest.mark.parametrize("masks", [{}, {"sinks": True}], ids=["plain", "sinks"])
def test_operator_over_pages_is_registered_right(generator, masks):
    batch = random_batch(generator, [(1, 40), (300, 8000)], dtype=HALF, device="cuda")
    if masks:
        batch = batch.replace(sinks=torch.zeros(4, device="cuda"))
    out, lse = torch.zeros_like(batch.q), torch.zeros(batch.q.shape[:2], device="cuda")
    known = dict(zip(("seq_lens_cpu", "cu_seqlens_q_cpu"), host_lengths(batch), strict=True))
    op, args = torch.ops.turboquant.triton_paged.default, operator_arguments(batch, out, lse)
    torch.library.opcheck(op, args, known, test_utils=("test_schema", "test_faketensor"))


def test_device_that_is_not_current(run, generator):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = random_case(generator, dtype=HALF, device="cuda:1", q_len=200, kv_len=300, is_causal=True)
    with torch.cuda.device(0):
        out, lse = check(run, case)
    assert out.device == lse.device == torch.device("cuda:1")
