"""Tensors without storage: nothing gets at memory that they do not have, and copies are worth what they are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from turboquant_vllm import TQ4Codec
from turboquant_vllm.hf.pages import PagedTensor, SpanMask, find_spans, read_spans
from turboquant_vllm.hf.static import PagedLayer
from turboquant_vllm.hf.tensors import CausalMask, DeferredTensor, PackedTensor


def packed(x: torch.Tensor) -> DeferredTensor:
    codec = TQ4Codec(64)
    return PackedTensor.of(codec.compress(x), codec, torch.float32)


def paged(x: torch.Tensor) -> DeferredTensor:
    layer = PagedLayer(0, 64, seed=0)
    layer.update(x, x)
    assert isinstance(layer.keys, PagedTensor)
    return layer.keys


def mask(x: torch.Tensor) -> DeferredTensor:
    size = x.shape[2]
    return CausalMask(
        (1, 1, size, size), x.device, None, None, torch.float32, lambda: torch.ones(1, 1, size, size, dtype=torch.bool).tril()
    )


def spans(x: torch.Tensor) -> DeferredTensor:
    found = find_spans(torch.arange(x.shape[2]).expand(3, 1, 1, -1) < 5, torch.float32)
    assert found is not None
    return found


kinds = pytest.mark.parametrize("make", [packed, paged, mask, spans])


@pytest.fixture
def x(randn: Callable[..., torch.Tensor]) -> torch.Tensor:
    return randn(1, 2, 11, 64)


# What would read or write at address 0, in this process or in that which gets the address.
USES = {
    "from_dlpack": torch.from_dlpack,
    "numpy_from_dlpack": np.from_dlpack,
    "to_dlpack": torch.utils.dlpack.to_dlpack,
    "data_ptr": lambda x: x.data_ptr(),
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
    "array": np.array,
    "share_memory_": lambda x: x.share_memory_(),
    "apply_": lambda x: x.apply_(lambda value: value),
    "map_": lambda x: x.map_(x, lambda value, other: value),
    "storage": lambda x: x.untyped_storage().data_ptr(),
    "bytes": lambda x: bytes(x.untyped_storage()),
    "set_": lambda x: x.set_(torch.zeros(1)),
    "resize_": lambda x: x.resize_(1),
    "cuda_array_interface": lambda x: x.__cuda_array_interface__,
}


@kinds
@pytest.mark.parametrize("use", USES)
def test_nothing_gets_an_address(use: str, make: Callable[[torch.Tensor], DeferredTensor], x: torch.Tensor) -> None:
    tensor = make(x)
    with pytest.raises((BufferError, RuntimeError, TypeError, AttributeError)):
        USES[use](tensor)
    assert torch.equal(tensor.clone(), make(x).dense())


@kinds
def test_refusals_say_what_to_do(make: Callable[[torch.Tensor], DeferredTensor], x: torch.Tensor) -> None:
    tensor = make(x)
    for use in (torch.from_dlpack, np.asarray, torch.Tensor.share_memory_):
        with pytest.raises((BufferError, RuntimeError), match=rf"{type(tensor).__name__} has no memory .* \.clone\(\) writes"):
            use(tensor) if use is not torch.Tensor.share_memory_ else tensor.share_memory_()


def saved_and_loaded(x: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@kinds
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: pickle.loads(ForkingPickler.dumps(x)),  # as a queue between processes sends it
        saved_and_loaded,
        lambda x: torch.tensor(x.tolist()),
        torch.clone,
        torch.Tensor.contiguous,
        lambda x: torch.zeros(x.shape).set_(x),
    ],
    ids=["copy", "deepcopy", "pickle", "queue", "save", "list", "clone", "contiguous", "set_"],
)
def test_copies(
    duplicate: Callable[[torch.Tensor], torch.Tensor], make: Callable[[torch.Tensor], DeferredTensor], x: torch.Tensor
) -> None:
    tensor = make(x)
    again = duplicate(tensor)
    assert torch.equal(again.clone(), tensor.dense())


def test_a_deep_copy_is_its_own(x: torch.Tensor) -> None:
    tensor = packed(x)
    again = copy.deepcopy(tensor)
    before = tensor.dense()
    assert isinstance(tensor, PackedTensor)
    tensor.codes.zero_()
    assert isinstance(again, PackedTensor)
    assert torch.equal(again.dense(), before)


def test_spans_stand_for_masks():
    sees = torch.zeros(4, 1, 1, 9, dtype=torch.bool)
    sees[0, ..., 2:7] = sees[1, ..., :9] = sees[2, ..., 8:] = True  # the last sequence sees nothing
    mask = find_spans(sees, torch.bfloat16)
    stops, rows, counts = read_spans(mask.spans)
    assert (stops.tolist(), rows.tolist(), counts.tolist()) == ([7, 9, 9, 0], [0, 1, 2, 3, 4], [5, 9, 1, 0])
    assert mask.spans.shape == (3, 4, 2)
    assert torch.equal(mask.written(), sees)
    assert (mask.shape, mask.dtype) == (sees.shape, torch.bfloat16)
    assert torch.equal(mask + 0, torch.zeros(()).bfloat16().where(sees, torch.finfo(torch.bfloat16).min))
    moved = mask.to("meta")
    assert isinstance(moved, SpanMask)
    assert moved.spans.device.type == "meta"
    assert find_spans(sees[[1, 3]], torch.float32).spans.shape[0] == 3
    mask = find_spans(sees[[1, 3]], torch.float32, windows=False)
    stops, rows, counts = read_spans(mask.spans)
    assert (stops.tolist(), rows.tolist(), counts) == ([9, 0], [0, 1, 2], None)
    assert torch.equal(mask.written(), sees[[1, 3]])
    sees[0, ..., 4] = False
    assert find_spans(sees, torch.float32) is None
