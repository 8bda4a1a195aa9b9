"""Native decoding in one launch, run lane by lane on a CPU with clusters, blocks that are spread and teams of a block's warps,
of several sizes, against float64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import kernel_lanes
from attention_cases import check, random_case
from kernel_lanes import LaneError, emulated_decode, few_objects, needs_compiler, run_pages  # noqa: F401
from paged_cases import check_batch, random_batch
from turboquant_vllm.cuda import cluster, decode, paged
from turboquant_vllm.cuda.variants import Cluster, Variant

pytestmark = [pytest.mark.slow, needs_compiler, pytest.mark.usefixtures("emulated_decode")]

HALF, BF16 = torch.float16, torch.bfloat16


@pytest.fixture
def kind() -> str:
    return ""


@pytest.fixture
def blocks() -> int:
    return 2


@pytest.fixture
def spread(kind: str) -> bool:
    return kind == "spread"


@pytest.fixture
def teams(kind: str) -> bool:
    return kind == "teams"


@pytest.fixture(autouse=True)
def clusters(
    emulated_decode: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    blocks: int,
    spread: bool,
    teams: bool,
) -> None:
    """Clusters of ``blocks``, as many that are ``spread``, or blocks of two ``teams`` of two warps serve every call; one that
    takes the line after all fails."""

    def choose(passes: int, tiles: int, variant: Variant, *_: Any) -> Cluster:
        if teams:
            return Cluster(1, dataclasses.replace(variant, warps=4, passes=2))
        return Cluster(blocks, dataclasses.replace(variant, spread=spread))

    monkeypatch.setattr(cluster, "choose_cluster", choose)
    for module in (decode, paged):
        monkeypatch.setattr(module.Call, "plan", None)
    monkeypatch.setattr(paged, "decode_pages", functools.partial(paged.decode_pages, hadamard=True))


def run(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return decode.decode(*args, hadamard=True)


@pytest.mark.parametrize(
    ("blocks", "spread", "dtype", "head_dim", "group", "q_len", "kv_len", "causal"),
    [
        (1, False, HALF, 128, 4, 1, 100, False),
        (2, False, HALF, 64, 5, 2, 77, True),
        (4, False, BF16, 128, 4, 3, 150, True),
        (2, False, HALF, 256, 3, 1, 33, False),
        (2, False, HALF, 64, 16, 2, 32, True),
        (8, False, HALF, 64, 4, 1, 17, False),
        (2, False, HALF, 128, 4, 4, 90, True),
        (3, True, HALF, 128, 4, 1, 100, False),
        (2, True, BF16, 64, 5, 2, 77, True),
        (5, True, HALF, 256, 3, 1, 33, False),
        (16, True, HALF, 64, 16, 2, 150, True),
    ],
)
def test_dense(generator, blocks, spread, dtype, head_dim, group, q_len, kv_len, causal):
    sizes = {"batch": 2, "group": group, "q_len": q_len, "kv_len": kv_len, "head_dim": head_dim, "is_causal": causal}
    check(run, random_case(generator, dtype=dtype, device="cpu", **sizes))


@pytest.mark.parametrize(
    ("spread", "q_len", "kv_len", "window", "softcap", "with_sinks"),
    [
        (False, 1, 90, None, None, True),
        (False, 2, 90, 33, None, False),
        (False, 3, 70, None, 2.0, False),
        (False, 5, 60, 40, 1.5, True),
        (True, 2, 90, 33, 1.5, True),
    ],
)
def test_masks(generator, spread, q_len, kv_len, window, softcap, with_sinks):
    sizes = {"batch": 2, "group": 4, "q_len": q_len, "kv_len": kv_len, "head_dim": 64, "is_causal": True}
    case = random_case(generator, dtype=HALF, device="cpu", **sizes)
    sinks = torch.randn(case.q.shape[1], generator=generator) + 1 if with_sinks else None
    check(run, case.replace(sliding_window=window, softcap=softcap, sinks=sinks))


@pytest.mark.parametrize(
    ("spread", "head_dim", "group", "kv_len"),
    [(False, 128, 4, 700), (False, 64, 16, 130), (False, 256, 4, 90), (True, 128, 4, 700)],
)
def test_offsets(generator, spread, head_dim, group, kv_len):
    sizes = {"group": group, "kv_len": kv_len, "head_dim": head_dim, "num_kv_heads": 1}
    check(run, random_case(generator, dtype=HALF, offsets=True, **sizes))


@pytest.mark.parametrize("blocks", [1])
@pytest.mark.parametrize(("head_dim", "offsets"), [(128, True), (64, True), (128, False)])
def test_blocks_that_share_a_multiprocessor(generator, monkeypatch, head_dim, offsets):
    small = kernel_lanes.small_variant
    changes = {"stages": 2, "resident": 2}
    monkeypatch.setattr(cluster, "choose_variant", lambda *args: dataclasses.replace(small(*args), **changes))
    check(run, random_case(generator, dtype=HALF, batch=2, group=4, kv_len=600, head_dim=head_dim, offsets=offsets))


@pytest.mark.parametrize("teams", [True])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "q_len", "kv_len", "options"),
    [
        (HALF, 128, 1, 100, {}),
        (BF16, 64, 2, 600, {"is_causal": True}),
        (HALF, 128, 1, 700, {"offsets": True}),
    ],
)
def test_teams_of_a_block(generator, dtype, head_dim, q_len, kv_len, options):
    sizes = {"batch": 3, "num_kv_heads": 2, "group": 4, "q_len": q_len, "kv_len": kv_len, "head_dim": head_dim}
    check(run, random_case(generator, dtype=dtype, device="cpu", **sizes, **options))


@pytest.mark.parametrize("teams", [True])
@pytest.mark.parametrize("options", [{}, {"offsets": True}, {"sliding_window": 40}])
def test_teams_over_pages(generator, options):
    lengths = [(1, 137), (0, 20), (2, 300), (5, 64), (1, 1), (1, 0)]
    sizes = {"head_dim": 64, "group": 4, "page_size": 64, "num_kv_heads": 2, **options}
    check_batch(run_pages, random_batch(generator, lengths, dtype=HALF, device="cpu", **sizes))


@pytest.mark.parametrize(
    ("spread", "head_dim", "group", "page_size", "lengths", "options"),
    [
        (False, 128, 4, 16, [(1, 37), (1, 100), (0, 20), (1, 1), (1, 32), (1, 0)], {}),
        (False, 64, 4, 48, [(1, 137), (3, 90), (2, 2), (5, 48), (0, 0)], {"sliding_window": 40}),
        (False, 64, 7, 64, [(1, 70), (2, 65), (1, 128)], {"causal": False}),
        (False, 64, 4, 64, [(1, 70), (2, 65), (1, 300)], {"offsets": True}),
        (True, 64, 4, 48, [(1, 137), (3, 90), (2, 2), (5, 48), (0, 0)], {"sliding_window": 40}),
        (True, 64, 4, 64, [(1, 70), (2, 65), (1, 300), (1, 0)], {"offsets": True}),
    ],
)
def test_pages(generator, spread, head_dim, group, page_size, lengths, options):
    sizes = {"head_dim": head_dim, "group": group, "page_size": page_size, **options}
    check_batch(run_pages, random_batch(generator, lengths, dtype=HALF, device="cpu", **sizes))


@pytest.mark.parametrize(("head_dim", "group", "offsets"), [(256, 16, False), (128, 32, True)])
def test_where_no_cluster_has_room_the_line_serves(generator, monkeypatch, head_dim, group, offsets):
    """99 KiB for a block, as compute capability 12.0 has, which has clusters."""
    monkeypatch.undo()
    kernel_lanes.emulate_decode(monkeypatch, 101376)
    monkeypatch.setattr(cluster, "has_clusters", lambda index: True)
    check(run, random_case(generator, dtype=HALF, group=group, head_dim=head_dim, num_kv_heads=1, offsets=offsets))


@pytest.mark.parametrize(
    ("kind", "group", "sound", "broken", "words"),
    [
        (
            "",
            4,
            "    cluster_arrive();\n    cluster_wait();\n",
            "    __syncthreads();\n",
            "no barrier|may yet write|may have ended",
        ),
        ("", 4, "  if (p.blocks > 1) cluster_wait();  // all have begun\n", "", "a block that may not have begun"),
        ("", 4, "  if (!SPREAD && p.blocks > 1) cluster_arrive();\n", "", "does not arrive"),
        ("", 4, "// all have begun\n  meet();  // all warps have left theirs\n", "// all have begun\n", "no barrier between"),
        ("", 16, "      else __syncthreads();  // table, rings", "      // table, rings", "to __syncthreads|no barrier"),
        (
            "",
            4,
            "#define SENT (USED > RESULT(WARPS) ?",
            "#define SENT (USED < RESULT(WARPS) ?",
            "no barrier between|another block wrote",
        ),
        ("spread", 4, "  meet();  // all rows are there\n", "", "another block wrote"),
        ("spread", 4, "  meet();  // which block is the last\n", "", "no barrier between"),
        ("spread", 4, "  if (*(const u32*)smem != p.blocks - 1) return;\n", "", "another block (wrote|read)"),
        ("spread", 4, "  if (thread_number() == 0) *(u32*)smem", "  *(u32*)smem", "past the number|no barrier|another block"),
        (
            "teams",
            4,
            "// all have begun\n  meet();  // all warps have left theirs\n",
            "// all have begun\n",
            "where a copy has not landed",
        ),
        ("teams", 4, "  } else {\n    meet();\n  }\n", "  }\n", "no barrier between"),
        ("teams", 4, "team_barrier(1 + team_of_thread(),", "team_barrier(1,", "of others than come"),
        ("teams", 4, "SENT + team * PART * 4;", "SENT;", "no barrier between"),
    ],
)
def test_what_blocks_must_wait_for(generator, monkeypatch, sound, broken, words, group):
    text = kernel_lanes.decode_source(True)
    assert text.count(sound) == 1
    monkeypatch.setattr(kernel_lanes, "decode_source", lambda *_: text.replace(sound, broken))
    with pytest.raises(LaneError, match=words):
        run(*random_case(generator, dtype=HALF, device="cpu", group=group, kv_len=100, head_dim=128).arguments)


@pytest.mark.parametrize("spread", [True])
def test_counters_are_left_as_they_were(generator, monkeypatch):
    """Calls take turns, and begin again where there are no more; each finds zeros."""
    zeros = torch.zeros(40, dtype=torch.int32)
    counters = cluster.Counters(zeros)
    monkeypatch.setattr(cluster, "_counters", {-1: counters})
    assert [(counters.take(n) - zeros.data_ptr()) // 4 for n in (16, 8, 16, 1, 39, 1)] == [0, 16, 24, 0, 1, 0]
    for _ in range(6):
        check(run, random_case(generator, dtype=HALF, batch=2, num_kv_heads=4, group=4, kv_len=40, head_dim=64))
        assert not zeros.any()
