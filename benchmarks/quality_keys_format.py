"""Keys with offsets and outlying keys, emulated in PyTorch: what a reader gets of a whole prompt, and token by token.

A key k is scaled and rotated, y = (w * k) @ rotation.T. Keys of a group of neighbouring tokens share an offset o; one of them,
the outlying key, has its y - o in 8 bits, and all have it in TQ4. Everything here works on y: scores are
((q / w) @ rotation.T) . y'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional

from turboquant_vllm.codec import TQ4Codec

__all__ = ["COPY", "GrowingKeys", "KeyFormat", "Rule", "codec_for", "int8", "read_back", "tq4"]

COPY = 1e9  # keys that the group before counts as where its vector is to be taken as it is


@dataclass(frozen=True)
class KeyFormat:
    """How keys, and perhaps values, are kept.

    Attributes:
        group: keys that share an offset; 0 is plain TQ4, no offsets, no outlying keys.
        scales: which of the measured channel scales; "ones" for none.
        basis: where offsets and outlying keys are rounded to 8 bits: behind the rotation, or before it, on w * k.
        exact: offsets and outlying keys are not rounded.
        values: values are kept in TQ4, too.
    """

    group: int = 64
    scales: str = "text"
    basis: Literal["rotated", "model"] = "rotated"
    exact: bool = False
    values: bool = False


@dataclass(frozen=True)
class Rule:
    """What becomes of a group that begins with fewer keys than it has room for.

    The offset is (count * p + sum of the keys but the outlying one) / (count + their number), p a vector of the group before.

    Attributes:
        prior: p: "mean" and "rest", the mean of the group before as it reads back, with and without its outlying key;
            "offset", its offset.
        count: how many keys p counts as. Without a group before it counts as none; an offset of no key is zero.
        all_keys: the outlying key counts as well.
        again: where there is no group before, the first group is begun anew, from its keys as they read back, by a call that
            finds so many keys in it.
    """

    prior: Literal["mean", "rest", "offset", "zero"] = "rest"
    count: float = 8.0
    all_keys: bool = False
    again: tuple[int, ...] = ()


Rows = slice | list[int]  # of the batch

_codecs: dict[tuple[int, torch.device], TQ4Codec] = {}


def codec_for(x: torch.Tensor) -> TQ4Codec:
    """The codec of x's last size and device."""
    return _codecs.setdefault((x.shape[-1], x.device), TQ4Codec(x.shape[-1], device=x.device))


def int8(x: torch.Tensor) -> torch.Tensor:
    """Vectors ``[..., D]`` as 8 bits a coordinate and one step give them back."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step.clamp_min(1e-30)).round() * step


def tq4(y: torch.Tensor) -> torch.Tensor:
    """Rotated vectors ``[..., D]`` as TQ4 gives them back, the scale unbiased."""
    codec = codec_for(y)
    length = y.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    levels = codec.centroids[torch.bucketize(y / length, codec.boundaries)]
    return levels * (length.square() / (y * levels).sum(-1, keepdim=True).clamp_min(1e-30))


def read_back(y: torch.Tensor, cached: KeyFormat) -> torch.Tensor:
    """Keys ``[..., N, D]``, scaled and rotated, that are written by one call, as they are read.

    With ``basis="model"`` they are rotated back, rounded there, and rotated once more.
    """
    if not cached.group:
        return tq4(y)
    length, size = y.shape[-2], cached.group
    groups = functional.pad(y, (0, 0, 0, -length % size)).unflatten(-2, (-1, size))  # [..., G, size, D]
    live = torch.arange(groups.shape[-3] * size, device=y.device).unflatten(0, (-1, size)) < length
    count = live.sum(-1)[:, None]
    total = groups.sum(-2)
    far = (groups - (total / count).unsqueeze(-2)).square().sum(-1).masked_fill(~live, -1).argmax(-1)
    pick = far[..., None, None].expand(*far.shape, 1, y.shape[-1])
    key = groups.gather(-2, pick)
    offset = (total.unsqueeze(-2) - key) / (count - 1).clamp_min(1).unsqueeze(-1)
    rotation = codec_for(y).rotation

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if cached.exact:
            return x
        return int8(x) if cached.basis == "rotated" else int8(x @ rotation) @ rotation.T

    offset = rounded(offset)
    rest = tq4(groups - offset).scatter(-2, pick, rounded(key - offset))
    return (rest + offset).flatten(-3, -2)[..., :length, :]


class GrowingKeys:
    """Keys of one layer that come call by call, each row by a rule of its own; all rows have the same length."""

    def __init__(self, rules: list[Rule], room: int, size: int = 64) -> None:
        self._rules, self._room, self._size = rules, room, size
        self._count = 0

    def write(self, y: torch.Tensor) -> torch.Tensor:
        """Add keys ``[R, H, n, D]``, scaled and rotated; all keys so far as they are read now, ``[R, H, N, D]``."""
        if self._count == 0:
            rows, heads, _, dim = y.shape
            self._keys, self._codes = (y.new_zeros(rows, heads, self._room, dim) for _ in range(2))
            self._offset, self._before = (y.new_zeros(rows, heads, 1, dim) for _ in range(2))
            self._place = torch.zeros(rows, heads, 1, dtype=torch.long, device=y.device)
            self._far = y.new_zeros(rows, heads, 1)
            self._weight = y.new_tensor([rule.count for rule in self._rules]).view(-1, 1, 1, 1)
            self._all = torch.tensor([rule.all_keys for rule in self._rules], device=y.device).view(-1, 1, 1, 1)
        at = 0
        while at < y.shape[2]:
            slot = self._count % self._size
            piece = y[:, :, at : at + self._size - slot]
            if slot == 0:
                self._begin(piece)
            else:
                self._continue(piece, slot)
            at += piece.shape[2]
        return self._keys[:, :, : self._count]

    def _begin(self, y: torch.Tensor) -> None:
        """A group's first keys."""
        self._before = self._priors()
        self._code(y, self._count, slice(None))
        self._count += y.shape[2]

    def _continue(self, y: torch.Tensor, slot: int) -> None:
        start = self._count - slot
        again = [row for row, rule in enumerate(self._rules) if start == 0 and slot in rule.again]
        others = sorted(set(range(len(y))) - set(again))
        if again:
            self._code(torch.cat([self._keys[again, :, :slot], y[again]], 2), 0, again)
        if others:
            rows: Rows = others if again else slice(None)
            self._add(y[rows], slot, rows)
        self._count += y.shape[2]

    def _priors(self) -> torch.Tensor:
        """Vector of the group before for each row, zeros where there is none."""
        if self._count < self._size:
            return torch.zeros_like(self._offset)
        last = self._keys[:, :, self._count - self._size : self._count]
        total = last.sum(2, keepdim=True)
        far = last.gather(2, self._place[..., None].expand(-1, -1, -1, last.shape[-1]))
        found = {
            "mean": total / self._size,
            "rest": (total - far) / (self._size - 1),
            "offset": self._offset,
            "zero": torch.zeros_like(far),
        }
        return torch.stack([found[rule.prior][row] for row, rule in enumerate(self._rules)])

    def _code(self, y: torch.Tensor, start: int, rows: Rows) -> None:
        """Offset, outlying key and codes of a group of which these are all keys so far."""
        number, whole = y.shape[2], y.shape[2] == self._size
        weight = self._weight[rows] * (start > 0 and not whole)
        prior = self._before[rows]
        total = y.sum(2, keepdim=True)
        far = (y - (weight * prior + total) / (weight + number)).square().sum(-1).argmax(-1, keepdim=True)  # [R, H, 1]
        key = y.gather(2, far[..., None].expand(-1, -1, -1, y.shape[-1]))
        every = self._all[rows] & (not whole)
        own, counted = torch.where(every, total, total - key), number - 1 + every.float()
        offset = int8((weight * prior + own) / (weight + counted).clamp_min(1e-9))
        coded = tq4(y - offset) + offset
        self._offset[rows], self._place[rows] = offset, far
        self._codes[rows, :, start : start + number] = coded
        self._keys[rows, :, start : start + number] = coded
        self._promote(key, far, start, rows)

    def _add(self, y: torch.Tensor, slot: int, rows: Rows) -> None:
        """Keys of a begun group, coded around its offset."""
        start, number = self._count - slot, y.shape[2]
        offset = self._offset[rows]
        coded = tq4(y - offset) + offset
        self._codes[rows, :, self._count : self._count + number] = coded
        self._keys[rows, :, self._count : self._count + number] = coded
        best, far = (y - offset).square().sum(-1).max(-1, keepdim=True)  # [R, H, 1]
        key = y.gather(2, far[..., None].expand(-1, -1, -1, y.shape[-1]))
        # Who keeps the place is written once more as it stands.
        farther, place = best > self._far[rows], self._place[rows]
        wide = place[..., None].expand(-1, -1, -1, y.shape[-1])
        group = self._keys[rows, :, start : start + self._size]
        kept, codes = group.gather(2, wide), self._codes[rows, :, start : start + self._size].gather(2, wide)
        group.scatter_(2, wide, torch.where(farther[..., None], codes, kept))
        self._keys[rows, :, start : start + self._size] = group
        key, place = torch.where(farther[..., None], key, kept), torch.where(farther, far + slot, place)
        self._promote(key, place, start, rows)

    def _promote(self, key: torch.Tensor, place: torch.Tensor, start: int, rows: Rows) -> None:
        """Make ``key`` ``[R, H, 1, D]`` at ``place`` the group's outlying key."""
        offset = self._offset[rows]
        again = int8(key - offset)
        group = self._keys[rows, :, start : start + self._size]
        group.scatter_(2, place[..., None].expand(-1, -1, -1, key.shape[-1]), again + offset)
        self._keys[rows, :, start : start + self._size] = group
        self._place[rows], self._far[rows] = place, again.square().sum(-1)
