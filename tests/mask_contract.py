"""What every backend that serves sliding windows, soft caps and sinks must do, as tests to inherit."""

from __future__ import annotations

import pytest
import torch

from attention_cases import check, compare, expected, random_case
from turboquant_vllm import merge_attention_states

# Query and key lengths with windows shorter than a tile, longer than one, longer than all keys; several splits; many rows.
WINDOWS = [(1, 40, 1), (1, 700, 300), (1, 33, 1000), (5, 300, 64), (5, 3, 2), (24, 300, 70), (70, 90, 16), (140, 300, 33)]
WINDOWS.append((7, 3, 2**40))  # beyond every position


def compare_rows(out, want, dtype, rows, **options):
    """As :func:`attention_cases.compare`, for some of the query positions, of which there may be none."""
    if rows.any():
        compare(out[:, :, rows], want[:, :, rows], dtype, **options)


def sinks_for(case, generator):
    return torch.randn(case.q.shape[1], generator=generator).to(case.q.device) + 1


class MaskContract:
    @pytest.mark.parametrize(("q_len", "kv_len", "window"), WINDOWS)
    def test_sliding_window(self, run, device, dtype, generator, q_len, kv_len, window):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=kv_len, is_causal=True)
        check(run, case.replace(sliding_window=window))

    @pytest.mark.parametrize("packed", [(True, False), (False, False)], ids=["packed-keys", "dense"])
    @pytest.mark.parametrize("q_len", [3, 140])
    def test_masks_over_dense_tensors(self, run, device, dtype, generator, packed, q_len):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=150, packed=packed, is_causal=True)
        check(run, case.replace(sliding_window=50, softcap=1.5, sinks=sinks_for(case, generator)))

    @pytest.mark.parametrize("name", ["k_norms", "v_norms"])
    @pytest.mark.parametrize(("q_len", "kv_len", "window"), WINDOWS)
    def test_what_is_before_the_window_does_not_matter(self, run, device, dtype, generator, name, q_len, kv_len, window):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=kv_len, is_causal=True)
        case = case.replace(sliding_window=window)
        want, want_lse = expected(case)
        hidden = ~case.visible()
        norms = getattr(case, name).clone()
        for key in (hidden.all(0), hidden[0].nonzero()[-1:, 0]):  # those that nobody sees, and one that some queries see
            norms[:, :, key] = float("nan")
            out, lse = run(*case.replace(**{name: norms}).arguments)
            clean = hidden[:, key].all(1)
            compare_rows(out, want, dtype, clean)
            seen = clean & (want_lse[0, 0] > float("-inf"))
            compare_rows(lse, want_lse, dtype, seen, at_least=1.0, what="lse")
            assert not out[:, :, ~clean].isfinite().any()

    @pytest.mark.parametrize("softcap", [0.3, 2.0, 50.0])
    @pytest.mark.parametrize("q_len", [1, 24, 140])
    def test_softcap(self, run, device, dtype, generator, softcap, q_len):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=300, is_causal=q_len > 1)
        check(run, case.replace(softcap=softcap))

    @pytest.mark.parametrize("sm_scale", [1e12, -1e12])
    def test_softcap_of_scores_that_reach_it(self, run, device, dtype, generator, sm_scale):
        case = random_case(generator, dtype=dtype, device=device, q_len=3, kv_len=300, sm_scale=sm_scale)
        # Queries have one rotated coordinate alone, for which a key's level is 7 or -8: no score is near zero.
        k = case.k.clone()
        k[..., 0] |= 0xF0
        k[:, :, ::3, 0] &= 0x0F
        q = (case.rotation[0] * case.q.shape[-1] ** 0.5).to(dtype).expand_as(case.q).contiguous()
        case = case.replace(q=q, k=k, centroids=torch.arange(-8.0, 8.0, device=device), v_norms=case.v_norms / 8)
        check(run, case.replace(softcap=20.0))

    @pytest.mark.parametrize(("q_len", "kv_len"), [(1, 33), (1, 700), (24, 300), (140, 150), (5, 3), (3, 0)])
    def test_sinks(self, run, device, dtype, generator, q_len, kv_len):
        case = random_case(generator, dtype=dtype, device=device, batch=2, q_len=q_len, kv_len=kv_len, is_causal=True)
        sinks = sinks_for(case, generator)
        sinks[-1] = float("-inf")
        out, lse = check(run, case.replace(sinks=sinks))
        unseen = max(0, q_len - kv_len)
        assert (out[:, :, :unseen] == 0).all()
        assert torch.allclose(lse[:, :-1, :unseen], sinks[:-1, None].expand(-1, unseen), rtol=1e-6)

    def test_no_sink_is_a_sink_of_minus_infinity(self, run, device, dtype, generator):
        case = random_case(generator, dtype=dtype, device=device, q_len=3, kv_len=300, is_causal=True)
        nothing = torch.full((case.q.shape[1],), float("-inf"), device=device)
        for one, other in zip(run(*case.arguments), run(*case.replace(sinks=nothing).arguments), strict=True):
            assert torch.equal(one, other)

    def test_parts_of_which_one_has_the_sinks_merge_to_the_whole(self, run, device, dtype, generator):
        case = random_case(generator, dtype=dtype, device=device, q_len=3, kv_len=90)
        case = case.replace(sinks=sinks_for(case, generator), softcap=3.0)
        want, want_lse = expected(case)
        parts = []
        for keys in (slice(0, 50), slice(50, 90)):
            tensors = {name: getattr(case, name)[:, :, keys] for name in ("k", "k_norms", "v", "v_norms")}
            part = case.replace(**tensors) if keys.start == 0 else case.replace(**tensors, sinks=None)
            parts.append(run(*part.arguments))
        out, lse = merge_attention_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
        compare(out, want, dtype, slack=torch.finfo(dtype).eps)  # each part is rounded once more
        compare(lse, want_lse, dtype, at_least=1.0, what="lse")

    @pytest.mark.parametrize(("q_len", "kv_len", "window"), [(1, 1000, 290), (4, 600, 290), (60, 150, 100)])
    def test_all_masks_in_a_group_of_five(self, run, device, dtype, generator, q_len, kv_len, window):
        sizes = {"q_len": q_len, "kv_len": kv_len, "group": 5, "batch": 2}
        case = random_case(generator, dtype=dtype, device=device, is_causal=True, **sizes)
        check(run, case.replace(sliding_window=window, softcap=2.0, sinks=sinks_for(case, generator)))
