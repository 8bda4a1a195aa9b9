"""The layers of a growing cache: what transformers asks of a layer, done on packed storage.

For transformers 5.14 and later. ``crop`` takes a negative number of tokens to remove, or, as releases before 5.23 pass it,
the positive length to keep.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from turboquant_vllm.checks import MAX_HEAD_DIM, check_dtype, check_key_scales
from turboquant_vllm.codec import TQ4Codec, TQ4Keys, TQ4Tensor
from turboquant_vllm.hf.storage import PackedStorage, codec_for
from turboquant_vllm.hf.tensors import PackedTensor
from turboquant_vllm.records import GROUP

__all__ = ["DTYPES", "PackedLayer", "PackedSlidingLayer", "check_states", "expected_shapes", "to_remove"]

MIN_HEAD_DIM = 16  # of a codec
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expected_shapes(keys: torch.Tensor, values: torch.Tensor) -> str:
    """What was expected of keys and values that cannot be kept in 4 bits, and what came; empty where they can."""
    head_dim = keys.shape[-1]
    if keys.shape != values.shape:
        return f"keys and values of one shape, got {list(keys.shape)} and {list(values.shape)}"
    if head_dim % 2 or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"an even head dimension from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
    return ""


def check_states(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Whether the keys and values of layer ``index``, ``[B, H_kv, n, D]``, can be kept in 4 bits.

    Raises:
        TypeError: their dtypes cannot.
        ValueError: their shapes cannot.
        RuntimeError: gradients are asked for, and there are none through a quantised cache.
    """
    for name, states in (("keys", keys), ("values", values)):
        if states.dtype not in DTYPES:
            check_dtype(f"layer {index}: {name}", states, DTYPES)
    if wrong := expected_shapes(keys, values):
        raise ValueError(f"layer {index}: expected {wrong}; keep the layer dense: skip_layers=({index},)")
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise RuntimeError("there are no gradients through a quantised cache: use torch.no_grad() or torch.inference_mode()")


class PackedLayer(CacheLayerMixin):
    """A layer that keeps all tokens in 4 bits.

    Args:
        index: of the layer in the model, for messages.
        seed: of the rotation.
        exact_prefill: whether the first call's own tokens are seen exactly by that call.
        key_offsets: whether keys have offsets.
        key_scales: with offsets, ``[H_kv, D]``, or None for ones.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    window: int | None = None

    def __init__(
        self,
        index: int,
        *,
        seed: int,
        exact_prefill: bool = True,
        key_offsets: bool = False,
        key_scales: torch.Tensor | None = None,
    ) -> None:
        self.index, self.seed, self.exact_prefill = index, seed, exact_prefill
        self.key_offsets, self.key_scales = key_offsets, key_scales
        self.storage: PackedStorage | None = None
        self.dtype: torch.dtype = torch.float32
        self.device = torch.device("cpu")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_seq_length()} tokens, {self.nbytes} bytes)"

    # What update keeps and returns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make empty storage for states like these, ``[B, H_kv, n, D]``."""
        check_states(self.index, key_states, value_states)
        batch, num_heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        check_key_scales(self.key_scales, num_heads, head_dim)
        codec = codec_for(head_dim, self.seed, self.device, self.key_scales)
        self.storage = PackedStorage(codec, batch, num_heads, self.key_offsets)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, H_kv, n, D]`` states, and return the keys and values that their queries may see.

        The first call returns the states as they came, which costs nothing; later calls return all tokens packed.
        """
        if torch.compiler.is_compiling():
            return self._update_uncompiled(key_states, value_states)
        if self.storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self.storage is not None
        again = self.storage.repeats(key_states, value_states)
        if not again:
            check_states(self.index, key_states, value_states)
            value_states = value_states.to(key_states.dtype)
            self._come_home(key_states)
        first = self.get_seq_length() == 0
        self._append(key_states, value_states, again)
        if first and self.exact_prefill:
            return key_states, value_states
        return self._packed(self._returned(key_states.shape[2]))

    @torch.compiler.disable
    def _update_uncompiled(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`update`: torch.compile knows no addresses, and writes to no views of another dtype."""
        return self.update(key_states, value_states)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, again: bool) -> None:
        assert self.storage is not None
        self.storage.append(key_states, value_states, again)

    def _returned(self, count: int) -> int:
        """How many tokens the queries of the last ``count`` may see."""
        return self.get_seq_length()

    def _packed(self, count: int) -> tuple[PackedTensor, PackedTensor]:
        assert self.storage is not None
        keys, key_norms, groups, steps = self.storage.keys
        values, value_norms, *_ = self.storage.values
        assert key_norms is not None
        assert value_norms is not None
        codec, first = self.storage.codec, self.storage.stop - count
        how = (codec.rotation, codec.centroids, codec.rotation_kind, self.dtype, first, count)
        packed = PackedTensor(keys, key_norms, *how, groups, steps, codec.key_scales), PackedTensor(values, value_norms, *how)
        packed[0].operands = self.storage.operands
        return packed

    def _come_home(self, states: torch.Tensor) -> None:
        """Bring storage that was loaded or offloaded to the device where the layer computes."""
        assert self.storage is not None
        self.dtype, self.device = states.dtype, states.device
        self.storage.move(self.device)

    # What there is

    @property
    def codec(self) -> TQ4Codec:
        """What reads the storage."""
        assert self.storage is not None
        return self.storage.codec

    @property
    def is_initialized(self) -> bool:
        """Whether there is storage."""
        return self.storage is not None

    @property
    def keys(self) -> PackedTensor | None:
        """The keys that are kept, ``[B, H_kv, n, D]``, in 4 bits."""
        return None if self.storage is None else self._packed(len(self.storage))[0]

    @property
    def values(self) -> PackedTensor | None:
        """The values that are kept, ``[B, H_kv, n, D]``, in 4 bits."""
        return None if self.storage is None else self._packed(len(self.storage))[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, with its room for more tokens."""
        return 0 if self.storage is None else self.storage.nbytes

    @property
    def _kept(self) -> int:
        """Tokens that later calls can see."""
        return self.get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return 0 if self.storage is None else len(self.storage)

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next call of ``query_length`` tokens returns, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    # What changes it

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        self.storage = None

    def export(self) -> tuple[TQ4Tensor | TQ4Keys, TQ4Tensor, int]:
        """Keys and values ``[B, H_kv, n, D]`` that later calls can see, and how many tokens there were."""
        assert self.storage is not None
        keys, values = self.storage.last(self._kept)
        packed: Any = TQ4Keys(*keys) if self.key_offsets else TQ4Tensor(*keys[:2])  # type: ignore[arg-type]
        return packed, TQ4Tensor(*values[:2]), self.get_seq_length()  # type: ignore[arg-type]

    def restore(self, keys: TQ4Tensor | TQ4Keys, values: TQ4Tensor, dtype: torch.dtype, length: int) -> None:
        """Take over keys and values ``[B, H_kv, n, D]`` that are what is left of ``length`` tokens."""
        self.dtype = dtype
        codec = codec_for(values.head_dim, self.seed, values.device, self.key_scales)
        self.storage = PackedStorage(codec, values.norms.shape[0], values.norms.shape[1], self.key_offsets)
        self.storage.put(keys, values)

    def crop(self, tokensto_remove: int) -> None:
        """Remove the last ``-tokensto_remove`` tokens, or all beyond the first ``tokensto_remove`` if that is positive."""
        if self.storage is not None:
            self.storage.remove_last(to_remove(tokensto_remove, self.get_seq_length()))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace sequence i by sequence ``beam_idx[i]``."""
        if self.storage is not None:
            self.storage.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences of an index, int64 ``[n]``, or of a mask, bool ``[B]``."""
        if self.storage is not None:
            sequences = torch.arange(self.storage.buffer.shape[0], device="cpu")
            self.storage.select(sequences[torch.as_tensor(indices, device="cpu")])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, one behind the other."""
        if self.storage is not None:
            sequences = torch.arange(self.storage.buffer.shape[0], device=self.storage.device)
            self.storage.select(sequences.repeat_interleave(repeats))

    def offload(self) -> None:
        """Move the storage to the CPU."""
        if self.storage is not None:
            self.storage.move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the storage back to where the layer computes."""
        if self.storage is None or self.storage.device == self.device:
            return
        self.storage.move(self.device)
        if self.device.type == "cuda":  # this may run on a stream that would use the memory again before attention has read it
            self.storage.buffer.record_stream(torch.cuda.default_stream(self.device))


class PackedSlidingLayer(PackedLayer):
    """A layer whose queries see the last ``window`` tokens, themselves included; it keeps one token less than that.

    Args:
        window: a sliding window, or the size of an attention chunk.
        index, seed, options: as for :class:`PackedLayer`.
    """

    is_sliding = True

    window: int

    def __init__(self, index: int, window: int, *, seed: int, **options: Any) -> None:
        super().__init__(index, seed=seed, **options)
        self.window = window
        self.length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep tokens that left the window until the next ``crop``, so that it can bring them back."""
        self.record_past = True

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, again: bool) -> None:
        assert self.storage is not None
        if not self.record_past:
            self.storage.keep_last(self.window - 1)
            # Of a long call only the end is kept, so only the end is compressed, if the call itself sees exact states.
            if self.length == 0 and self.exact_prefill:
                tokens = slice(-min(self.window - 1, key_states.shape[2]) or key_states.shape[2], None)
                if self.key_offsets:  # groups are counted from the first token
                    tokens = slice((tokens.start % key_states.shape[2]) // GROUP * GROUP, None)
                self.length += key_states.shape[2]
                self.storage.append(key_states[:, :, tokens], value_states[:, :, tokens])
                return
        self.length += key_states.shape[2]
        self.storage.append(key_states, value_states, again)

    def _returned(self, count: int) -> int:
        return min(self.length, self.window - 1 + count)

    @property
    def _kept(self) -> int:
        kept = min(self.length, self.window - 1)
        return kept if self.storage is None else self.storage.readable(kept)

    def get_seq_length(self) -> int:
        return self.length

    def restore(self, keys: TQ4Tensor | TQ4Keys, values: TQ4Tensor, dtype: torch.dtype, length: int) -> None:
        super().restore(keys, values, dtype, length)
        self.length = length

    def get_max_length(self) -> int:
        """The window."""
        return self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = min(self.length, self.window - 1)  # not with the rest of their group: layers of all kinds share a mask
        return kept + query_length, self.length - kept

    def reset(self) -> None:
        super().reset()
        self.length = 0

    def crop(self, tokensto_remove: int) -> None:
        """As :meth:`PackedLayer.crop`.

        Raises:
            RuntimeError: tokens left the window that are needed again; call ``activate_past_recording`` before.
        """
        if self.storage is None:
            return
        count = to_remove(tokensto_remove, self.length)
        kept = min(self.length - count, self.window - 1)
        if len(self.storage) - count < kept:
            raise RuntimeError(
                f"layer {self.index}: cannot remove {count} tokens, for those that the window of {self.window} would "
                "show again are gone; call activate_past_recording() on the cache before"
            )
        self.storage.remove_last(count)
        self.storage.keep_last(self.window - 1)
        self.length -= count


def to_remove(tokensto_remove: int, length: int) -> int:
    """How many of ``length`` tokens ``crop`` is asked to remove: by a negative number, or by the positive length to keep."""
    tokensto_remove = int(tokensto_remove)  # some releases pass a tensor
    return max(0, length - tokensto_remove) if tokensto_remove > 0 else min(-tokensto_remove, length)
