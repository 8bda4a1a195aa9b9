"""What every attention backend must do, as tests to inherit.

A subclass gives fixtures ``run`` (see :mod:`attention_cases`), ``device`` and ``dtype``. Shapes are small and of one head
dimension, so that a backend which compiles kernels compiles few.
"""

from __future__ import annotations

import math

import pytest
import torch

from attention_cases import LAYOUTS, TOLERANCE, Case, Run, check, compare, expected, levels_and_rotation, random_case
from turboquant_vllm import reference

PACKED = [
    pytest.param((True, True), id="packed"),
    pytest.param((True, False), id="packed-keys"),
    pytest.param((False, False), id="dense"),
]
HEAD_DIM = 64


class AttentionContract:
    @pytest.mark.parametrize("packed", PACKED)
    @pytest.mark.parametrize(("q_len", "kv_len"), [(5, 3), (3, 0), (70, 9), (140, 130)])
    def test_query_that_sees_no_key_gives_zeros(self, run, device, dtype, generator, packed, q_len, kv_len):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=kv_len, packed=packed, is_causal=True)
        out, lse = check(run, case)
        unseen = q_len - kv_len
        assert (out[:, :, :unseen] == 0).all()
        assert (lse[:, :, :unseen] == float("-inf")).all()
        assert lse[:, :, unseen:].isfinite().all()

    def test_no_keys_at_all(self, run, device, dtype, generator):
        out, lse = run(*random_case(generator, dtype=dtype, device=device, q_len=3, kv_len=0).arguments)
        assert (out == 0).all()
        assert (lse == float("-inf")).all()

    def test_call_without_queries_or_sequences(self, run, device, dtype, generator):
        for sizes in ({"q_len": 0}, {"batch": 0}):
            case = random_case(generator, dtype=dtype, device=device, **sizes)
            out, lse = run(*case.arguments)
            assert out.shape == case.q.shape
            assert lse.shape == case.q.shape[:-1]

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("packed", PACKED)
    def test_any_strides(self, run, device, dtype, generator, packed, layout):
        case = random_case(
            generator, dtype=dtype, device=device, batch=2, q_len=3, kv_len=37, packed=packed, is_causal=True, layout=layout
        )
        check(run, case)

    @pytest.mark.parametrize("magnitude", [1e3, 1.0, 1e-3])
    def test_any_sixteen_levels(self, run, device, dtype, generator, magnitude):
        case = random_case(generator, dtype=dtype, device=device, q_len=2, kv_len=45)
        levels = (torch.randn(16, generator=generator) + 0.5) * magnitude
        assert not torch.equal(levels, levels.sort()[0])
        unit = 1 / (magnitude * math.sqrt(HEAD_DIM))
        changes = {"centroids": levels.to(device), "k_norms": case.k_norms * unit, "v_norms": case.v_norms * unit}
        check(run, case.replace(**changes))

    @pytest.mark.parametrize("magnitude", [1e4, 1e-3])
    def test_queries_of_any_length(self, run, device, dtype, generator, magnitude):
        case = random_case(generator, dtype=dtype, device=device, q_len=2, kv_len=45)
        check(run, case.replace(q=case.q * magnitude, sm_scale=case.sm_scale / magnitude))

    @pytest.mark.parametrize("sm_scale", [-0.2, 0.0, 1e-30])
    @pytest.mark.parametrize("packed", PACKED)
    def test_any_scale(self, run, device, dtype, generator, packed, sm_scale):
        case = random_case(generator, dtype=dtype, device=device, q_len=3, packed=packed, is_causal=True, sm_scale=sm_scale)
        check(run, case)

    @pytest.mark.parametrize("score", [-6e4, 6e4])
    @pytest.mark.parametrize(("q_len", "kv_len"), [(3, 300), (140, 150), (5, 3)])
    def test_scores_far_from_zero(self, run, device, dtype, generator, score, q_len, kv_len):
        # Queries have one rotated coordinate, for which all keys have the same code, and all numbers are small integers
        # over a power of two: every visible key has exactly the same score.
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=kv_len, is_causal=True)
        side = math.isqrt(HEAD_DIM)
        q = (case.rotation[0] * side).to(dtype).expand_as(case.q).contiguous()  # +-1
        k = case.k.clone()
        k[..., 0] = 0xF0
        case = case.replace(
            q=q,
            k=k,
            k_norms=torch.ones_like(case.k_norms),
            v_norms=case.v_norms / side,
            centroids=torch.arange(-8.0, 8.0, device=device),
            sm_scale=score / (7 * side),
        )
        # Parts of the keys are joined by their log-sum-exps, float32 numbers of this size.
        check(run, case, gate=False, slack=abs(score) * 2.0**-23)

    @pytest.mark.parametrize(
        ("q_len", "kv_len", "size"), [(3, 33, 1e5), (3, 300, 1e5), (140, 150, 1e5), (3, 33, 1e-6), (3, 300, 1e-6)]
    )
    def test_norms_outside_half_precision(self, run, device, dtype, generator, size, q_len, kv_len):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=kv_len, is_causal=True)
        k_norms, v_norms = ((x / x.max() * size) for x in (case.k_norms, case.v_norms))
        case = case.replace(k_norms=k_norms, v_norms=v_norms, sm_scale=1 / size)
        check(run, case, gate=False)

    def test_norms_of_very_different_sizes(self, run, device, dtype, generator):
        case = random_case(generator, dtype=dtype, device=device, q_len=3, kv_len=300)
        powers = 11 * torch.rand(case.v_norms.shape, generator=generator) - 6  # 1e-6 to 1e5
        check(run, case.replace(v_norms=(10**powers).to(device)))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", ["k_norms", "v_norms"])
    @pytest.mark.parametrize(("q_len", "kv_len", "bad"), [(4, 40, 38), (4, 300, 298), (20, 40, 30), (140, 150, 100)])
    def test_bad_norm_reaches_the_rows_that_see_it_alone(self, run, device, dtype, generator, name, value, q_len, kv_len, bad):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=kv_len, is_causal=True)
        norms = getattr(case, name).clone()
        norms[:, 0, bad] = value
        case = case.replace(**{name: norms})
        out, lse = run(*case.arguments)
        want, want_lse = expected(case)
        # Rows that do not see it, and heads of the other key/value head.
        clean = torch.ones(case.q.shape[:3], dtype=torch.bool, device=device)
        clean[:, : case.group] = ~case.visible()[:, bad]
        assert 0 < clean[0, 0].sum() < q_len
        compare(out[clean], want[clean], dtype)
        compare(lse[clean], want_lse[clean], dtype, at_least=1.0, what="lse")
        # A key at -inf may have no weight, or make the row NaN; nothing else that is not finite may be lost.
        assert not (out.isfinite().all(-1) & ~want.isfinite().all(-1)).any()
        assert not (lse.isfinite() & ~want_lse.isfinite()).any()
        if value != value:
            assert not out[~clean].isfinite().any()

    @pytest.mark.parametrize(("q_len", "kv_len"), [(1, 700), (3, 40), (24, 300), (140, 150)])
    def test_same_bits_again_and_alone(self, run, device, dtype, generator, q_len, kv_len):
        sizes = {"batch": 2, "num_kv_heads": 1, "q_len": q_len, "kv_len": kv_len}
        case = random_case(generator, dtype=dtype, device=device, is_causal=True, **sizes)
        out, lse = check(run, case)
        again, lse_again = run(*case.arguments)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)
        alone, lse_alone = run(*case.batch_entry(1).arguments)
        assert torch.equal(alone, out[1:])
        assert torch.equal(lse_alone, lse[1:])


def check_causal_sizes(run: Run, generator: torch.Generator, dtype: torch.dtype, device: str, sizes: list[int]) -> None:
    """Causal calls for every pair of query and key lengths from ``sizes``, against softmax over a prefix of the keys."""
    longest = max(sizes)
    case = random_case(generator, dtype=dtype, device=device, num_kv_heads=1, q_len=longest, kv_len=longest, is_causal=True)
    packed = {"k": case.k, "k_norms": case.k_norms, "v": case.v, "v_norms": case.v_norms}
    centroids, rotation = levels_and_rotation(HEAD_DIM, device)
    keys, values = (
        reference.decompress(packed[x], packed[x + "_norms"], centroids, rotation, torch.float64) for x in ("k", "v")
    )
    score = case.q.double() @ keys.transpose(-1, -2) * case.sm_scale
    weight = (score - score.amax(-1, keepdim=True)).exp()  # [1, H, longest, longest]
    total = weight.cumsum(-1)
    # [m]: attention to the first m + 1 keys.
    prefix = (weight.unsqueeze(-1) * values.unsqueeze(2)).cumsum(3) / total.unsqueeze(-1)
    errors = []
    for q_len in sizes:
        for kv_len in sizes:
            short: Case = case.replace(
                q=case.q[:, :, :q_len],
                **{name: x[:, :, :kv_len] for name, x in packed.items()},
            )
            out, _ = run(*short.arguments)
            want = torch.zeros_like(out, dtype=torch.float64)
            row = torch.arange(max(0, q_len - kv_len), q_len, device=device)
            want[:, :, row] = prefix[:, :, row, kv_len - q_len + row]
            errors.append((out - want).abs().amax())
    error = torch.stack(errors).reshape(len(sizes), len(sizes))
    limit = TOLERANCE[dtype] * values.abs().max()
    wrong = [(sizes[i], sizes[j], error[i, j].item()) for i, j in (~(error <= limit)).nonzero().tolist()]
    assert not wrong, f"(q_len, kv_len, error) above {limit:.2e}: {wrong}"
