"""Tensors that stand for values nobody has written out yet, made when an operation first asks for their elements.

transformers passes keys, values and masks through model code to the attention function. A :class:`PackedTensor` goes that
way in 4 bits: an attention function that knows it reads the codes, and any other operation (a slice, a matrix product,
PyTorch's own attention) gets the decompressed vectors without noticing. :class:`CausalMask` does the same for a mask of
``N_q x N_kv`` elements that is known by a few numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from turboquant_vllm.codec import TQ4Codec, TQ4Keys, TQ4Tensor
from turboquant_vllm.cuda.decode import Operands
from turboquant_vllm.records import GROUP
from turboquant_vllm.rotation import RotationKind

__all__ = ["CausalMask", "DeferredTensor", "PackedTensor", "additive", "find_parts", "some_of", "tokens_before", "unpack"]


class DeferredTensor(torch.Tensor):
    """A tensor without storage. Every operation on it runs on :meth:`dense`, except for moving it to another device.

    What is written to it would be written to a copy, and lost: that raises RuntimeError. So does everything that wants the
    address of its elements, which have none.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def _make(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
        """A tensor of this class, without its attributes."""
        make: Any = torch.Tensor._make_wrapper_subclass
        self = make(cls, shape, dtype=dtype, device=device)
        if not torch.compiler.is_compiling():
            torch._C._set_throw_on_mutable_data_ptr(self)  # what asks for an address in C++ would get 0
        return self

    def dense(self) -> torch.Tensor:
        """The elements, as an ordinary tensor of this shape, dtype and device."""
        raise NotImplementedError

    def moved(self, device: torch.device) -> DeferredTensor:
        """The same tensor on another device, still without storage."""
        names, context = self.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {name: getattr(self, name).to(device) for name in names}
        return self.__tensor_unflatten__(inner, context, None, None)  # type: ignore[attr-defined]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and _only_moves(args[0], kwargs):
            return args[0].moved(torch.device(kwargs["device"]))
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            _refuse_writing(func._schema.arguments, args, kwargs)
        args, kwargs = tree_map_only(DeferredTensor, lambda x: x.dense(), (args, kwargs))
        return func(*args, **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(f"{type(self).__name__} cannot be written to: {_WRITE_TO_A_COPY}")

    def tolist(self) -> Any:
        return self.dense().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError(self._no_memory())  # as the protocol has it

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError(self._no_memory())

    numpy = __array__ = apply_ = share_memory_ = _refuse

    def __reduce_ex__(self, protocol: Any) -> Any:
        names, context = self.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {name: getattr(self, name) for name in names}
        return type(self).__tensor_unflatten__, (inner, context, None, None)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: Any) -> Any:
        rebuild, (inner, *context) = self.__reduce_ex__(4)
        return rebuild(copy.deepcopy(inner, memo), *context)

    def _no_memory(self) -> str:
        return f"{type(self).__name__} has no memory for others to use: it stands for values that only .clone() writes out"


def _only_moves(x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a copy differs in its device alone; ``Tensor.to`` also says what stays as it is."""
    same = {"dtype": x.dtype, "layout": x.layout, "device": x.device}
    changed = {name for name, value in kwargs.items() if name != "non_blocking" and value != same.get(name)}
    return changed == {"device"}


_WRITE_TO_A_COPY = "it stands for what a cache or a mask holds; write to a copy, .clone()"


def _refuse_writing(schema: Any, args: Any, kwargs: Any) -> None:
    """Raise if an operator writes to a tensor without storage."""
    for argument, value in (*zip(schema, args, strict=False), *((x, kwargs[x.name]) for x in schema if x.name in kwargs)):
        if isinstance(value, DeferredTensor) and argument.alias_info is not None and argument.alias_info.is_write:
            raise RuntimeError(f"{type(value).__name__} cannot be written to: {_WRITE_TO_A_COPY}")


class PackedTensor(DeferredTensor):
    """Keys or values ``[B, H_kv, N, D]`` in 4 bits: N tokens from ``first`` on of tensors that may hold more.

    torch.compile follows a tensor of this kind from where it is made to where it is read, so it is made of tensors and
    constants alone; :meth:`of` makes one from a codec.

    Attributes:
        codes: uint8 ``[B, H_kv, capacity, D // 2]``.
        norms: float32 ``[B, H_kv, capacity]``.
        groups, steps, key_scales: of keys with offsets, as :class:`turboquant_vllm.records.Operand` and
            :class:`turboquant_vllm.records.Tables` have them; groups are counted from token 0, whatever ``first`` is.
        operands: of keys: what the native kernel takes of them and of the values beside them, if their storage keeps that.
    """

    operands: Operands | None = None  # torch.compile does without
    codes: torch.Tensor
    norms: torch.Tensor
    rotation: torch.Tensor
    centroids: torch.Tensor
    groups: torch.Tensor | None
    steps: torch.Tensor | None
    key_scales: torch.Tensor | None
    kind: RotationKind
    first: int
    count: int

    @staticmethod
    def __new__(
        cls,
        codes: torch.Tensor,
        norms: torch.Tensor,
        rotation: torch.Tensor,
        centroids: torch.Tensor,
        kind: RotationKind,
        dtype: torch.dtype,
        first: int,
        count: int,
        groups: torch.Tensor | None = None,
        steps: torch.Tensor | None = None,
        key_scales: torch.Tensor | None = None,
    ) -> PackedTensor:
        batch, heads = codes.shape[:2]
        self: PackedTensor = cls._make((batch, heads, count, rotation.shape[0]), dtype, codes.device)
        self.codes, self.norms, self.first, self.count = codes, norms, first, count
        self.rotation, self.centroids, self.kind = rotation, centroids, kind
        self.groups, self.steps, self.key_scales = groups, steps, key_scales
        return self

    @staticmethod
    def of(packed: TQ4Tensor | TQ4Keys, codec: TQ4Codec, dtype: torch.dtype) -> PackedTensor:
        """Vectors that ``codec`` has compressed, to be read in ``dtype``."""
        tables = (codec.rotation, codec.centroids, codec.rotation_kind)
        offsets = (packed.groups, packed.steps, codec.key_scales) if isinstance(packed, TQ4Keys) else ()
        return PackedTensor(packed.codes, packed.norms, *tables, dtype, 0, packed.codes.shape[2], *offsets)

    def dense(self) -> torch.Tensor:
        """The vectors decompressed, ``[B, H_kv, n, D]``."""
        before = tokens_before(self)
        packed, codec = unpack(self, before)
        return codec.decompress(packed, self.dtype)[:, :, before:]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["codes", "norms", "rotation", "centroids"]
        names += [name for name in ("groups", "steps", "key_scales") if getattr(self, name) is not None]
        return names, (self.kind, self.dtype, self.first, self.count)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> PackedTensor:
        offsets = (inner.get(name) for name in ("groups", "steps", "key_scales"))
        return PackedTensor(inner["codes"], inner["norms"], inner["rotation"], inner["centroids"], *context, *offsets)


# Functions, since torch.compile follows no property of a tensor.


def tokens_before(x: PackedTensor) -> int:
    """How many tokens before its first one the group of that began: keys with offsets are read from there."""
    return 0 if x.groups is None else x.first % GROUP


def unpack(x: PackedTensor, before: int = 0) -> tuple[TQ4Tensor | TQ4Keys, TQ4Codec]:
    """Codes and norms, and what reads them, from ``before`` tokens earlier on: of keys with offsets, where a group begins."""
    first, count = x.first - before, x.count + before
    codes, norms = (t.narrow(2, first, count) for t in (x.codes, x.norms))
    codec = TQ4Codec.reader(x.rotation, x.centroids, x.kind, x.key_scales)
    if x.groups is None or x.steps is None:
        return TQ4Tensor(codes, norms), codec
    assert first % GROUP == 0, first
    groups, steps = (t.narrow(2, first // GROUP, -(-count // GROUP)) for t in (x.groups, x.steps))
    return TQ4Keys(codes, norms, groups, steps), codec


def some_of(x: PackedTensor, sequences: slice, tokens: slice) -> PackedTensor:
    """Some tokens of some sequences, as they are."""
    codes, norms, groups, steps = (None if t is None else t[sequences] for t in (x.codes, x.norms, x.groups, x.steps))
    assert codes is not None
    assert norms is not None
    where = (x.dtype, x.first + tokens.start, tokens.stop - tokens.start)
    return PackedTensor(codes, norms, x.rotation, x.centroids, x.kind, *where, groups, steps, x.key_scales)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to scores in place of a bool mask: 0 where it is True, else the least number of ``dtype``."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


class CausalMask(DeferredTensor):
    """An additive mask ``[B, 1, N_q, N_kv]``: causal, aligned to the bottom right, perhaps with padding and a sliding window.

    Additive, because that is what all models can apply, those among them that attend in their own way.

    Attributes:
        visible: bool ``[B, N_kv]``, the keys that are not padding; None where all are visible.
        window: how many keys a query sees at most, itself included; None for all.
    """

    visible: torch.Tensor | None
    window: int | None
    _write: Callable[[], torch.Tensor]
    _parts: list[Part] | None

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        device: torch.device,
        visible: torch.Tensor | None,
        window: int | None,
        dtype: torch.dtype,
        write: Callable[[], torch.Tensor],
    ) -> CausalMask:
        """``write`` makes a bool mask, True where a query sees a key, should it be needed."""
        self: CausalMask = cls._make(shape, dtype, device)
        self.visible, self.window, self._write, self._parts = visible, window, write, None
        return self

    def written(self) -> torch.Tensor:
        """The mask as bools, True where a query sees a key."""
        return self._write().to(self.device)

    def dense(self) -> torch.Tensor:
        """The mask's elements, to be added to scores."""
        return additive(self.written(), self.dtype)

    def moved(self, device: torch.device) -> CausalMask:
        """The same mask on another device."""
        visible = None if self.visible is None else self.visible.to(device)
        return CausalMask(self.shape, device, visible, self.window, self.dtype, self._write)

    def last_queries(self, count: int) -> CausalMask:
        """The mask of the last ``count`` queries."""
        shape = (self.shape[0], 1, count, self.shape[3])
        return CausalMask(shape, self.device, self.visible, self.window, self.dtype, lambda: self._write()[:, :, -count:])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.slice.Tensor and isinstance(args[0], cls) and args[1:2] == (2,):
            first, stop, step = slice(*args[2:5]).indices(args[0].shape[2])  # some models ask for the last queries alone
            if first < stop == args[0].shape[2] and step == 1:
                return args[0].last_queries(stop - first)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.dense(),)  # what writes a mask cannot be pickled

    @property
    def parts(self) -> list[Part]:
        """Runs of sequences with the same padding; worked out once, which waits for the device."""
        if self._parts is None:
            assert self.visible is not None
            self._parts = find_parts(self.visible)
        return self._parts


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


# Sequences (a slice of the batch), and their visible keys: a slice, or an index where padding stands between visible keys.
Part = tuple[slice, slice | torch.Tensor]


def find_parts(visible: torch.Tensor) -> list[Part]:
    """Runs of neighbouring sequences that see the same keys; ``visible`` is bool ``[B, N_kv]``."""
    counted = visible.long()
    columns = (counted.argmax(-1), counted.sum(-1), counted.shape[-1] - counted.flip(-1).argmax(-1))
    parts: list[Part] = []
    for row, (first, count, stop) in enumerate(torch.stack(columns, -1).tolist()):
        if count and stop - first != count:
            parts.append((slice(row, row + 1), visible[row].nonzero().squeeze(-1)))
            continue
        keys = slice(first, stop) if count else slice(0, 0)
        if parts and parts[-1][1] == keys and isinstance(parts[-1][1], slice):
            parts[-1] = (slice(parts[-1][0].start, row + 1), keys)
        else:
            parts.append((slice(row, row + 1), keys))
    return parts
