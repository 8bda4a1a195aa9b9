"""The study of the key format: its emulation against the library's own writer, and the pages that its results make."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("transformers")

import quality_keys_tables
from quality_keys_format import GrowingKeys, KeyFormat, Rule, read_back
from quality_tables import fill
from turboquant_vllm import PagedTQ4Cache, TQ4Codec
from turboquant_vllm.reference_keys import read_rotated, rotate_keys
from turboquant_vllm.store import tq4_store

Randn = Callable[..., torch.Tensor]


def some_keys(randn: Randn, length: int, heads: int = 2) -> torch.Tensor:
    """Keys ``[H_kv, N, D]`` with a common part, and one that is unlike all others."""
    keys = randn(heads, length, 64) + 3 * randn(heads, 1, 64)
    keys[:, length // 12] = 20 * randn(heads, 64)
    return keys


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """But for what rounding makes of it: a step of an offset's coordinate more or less, which moves some codes of that channel.

    One channel of 64 has an eighth of the error's length; a code that moves is off by up to twice what it was.
    """
    assert (ours - theirs).norm() < 0.25 * (theirs - exact).norm()
    assert (ours - theirs).abs().median() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("length", [1, 20, 64, 256])
def test_whole_prompts_are_what_the_codec_writes(randn: Randn, length: int) -> None:
    keys = some_keys(randn, length)
    codec = TQ4Codec(64).with_key_scales(randn(2, 64).exp())
    theirs = read_rotated(codec._check_keys(codec.compress_keys(keys)), codec.centroids, torch.float32)
    y = rotate_keys(keys, codec.key_tables)
    assert_same(read_back(y, KeyFormat()), theirs, y)


@pytest.mark.parametrize(("prompt", "step"), [(64, 1), (128, 1), (1, 1), (70, 1), (64, 4), (150, 7)])
def test_growing_keys_are_what_the_store_writes(randn: Randn, prompt: int, step: int) -> None:
    length, heads = 230, 8
    keys = some_keys(randn, length, heads)
    codec = TQ4Codec(64)
    cache = PagedTQ4Cache.allocate(1, page_size=256, num_kv_heads=heads, head_dim=64, has_offsets=True)
    ours, y = GrowingKeys([Rule()], 256), rotate_keys(keys, codec.key_tables)
    for first, last in [(0, prompt), *((at, min(at + step, length)) for at in range(prompt, length, step))]:
        new = keys[:, first:last].transpose(0, 1)
        tq4_store(new, new, cache, codec, torch.arange(first, last), backend="reference")
        read = ours.write(y[None, :, first:last])[0]
    theirs = read_rotated(cache.keys.each(lambda x: x[0]), codec.centroids, torch.float32)[:, :length]
    assert_same(read[:, :64], theirs[:, :64], y[:, :64])
    # Of a group that begins with several keys, or in the same call as the group before ends, the library finds the offset in
    # slightly another way, which may be no better or worse: the noise of codes alone makes a hundredth.
    mine, library = ((x - y).norm() for x in (read, theirs))
    assert abs(mine / library - 1) < 0.03
    if step == 1 and prompt != 70:
        # Where rounding moves a code, the next offset of that head may be a step off, and all its keys; in most none is.
        off = (read - theirs)[:, 64:192].unflatten(1, (-1, 64)).norm(dim=(-2, -1)) / theirs[:, 64:192].norm(dim=(1, 2))[:, None]
        assert (off.median(0).values < 1e-5).all()


def test_a_rule_that_begins_the_first_group_anew_makes_it_better(randn: Randn) -> None:
    y = randn(1, 2, 64, 64) + 3 * randn(1, 2, 1, 64)
    errors = []
    for rule in (Rule(), Rule(again=(1, 2, 3, 4))):
        keys = GrowingKeys([rule], 64)
        for at in range(64):
            read = keys.write(y[:, :, at : at + 1])
        errors.append((read - y).norm().item())
    assert errors[1] < 0.7 * errors[0]


def test_the_pages_say_what_the_results_say() -> None:
    found = set()
    for page in quality_keys_tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert fill(text, quality_keys_tables.TABLES, "quality_keys_tables") == text
        found |= {line.split()[3] for line in text.splitlines() if line.startswith("<!-- python")}
    assert found == set(quality_keys_tables.TABLES)
