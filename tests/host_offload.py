"""vLLM's offloading of blocks to host memory where there is no GPU: its own connectors with copies written in Python.

vLLM decides which blocks go when and where, what bytes a block has, and when a request waits for them; the copies are ours,
which vLLM has for GPUs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostOffloadingSpec(CPUOffloadingSpec):
    """For ``OffloadingConnector``: ``{"spec_name": "HostOffloadingSpec", "spec_module_path": "host_offload", ...}``."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            assert self.blocks_per_chunk == 1
            self._worker = HostWorker(kv_caches, self.num_chunks)  # type: ignore[assignment]
        return self._worker  # type: ignore[return-value]


class HostWorker(OffloadingWorker):
    """Copies the pages of blocks at once; ``moved`` counts bytes."""

    moved: tuple[int, int] = (0, 0)  # stored, loaded; of all workers, for tests

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self.there = [one.tensor for one in kv_caches.tensors]
        self.here = [torch.zeros(chunks, one.page_size_bytes, dtype=torch.int8) for one in kv_caches.tensors]
        self.refs = kv_caches.group_data_refs
        self.finished: list[TransferResult] = []

    def _pages(self, blocks: GPULoadStoreSpec, chunks: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        place = 0
        for refs, count in zip(self.refs, blocks.group_sizes, strict=True):
            for block, chunk in zip(blocks.block_ids[place:][:count], chunks.block_ids[place:][:count], strict=True):
                for ref in refs:
                    own = slice(0, ref.page_size_bytes)
                    yield self.there[ref.tensor_idx][int(block)][own], self.here[ref.tensor_idx][int(chunk)][own]
            place += count

    def _done(self, job_id: int, size: int) -> bool:
        self.finished.append(TransferResult(job_id=job_id, success=True, transfer_size=size, transfer_time=1e-3))
        return True

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        size = 0
        for there, here in self._pages(src_spec, dst_spec):
            here.copy_(there)
            size += here.nbytes
        HostWorker.moved = (HostWorker.moved[0] + size, HostWorker.moved[1])
        return self._done(job_id, size)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec, expedited: bool = False) -> bool:
        size = 0
        for there, here in self._pages(dst_spec, src_spec):
            there.copy_(here)
            size += here.nbytes
        HostWorker.moved = (HostWorker.moved[0], HostWorker.moved[1] + size)
        return self._done(job_id, size)

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""


class _Stream:
    def __init__(self, priority: int = 0) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    def record(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class HostCopies:
    """For ``SimpleCPUOffloadConnector``, in place of vLLM's ``DmaCopyBackend``."""

    def init(self, gpu_caches: dict[str, torch.Tensor], cpu_caches: dict[str, torch.Tensor], *_: object) -> None:
        self.pairs = [(there, cpu_caches[name]) for name, there in gpu_caches.items()]

    def launch_copy(
        self, src_blocks: list[int], dst_blocks: list[int], is_store: bool, event_idx: int, events_list: list[Any], **_: object
    ) -> None:
        for pair in self.pairs:
            source, target = pair if is_store else pair[::-1]
            for src, dst in zip(src_blocks, dst_blocks, strict=True):
                target[dst].copy_(source[src])
        size = len(src_blocks) * sum(there.stride(0) for there, _ in self.pairs)
        stored, loaded = HostWorker.moved
        HostWorker.moved = (stored + size, loaded) if is_store else (stored, loaded + size)
        events_list.append((event_idx, _Event()))

    def shutdown(self) -> None: ...


class TorchWithoutGPU:
    """``torch`` as vLLM's worker of that connector uses it, without a GPU."""

    cuda = SimpleNamespace(Stream=_Stream, current_stream=lambda: None)
    Event = _Event

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
