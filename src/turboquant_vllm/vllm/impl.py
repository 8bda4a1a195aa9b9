"""The layer object of the vLLM backend: vLLM's arguments to :class:`turboquant_vllm.vllm.layer.PagedLayer`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import CompilationConfig, VllmConfig, get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from turboquant_vllm.vllm import CACHE_DTYPE
from turboquant_vllm.vllm.dense import DenseLayer
from turboquant_vllm.vllm.flash import choose_dense, choose_exact
from turboquant_vllm.vllm.layer import PagedLayer
from turboquant_vllm.vllm.metadata import TQ4Metadata
from turboquant_vllm.vllm.options import Options
from turboquant_vllm.vllm.scales import check_folder

__all__ = ["Settings", "TQ4Impl", "current_settings", "latest_impls"]


@dataclass(frozen=True)
class Settings:
    """What the backend takes from vLLM's configuration.

    Attributes:
        options: the plugin's own.
        leaves_dense: some layers are left dense by number or by window. Their cache dtype is "auto", all others' is "tq4".
    """

    options: Options
    leaves_dense: bool = False

    @classmethod
    def read(cls, config: VllmConfig) -> Settings:
        """Those of a configuration.

        Raises:
            TypeError, ValueError: an option is none, or layers are to be skipped that cannot be told from others.
        """
        options, cache_config = Options.read(config.additional_config), config.cache_config
        skipped = getattr(cache_config, "kv_cache_dtype_skip_layers", None)
        if not skipped:
            return cls(options)
        if cache_config.cache_dtype != CACHE_DTYPE:
            raise ValueError(
                f"kv_cache_dtype_skip_layers {', '.join(skipped)} must come with --kv-cache-dtype tq4 (vLLM 0.33 and "
                f"later), or the layers cannot be told from others; got {cache_config.cache_dtype}"
            )
        return cls(options, leaves_dense=True)


_latest = Settings(Options())
_latest_model: weakref.ref[CompilationConfig] | None = None  # has the layers of the model that was made last


def current_settings() -> Settings:
    """Those of vLLM's configuration; where it has set none, of the last layer: vLLM asks for a layer's cache without any."""
    config = get_current_vllm_config_or_none()
    return _latest if config is None else Settings.read(config)


def latest_impls() -> list[TQ4Impl]:
    """The layers of the model that was made last in this process, its drafts' among them."""
    model = None if _latest_model is None else _latest_model()
    impls = [] if model is None else [getattr(layer, "impl", None) for layer in model.static_forward_context.values()]
    return [impl for impl in impls if isinstance(impl, TQ4Impl)]


class TQ4Impl(AttentionImpl[TQ4Metadata]):
    """Attention of one layer of a vLLM model over a cache in 4 bits per coordinate."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise ValueError("the TQ4 backend has no ALiBi, got alibi_slopes")
        if attn_type != AttentionType.DECODER:
            raise ValueError(f"the TQ4 backend serves decoders, got attention of type {attn_type}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.shares_cache = kv_sharing_target_layer_name is not None
        softcap = logits_soft_cap or None  # vLLM writes 0 for none
        config = get_current_vllm_config_or_none()
        settings = Settings(Options()) if config is None else Settings.read(config)
        global _latest, _latest_model
        _latest, _latest_model = settings, None if config is None else weakref.ref(config.compilation_config)
        options = settings.options
        masks: dict[str, Any] = {"sliding_window": sliding_window, "softcap": softcap, "sinks": sinks}
        sizes = (num_heads, self.num_kv_heads, head_size, self.scale)
        self.layer: PagedLayer | DenseLayer
        if settings.leaves_dense and self.shares_cache:
            raise ValueError(
                "no layer can be left dense where layers share caches: vLLM groups those of one page size only; got "
                f"a layer that reads the cache of {kv_sharing_target_layer_name}, and --kv-cache-dtype-skip-layers"
            )
        if settings.leaves_dense and config is not None and getattr(config.model_config, "is_hybrid", False):
            raise ValueError(
                "no layer can be left dense beside recurrent states: vLLM makes all their pages as large as dense ones, got "
                "--kv-cache-dtype-skip-layers"
            )
        if settings.leaves_dense and kv_cache_dtype == "auto":
            self.layer = DenseLayer(*sizes, **masks, ops=choose_dense(head_size, sinks is not None))
        else:
            exact = choose_exact(head_size, sinks is not None) if options.exact_prefill else None
            self.layer = PagedLayer(*sizes, **masks, exact=exact, key_offsets=options.key_offsets)
            if options.key_offsets and config is not None:
                check_folder(config.model_config)
        self._max_seqs = 1 if config is None else config.scheduler_config.max_num_seqs

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Compress keys and values into their slots outside of :meth:`forward`, as models that draft ask for some."""
        if kv_cache.numel():
            self.layer.store(key, value, kv_cache, slot_mapping, _previous_slots(layer))

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TQ4Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the step's keys and values, and attend to all of its tokens into ``output``."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the TQ4 backend does not quantize its output, got output_scale")
        if attn_metadata is None:  # vLLM measures memory: the scratch of a real step must be part of it
            torch.empty(self.layer.scratch_bytes(query.shape[0], self._max_seqs), dtype=torch.uint8, device=query.device)
            return output.zero_()
        shape: tuple[Any, ...] = (query.shape[0], self.num_heads, self.head_size)
        # A layer that reads another's cache must see what that layer has stored.
        own, slots = (None, None) if self.shares_cache or not kv_cache.numel() else (key, _slot_mapping(layer))
        where = {"slot_mapping": slots, "previous_slots": attn_metadata.previous_slots}
        self.layer.attend(query.view(shape), own, value, kv_cache, attn_metadata.runs, output.view(shape), **where)
        return output


def _slot_mapping(layer: Any) -> torch.Tensor | None:
    """The step's, which a graph will find again; None where nothing is to be stored."""
    if not is_forward_context_available():
        return None
    mappings = get_forward_context().slot_mapping
    if isinstance(mappings, list):  # of microbatches, as below
        mappings = mappings[0]
    return mappings.get(layer.layer_name)


def _previous_slots(layer: Any) -> torch.Tensor | None:
    """The step's, of the metadata that the layer will get; None outside of steps."""
    if not is_forward_context_available():
        return None
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):  # of microbatches, whose first is the one that is no draft's
        metadata = metadata[0]
    own = metadata.get(layer.layer_name) if isinstance(metadata, dict) else metadata
    return own.previous_slots if isinstance(own, TQ4Metadata) else None
