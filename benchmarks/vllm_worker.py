"""One vLLM engine with one cache type: started by ``vllm_serving.py``, times whole engine steps of the cases it is told.

Prints one JSON object a line: ``{"ready": ...}`` once the engine is there, then one for each case that is named in a line on
standard input: its value, or what went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

# At the end: a file here must not be taken for a package of the same name. Processes that vLLM starts have the same path.
sys.path.append(str(Path(__file__).parent))

from vllm_profile import EXTENSION, host_times

CACHES: dict[str, dict[str, Any]] = {
    "tq4": {"attention_backend": "CUSTOM"},
    "tq4_plain": {"attention_backend": "CUSTOM", "additional_config": {"turboquant": {"key_offsets": False}}},
    "bf16": {"attention_backend": "FLASH_ATTN"},
    "fp8": {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
    "int4_per_token_head": {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "int4_per_token_head"},
    "turboquant_4bit_nc": {"kv_cache_dtype": "turboquant_4bit_nc"},
}
# id: requests, tokens of context.
DECODE = {"b32-8k": (32, 8192), "b1-32k": (1, 32768), "b8-32k": (8, 32768), "short-32": (32, 1024), "short-1": (1, 1024)}
TTFT, CAPACITY = {"ttft": 16384, "ttft-32k": 32768}, (256, 8192)  # prompts are read in chunks of CHUNK
TRACES = {"trace-1": "short-1", "trace-32": "b32-8k"}
HOSTS = {"host-1": "short-1", "host-32k": "b1-32k", "host-32": "short-32"}
SERVED = "capacity-served"  # the engine in a process of its own, as vLLM has it unless told otherwise
CASES = [*DECODE, *TTFT, *TRACES, *HOSTS, "capacity", SERVED]  # what matters most comes first
CHUNK = 8192
STRETCH, WARMUP_STEPS = 8, 6
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 96, 104, 112, 128, 160, 192, 208, 224, 256]
VOCABULARY = 128256
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCABULARY, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def check_answer(key_offsets: bool) -> float:
    """Attention of one layer as the plugin calls it, a decode and a prompt, against the definition; the largest error."""
    from turboquant_vllm import reference
    from turboquant_vllm.records import NO_TABLES, Masks, Operand
    from turboquant_vllm.vllm.batch import plan_runs
    from turboquant_vllm.vllm.flash import choose_exact
    from turboquant_vllm.vllm.layer import PagedLayer, place_of
    from turboquant_vllm.vllm.previous import PreviousSlots

    device, lengths = torch.device("cuda" if torch.cuda.is_available() else "cpu"), [(1, 3000), (200, 200)]
    layer = PagedLayer(32, 8, 128, 128**-0.5, exact=choose_exact(128, False), key_offsets=key_offsets)
    if key_offsets:
        layer.use_key_scales(torch.exp(0.4 * torch.randn(8, 128)), torch.empty(0, device=device).device)
    codec = layer.codec_on(torch.empty(0, device=device).device)
    count = sum(keys for _, keys in lengths)
    k, v = (torch.randn(count, 8, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(201, 32, 128, dtype=torch.bfloat16, device=device)
    tokens_of_place, width = place_of(128, key_offsets)
    page = 64
    kv_cache = torch.zeros(64, 8, page // tokens_of_place, width, dtype=torch.uint8, device=device)
    pages = torch.randperm(64, device=device).int()
    table = torch.stack([pages[:50], torch.cat([pages[50:], pages[:36]])])
    position = torch.cat([torch.arange(keys, device=device) for _, keys in lengths])
    row = torch.repeat_interleave(torch.arange(2, device=device), torch.tensor([3000, 200], device=device))
    slots = table[row, position // page].long() * page + position % page
    starts, totals = torch.tensor([0, 1, 201], dtype=torch.int32), torch.tensor([3000, 200], dtype=torch.int32)
    ends = torch.tensor([0, 3000, 3200], dtype=torch.int32, device=device)
    previous = PreviousSlots(count, page, slots.device).find(ends, totals.to(device), table, slots)
    layer.store(k, v, kv_cache, slots, previous)
    on_host = (starts.numpy(), totals.numpy())
    runs = plan_runs(starts.to(device), totals.to(device), table, *on_host, decode_len=1)
    out = torch.empty_like(q)
    layer.attend(q, torch.cat([k[2999:3000], k[3000:]]), torch.cat([v[2999:3000], v[3000:]]), kv_cache, runs, out)
    worst = 0.0
    for packed, rows, own in ((True, slice(0, 1), slice(0, 3000)), (False, slice(1, 201), slice(3000, 3200))):
        queries, keys, values = (x.transpose(0, 1)[None].float() for x in (q[rows], k[own], v[own]))
        if packed:  # in one call, so that keys with offsets are as the codec has them
            packed_keys = codec.compress_keys(keys) if key_offsets else codec.compress(keys)
            keys, values = codec.decompress(packed_keys), codec.decompress(codec.compress(values))
        expected, _ = reference.attention(queries, Operand(keys), Operand(values), NO_TABLES, layer.sm_scale, Masks(True))
        error = (out[rows].float() - expected[0].transpose(0, 1)).abs().max() / expected.abs().max()
        worst = max(worst, error.item())
    return worst


def write_scales(folder: Path, layers: int) -> None:
    """Random scales of keys, since weights are dummies: a model that is served has some."""
    from transformers import AutoConfig

    from turboquant_vllm.calibration import FILE_NAME, save_key_scales

    shape = (LLAMA["num_key_value_heads"], LLAMA["head_dim"])
    scales = {layer: torch.exp(0.4 * torch.randn(shape)) for layer in range(layers)}
    save_key_scales(folder / FILE_NAME, scales, AutoConfig.from_pretrained(folder), source="random")


class Timer:
    """Requests with random prompts in one engine, and the time of its steps."""

    def __init__(self, llm: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.engine = llm.llm_engine
        self.params = lambda tokens: SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.ids: list[str] = []
        self.step_ms: dict[str, float] = {}  # by case

    def add(self, requests: int, context: int, tokens: int) -> None:
        for _ in range(requests):
            prompt = torch.randint(10, VOCABULARY, (context,)).tolist()
            self.ids.append(
                self.engine.add_request(f"r{time.monotonic_ns()}", {"prompt_token_ids": prompt}, self.params(tokens))
            )

    def step(self) -> int:
        """One step; how many tokens came."""
        return sum(len(output.outputs[0].token_ids) for output in self.engine.step())

    def clear(self) -> None:
        self.engine.abort_request(self.ids, internal=True)
        self.ids = []
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def stretches(self) -> list[tuple[int, float]]:
        """Tokens and seconds of six stretches of steps."""
        for _ in range(WARMUP_STEPS):
            self.step()
        result = []
        for _ in range(6):
            start = time.perf_counter()
            tokens = sum(self.step() for _ in range(STRETCH))
            result.append((tokens, time.perf_counter() - start))
        return result

    def measure(self, case: str) -> dict[str, Any]:
        """The case's value, and what else is to be told of it."""
        if case in DECODE:
            self.step_ms[case] = round(self.decode_ms(*DECODE[case]), 4)
            return {"value": self.step_ms[case]}
        if case in TTFT:
            return {"value": round(self.ttft_ms(TTFT[case]), 2)}
        if case in TRACES:
            return {"value": self.trace(*DECODE[TRACES[case]])}
        if case in HOSTS:
            return {"value": self.host(HOSTS[case])}
        rate, running = self.capacity(*CAPACITY)
        found = {"value": round(rate, 1), "running": running}
        if case != SERVED:
            found["kernel_ms"] = self.profiled()[0]["kernel_ms"]
        self.clear()
        return found

    def start(self, requests: int, context: int) -> None:
        """Requests whose prompts are read."""
        self.add(requests, context, 6 * STRETCH + WARMUP_STEPS + requests + 64)
        waiting = requests
        while waiting > 0:  # steps in which prompts are read give tokens of the others, too
            self.step()
            waiting = self.unread()

    def trace(self, requests: int, context: int) -> dict[str, Any]:
        """Of a step in which all requests decode: milliseconds of its kernels, and how often each is launched that this library
        or attention needs. Its wall time with the profiler tells nothing: see the case that it is of."""
        traced = self.traced(requests, context)[0]
        return {name: traced[name] for name in ("kernel_ms", "launches", "of_attention")}

    def host(self, case: str) -> dict[str, Any]:
        """How long the GPU has nothing to do in a step of ``case``, whose wall time is taken if it has been timed already: with
        no profiler, and before one ran."""
        if case not in self.step_ms:
            self.measure(case)
        return host_times(self.step_ms[case], self.traced(*DECODE[case]))

    def traced(self, requests: int, context: int) -> list[dict[str, Any]]:
        """As :meth:`profiled`, of steps in which all requests decode."""
        self.start(requests, context)
        for _ in range(WARMUP_STEPS):
            self.step()
        ranks = self.profiled()
        self.clear()
        return ranks

    def profiled(self) -> list[dict[str, Any]]:
        """What each rank's GPU does in the next steps; in the workers, which may be other processes."""
        self.engine.collective_rpc("start_step_profile")
        try:
            for _ in range(STRETCH):
                self.step()
        finally:  # a profiler that runs on would fail the next case, too
            ranks: list[dict[str, Any]] = self.engine.collective_rpc("end_step_profile", args=(STRETCH,))
        return ranks

    def decode_ms(self, requests: int, context: int) -> float:
        """Milliseconds of a step in which all requests decode, each giving a token; the median of the stretches."""
        self.start(requests, context)
        stretches = self.stretches()
        self.clear()
        if any(tokens != requests * STRETCH for tokens, _ in stretches):
            raise RuntimeError(f"expected {requests} tokens a step, got {stretches}")
        return 1e3 * statistics.median(seconds / STRETCH for _, seconds in stretches)

    def unread(self) -> int:
        """Requests whose prompts have not been read to the end."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        reading = [request for request in scheduler.running if request.num_computed_tokens < request.num_prompt_tokens]
        return len(scheduler.waiting) + len(reading)

    def ttft_ms(self, context: int) -> float:
        """Milliseconds from a request to its first token, in an engine with nothing else to do; the median of five."""
        times = []
        for _ in range(6):
            start = time.perf_counter()
            self.add(1, context, 2)
            while not self.step():
                pass
            times.append(1e3 * (time.perf_counter() - start))
            self.clear()
        return statistics.median(times[1:])

    def capacity(self, requests: int, context: int) -> tuple[float, int]:
        """Tokens a second of as many of the requests as the cache has room for, and how many those are; they still run."""
        tokens = 10 * STRETCH + WARMUP_STEPS + 4 * -(-requests * context // 8192)
        self.add(requests, context, tokens)
        before, came = -1, 0
        while came == 0 or came != before:  # as long as prompts are read, each stretch gives more
            before, came = came, sum(self.step() for _ in range(STRETCH))
        stretches = self.stretches()  # at the edge, some may be preempted meanwhile
        running = round(statistics.median(tokens / STRETCH for tokens, _ in stretches))
        return statistics.median(tokens / seconds for tokens, seconds in stretches), running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", choices=CACHES)
    parser.add_argument("--folder", type=Path, required=True, help="for the model's config.json")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--cache-bytes", type=float, required=True)
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--tensor-parallel-size", type=int, required=True, help="above 1: the plugin must be installed")
    parser.add_argument("--core-process", type=int, default=0, help="1: the engine's core in its own; the plugin is installed")
    options = parser.parse_args()
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING=str(options.core_process),
        VLLM_USE_FLASHINFER_SAMPLER="0",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
    )
    from vllm import LLM

    import turboquant_vllm.vllm as plugin

    plugin.register()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": options.layers}))
    if options.cache == "tq4":
        write_scales(options.folder, options.layers)
    start = time.perf_counter()
    llm = LLM(
        model=str(options.folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=33792,
        max_num_seqs=256,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=int(options.cache_bytes),
        gpu_memory_utilization=0.1,  # must be free at the start, whatever the cache takes: other engines are there
        block_size=options.block_size,
        tensor_parallel_size=options.tensor_parallel_size,
        worker_extension_cls=EXTENSION,
        compilation_config={"cudagraph_capture_sizes": CAPTURED},
        **CACHES[options.cache],
    )
    import vllm

    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    worst = check_answer(options.cache == "tq4") if options.cache.startswith("tq4") else None
    if worst is not None and not worst < 0.02:
        sys.exit(f"expected a largest error below 0.02, got {worst}")
    say(ready={"value": blocks, "seconds": round(time.perf_counter() - start, 1)}, vllm=vllm.__version__, worst=worst)
    timer = Timer(llm)
    for line in sys.stdin:
        case = line.strip()
        try:
            say(id=case, **timer.measure(case))
        except Exception as failure:  # the other cases may still be measured
            traceback.print_exc()
            say(id=case, error=f"{type(failure).__name__}: {failure}"[:500])
            timer.clear()


if __name__ == "__main__":
    main()
