"""Layers that have attention and a recurrent state side by side (Falcon-H1, Zamba2, Zaya): keys and values are packed, while
convolution and recurrent states are kept as transformers keeps them, exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from turboquant_vllm.hf.layers import PackedLayer, PackedSlidingLayer, to_remove
from turboquant_vllm.hf.static import DenseStaticLayer, PagedLayer

__all__ = ["fill_states", "forget_states", "growing_layer", "recurrent_states", "state_names", "static_layer"]


class _RecurrentStates(LinearAttentionLayer):
    """The states, in front of a class of attention among the bases of a layer.

    Args:
        number_of_states: convolution states, and recurrent ones at most, that the layer has.
        args, options: of the attention's class.
    """

    index: int

    def __init__(self, *args: Any, number_of_states: int, **options: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self._attention.__init__(*args, **options)

    @property
    def _attention(self) -> Any:
        """What comes behind: this layer as a class of attention has it."""
        return super(LinearAttentionCacheLayerMixin, self)

    def __repr__(self) -> str:
        return str(self._attention.__repr__())

    def lazy_initialization(self, *states: torch.Tensor, **kwargs: Any) -> None:
        """Keys and values come by position, convolution and recurrent states by name."""
        if states:
            self._attention.lazy_initialization(*states)
        else:
            super().lazy_initialization(**kwargs)

    @property
    def is_croppable(self) -> bool:
        """Whether there is a convolution state and no recurrent one, which cannot be taken back."""
        return any(self.is_conv_states_initialized.values()) and not any(self.is_recurrent_states_initialized.values())

    @property
    def is_compileable(self) -> bool:
        """Whether shapes stay as they are; a growing layer says no."""
        return not self.record_past

    def get_max_length(self) -> int:
        return int(self._attention.get_max_length())

    def reset(self) -> None:
        super().reset()
        self._attention.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """As the attention's own.

        Raises:
            RuntimeError: there is a recurrent state; or past states of the convolution are gone: call
                ``activate_past_recording`` on the cache before.
        """
        count = to_remove(tokens_to_remove, int(self._attention.get_seq_length()))
        if count and any(self.is_recurrent_states_initialized.values()):
            raise RuntimeError(f"layer {self.index}: cannot remove {count} tokens from a recurrent state")
        if (count or self.record_past) and any(self.is_conv_states_initialized.values()):
            super().crop(-count)
        self._attention.crop(-count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace sequence i by sequence ``beam_idx[i]``."""
        self._attention.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences of an index, int64 ``[n]``, or of a mask, bool ``[B]``."""
        self._attention.batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, one behind the other."""
        self._attention.batch_repeat_interleave(repeats)
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: x.repeat_interleave(repeats, 0) for i, x in states.items() if x is not None})

    def _select(self, sequences: torch.Tensor) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for i, x in states.items():
                if x is None:
                    continue
                chosen = x[torch.as_tensor(sequences, device=x.device)]
                if chosen.shape == x.shape:
                    x.copy_(chosen)  # CUDA graphs know its address
                else:
                    states[i] = chosen

    def offload(self) -> None:
        """Move keys and values to the CPU; the states, which are small, stay: not only ``update`` reads them."""
        self._attention.offload()

    def prefetch(self) -> None:
        """Move keys and values back."""
        self._attention.prefetch()


class _PackedRecurrentLayer(_RecurrentStates, PackedLayer):  # type: ignore[override]
    is_compileable = False


class _PackedSlidingRecurrentLayer(_RecurrentStates, PackedSlidingLayer):  # type: ignore[override]
    is_compileable = False


class _PagedRecurrentLayer(_RecurrentStates, PagedLayer):  # type: ignore[override]
    pass


class _DenseStaticRecurrentLayer(_RecurrentStates, DenseStaticLayer):
    pass


def growing_layer(like: Any, index: int, **options: Any) -> PackedLayer:
    """A layer that packs what transformers' layer ``like`` of a growing cache keeps dense."""
    window, states = _of(like)
    if window is None:
        return _PackedRecurrentLayer(index, **states, **options) if states else PackedLayer(index, **options)
    kind = _PackedSlidingRecurrentLayer if states else PackedSlidingLayer
    return kind(index, window, **states, **options)


def static_layer(like: Any, index: int, max_cache_len: int, *, packed: bool, **options: Any) -> PagedLayer | DenseStaticLayer:
    """A layer of a cache of fixed size for what ``like`` keeps in a growing one."""
    window, states = _of(like)
    if packed:
        kind: Any = _PagedRecurrentLayer if states else PagedLayer
    else:
        kind = _DenseStaticRecurrentLayer if states else DenseStaticLayer
    layer: PagedLayer | DenseStaticLayer = kind(index, max_cache_len, window=window, **states, **options)
    return layer


def _of(like: Any) -> tuple[int | None, dict[str, int]]:
    """The window of a layer, and what its states are made of if it has any."""
    states = {"number_of_states": like.number_of_states} if isinstance(like, LinearAttentionCacheLayerMixin) else {}
    return getattr(like, "sliding_window", None), states


def state_names(layer: Any) -> list[str]:
    """Names of all that a layer may hold beside keys and values."""
    has_states = isinstance(layer, LinearAttentionCacheLayerMixin)
    return [f"{kind}.{i}" for i in range(layer.number_of_states) for kind in ("conv", "recurrent")] if has_states else []


def recurrent_states(layer: Any) -> dict[str, torch.Tensor]:
    """What a layer holds beside keys and values, by :func:`state_names`."""
    found: dict[str, torch.Tensor] = {}
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for i in (i for i, is_there in layer.has_previous_state.items() if is_there):
            if (conv := layer.conv_states[i]) is not None:
                found[f"conv.{i}"] = conv[..., -layer.conv_kernel_size[i] :]  # a layer that records its past has more
            if (state := layer.recurrent_states[i]) is not None:
                found[f"recurrent.{i}"] = state
    return found


def fill_states(layer: Any, states: dict[str, torch.Tensor]) -> None:
    """Give a new layer what :func:`recurrent_states` found in another one."""
    for name, x in states.items():
        kind, _, i = name.partition(".")
        (layer.update_conv_state if kind == "conv" else layer.update_recurrent_state)(x, int(i))


def forget_states(layer: Any) -> None:
    """Forget the states of a layer, and for how many sequences they were."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for i in range(layer.number_of_states):
            layer.conv_states[i] = layer.recurrent_states[i] = None
            layer.is_conv_states_initialized[i] = layer.is_recurrent_states_initialized[i] = False
            layer.has_previous_state[i] = False
