"""Keys with offsets and outliers: what the definition says, by loops that share no code with it, and what writers keep."""

from __future__ import annotations

import math

import pytest
import torch

from attention_cases import compare, expected, random_case
from offset_contract import OffsetContract, PagedOffsetContract
from paged_cases import run_reference
from turboquant_vllm import PagedTQ4Cache, TQ4Codec, TQ4Keys, tq4_attention, tq4_paged_attention, tq4_store
from turboquant_vllm.records import GROUP, Operand
from turboquant_vllm.reference import attention, decompress_keys
from turboquant_vllm.reference_keys import PRIOR_WEIGHT

HEADS, D = 2, 64


@pytest.fixture
def device():
    return "cpu"


class TestReference(OffsetContract):
    # Not float32: of a definition that rotates queries, PyTorch's own error over decompressed keys is no measure of rounding.
    @pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
    def dtype(self, request):
        return request.param

    @pytest.fixture
    def run(self):
        return attention


class TestPages(PagedOffsetContract):
    @pytest.fixture
    def dtype(self):
        return torch.float16

    @pytest.fixture
    def run(self):
        return run_reference


def keys_like_a_models(generator: torch.Generator, count: int) -> torch.Tensor:
    """``[HEADS, count, D]`` in float64: a large common part, and a first key unlike all others."""
    k = torch.randn(HEADS, count, D, generator=generator) + 6 * torch.randn(HEADS, 1, D, generator=generator)
    k[:, :1] = 20 * torch.randn(HEADS, 1, D, generator=generator)
    return k.double()


@pytest.fixture
def codec(generator):
    return TQ4Codec(D).with_key_scales(torch.exp(0.4 * torch.randn(HEADS, D, generator=generator)))


def test_reading(generator):
    case = random_case(generator, dtype=torch.float64, kv_len=150, offsets=True)
    got = decompress_keys(case.keys, case.tables, torch.float64)
    for head in range(HEADS):
        for n in range(150):
            step, (offset, outlier) = case.k_steps[0, head, n // 64], case.k_groups[0, head, n // 64]
            norm, codes = case.k_norms[0, head, n], case.k[0, head, n].tolist()
            y = [float(norm) * float(case.centroids[c]) for byte in codes for c in (byte >> 4, byte & 15)]
            y = [float(step[1]) * float(e) for e in outlier] if norm < 0 else y
            y = torch.tensor([a + float(step[0]) * float(o) for a, o in zip(y, offset, strict=True)], dtype=torch.float64)
            want = torch.einsum("j,ji->i", y, case.rotation.double()) / case.key_scales[head].double()
            torch.testing.assert_close(got[0, head, n], want)


def test_attention_is_that_over_the_keys_as_they_read_back(generator):
    case = random_case(generator, dtype=torch.float64, group=3, q_len=4, kv_len=150, is_causal=True, offsets=True)
    dense = Operand(decompress_keys(case.keys, case.tables, torch.float64))
    q, _, *others = case.arguments
    for got, want in zip(attention(*case.arguments), attention(q, dense, *others), strict=True):
        torch.testing.assert_close(got, want)


def rotated(k: torch.Tensor, codec: TQ4Codec) -> torch.Tensor:
    return torch.einsum("hni,ji->hnj", k * codec.key_scales.double()[:, None], codec.rotation.double())


def offset_by_hand(y: torch.Tensor, prior: torch.Tensor | None) -> torch.Tensor:
    """The offset, not rounded, of a new group of keys ``y [n, D]``."""
    far = max(range(len(y)), key=lambda i: float((y[i] - y.mean(0)).norm()))
    others = [row for i, row in enumerate(y) if i != far] + ([] if prior is None else [prior] * PRIOR_WEIGHT)
    return sum(others) / len(others) if others else torch.zeros(D, dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 67, 150, 192])  # of two keys both are equally far from their mean
def test_writing_whole_keys(generator, codec, count):
    k = keys_like_a_models(generator, count)
    t = codec.compress_keys(k)
    y, plain = rotated(k, codec), TQ4Codec(D)
    for head in range(HEADS):
        prior = None
        for group in range(-(-count // GROUP)):
            some = slice(group * GROUP, min((group + 1) * GROUP, count))
            own = y[head, some]
            offset = offset_by_hand(own, prior if len(own) < GROUP else None)
            kept, (step, outlier_step, distance, spare) = t.groups[head, group].double(), t.steps[head, group].double()
            assert step == pytest.approx(float(offset.abs().max()) / 127, rel=1e-5)
            torch.testing.assert_close(kept[0] * step, offset, rtol=0, atol=float(step) * 0.501)  # at a half either way
            residual = own - kept[0] * step
            far = int(residual.norm(dim=-1).argmax())
            assert (t.norms[head, some] < 0).nonzero().flatten().tolist() == [far]
            torch.testing.assert_close(kept[1] * outlier_step, residual[far], rtol=0, atol=float(outlier_step) * 0.5001)
            assert outlier_step == pytest.approx(float(residual[far].abs().max()) / 127, rel=1e-5)
            assert distance == pytest.approx(float(residual[far].norm()), rel=1e-5)
            assert spare == 0
            # Around the offset keys are coded as any vectors.
            want = plain.compress(residual @ plain.rotation.double())
            same = t.codes[head, some] == want.codes
            assert (~same).sum() <= 1 + want.codes.numel() // 100
            same = same.all(-1)  # a code that rounding moved moves its key's norm
            torch.testing.assert_close(t.norms[head, some].abs()[same], want.norms[same], rtol=1e-4, atol=1e-6)
            prior = offset if group == 0 or len(own) == GROUP else None


def test_a_part_that_all_keys_share_costs_nothing(generator):
    k = torch.randn(1, HEADS, 256, D, generator=generator)
    shared = 100 * torch.randn(1, HEADS, 1, D, generator=generator)
    codec = TQ4Codec(D)
    error = (codec.decompress(codec.compress_keys(k + shared)) - (k + shared)).square().sum(-1)
    plain = (codec.decompress(codec.compress(k)) - k).square().sum(-1)
    # The offset's rounding, at most half a step of max / 127 in each coordinate, is coded along with the keys.
    rounding = (shared.abs().max() * math.sqrt(D) / 254).item() ** 2
    assert error.mean() < 1.5 * plain.mean() * (1 + rounding / D)
    assert (codec.decompress(codec.compress(k + shared)) - (k + shared)).square().sum(-1).mean() > 100 * error.mean()


class Pages:
    """A cache of scattered pages full of poison, and one sequence in it."""

    def __init__(self, codec: TQ4Codec, tokens: int, page_size: int = 64) -> None:
        self.codec, count = codec, -(-tokens // page_size) + 2
        self.cache = PagedTQ4Cache.allocate(count, page_size=page_size, num_kv_heads=HEADS, head_dim=D, has_offsets=True)
        self.cache.buffer.fill_(255)  # NaN as a norm and as a step
        self.table = torch.randperm(count).int()
        position = torch.arange(tokens)
        self.slots = self.table[position // page_size].long() * page_size + position % page_size
        self.previous = torch.cat([torch.tensor([-1]), self.slots[:-1]])
        self.length = 0

    def write(self, k: torch.Tensor, first: int | None = None, pad: int = 0) -> None:
        """Append, or write over from ``first`` on; ``pad``: tokens without a slot before every third one."""
        first = self.length if first is None else first
        count = k.shape[1]
        rows = torch.arange(first, first + count)
        slots, previous, tokens = self.slots[rows], self.previous[rows], k.transpose(0, 1).float()
        if pad:
            place = torch.tensor([i for i in range(count) for _ in range(1 + (pad if i % 3 == 0 else 0))])
            real = torch.cat([place[1:] != place[:-1], torch.tensor([True])])
            slots, previous, tokens = torch.where(real, slots[place], -1), previous[place], tokens[place]
        tq4_store(tokens, tokens, self.cache, self.codec, slots, previous_slots=previous, backend="reference")
        self.length = first + count

    def keys(self) -> TQ4Keys:
        """The sequence as a whole tensor."""
        used = self.table[: -(-self.length // self.cache.page_size)].long()
        parts = self.cache.keys.each(lambda x: x[used].transpose(0, 1).flatten(1, 2)[None]).tokens(0, self.length)
        return TQ4Keys(*(x[0] for x in parts))

    def read(self) -> torch.Tensor:
        return self.codec.decompress(self.keys(), torch.float64)


def assert_same(got: TQ4Keys, want: TQ4Keys) -> None:
    for name, a, b in zip(TQ4Keys._fields, got, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("chunks", [[200], [64, 128, 8], [128, 72]])
def test_chunks_of_whole_groups_are_written_as_the_whole(generator, codec, chunks, pad, page_size):
    k = keys_like_a_models(generator, 200)
    pages = Pages(codec, 200, page_size)
    for count in chunks:
        pages.write(k[:, pages.length : pages.length + count], pad=pad)
    got, want = pages.keys(), codec.compress_keys(k.float())
    last = 3 if len(chunks) > 1 else 4  # the last group's prior is read back where it was written before
    assert_same(TQ4Keys(*(x[:, : 64 * last] for x in got[:2]), *(x[:, :last] for x in got[2:])),
                TQ4Keys(*(x[:, : 64 * last] for x in want[:2]), *(x[:, :last] for x in want[2:])))  # fmt: skip


def relative_error(got: torch.Tensor, k: torch.Tensor) -> float:
    """Of what tells keys apart."""
    return ((got - k)[:, 1:].square().sum() / (k - k.mean(1, keepdim=True))[:, 1:].square().sum()).item()


@pytest.mark.parametrize("chunks", [[1] * 200, [20] + [1] * 180, [130] + [1] * 70, [7] * 28 + [4], [63, 1, 1, 63, 72]])
def test_chunks_of_any_size_are_nearly_as_good(generator, codec, chunks):
    k = keys_like_a_models(generator, 200)
    pages = Pages(codec, 200)
    for count in chunks:
        pages.write(k[:, pages.length : pages.length + count])
    read, norms = pages.read(), pages.keys().norms
    assert norms.isfinite().all()
    assert all((norms[:, i : i + GROUP] < 0).sum(-1).tolist() == [1] * HEADS for i in range(0, 200, GROUP))
    whole = relative_error(codec.decompress(codec.compress_keys(k)), k)
    # Around a mean of others than its own keys a group's variance is at most doubled. A group that begins with nothing
    # before it is coded as it comes, common part and all, and the mean that the next one begins with has that error.
    after = slice(128, None) if chunks[0] < 8 else slice(None)
    assert relative_error(read[:, after], k[:, after]) < 2.2 * whole
    # The sink is as good as 8 bits make it: half a step in each coordinate.
    sink = (read - k)[:, 0] * codec.key_scales.double()
    assert (sink.norm(dim=-1) < 20 * 5 * math.sqrt(D) / 254 * codec.key_scales.max()).all()


def test_a_later_key_that_lies_farther_takes_the_place(generator):
    codec, k = TQ4Codec(D), torch.randn(HEADS, 64, D, generator=generator).double()
    k[:, 3] *= 5
    k[0, 40] *= 20
    pages = Pages(codec, 64)
    pages.write(k[:, :20])
    assert (pages.keys().norms < 0).nonzero().tolist() == [[0, 3], [1, 3]]
    before = pages.keys()
    for n in range(20, 64):
        pages.write(k[:, n : n + 1])
    after = pages.keys()
    assert (after.norms < 0).nonzero().tolist() == [[0, 40], [1, 3]]
    assert torch.equal(after.norms[0, 3], before.norms[0, 3].abs())
    assert torch.equal(after.groups[:, :, 0], before.groups[:, :, 0])  # offsets stay
    error = (pages.read() - k).norm(dim=-1) / k.norm(dim=-1)
    assert error[0, 40] < 0.02 < 0.05 < error[0, 3]
    assert error[1, 3] < 0.02


def test_an_outlier_that_is_written_over_is_none(generator):
    codec, k = TQ4Codec(D), torch.randn(HEADS, 130, D, generator=generator).double()
    k[:, 20] *= 30
    pages = Pages(codec, 130)
    pages.write(k[:, :18])
    pages.write(k[:, 18:22])  # a draft, of which two tokens are rejected
    assert (pages.keys().norms < 0).nonzero()[:, 1].tolist() == [20, 20]
    k[:, 20:22] = torch.randn(HEADS, 2, D, generator=generator)
    pages.write(k[:, 20:24], first=20)
    norms = pages.keys().norms
    assert ((norms[:, :20] < 0).sum(-1) == 0).all()  # its place was taken from them
    assert ((norms[:, 20:] < 0).sum(-1) == 1).all()
    assert relative_error(pages.read(), k[:, :24]) < 0.03


def test_a_group_that_is_begun_again_is_a_new_one(generator, codec):
    k = keys_like_a_models(generator, 70)
    pages = Pages(codec, 70)
    pages.write(k[:, :62])
    pages.write(torch.randn(HEADS, 6, D, generator=generator))  # a draft beyond the group's end, rejected whole
    pages.write(k[:, 62:63], first=62)
    pages.write(k[:, 63:70])
    want = Pages(codec, 70)
    for first, stop in ((0, 62), (62, 63), (63, 70)):
        want.write(k[:, first:stop])
    assert_same(pages.keys(), want.keys())


def test_bad_keys_do_not_touch_their_neighbours(generator, codec):
    k = keys_like_a_models(generator, 80)
    k[:, 5, 3], k[:, 70, 1] = float("nan"), float("inf")
    pages = Pages(codec, 80)
    for first, stop in ((0, 3), (3, 66), (66, 69), (69, 72), (72, 80)):
        pages.write(k[:, first:stop])
    norms = pages.keys().norms
    assert norms.isnan().nonzero()[:, 1].tolist() == [5, 70, 5, 70]
    good = [n for n in range(80) if n not in (5, 70)]
    assert relative_error(pages.read()[:, good], k[:, good]) < 0.05
    t = codec.compress_keys(k)
    assert t.norms.isnan().nonzero()[:, 1].tolist() == [5, 70, 5, 70]
    assert relative_error(codec.decompress(t, torch.float64)[:, good], k[:, good]) < 0.03


@pytest.mark.parametrize("count", [1, 70])
def test_zeros_and_equal_keys(codec, count):
    for k in (torch.zeros(HEADS, count, D), torch.ones(HEADS, count, D)):
        t = codec.compress_keys(k)
        # Eight bits, at worst: half a step in every coordinate.
        limit = rotated(k.double(), codec).abs().amax() * math.sqrt(D) / 254 / codec.key_scales.min()
        torch.testing.assert_close(codec.decompress(t), k, rtol=0, atol=float(limit))
        pages = Pages(codec, count)
        pages.write(k)
        assert_same(pages.keys(), t)


@pytest.mark.parametrize("magnitude", [1e-25, 1e25])
def test_magnitudes(generator, codec, magnitude):
    k = keys_like_a_models(generator, 100)
    small, t = codec.compress_keys(k), codec.compress_keys(k * magnitude)
    same = small.codes == t.codes
    assert same.float().mean() > 0.99
    same = same.all(-1)  # a code that rounding moved moves its key's norm
    torch.testing.assert_close(t.norms.double()[same] / magnitude, small.norms.double()[same], rtol=1e-4, atol=0)


def test_public_functions_take_keys_with_offsets(generator, codec):
    k = keys_like_a_models(generator, 100)[None].float()
    v = torch.randn(1, HEADS, 100, D, generator=generator)
    q = torch.randn(1, 2 * HEADS, 3, D, generator=generator)
    keys, values = codec.compress_keys(k), codec.compress(v)
    out, lse = tq4_attention(q, keys, values, codec, is_causal=True, return_lse=True)
    dense = codec.decompress(keys, torch.float64), codec.decompress(values, torch.float64)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), *(x.repeat_interleave(2, 1) for x in dense), attn_mask=torch.ones(3, 100, dtype=torch.bool).tril(97)
    )
    # Scores of keys as long as these are rounded by some 2^-23 |q| |k| / sqrt(D); that moves weights by as much, results twice.
    slack = 2 * 2.0**-23 * (q.norm(dim=-1).max() * k.norm(dim=-1).max() / D**0.5).item()
    compare(out, want, torch.float32, slack=slack)
    pages = Pages(codec, 100)
    tq4_store(k[0].transpose(0, 1), v[0].transpose(0, 1), pages.cache, codec, pages.slots, previous_slots=pages.previous)
    index = (pages.table[None], torch.tensor([100], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32))
    paged, paged_lse = tq4_paged_attention(q[0].transpose(0, 1), pages.cache, codec, *index, return_lse=True)
    compare(paged.transpose(0, 1)[None], out.double(), torch.float32, slack=slack)
    compare(paged_lse.T[None], lse.double(), torch.float32, slack=slack)


WRONG = {
    "scales-of-other-heads": (lambda codec, k: codec.compress_keys(k[:1]), r"key_scales must have shape \[1, 64\], got \[2"),
    "negative-scales": (lambda codec, k: codec.with_key_scales(-torch.ones(2, D)), "key_scales must be positive and finite"),
    "scales-of-another-size": (lambda codec, k: codec.with_key_scales(torch.ones(2, 32)), r"key_scales must have shape"),
    "no-heads": (lambda codec, k: codec.compress_keys(k[0]), r"k must have shape \[..., num_kv_heads, tokens, 64\]"),
    "groups": (
        lambda codec, k: codec.decompress(codec.compress_keys(k)._replace(groups=torch.zeros(2, 1, 2, D, dtype=torch.int8))),
        r"t.groups must have shape \[2, 2, 2, 64\], got \[2, 1, 2, 64\]",
    ),
    "page-size": (
        lambda codec, k: PagedTQ4Cache.allocate(1, page_size=32, num_kv_heads=2, head_dim=D, has_offsets=True),
        "page_size must be a multiple of 64, from 16 to 256, got 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(generator, codec, call, message):
    with pytest.raises(ValueError, match=message):
        call(codec, keys_like_a_models(generator, 100))


def test_expected_is_not_vacuous(generator):
    case = random_case(generator, dtype=torch.float64, kv_len=150, offsets=True)
    want, _ = expected(case)
    for change in ({"k_norms": case.k_norms.abs()}, {"key_scales": None}, {"k_steps": case.k_steps * 0}):
        assert (expected(case.replace(**change))[0] - want).abs().max() > 0.002
