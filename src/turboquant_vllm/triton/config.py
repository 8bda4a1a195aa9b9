"""Compile-time choices of the attention kernels, and what depends on the device alone.

A small static table over the regime (few or many query rows), the head dimension and what is packed. Nothing is tuned at run
time and nothing depends on a length, so a new length never compiles anything.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
import triton

__all__ = [
    "FEW_ROWS",
    "INTERPRETED",
    "LOG2_E",
    "MIN_SPLIT",
    "SPLITS",
    "WIDE",
    "WIDEST",
    "Config",
    "choose_config",
    "choose_parts",
    "device_guard",
    "padded",
    "split_length",
    "uses_prmt",
]

INTERPRETED: bool = triton.knobs.runtime.interpret
LOG2_E = 1 / math.log(2)
# Up to this many packed rows (query tokens x heads of a group) keys are split over programs and looked up in place. With
# more, each level would be looked up many times: slices of the cache are unpacked once, into a small scratch.
FEW_ROWS = 256
SPLITS, MIN_SPLIT = 16, 256
WIDE = 256  # vectors of more coordinates do not fit the registers together with what they are multiplied by
WIDEST = 1 << 30  # a sliding window wider than this is taken for it: positions less a window stay 32-bit numbers


@dataclass(frozen=True)
class Config:
    """Compile-time choices of one regime: rows and keys per tile, warps, pipeline stages, orientation of the tiles."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    swap: bool = False


def choose_config(rows: int, head_dim: int, itemsize: int, packed: bool, nvidia: bool) -> Config:
    """The configuration for ``rows`` packed query rows of ``head_dim`` coordinates of ``itemsize`` bytes.

    ``packed`` says that keys and values both are. Tiles fit 99 KiB of shared memory on NVIDIA's GPUs, 64 KiB elsewhere.
    """
    wide = head_dim > 128
    if head_dim > WIDE:  # sums of so many coordinates take the registers of more warps, for fewer rows
        if itemsize == 4:
            return Config(16, 16, 8, 1)
        if packed and rows <= FEW_ROWS:
            return Config(8, 32, 4, 2, swap=True) if rows <= 8 and nvidia else Config(16, 16, 8, 2, swap=True)
        return Config(16 if rows <= 16 else 32, 16, 8, 2)
    if itemsize == 4:  # float32 products run without tensor cores: small tiles, for correctness rather than speed
        return Config(16, 32, 4, 1)
    if rows <= 16 and packed:
        return Config(8 if rows <= 8 else 16, 16 if wide else 32, 1, 3, swap=True)
    if rows <= 16:
        return Config(16, 16 if wide else 32, 1, 3 if nvidia else 2)
    if rows <= FEW_ROWS:
        return Config(32 if rows <= 32 else 64, 32, 2 if rows <= 32 else 4, 2 if wide else 3)
    return Config(64, 32, 4, 2) if wide else Config(128, 64, 8, 3 if nvidia else 2)


def split_length(rows: int, kv_len: int) -> int:
    """Keys per split: a function of the call's own sequence, never of the batch, so that a batch changes no bits."""
    if rows > FEW_ROWS or kv_len <= MIN_SPLIT:
        return max(kv_len, 1)
    return max(MIN_SPLIT, triton.next_power_of_2(triton.cdiv(kv_len, SPLITS)))


@cache
def uses_prmt(device_type: str) -> bool:
    """Whether levels are looked up by NVIDIA's byte permute on this kind of device."""
    return device_type == "cuda" and torch.version.hip is None and not INTERPRETED


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make ``device`` current while a kernel is launched; Triton launches on the current device."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    if INTERPRETED:
        return contextlib.nullcontext()
    raise RuntimeError(f"Triton kernels need tensors on a GPU, got {device} (or set TRITON_INTERPRET=1)")


def choose_parts(head_dim: int, allowed: Iterable[int]) -> int:
    """Coordinates in one element of packed codes, of those ``allowed`` that which pads least: the widest such."""
    return min(allowed, key=lambda parts: (parts * padded(head_dim, parts), -parts))


def padded(head_dim: int, parts: int) -> int:
    """Columns of one part of a tile: a power of two, at least the 16 that a matrix instruction contracts over."""
    return max(16, triton.next_power_of_2(head_dim // parts))
