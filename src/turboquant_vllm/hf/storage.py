"""Storage of one layer's packed keys and values: two buffers that grow in steps, and the part of them that is in use."""

from __future__ import annotations

from functools import cache

import torch

from turboquant_vllm.codec import TQ4Codec, TQ4Tensor

__all__ = ["PackedStorage", "codec_for", "compress_both"]

# Room beyond what is needed when buffers are made: few copies later, and at most a thirty-second of memory unused.
_SPARE_TOKENS, _SPARE_SHARE = 256, 32
# Up to this many new tokens, keys and values are compressed in one call, on a copy.
_FEW_TOKENS = 64


@cache
def codec_for(head_dim: int, seed: int, device: torch.device) -> TQ4Codec:
    """The codec that all layers of that head dimension on that device share."""
    with torch.inference_mode(False):
        return TQ4Codec(head_dim, seed=seed, device=device)


def compress_both(codec: TQ4Codec, keys: torch.Tensor, values: torch.Tensor) -> TQ4Tensor:
    """Keys and values ``[B, H_kv, n, D]`` as one compressed tensor ``[2, B, H_kv, n, D]``."""
    if keys.shape[2] <= _FEW_TOKENS:
        return codec.compress(torch.stack((keys, values)))
    packed = codec.compress(keys), codec.compress(values)
    return TQ4Tensor(torch.stack([x.codes for x in packed]), torch.stack([x.norms for x in packed]))


class PackedStorage:
    """Keys and values in 4 bits: tokens ``start`` to ``stop`` of buffers with room for more.

    Attributes:
        codec: of keys and values.
        codes: uint8 ``[2, B, H_kv, capacity, D // 2]``, keys before values.
        norms: float32 ``[2, B, H_kv, capacity]``.
        start, stop: the tokens in use.
    """

    def __init__(self, codec: TQ4Codec, batch: int, num_heads: int, capacity: int = 0) -> None:
        self.codec = codec
        self.start = self.stop = 0
        self._take(*self._allocate(batch, num_heads, capacity))

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return self.norms.shape[3]

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, whether in use or not."""
        return self.codes.nbytes + self.norms.nbytes

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Compress ``[B, H_kv, n, D]`` keys and values behind the last token."""
        count = keys.shape[2]
        if count <= _FEW_TOKENS:
            self.put(compress_both(self.codec, keys, values))
            return
        self._make_room(count)
        for part, states in enumerate((keys, values)):  # one after the other, so that the codes of one alone exist twice
            packed = self.codec.compress(states)
            self.codes[part].narrow(2, self.stop, count).copy_(packed.codes)
            self.norms[part].narrow(2, self.stop, count).copy_(packed.norms)
        self.stop += count

    def put(self, packed: TQ4Tensor) -> None:
        """Append keys and values that are packed already, ``[2, B, H_kv, n, D]``."""
        count = packed.norms.shape[3]
        self._make_room(count)
        self.codes.narrow(3, self.stop, count).copy_(packed.codes)
        self.norms.narrow(3, self.stop, count).copy_(packed.norms)
        self.stop += count

    def last(self, count: int) -> tuple[TQ4Tensor, TQ4Tensor]:
        """Keys and values of the last ``count`` tokens; views, to be read before the next change."""
        first = self.stop - count
        keys, key_norms, values, value_norms = (x.narrow(2, first, count) for x in self._parts)
        return TQ4Tensor(keys, key_norms), TQ4Tensor(values, value_norms)

    def keep_last(self, count: int) -> None:
        """Forget all but the last ``count`` tokens."""
        self.start = max(self.start, self.stop - count)

    def remove_last(self, count: int) -> None:
        """Forget the last ``count`` tokens, or all there are."""
        self.stop = max(self.start, self.stop - count)

    def select(self, sequences: torch.Tensor) -> None:
        """Replace the batch by the sequences of an index, int64 ``[n]``."""
        sequences = sequences.to(self.device)
        with torch.inference_mode(False):
            self._take(self.codes.index_select(1, sequences), self.norms.index_select(1, sequences))

    def move(self, device: torch.device) -> None:
        """Bring the buffers to ``device``; copies to or from a GPU are queued, not waited for."""
        if device != self.device:
            self.codec = codec_for(self.codec.head_dim, self.codec.seed, device)
            with torch.inference_mode(False):
                self._take(self.codes.to(device, non_blocking=True), self.norms.to(device, non_blocking=True))

    def _make_room(self, count: int) -> None:
        """Where ``count`` more tokens do not fit, move what is in use to the front of larger buffers, with room to spare."""
        if self.stop + count <= self.capacity:
            return
        needed = len(self) + count
        used = slice(self.start, self.stop)
        old_codes, old_norms = self.codes[:, :, :, used], self.norms[:, :, :, used]
        batch, num_heads = self.codes.shape[1:3]
        capacity = needed + max(_SPARE_TOKENS, needed // _SPARE_SHARE)
        self._take(*self._allocate(batch, num_heads, capacity))
        self.start, self.stop = 0, old_norms.shape[3]
        self.codes[:, :, :, : self.stop] = old_codes
        self.norms[:, :, :, : self.stop] = old_norms

    def _take(self, codes: torch.Tensor, norms: torch.Tensor) -> None:
        """Use these buffers from now on."""
        self.codes, self.norms = codes, norms
        self._parts = (codes[0], norms[0], codes[1], norms[1])

    def _allocate(self, batch: int, num_heads: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape, device = (2, batch, num_heads, capacity), self.codec.device
        # Tensors born in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            codes = torch.empty((*shape, self.codec.head_dim // 2), dtype=torch.uint8, device=device)
            return codes, torch.empty(shape, dtype=torch.float32, device=device)
