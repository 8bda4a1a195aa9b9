"""The contracts of attention for the native kernels' own source, run lane by lane on a CPU, by the line of tiles and by
clusters: numbers of any size, and such as are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention_cases import skip_if_refused
from attention_contract import AttentionContract
from kernel_lanes import emulated_decode, few_objects, needs_compiler  # noqa: F401
from mask_contract import MaskContract
from offset_contract import OffsetContract
from turboquant_vllm.cuda import cluster, decode
from turboquant_vllm.cuda.variants import Cluster

pytestmark = [pytest.mark.slow, needs_compiler, pytest.mark.usefixtures("emulated_decode")]


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture
def dtype() -> torch.dtype:
    return torch.float16


@pytest.fixture
def clusters() -> bool:
    """Or else the line of tiles, whose masks and offsets have tests of their own."""
    return True


@pytest.fixture
def run(clusters: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cluster, "choose_cluster", lambda _, __, variant, *___: Cluster(2, variant) if clusters else None)
    split_len = None if clusters else 64  # in ranges of fixed length, so that a sequence alone gives the same bits

    def decode_where_it_can(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        skip_if_refused(*args)
        return decode.decode(*args, hadamard=True, split_len=split_len)

    return decode_where_it_can


class TestContract(AttentionContract):
    @pytest.fixture(params=[False, True], ids=["line", "clusters"])
    def clusters(self, request: pytest.FixtureRequest) -> Any:
        return request.param


class TestMasks(MaskContract): ...


class TestOffsets(OffsetContract): ...
