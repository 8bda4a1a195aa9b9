"""TQ4Codec: compress vectors to 4 bits per coordinate, and back; save and load.

    codec = TQ4Codec(128)
    t = codec.compress(keys)              # keys [..., 128] -> t.codes uint8 [..., 64], t.norms float32 [...]
    keys_again = codec.decompress(t)      # relative error |x - x'|^2 / |x|^2 about 0.0092

The work is done by the operators of :mod:`turboquant_vllm.ops`, on whatever device the tensors are.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from turboquant_vllm import ops, reference  # noqa: F401  (ops registers the operators)
from turboquant_vllm.checks import (
    check_device,
    check_dtype,
    check_groups,
    check_head_dim,
    check_key_scales,
    check_packed,
    check_seed,
    check_shape,
)
from turboquant_vllm.codebook import companding, lloyd_max
from turboquant_vllm.files import header_number, read_header, read_tensors, write_tensors
from turboquant_vllm.records import Operand, Tables
from turboquant_vllm.rotation import RotationKind, haar, randomized_hadamard, rotation_kind

__all__ = ["SCALES", "TQ4Codec", "TQ4Keys", "TQ4Tensor", "other_table"]

SCALES = ("norm", "least_squares", "unbiased")

_FORMAT = "turboquant-tq4"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Linear-algebra libraries differ in a Haar matrix's last bits; anything beyond that is another rotation.
_SAME_ROTATION = 1e-5


class TQ4Tensor(NamedTuple):
    """Vectors in 4 bits per coordinate.

    Attributes:
        codes: uint8 ``[..., head_dim // 2]``; byte i holds coordinate 2i (high nibble) and 2i + 1 (low nibble).
        norms: float32 ``[...]``, one scale per vector.
    """

    codes: torch.Tensor
    norms: torch.Tensor

    @property
    def head_dim(self) -> int:
        """Coordinates per vector."""
        return 2 * self.codes.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the vectors that this stands for, ``[..., head_dim]``."""
        return torch.Size((*self.codes.shape[:-1], self.head_dim))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and norms."""
        return self.codes.nbytes + self.norms.nbytes

    def to(self, device: torch.device | str) -> TQ4Tensor:
        """The same vectors on another device."""
        return TQ4Tensor(self.codes.to(device), self.norms.to(device))


class TQ4Keys(NamedTuple):
    """Keys in 4 bits per coordinate whose groups of 64 tokens share an offset and an outlying key: the format that models bear
    (:mod:`turboquant_vllm.reference_keys` defines it).

    Attributes:
        codes: uint8 ``[..., H_kv, N, head_dim // 2]``, as of :class:`TQ4Tensor`.
        norms: float32 ``[..., H_kv, N]``, negative for the outlier of a group.
        groups: int8 ``[..., H_kv, ceil(N / 64), 2, head_dim]``: offset and outlier of each group, counted from token 0.
        steps: float32 ``[..., H_kv, ceil(N / 64), 4]``: what these are multiples of; the outlier's distance; one to spare.
    """

    codes: torch.Tensor
    norms: torch.Tensor
    groups: torch.Tensor
    steps: torch.Tensor

    @property
    def head_dim(self) -> int:
        """Coordinates per vector."""
        return 2 * self.codes.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the keys that this stands for, ``[..., H_kv, N, head_dim]``."""
        return torch.Size((*self.codes.shape[:-1], self.head_dim))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self)

    def to(self, device: torch.device | str) -> TQ4Keys:
        """The same keys on another device."""
        return TQ4Keys(*(x.to(device) for x in self))


class TQ4Codec:
    """A rotation and 16 levels: everything needed to compress vectors of one head dimension and to read them back.

    Args:
        head_dim: coordinates per vector, even and at least 16.
        seed: of the rotation, a non-negative int. Caches written with one seed cannot be read with another.
        rotation: "hadamard" (randomized Hadamard, powers of two only), "haar", or "auto" (the first that exists).
        scale: what :meth:`compress` keeps in ``norms``, with y the rotated vector and c the levels of its codes: "norm"
            the length |x|; "least_squares" <y, c> / <c, c>, which makes |x - x'| smallest; "unbiased" |x|^2 / <y, c>,
            which makes <x, x'> = |x|^2, so that inner products are right on average, and changes models least
            (docs/quality.md). Any codec of the same seed and rotation reads all three: keys and values may be written by
            two codecs that differ in this alone.
        device: where rotation and levels are kept; tensors to compress must be there too. None: PyTorch's default device.

    Attributes:
        rotation: float32 ``[head_dim, head_dim]``, orthogonal.
        centroids: float32 ``[16]``, ascending.
        boundaries: float32 ``[15]``, between neighbouring centroids.
        companding: float32 ``[6]``, the same as a curve, for kernels: :func:`turboquant_vllm.codebook.companding`.
        rotation_kind: "hadamard" or "haar".
        scale: as given.
        key_scales: float32 ``[H_kv, head_dim]``, or None for ones: what keys with offsets are multiplied by before they are
            coded, and queries divided by, so that scores do not change but the error falls where queries are large. Of one
            layer; see :meth:`with_key_scales`.

    Raises:
        TypeError, ValueError: an argument out of its range.
    """

    rotation: torch.Tensor
    centroids: torch.Tensor
    boundaries: torch.Tensor
    companding: torch.Tensor
    rotation_kind: RotationKind
    scale: str
    key_scales: torch.Tensor | None = None

    def __init__(
        self,
        head_dim: int,
        *,
        seed: int = 0,
        rotation: str = "auto",
        scale: str = "unbiased",
        device: torch.device | str | None = None,
    ) -> None:
        check_head_dim(head_dim, minimum=16)
        check_seed(seed)
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))}, got {scale!r}")
        self.head_dim = head_dim
        self.seed = seed
        self.scale = scale
        self.rotation_kind = rotation_kind(head_dim, rotation)
        matrix = (randomized_hadamard if self.rotation_kind == "hadamard" else haar)(head_dim, seed)
        book = lloyd_max(head_dim, 4)
        tables = (matrix, book.centroids, book.boundaries, companding(book.boundaries))
        device = torch.get_default_device() if device is None else device
        self.rotation, self.centroids, self.boundaries, self.companding = (
            torch.tensor(table, dtype=torch.float32, device=device) for table in tables
        )

    def __repr__(self) -> str:
        return (
            f"TQ4Codec(head_dim={self.head_dim}, seed={self.seed}, rotation={self.rotation_kind!r}, "
            f"scale={self.scale!r}, device={str(self.device)!r})"
        )

    @property
    def device(self) -> torch.device:
        """Where the rotation and the levels are."""
        return self.rotation.device

    def to(self, device: torch.device | str) -> TQ4Codec:
        """The same codec with its rotation and levels on another device."""
        other = object.__new__(TQ4Codec)
        other.head_dim, other.seed, other.rotation_kind, other.scale = self.head_dim, self.seed, self.rotation_kind, self.scale
        other.rotation = self.rotation.to(device)
        other.centroids = self.centroids.to(device)
        other.boundaries = self.boundaries.to(device)
        other.companding = self.companding.to(device)
        other.key_scales = None if self.key_scales is None else self.key_scales.to(device)
        return other

    def with_key_scales(self, key_scales: torch.Tensor | None) -> TQ4Codec:
        """This codec for the keys of a layer with such scales; all else is shared.

        Args:
            key_scales: ``[H_kv, head_dim]``, floating, positive and finite; None for ones.

        Raises:
            TypeError, ValueError: it is no such tensor.
        """
        if key_scales is not None:
            check_dtype("key_scales", key_scales, _FLOATS)
            check_shape("key_scales", key_scales, ("num_kv_heads", self.head_dim))
            key_scales = key_scales.detach().to(self.device, torch.float32).contiguous()
            if not (key_scales.isfinite() & (key_scales > 0)).all():
                raise ValueError("key_scales must be positive and finite, got others")
        return self.with_checked_scales(key_scales)

    def with_checked_scales(self, key_scales: torch.Tensor | None) -> TQ4Codec:
        """As :meth:`with_key_scales`, of float32 scales that have been checked; waits for no GPU."""
        other = copy.copy(self)
        other.key_scales = None if key_scales is None else key_scales.to(self.device, non_blocking=True)
        return other

    @staticmethod
    def reader(
        rotation: torch.Tensor, centroids: torch.Tensor, kind: RotationKind, key_scales: torch.Tensor | None = None
    ) -> TQ4Codec:
        """A codec that reads what the owner of these tables wrote, and writes nothing; for code that torch.compile follows."""
        codec = object.__new__(TQ4Codec)
        codec.head_dim, codec.rotation_kind = rotation.shape[0], kind
        codec.rotation, codec.centroids, codec.key_scales = rotation, centroids, key_scales
        return codec

    def compress(self, x: torch.Tensor) -> TQ4Tensor:
        """Compress vectors.

        Args:
            x: ``[..., head_dim]``, fp16, bf16, fp32 or fp64, any strides, on the codec's device.

        Returns:
            codes uint8 ``[..., head_dim // 2]``, norms float32 ``[...]``; contiguous. The zero vector keeps norm 0 and
            comes back as zeros; a vector with a NaN or Inf has norm NaN and comes back as NaN.

        Raises:
            TypeError, ValueError: ``x`` has another dtype, last size or device.
        """
        check_dtype("x", x, _FLOATS)
        check_shape("x", x, (*x.shape[:-1], self.head_dim) if x.dim() else ("...", self.head_dim))
        check_device("x", x, self.device, "the codec")
        codes, norms = torch.ops.turboquant.compress(x, *self.writing)
        return TQ4Tensor(codes, norms)

    def compress_keys(self, k: torch.Tensor) -> TQ4Keys:
        """Compress keys around offsets, the first token beginning a group of 64.

        Args:
            k: ``[..., H_kv, N, head_dim]``, fp16, bf16, fp32 or fp64, any strides, on the codec's device.

        Returns:
            Codes, norms, and what groups share; contiguous. A key with a NaN or Inf has norm NaN.

        Raises:
            TypeError, ValueError: ``k`` has another dtype, shape or device.
        """
        check_dtype("k", k, _FLOATS)
        if k.dim() < 3 or k.shape[-1] != self.head_dim:
            raise ValueError(f"k must have shape [..., num_kv_heads, tokens, {self.head_dim}], got {list(k.shape)}")
        check_device("k", k, self.device, "the codec")
        check_key_scales(self.key_scales, k.shape[-3], self.head_dim)
        codes, norms, groups, steps = reference.compress_keys(k, self.key_tables, self.boundaries, self.scale)
        assert norms is not None
        assert groups is not None
        assert steps is not None
        return TQ4Keys(codes, norms, groups, steps)

    def decompress(self, t: TQ4Tensor | TQ4Keys, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Reconstruct vectors ``[..., head_dim]`` in ``dtype`` (fp16, bf16, fp32 or fp64).

        Raises:
            TypeError, ValueError: ``t`` is no compressed tensor of this head_dim and device, or ``dtype`` is no such dtype.
        """
        if dtype not in _FLOATS:
            raise TypeError(f"dtype must be one of {_FLOATS}, got {dtype}")
        if isinstance(t, TQ4Keys):
            return reference.decompress_keys(self._check_keys(t), self.key_tables, dtype)
        codes, norms = self._check(t)
        run = torch.ops.turboquant.decompress
        return run(codes, norms, self.centroids, self.rotation, self._hadamard, dtype)

    def save(self, path: str | os.PathLike[str], t: TQ4Tensor) -> None:
        """Write ``t`` with the rotation and levels that read it to a safetensors file, with a checksum.

        The file is replaced in one step, so that a reader never sees half of it.

        Raises:
            TypeError, ValueError: ``t`` is no compressed tensor of this head_dim and device.
            OSError: the file cannot be written; what stood at ``path`` before stands there still.
        """
        codes, norms = self._check(t)
        tensors = {"codes": codes, "norms": norms, "centroids": self.centroids, "rotation": self.rotation}
        header = {"head_dim": self.head_dim, "seed": self.seed, "rotation_kind": self.rotation_kind}
        write_tensors(path, tensors, {"format": _FORMAT, "codec": json.dumps(header)})

    def load(self, path: str | os.PathLike[str]) -> TQ4Tensor:
        """Read a file of :meth:`save` to the codec's device.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not such a file, another format version, a wrong checksum, or written by a codec with another
                head_dim, rotation or levels.
        """
        tensors, header = _read(Path(path))
        if header["head_dim"] != self.head_dim:
            raise ValueError(f"{path}: expected head_dim {self.head_dim}, got {header['head_dim']}")
        rows = tensors["norms"].shape
        expected = {
            "codes": (torch.uint8, (*rows, self.head_dim // 2)),
            "norms": (torch.float32, rows),
            "centroids": (torch.float32, (16,)),
            "rotation": (torch.float32, (self.head_dim, self.head_dim)),
        }
        for name, (dtype, shape) in expected.items():
            got = tensors[name]
            if got.dtype != dtype or got.shape != shape:
                raise ValueError(f"{path}: expected {name} {dtype} {list(shape)}, got {got.dtype} {list(got.shape)}")
        if (name := other_table(tensors["rotation"], tensors["centroids"], self)) == "rotation":
            mine = f"seed {self.seed}, {self.rotation_kind}"
            theirs = f"seed {header['seed']}, {header['rotation_kind']}"
            raise ValueError(f"{path}: expected the rotation of this codec ({mine}), got another ({theirs})")
        if name:
            raise ValueError(f"{path}: expected the {name} of this codec, got others")
        return TQ4Tensor(tensors["codes"].to(self.device), tensors["norms"].to(self.device))

    @property
    def tables(self) -> Tables:
        """What reads the vectors that this codec wrote."""
        return Tables(self.centroids, self.rotation)

    @property
    def key_tables(self) -> Tables:
        """What reads the keys with offsets that this codec wrote."""
        return Tables(self.centroids, self.rotation, self.key_scales)

    @property
    def writing(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool, torch.Tensor, str]:
        """What operators that compress take after the vectors: rotation, boundaries, companding, whether the rotation is
        a Sylvester-Hadamard matrix times signs, which kernels multiply by exactly in half precision, centroids, and scale."""
        return self.rotation, self.boundaries, self.companding, self._hadamard, self.centroids, self.scale

    @property
    def _hadamard(self) -> bool:
        return self.rotation_kind == "hadamard"

    def _check(self, t: TQ4Tensor) -> TQ4Tensor:
        if not isinstance(t, TQ4Tensor):
            raise TypeError(f"t must be a TQ4Tensor, got {type(t).__name__}")
        check_dtype("t.codes", t.codes, (torch.uint8,))
        if t.codes.dim() == 0:
            raise ValueError(f"t.codes must have shape [..., {self.head_dim // 2}], got []")
        norms = check_packed("t.codes", t.codes, t.norms, self.head_dim, t.codes.shape[:-1])
        check_device("t.codes", t.codes, self.device, "the codec")
        check_device("t.norms", norms, self.device, "the codec")
        return TQ4Tensor(t.codes, norms)

    def _check_keys(self, t: TQ4Keys) -> Operand:
        """Keys with offsets, as attention takes them; raises as :meth:`_check` does."""
        codes, norms = self._check(TQ4Tensor(t.codes, t.norms))
        if codes.dim() < 3:
            raise ValueError(
                f"t.codes must have shape [..., num_kv_heads, tokens, {self.head_dim // 2}], got {list(codes.shape)}"
            )
        check_groups("t", t.groups, t.steps, norms.shape, self.head_dim)
        for name, x in (("t.groups", t.groups), ("t.steps", t.steps)):
            check_device(name, x, self.device, "the codec")
        check_key_scales(self.key_scales, codes.shape[-3], self.head_dim)
        return Operand(codes, norms, t.groups, t.steps)


def other_table(rotation: torch.Tensor | None, centroids: torch.Tensor | None, codec: TQ4Codec) -> str:
    """Which of a file's tables is another than the codec's, "rotation" or "centroids"; empty where both are its own."""
    for name, found, own, tolerance in (
        ("rotation", rotation, codec.rotation, _SAME_ROTATION),
        ("centroids", centroids, codec.centroids, 0.0),
    ):
        if found is None or (found.dtype, found.shape) != (own.dtype, own.shape):
            return name
        if not bool((found - own.to(found.device)).abs().max() <= tolerance):  # which a NaN is not
            return name
    return ""


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and header of a file that :meth:`TQ4Codec.save` wrote; ValueError for anything else."""
    tensors, metadata = read_tensors(path, _FORMAT, ("codes", "norms", "centroids", "rotation"))
    header = read_header(path, metadata, "codec", ("head_dim", "seed", "rotation_kind"))
    for name in ("head_dim", "seed"):
        header_number(path, name, header[name])
    if header["rotation_kind"] not in get_args(RotationKind):
        raise ValueError(f"{path}: expected rotation_kind hadamard or haar, got {header['rotation_kind']!r}")
    return tensors, header
