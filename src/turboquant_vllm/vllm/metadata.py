"""What attention needs to know of a step: made once a step by the builder, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.vllm.batch import Kind, Run, plan_runs
from turboquant_vllm.vllm.dense import DenseLayer
from turboquant_vllm.vllm.layer import PagedLayer, codec_for, place_of
from turboquant_vllm.vllm.previous import PreviousSlots
from turboquant_vllm.vllm.scales import use_key_scales

__all__ = ["TQ4Metadata", "TQ4MetadataBuilder"]


@dataclass  # not frozen: for layers that share a cache, vLLM fills in a subclass field by field
class TQ4Metadata(AttentionMetadata):
    """A step's sequences, in runs that are served alike.

    Attributes:
        runs: of all sequences.
        previous_slots: int64, of the step's tokens or more: the slot of the token before each, where keys have offsets.
    """

    runs: list[Run]
    previous_slots: torch.Tensor | None = None


class TQ4MetadataBuilder(AttentionMetadataBuilder[TQ4Metadata]):
    """Makes :class:`TQ4Metadata`. Graphs may be captured of decoding, and of verifying drafts of one length.

    Kernels find lengths, pages and query tokens in vLLM's persistent tensors, and take any number of query tokens, so what
    is captured is right for whatever these hold at a replay.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        layers = [context[name].impl.layer for name in layer_names]
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._previous_slots: PreviousSlots | None = None
        self._is_dense = isinstance(layers[0], DenseLayer)
        if not self._is_dense:
            self._prepare_packed(kv_cache_spec, dict(zip(layer_names, layers, strict=True)))

    def _prepare_packed(self, spec: AttentionSpec, layers: dict[str, PagedLayer]) -> None:
        """Check the cache of layers in 4 bits, and make what they need before any graph is captured."""
        names, key_offsets = list(layers), next(iter(layers.values())).key_offsets
        expected = place_of(spec.head_size, key_offsets)
        if (spec.tokens_per_state, spec.state_content_bytes) != expected:
            raise ValueError(
                f"the cache of {names} must have {expected[1]} bytes for {expected[0]} tokens of a head, got "
                f"{spec.state_content_size_bytes} for {spec.tokens_per_state}"
            )
        page_bytes = PagedTQ4Cache.page_bytes(spec.block_size, spec.num_kv_heads, spec.head_size, key_offsets)
        assert spec.real_page_size_bytes == page_bytes, (spec, page_bytes)
        codec_for(spec.head_size, self.device)
        if key_offsets:
            use_key_scales(names, self.vllm_config, self.device)
            self._previous_slots = PreviousSlots(_most_tokens(self.vllm_config), spec.block_size, self.device)
            self._previous_slots.warm_up()
        for layer in {layer.kind: layer for layer in layers.values()}.values():
            if self.device.type != "cpu":  # there nothing is compiled
                layer.warm_up(spec.block_size, self.vllm_config.model_config.dtype, self.device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TQ4Metadata:
        """Sort the sequences by the lengths that the host knows; nothing waits for the device."""
        step = common_attn_metadata
        _check_causal(step)
        if self._is_dense:
            return TQ4Metadata([_whole_step(step)])
        count, decode_len = step.num_reqs, self.reorder_batch_threshold
        assert decode_len is not None
        lengths = step.seq_lens_cpu_upper_bound
        if lengths is None:  # waits for the device; vLLM's runners give the bound
            lengths = step.seq_lens.cpu()
        on_host = (step.query_start_loc_cpu[: count + 1].numpy(), lengths[:count].numpy())
        return TQ4Metadata(plan_runs(*_on_device(step), *on_host, decode_len), self._find_previous_slots(step))

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> TQ4Metadata:
        """All sequences decode, whatever the lengths are that they happen to have now."""
        step = common_attn_metadata
        _check_causal(step)
        if step.max_query_len > (self.reorder_batch_threshold or 0):
            raise ValueError(
                f"graphs are captured of up to {self.reorder_batch_threshold} query tokens, got {step.max_query_len}"
            )
        return TQ4Metadata([_whole_step(step)], self._find_previous_slots(step))

    def _find_previous_slots(self, step: CommonAttentionMetadata) -> torch.Tensor | None:
        """In memory that a graph will find again, like vLLM's own; nothing waits for the device."""
        if self._previous_slots is None:
            return None
        return self._previous_slots.find(*_on_device(step), step.slot_mapping)


def _on_device(step: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of vLLM's persistent tensors, which a graph will find again: cu_seqlens_q, seq_lens, block_table."""
    count = step.num_reqs
    return step.query_start_loc[: count + 1], step.seq_lens[:count], step.block_table_tensor[:count]


def _whole_step(step: CommonAttentionMetadata) -> Run:
    """All of its sequences as one run, with nothing for the host to know."""
    cu_seqlens_q, seq_lens, block_table = _on_device(step)
    return Run(
        kind=Kind.DECODE,
        tokens=slice(0, step.num_actual_tokens),
        block_table=block_table,
        seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        max_query_len=step.max_query_len,
        max_seq_len=step.max_seq_len,
    )


def _most_tokens(config: VllmConfig) -> int:
    """Tokens that a step may have; those of drafts that are made all at once come on top of the scheduler's."""
    scheduler, drafts = config.scheduler_config, config.speculative_config
    count = 0 if drafts is None else drafts.num_speculative_tokens or 0
    return scheduler.max_num_batched_tokens + scheduler.max_num_seqs * (count + 1)


def _check_causal(step: CommonAttentionMetadata) -> None:
    if isinstance(step.causal, torch.Tensor) or not step.causal:
        raise ValueError("the TQ4 backend attends causally, got a step that does not")
