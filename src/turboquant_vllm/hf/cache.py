"""TurboQuantCache and TurboQuantStaticCache: caches for transformers that keep keys and values in 4 bits per coordinate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from turboquant_vllm.checks import check_count, check_flag, check_seed
from turboquant_vllm.hf.files import fill_layers, read_cache, write_cache
from turboquant_vllm.hf.layers import PackedLayer
from turboquant_vllm.hf.packing import warn_if_all_dense, why_dense
from turboquant_vllm.hf.recurrent import forget_states, growing_layer, static_layer
from turboquant_vllm.hf.scales import KeyScales, key_scales_for, split_model
from turboquant_vllm.hf.static import PagedLayer

__all__ = ["TurboQuantCache", "TurboQuantStaticCache"]


_LONGEST = 2**31 - 64  # lengths are 32-bit numbers, also rounded up to pages
# Models whose masks show what is behind the window that their configuration names: pages, which hold more, would be seen.
_MASKS_WITHOUT_WINDOWS = ("moshi",)


class _SavedCache:
    """What both caches offer beside transformers' methods."""

    layers: list[Any]
    seed: int

    def __init__(self, config: Any, **options: Any) -> None:
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write keys and values of all layers to a safetensors file, packed where they are packed, with a checksum; and the
        states of linear attention.

        Raises:
            ValueError: a layer holds something else, such as indexed attention's keys.
            OSError: the file cannot be written; what stood at ``path`` before stands there still.
        """
        write_cache(path, self.layers, self.seed)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any, *, device: torch.device | str = "cpu", **options: Any) -> Self:
        """A cache with the contents of a file of :meth:`save`.

        Args:
            path: the file.
            config: of the model that filled the cache, or the model.
            device: of layers that are kept dense. Packed ones are read into the CPU's memory, and each moves to the device
                of its layer when it is used.
            options: further arguments of the class; seed, skip_layers and key scales are those of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not such a file, another version, a wrong checksum, or the cache of another kind of model.
        """
        check_config(split_model(config)[0])
        seed, descriptions, tensors = read_cache(path)
        expected = len(DynamicCache(config=split_model(config)[0]).layers)
        if len(descriptions) != expected:
            raise ValueError(f"{path}: expected {expected} layers, got {len(descriptions)}")
        skipped = [index for index, layer in enumerate(descriptions) if layer.get("kind") == "dense"]
        if packed := [layer for layer in descriptions if layer.get("kind") == "packed" and layer.get("length")]:
            options = {"key_offsets": any(layer.get("offsets") for layer in packed), "key_scales": {}, **options}
        cache = cls(config, **{**options, "seed": seed, "skip_layers": skipped})
        fill_layers(path, cache.layers, seed, descriptions, tensors, device)
        return cache

    @property
    def packed_layers(self) -> list[int]:
        """The layers that are kept in 4 bits."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, (PackedLayer, PagedLayer))]

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values of all layers take, packed or dense."""
        return sum(layer_bytes(layer) for layer in self.layers)


class TurboQuantCache(_SavedCache, DynamicCache):
    """A growing cache in 4 bits: ``model.generate(..., cache=TurboQuantCache(model.config))``.

    It serves every attention implementation of transformers. With ``attn_implementation="tq4"`` (see
    :func:`turboquant_vllm.hf.register`) attention reads the codes; others get the vectors decompressed, layer by layer.

    Layers with full, sliding-window or chunked attention are packed; what they have of a recurrent state beside it stays exact.
    Others (linear attention, indexed attention, layers that share another's cache, all layers of models with multi-head latent
    attention) are transformers' own, and dense; if that is all layers, a UserWarning says why.

    Args:
        config: of the model, ``model.config``; or the model itself, whose weights then give the key scales that no file has.
        seed: of the rotations, a non-negative int.
        skip_layers: layers to keep dense; negative numbers count from the end.
        exact_prefill: the tokens of the first call see one another exactly, as their keys and values are at hand then; all
            later calls see every token in 4 bits. With False the first call does, too, and cutting a prompt into
            chunks changes nothing.
        key_offsets: keep keys around offsets that groups of 64 tokens share, and one outlying key of each group in 8 bits: what
            pretrained models need (:mod:`turboquant_vllm.reference_keys`), for 4 bytes more a token and head at head_dim 128.
            False: plain TQ4.
        key_scales: with offsets, the channel scales of keys: ``[H_kv, D]`` by layer (others have ones), or the path of a file
            of ``turboquant calibrate``. None: those of "turboquant.safetensors" in the folder that the model came from, else
            from the weights, which are read once, of the model or of that folder; else ones, which the log says.
        offloading, offload_only_non_sliding: as for ``DynamicCache``: keep all layers but the current one on the CPU.

    Raises:
        TypeError, ValueError: ``config`` is none, ``skip_layers`` or ``seed`` is out of range, the model's attention is
            "flex_attention", or key scales are another model's.
    """

    def __init__(
        self,
        config: Any,
        *,
        seed: int = 0,
        skip_layers: Iterable[int] = (),
        exact_prefill: bool = True,
        key_offsets: bool = True,
        key_scales: KeyScales | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        config, model = split_model(config)
        check_config(config)
        check_seed(seed)
        check_flag("exact_prefill", exact_prefill)
        DynamicCache.__init__(self, config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.seed = seed
        skipped = check_layers("skip_layers", skip_layers, len(self.layers))
        reasons = why_dense(config)
        warn_if_all_dense(reasons, type(self).__name__)
        scales = _scales(config, model, key_offsets, key_scales, reasons)
        for index, reason in enumerate(reasons):
            if reason or index in skipped:
                continue
            self.layers[index] = growing_layer(
                self.layers[index], index, seed=seed, exact_prefill=exact_prefill, key_offsets=key_offsets,
                key_scales=scales.get(index),
            )  # fmt: skip

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer) and layer.get_seq_length():
                # Releases before 5.23 fill a dense layer with zeros and leave it as long as it was.
                layer.keys = layer.values = None
                layer.is_initialized = False
            forget_states(layer)  # of linear attention, which transformers fills with zeros


class TurboQuantStaticCache(_SavedCache, StaticCache):
    """A cache of fixed size in 4 bits, for compiled generation: ``TurboQuantStaticCache(model.config, max_cache_len=4096)``.

    Its tensors stay where they are and its lengths are on the device, so ``generate`` compiles the model with it, into CUDA
    graphs. Layers with a sliding window have room for little more than the window.

    Args:
        config: as for :class:`TurboQuantCache`.
        max_cache_len: tokens that fit, prompt and continuation together; rounded up to a multiple of 64.
        seed, skip_layers, exact_prefill, key_offsets, key_scales: as for :class:`TurboQuantCache`.

    Raises:
        TypeError, ValueError: as for :class:`TurboQuantCache`; ``max_cache_len`` is out of range; the model has an encoder, or
            masks without the window that its configuration names.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        *,
        seed: int = 0,
        skip_layers: Iterable[int] = (),
        exact_prefill: bool = True,
        key_offsets: bool = True,
        key_scales: KeyScales | None = None,
    ) -> None:
        config, model = split_model(config)
        check_config(config)
        check_count("max_cache_len", max_cache_len, 1, _LONGEST)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                "config: expected a model without an encoder for a cache of fixed size (cross-attention would see places that "
                "are not in use), got is_encoder_decoder=True; EncoderDecoderCache(TurboQuantCache(config), ...) works"
            )
        kind = config.get_text_config(decoder=True).model_type
        if kind in _MASKS_WITHOUT_WINDOWS:
            raise ValueError(
                "config: expected a model whose masks hide what its sliding window does for a cache of fixed size, got "
                f"model_type {kind}; TurboQuantCache works"
            )
        check_seed(seed)
        check_flag("exact_prefill", exact_prefill)
        StaticCache.__init__(self, config=config, max_cache_len=max_cache_len)
        self.seed = seed
        skipped = check_layers("skip_layers", skip_layers, len(self.layers))
        reasons = why_dense(config)
        warn_if_all_dense(reasons, type(self).__name__)
        scales = _scales(config, model, key_offsets, key_scales, reasons)
        for index, (reason, like) in enumerate(zip(reasons, DynamicCache(config=config).layers, strict=True)):
            if reason:
                continue
            options: dict[str, Any] = {"packed": index not in skipped, "exact_prefill": exact_prefill}
            if options["packed"]:
                options |= {"seed": seed, "key_offsets": key_offsets, "key_scales": scales.get(index)}
            self.layers[index] = static_layer(like, index, max_cache_len, **options)


def _scales(
    config: Any, model: Any, key_offsets: bool, key_scales: KeyScales | None, reasons: list[Any]
) -> Mapping[int, torch.Tensor]:
    """Key scales by layer, of a cache some of whose layers are packed."""
    check_flag("key_offsets", key_offsets)
    if not key_offsets:
        if key_scales:
            raise ValueError("key_scales must come with key_offsets=True, got False")
        return {}
    return {} if all(reasons) else key_scales_for(config, model, key_scales)


def check_config(config: Any) -> None:
    """``config`` must be a model's configuration, whose attention takes packed keys and values.

    Flex attention compiles its own reading of them, so for it they must be ordinary tensors.
    """
    if not hasattr(config, "get_text_config"):
        hint = ": pass model.config" if hasattr(config, "config") else ""
        raise TypeError(f"config must be a model's configuration, got {type(config).__name__}{hint}")
    if getattr(config.get_text_config(decoder=True), "_attn_implementation", None) == "flex_attention":
        raise ValueError('attn_implementation: expected one that takes packed keys and values, such as "tq4" or "sdpa", got '
                         '"flex_attention"')  # fmt: skip


def layer_bytes(layer: Any) -> int:
    """Bytes of the keys and values of a layer, packed or dense."""
    if isinstance(layer, (PackedLayer, PagedLayer)):
        return layer.nbytes
    return sum(x.nbytes for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None)


def check_layers(name: str, layers: Iterable[int], count: int) -> set[int]:
    """Numbers of layers from 0 to ``count - 1``; negative ones count from the end."""
    found = set()
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{name} must hold ints, got {type(index).__name__}")
        if not -count <= index < count:
            raise ValueError(f"{name} must hold numbers from {-count} to {count - 1}, got {index}")
        found.add(index % count)
    return found
