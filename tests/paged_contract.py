"""What every backend must do with batches over pages, as tests to inherit.

A subclass gives fixtures ``run`` (see :mod:`paged_cases`), ``device`` and ``dtype``.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from attention_cases import compare, expected
from paged_cases import check_batch, check_sequence, random_batch

# (query tokens, keys) of each sequence: decode, prefill, a chunk after a cached prefix, verification of a draft, a padded
# entry, a prefix without new tokens, keys that just fill pages, more queries than keys.
MIXED = [(1, 37), (40, 40), (24, 70), (4, 90), (0, 0), (0, 20), (1, 1), (1, 32), (5, 3), (20, 20)]


class PagedContract:
    same_bits_alone = True  # whether a sequence alone and in a batch gives the same bits

    def test_windows_of_single_sequences(self, run, device, dtype, generator):
        lengths = [*MIXED, (1, 700), (3, 700), (1, 40)]
        windows = torch.randint(1, 70, (len(lengths),), generator=generator, dtype=torch.int32)
        windows[-3:] = torch.tensor([600, 300, 0])  # the last sequence sees nothing
        windows[lengths.index((5, 3))] = 2**31 - 1  # less any position of its queries, no 32-bit number
        batch = random_batch(generator, lengths, dtype=dtype, device=device).replace(windows=windows.to(device))
        out, lse = check_batch(run, batch)
        assert (out[-1] == 0).all()
        assert (lse[-1] == float("-inf")).all()

    @pytest.mark.parametrize("order", ["as-listed", "reversed"])
    def test_mixed_batch(self, run, device, dtype, generator, order):
        lengths = MIXED if order == "as-listed" else MIXED[::-1]
        check_batch(run, random_batch(generator, lengths, dtype=dtype, device=device))

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("page_size", [16, 32, 48, 256])
    def test_page_sizes(self, run, device, dtype, generator, page_size, causal):
        lengths = [(1, 300), (20, 290), (3, page_size), (17, page_size + 1)]
        check_batch(run, random_batch(generator, lengths, dtype=dtype, device=device, page_size=page_size, causal=causal))

    def test_long_sequences_are_split(self, run, device, dtype, generator):
        sizes = {"dtype": dtype, "device": device, "num_kv_heads": 1}
        check_batch(run, random_batch(generator, [(1, 4300), (2, 600), (1, 256), (17, 300)], **sizes))

    def test_issue_46460_continued_prefix_beside_a_prompt_of_equal_length(self, run, device, dtype, generator):
        # vLLM's issue: with max_query_len == max_seq_len taken for "no sequence has a prefix", the prefix is dropped.
        lengths = [(48, 48), (30, 48), (48, 96), (1, 48)]
        check_batch(run, random_batch(generator, lengths, dtype=dtype, device=device, num_kv_heads=1))
        check_batch(run, random_batch(generator, [(48, 48), (20, 48)], dtype=dtype, device=device, num_kv_heads=1))

    # The last two numbers have more than 32 rows; None: chunks of any size.
    @pytest.mark.parametrize("chunk", [1, 7, 17, 20, None])
    def test_chunks_give_what_one_shot_gives(self, run, device, dtype, generator, chunk):
        length = 20
        cuts = list(range(chunk, length, chunk)) if chunk else sorted(1 + torch.randperm(length - 1, generator=generator)[:4])
        whole = random_batch(generator, [(length, length), (1, 30)], dtype=dtype, device=device, num_kv_heads=1)
        out, lse = (torch.full_like(x[:length], float("nan")) for x in run(whole))
        for begin, end in itertools.pairwise([0, *cuts, length]):
            # The other sequence decodes meanwhile; keys after the chunk are not written yet.
            part = whole.replace(
                q=torch.cat([whole.q[length:], whole.q[begin:end]]),
                block_table=whole.block_table.flip(0),
                seq_lens=torch.tensor([30, end], dtype=torch.int32, device=device),
                cu_seqlens_q=torch.tensor([0, 1, 1 + end - begin], dtype=torch.int32, device=device),
            )
            some, some_lse = run(part)
            out[begin:end], lse[begin:end] = some[1:], some_lse[1:]
        check_sequence(whole.alone(0), out, lse)

    def test_same_bits_alone_and_in_a_batch(self, run, device, dtype, generator):
        sizes = {"dtype": dtype, "device": device, "num_kv_heads": 1}
        batch = random_batch(generator, [(1, 600), (40, 90), (4, 300), (9, 9), (1, 20)], **sizes)
        out, lse = check_batch(run, batch)
        for again, first in zip(run(batch), (out, lse), strict=True):
            assert torch.equal(again, first)
        for index, tokens in enumerate(batch.tokens):
            alone, alone_lse = check_batch(run, batch.only(index), gate=False)
            if not self.same_bits_alone:
                continue
            assert torch.equal(alone, out[tokens]), index
            assert torch.equal(alone_lse, lse[tokens]), index

    @pytest.mark.parametrize("window", [1, 20, 300, 2**40])
    def test_sliding_window(self, run, device, dtype, generator, window):
        lengths = [(1, 600), (40, 120), (3, 30), (24, 400), (0, 0), (7, 3)]
        check_batch(run, random_batch(generator, lengths, dtype=dtype, device=device, sliding_window=window))

    def test_keys_before_the_window_do_not_matter(self, run, device, dtype, generator):
        batch = random_batch(generator, [(1, 200), (40, 150)], dtype=dtype, device=device, sliding_window=50)
        for index, (hidden, pages) in enumerate(((150, 9), (61, 3))):  # keys before every window, and the pages they fill
            assert hidden == batch.seq_lens[index] - (batch.tokens[index].stop - batch.tokens[index].start) + 1 - 50
            assert pages == hidden // 16
            batch.cache.buffer[batch.block_table[index, :pages].long()] = 255  # NaN among the norms
        check_batch(run, batch)

    def test_softcap_and_sinks(self, run, device, dtype, generator):
        sinks = torch.randn(4, generator=generator).to(device) + 1
        options = {"sliding_window": 100, "softcap": 2.0, "sinks": sinks}
        batch = random_batch(generator, MIXED, dtype=dtype, device=device, **options)
        out, lse = check_batch(run, batch)
        unseen = slice(batch.tokens[8].start, batch.tokens[8].start + 2)  # 5 queries, 3 keys
        assert (out[unseen] == 0).all()
        assert torch.allclose(lse[unseen], sinks.expand(2, 4), rtol=1e-6)

    def test_sinks(self, run, device, dtype, generator):
        sinks = torch.randn(4, generator=generator).to(device) + 3
        sinks[1] = float("-inf")  # none
        lengths = [(20, 300), (1, 40), (30, 9), (3, 30), (2, 0)]
        batch = random_batch(generator, lengths, dtype=dtype, device=device, sinks=sinks)
        out, lse = check_batch(run, batch)
        assert (out[batch.tokens[4]] == 0).all()
        assert torch.allclose(lse[batch.tokens[4]], sinks.expand(2, 4), rtol=1e-6)

    @pytest.mark.parametrize("sequence", range(3))
    def test_nan_stays_in_its_sequence(self, run, device, dtype, generator, sequence):
        batch = random_batch(generator, [(1, 40), (20, 40), (3, 40)], dtype=dtype, device=device)
        clean = run(batch)[0]
        page = batch.block_table[sequence, 1]
        batch.cache.v_norms[page.item(), 0, 3] = float("nan")  # key 19
        out, _ = run(batch)
        for index, tokens in enumerate(batch.tokens):
            case = batch.alone(index)
            sees = case.visible()[:, 19].cpu() if index == sequence else torch.zeros(case.q.shape[2], dtype=torch.bool)
            assert not out[tokens][sees, :2].isfinite().any()
            assert torch.equal(out[tokens][~sees], clean[tokens][~sees])
            assert torch.equal(out[tokens][:, 2:], clean[tokens][:, 2:])

    def test_nothing_outside_the_pages_is_read(self, run, device, dtype, generator):
        batch = random_batch(generator, [(1, 100), (20, 90)], dtype=dtype, device=device)
        # All of the buffer's pages are finite; what surrounds them is not.
        batch.cache.k_norms.nan_to_num_(1.0)
        batch.cache.v_norms.nan_to_num_(1.0)
        table = batch.block_table.clone()
        table[0, :6] = torch.tensor([-1, -(2**31), batch.cache.num_pages, 2**31 - 1, 7, 10**6], device=device)
        out, lse = run(batch.replace(block_table=table))
        assert out.isfinite().all()
        assert lse.isfinite().all()
        nearest = table.clamp(0, batch.cache.num_pages - 1)
        assert torch.equal(out, run(batch.replace(block_table=nearest))[0])
        # More keys than the table has room for, and tokens that do not exist.
        room = table.shape[1] * 16
        lens = torch.tensor([2**31 - 1, -5], dtype=torch.int32, device=device)
        out, lse = run(batch.replace(block_table=nearest, seq_lens=lens))
        assert out[:1].isfinite().all()
        assert (out[1:] == 0).all()
        # Lengths out of range are unknown to the host. Another backend may serve those that it knows, which rounds otherwise.
        lens = torch.tensor([room, 0], dtype=torch.int32, device=device)
        full = run(batch.replace(block_table=nearest, seq_lens=lens, host_knows=False))
        assert torch.equal(out, full[0])
        for starts in ([0, 1, 2**31 - 1], [0, 1, 10**6], [-(2**31), 1, 21], [5, 3, 21]):
            run(batch.replace(cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device)))

    def test_empty_calls(self, run, device, dtype, generator):
        batch = random_batch(generator, [(1, 20), (3, 3)], dtype=dtype, device=device)
        nobody = batch.replace(
            block_table=batch.block_table[:0], seq_lens=batch.seq_lens[:0], cu_seqlens_q=batch.cu_seqlens_q[:1], sequences=[]
        )
        run(nobody)
        out, _ = run(batch.replace(q=batch.q[:0], cu_seqlens_q=torch.zeros_like(batch.cu_seqlens_q)))
        assert out.shape == (0, 4, 64)
        for nothing in ({"seq_lens": torch.zeros_like(batch.seq_lens)}, {"block_table": batch.block_table[:, :0]}):
            out, lse = run(batch.replace(**nothing))
            assert (out == 0).all()
            assert (lse == float("-inf")).all()

    @pytest.mark.parametrize(("head_dim", "group"), [(80, 5), (96, 7), (128, 1), (192, 4), (256, 8)])
    def test_head_dims_and_groups(self, run, device, dtype, generator, head_dim, group):
        sizes = {"head_dim": head_dim, "group": group, "num_kv_heads": 1}
        check_batch(run, random_batch(generator, [(1, 50), (12, 40), (2, 33), (34, 34)], dtype=dtype, device=device, **sizes))

    def test_strided_queries_and_index_tensors(self, run, device, dtype, generator):
        batch = random_batch(generator, [(1, 50), (20, 40)], dtype=dtype, device=device)
        want = run(batch)
        q = torch.full((42, 4, 65), float("nan"), dtype=dtype, device=device)[::2, :, 1:].copy_(batch.q)
        wide = {name: getattr(batch, name).repeat_interleave(2, -1)[..., ::2] for name in ("block_table", "seq_lens")}
        for one, other in zip(run(batch.replace(q=q, **wide)), want, strict=True):
            assert torch.equal(one, other)

    def test_tokens_of_no_sequence(self, run, device, dtype, generator):
        batch = random_batch(generator, [(1, 50), (20, 40), (3, 9)], dtype=dtype, device=device, spare_tokens=5)
        check_batch(run, batch)
        for index in range(3):
            out, _ = run(batch.only(index))
            compare(out.transpose(0, 1)[None], expected(batch.alone(index))[0], dtype)
