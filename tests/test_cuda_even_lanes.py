"""Clusters over pages that serve where sequences are about equally long, and leave the others to the line of tiles: run lane by
lane on a CPU, each gives the bits that it gives alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch

import kernel_lanes
from attention_cases import poisoned_memory
from kernel_lanes import LaneError, emulated_decode, few_objects, needs_compiler, run_pages  # noqa: F401
from paged_cases import Batch, check_batch, random_batch
from turboquant_vllm.cuda import cluster, paged
from turboquant_vllm.cuda.variants import Cluster, Even, Variant

pytestmark = [pytest.mark.slow, needs_compiler, pytest.mark.usefixtures("emulated_decode")]

# Query tokens, keys. Of 7 tiles at most, 27 in all; of 19, 22 in all, since more rows than a pass takes are another kernel's.
EVEN = [(1, 100), (2, 90), (1, 112), (1, 97)]
UNEVEN = [(1, 300), (2, 20), (1, 0), (0, 5), (9, 500), (1, 1)]
SIZES: dict[str, Any] = {"head_dim": 64, "group": 4, "page_size": 64}


@pytest.fixture(autouse=True)
def rotation(emulated_decode: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(paged, "decode_pages", functools.partial(paged.decode_pages, hadamard=True))


def choose(monkeypatch: pytest.MonkeyPatch, *, blocks: int = 2, spread: bool = False, slack: int | None) -> list[str]:
    """Clusters of ``blocks``, each of two warps, or as many that are ``spread``, beside a line of 24 warps; returns names of
    kernels as they run. ``slack``: as in ``Even``; None: clusters serve all, whatever their lengths; -1: none."""
    even = [] if slack is None else [Even(2 * blocks, 1, 24, slack)]

    def found(passes: int, tiles: int, variant: Variant, *_: Any) -> Cluster | None:
        return None if slack == -1 else Cluster(blocks, dataclasses.replace(variant, spread=spread), *even)

    monkeypatch.setattr(cluster, "choose_cluster", found)
    for plan in (cluster.plan, paged.Call.plan):
        plan.cache_clear()
    return kernel_lanes.names_of_launches(monkeypatch)


def bits(batch: Batch, **options: Any) -> tuple[torch.Tensor, ...]:
    return tuple(x.view(torch.int16 if x.element_size() == 2 else torch.int32) for x in run_pages(batch, 2, **options))


@pytest.mark.parametrize(("lengths", "clusters"), [(EVEN, True), (UNEVEN, False)])
@pytest.mark.parametrize(
    ("blocks", "spread", "head_dim", "group", "offsets", "window"),
    [
        (1, False, 64, 4, False, None),
        (2, False, 128, 3, True, None),
        (2, False, 64, 4, False, 40),
        (3, True, 64, 4, True, None),
    ],
)
def test_lengths_decide_who_serves(generator, monkeypatch, lengths, clusters, blocks, spread, head_dim, group, offsets, window):
    sizes = {"head_dim": head_dim, "group": group, "page_size": 64, "offsets": offsets, "sliding_window": window}
    batch = random_batch(generator, lengths, dtype=torch.float16, device="cpu", **sizes)
    launched = choose(monkeypatch, blocks=blocks, spread=spread, slack=2 if clusters or window is None else 0)
    got = bits(batch)
    assert launched == ["tq4_rotate", "tq4_decode", "tq4_combine", "tq4_decode"]
    choose(monkeypatch, blocks=blocks, spread=spread, slack=None if clusters else -1)
    want = bits(batch)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    choose(monkeypatch, blocks=blocks, spread=spread, slack=-1 if clusters else None)
    assert not torch.equal(got[1], bits(batch)[1])


@pytest.mark.parametrize("lengths", [EVEN, [(1, 300), (2, 20), (1, 0), (0, 5), (1, 1)]])
def test_against_the_definition(generator, monkeypatch, lengths):
    choose(monkeypatch, slack=2)
    check_batch(run_pages, random_batch(generator, lengths, dtype=torch.float16, device="cpu", **SIZES, offsets=True))


@pytest.mark.parametrize(
    ("lengths", "clusters", "sound", "broken"),
    [
        (EVEN, False, "if (is_even(p)) return leave();  // clusters will serve\n#endif", "\n#endif"),
        (UNEVEN, True, "if (!is_even(p)) return leave();", ""),
    ],
)
def test_what_each_must_do_for_the_other(generator, monkeypatch, lengths, clusters, sound, broken):
    batch = random_batch(generator, lengths, dtype=torch.float16, device="cpu", **SIZES)
    choose(monkeypatch, slack=2)
    want = bits(batch)
    text = {flag: kernel_lanes.decode_source(flag) for flag in (False, True)}
    assert text[clusters].count(sound) == 1
    text[clusters] = text[clusters].replace(sound, broken)
    monkeypatch.setattr(kernel_lanes, "decode_source", lambda flag=False, stores=False: text[flag])
    choose(monkeypatch, slack=2)
    with poisoned_memory(), contextlib.suppress(LaneError):
        assert not all(torch.equal(x, y) for x, y in zip(bits(batch), want, strict=True))
