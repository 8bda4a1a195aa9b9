"""What every backend that reads keys with offsets must do, as tests to inherit: whole tensors, and pages."""

from __future__ import annotations

import pytest
import torch

from attention_cases import check, compare, expected, random_case
from mask_contract import compare_rows, sinks_for
from paged_cases import check_batch, random_batch
from turboquant_vllm import merge_attention_states
from turboquant_vllm.records import GROUP

# Query and key lengths: less than a group, whole ones, one key more; several splits; many rows.
SIZES = [(1, 1), (1, 63), (1, 64), (3, 65), (5, 200), (1, 700), (24, 300), (70, 130), (140, 150), (5, 3)]
ONES = [(1, 64), (5, 200), (140, 150)]  # without key scales


class OffsetContract:
    @pytest.mark.parametrize(
        ("q_len", "kv_len", "scaled"), [*((*size, True) for size in SIZES), *((*size, False) for size in ONES)]
    )
    def test_offsets(self, run, device, dtype, generator, q_len, kv_len, scaled):
        case = random_case(
            generator, dtype=dtype, device=device, batch=2, q_len=q_len, kv_len=kv_len, is_causal=q_len > 1, offsets=True
        )
        check(run, case if scaled else case.replace(key_scales=None))

    def test_none_of_few_keys_is_an_outlier_and_all_are_one(self, run, device, dtype, generator):
        case = random_case(generator, dtype=dtype, device=device, q_len=2, kv_len=150, offsets=True)
        check(run, case.replace(k_norms=case.k_norms.abs()))
        check(run, case.replace(k_norms=-case.k_norms.abs()))  # what no writer makes, but the definition reads

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "odd", "strided", "expanded"])
    def test_offsets_with_any_strides(self, run, device, dtype, generator, layout):
        case = random_case(
            generator, dtype=dtype, device=device, batch=2, q_len=3, kv_len=170, is_causal=True, layout=layout, offsets=True
        )
        check(run, case)

    @pytest.mark.parametrize("group", [1, 5, 8])
    def test_heads_of_a_group(self, run, device, dtype, generator, group):
        check(run, random_case(generator, dtype=dtype, device=device, group=group, kv_len=300, offsets=True))

    @pytest.mark.parametrize(("q_len", "kv_len", "window"), [(1, 700, 300), (5, 300, 64), (24, 300, 70), (140, 300, 33)])
    def test_offsets_and_masks(self, run, device, dtype, generator, q_len, kv_len, window):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=kv_len, is_causal=True, offsets=True)
        check(run, case.replace(sliding_window=window))
        check(run, case.replace(sliding_window=window, softcap=1.5, sinks=sinks_for(case, generator)))

    @pytest.mark.parametrize("q_len", [3, 140])
    def test_offsets_of_hidden_groups_do_not_matter(self, run, device, dtype, generator, q_len):
        case = random_case(generator, dtype=dtype, device=device, q_len=q_len, kv_len=400, is_causal=True, offsets=True)
        case = case.replace(sliding_window=100)
        want, want_lse = expected(case)
        hidden = ~case.visible()
        for group in range(-(-400 // GROUP)):
            keys = slice(group * GROUP, (group + 1) * GROUP)
            steps = case.k_steps.clone()
            steps[:, :, group] = float("nan")
            out, lse = run(*case.replace(k_steps=steps).arguments)
            clean = hidden[:, keys].all(1)
            compare_rows(out, want, dtype, clean)
            compare_rows(lse, want_lse, dtype, clean, at_least=1.0, what="lse")
            assert out[:, :, ~clean].isnan().all()

    def test_log_sum_exps_join(self, run, device, dtype, generator):
        case = random_case(generator, dtype=dtype, device=device, q_len=3, kv_len=300, offsets=True)
        parts = []
        for first, stop in ((0, 128), (128, 300)):
            k, v = case.keys.tokens(first, stop - first), (case.v[:, :, first:stop], case.v_norms[:, :, first:stop])
            part = case.replace(k=k.data, k_norms=k.norms, k_groups=k.groups, k_steps=k.steps, v=v[0], v_norms=v[1])
            parts.append(run(*part.arguments))
        out, lse = merge_attention_states(*(torch.stack(x) for x in zip(*parts, strict=True)))
        want, want_lse = expected(case)
        compare(lse, want_lse, dtype, at_least=1.0, what="lse")
        compare(out, want, dtype, slack=torch.finfo(dtype).eps)  # each part is rounded once

    def test_large_offsets(self, run, device, dtype, generator):
        # All keys share an offset 100 times as long as what tells them apart: softmax does not see it.
        case = random_case(generator, dtype=dtype, device=device, batch=2, q_len=5, kv_len=200, offsets=True)
        groups, steps = case.k_groups.clone(), case.k_steps.clone()
        groups[:, :, :, 0], steps[..., 0] = groups[:, :, :1, 0], 1.0
        check(run, case.replace(k_groups=groups, k_steps=steps, q=case.q * 0.25))


class PagedOffsetContract:
    LENGTHS = ((1, 37), (40, 40), (24, 170), (4, 90), (0, 0), (0, 20), (1, 1), (1, 64), (5, 3), (1, 129), (3, 400))
    LONG = ((1, 4300), (2, 600), (1, 256), (17, 300))

    @pytest.mark.parametrize("page_size", [64, 128, 256])
    def test_offsets_in_pages(self, run, device, dtype, generator, page_size):
        check_batch(run, random_batch(generator, self.LENGTHS, dtype=dtype, device=device, page_size=page_size, offsets=True))

    def test_no_key_scales(self, run, device, dtype, generator):
        batch = random_batch(generator, self.LENGTHS, dtype=dtype, device=device, page_size=64, offsets=True)
        check_batch(run, batch.replace(key_scales=None))

    def test_offsets_in_pages_and_masks(self, run, device, dtype, generator):
        sizes = {"dtype": dtype, "device": device, "page_size": 64, "offsets": True}
        batch = random_batch(generator, self.LENGTHS, sliding_window=50, **sizes)
        check_batch(run, batch.replace(softcap=2.0, sinks=torch.randn(batch.q.shape[1], generator=generator).to(device)))
        windows = torch.randint(0, 70, (len(self.LENGTHS),), generator=generator, dtype=torch.int32).to(device)
        check_batch(run, random_batch(generator, self.LENGTHS, **sizes).replace(windows=windows))

    def test_long_sequences_with_offsets_are_split(self, run, device, dtype, generator):
        sizes = {"dtype": dtype, "device": device, "num_kv_heads": 1, "page_size": 64, "offsets": True}
        check_batch(run, random_batch(generator, self.LONG, **sizes))
