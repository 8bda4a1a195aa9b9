"""Decoding a model of 8B shape with caches of transformers and with ours: `python benchmarks/hf.py [--out FOLDER]`.

Random weights in bf16. Caches are filled with random keys and values through their own `update`, and `generate` is timed from
there: "eager" is DynamicCache with sdpa against TurboQuantCache with tq4, "compiled" is StaticCache with sdpa against
TurboQuantStaticCache with tq4, both compiled by `generate`. "memory" is a real prefill of one long prompt and a few tokens,
"host" says what limits eager steps.

A row says how many of the model's layers ran: fewer where bf16's cache of all would not fit, or where compiling all would take
too long. Dense caches get the vectors that ours hold, decompressed, and the logits of the first steps on each are compared
with what `hf_logits.py` computes of these in float32: a row of ours whose logits are wrong has no times, and the command fails
in the end. The file is written after every row, the most important rows first.

`--quick` runs all parts with few layers, short contexts and few steps; `--device cpu` with a tiny model, to try the command.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, StoppingCriteria

from common import RESULTS, environment, write_results
from hf_host import host_row
from hf_logits import LARGEST_RATIO, exact_logits, relative_error, round_trips
from turboquant_vllm import TQ4Codec
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, register

DTYPE = torch.bfloat16
WARMUP = 4  # tokens, compiling among them
RUNS = 3  # of which the fastest counts: what else the host does slows down steps that wait for it
CASES = [(8, 32768), (1, 8192), (8, 8192), (1, 32768), (1, 131072), (8, 131072)]
HOST_CASES = [(8, 8192), (1, 8192)]
MEMORY_TOKENS = 131072
# Of memory beside the weights, for bf16's cache: attention over a StaticCache repeats a layer's keys and values for every head.
DENSE_SHARE = 0.56
SHAPES: dict[str, dict[str, int]] = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
             "vocab_size": 128256},
    "cpu": {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 997},
}  # fmt: skip
QUICK: dict[str, Any] = {
    "layers": 4, "compiled_layers": 2, "memory_tokens": 16384, "steps": 4, "cases": [(8, 8192), (1, 8192)],
    "host_cases": [(8, 8192)],
}  # fmt: skip


def make_model(layers: int, device: str) -> Any:
    """A LlamaForCausalLM of 8B shape, or a tiny one on a CPU, with random weights."""
    sizes = SHAPES[device]
    config = LlamaConfig(
        num_hidden_layers=layers, max_position_embeddings=2 * MEMORY_TOKENS, tie_word_embeddings=False, **sizes
    )  # fmt: skip
    register()
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()


def use_layers(model: Any, all_layers: Any, count: int) -> None:
    """Leave the model its first ``count`` layers."""
    model.model.layers, model.config.num_hidden_layers = all_layers[:count], count


def fitting_layers(model: Any, batch: int, tokens: int, most: int) -> int:
    """Layers whose cache in bf16 takes no more than ``DENSE_SHARE`` of the memory that there is for caches."""
    if model.device.type == "cpu":
        return most
    config = model.config
    memory = torch.cuda.get_device_properties(model.device).total_memory - torch.cuda.memory_allocated()
    layer_bytes = 4 * batch * tokens * config.num_key_value_heads * config.head_dim
    return max(1, min(most, int(DENSE_SHARE * memory // layer_bytes)))


def draw(model: Any, batch: int, tokens: int) -> list[torch.Tensor]:
    """Random keys and values ``[B, H_kv, N, D]`` for every layer, the same in every call with the same sizes.

    Values are large, so that what a layer attends to outweighs what it passes on, and logits say whether attention is right.
    """
    config = model.config
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    k, v = (torch.randn(shape, generator=generator, device=model.device, dtype=DTYPE) for _ in range(2))
    return [k, v.mul_(8)]


def fill(cache: Any, model: Any, batch: int, tokens: int) -> None:
    """Fill a new cache: ours with random vectors, a dense one with what compress and decompress leave of the same."""
    states = draw(model, batch, tokens)
    if not hasattr(cache, "packed_layers"):
        codec = TQ4Codec(model.config.head_dim, device=model.device)
        keys, values = states
        states = [x.to(DTYPE) for x in round_trips(keys, values, codec)]
    for layer in range(model.config.num_hidden_layers):
        cache.update(*states, layer)


def bytes_of(cache: Any) -> int:
    """Bytes of all keys and values."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def release() -> None:
    """Give back what nothing holds any more, and measure the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Most bytes in use since :func:`release`; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def generate(model: Any, cache: Any, batch: int, length: int, count: int, **options: Any) -> Any:
    """``count`` greedy tokens behind ``length``, of which the last is not in the cache yet."""
    ids = torch.ones((batch, length), dtype=torch.long, device=model.device)
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, **how)


class Clock(StoppingCriteria):
    """Never stops; notes when each step ended, which `generate` waits for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def tokens_per_second(
    model: Any, cache: Any, batch: int, tokens: int, steps: int, runs: int
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Tokens a second of `generate` on a full cache, all sequences together; logits ``[B, S, vocabulary]`` and the tokens
    ``[B, S]`` of its first steps.

    From the second step on: the first is a prefill to `generate`, which compiles none.
    """
    first = generate(model, cache, batch, tokens + 1, WARMUP, return_dict_in_generate=True, output_logits=True)
    seconds = []
    for run in range(runs):
        clock = Clock()
        length = tokens + 1 + WARMUP + run * (steps + 1)
        generate(model, cache, batch, length, steps + 1, stopping_criteria=[clock])
        seconds.append(clock.times[-1] - clock.times[0])
    return batch * steps / min(seconds), torch.stack(first.logits, 1).float(), first.sequences[:, tokens : tokens + WARMUP]


@torch.inference_mode()
def error_of(model: Any, logits: torch.Tensor, ids: torch.Tensor, tokens: int, packed: bool) -> float:
    """How far logits of ``ids [B, S]`` behind a full cache are from those that they must be."""
    codec = TQ4Codec(model.config.head_dim, device=model.device)
    keys, values = draw(model, ids.shape[0], tokens)
    return relative_error(logits, exact_logits(model, keys, values, ids, codec, packed))


# Tokens a second, the logits' error, and what else a row says of a cache; None where memory does not suffice.
Found = tuple[float | None, float | None, dict[str, Any]]


def measure(
    model: Any, attention: str, make: Any, batch: int, tokens: int, steps: int, runs: int, cudnn: bool, check: bool
) -> Found:
    """What is found of a new cache; its logits are looked at if ``check``."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch._dynamo.reset()
    model.set_attn_implementation(attention)
    cache: Any = None
    found: Found = (None, None, {})
    try:
        release()
        cache = make(tokens)
        fill(cache, model, batch, tokens)
        speed, logits, ids = tokens_per_second(model, cache, batch, tokens, steps, runs)
        more = {"cudnn": cudnn, "bytes": bytes_of(cache), "peak_bytes": peak_bytes()}
        packed, cache = hasattr(cache, "packed_layers"), None
        release()
        found = speed, error_of(model, logits, ids, tokens, packed) if check else None, more
    except torch.OutOfMemoryError:
        pass
    cache = None
    release()
    torch.backends.cuda.enable_cudnn_sdp(True)
    return found


def faster(a: Found, b: Found) -> Found:
    """The faster of two runs, with the larger error."""
    speed, _, more = max(a, b, key=lambda found: found[0] or 0.0)
    return speed, max((error for _, error, _ in (a, b) if error is not None), default=None), more


def measure_in_turn(
    model: Any, caches: dict[str, tuple[str, Any]], batch: int, tokens: int, steps: int, turns: int
) -> list[Found]:
    """What is found of each cache, whose runs take turns, since the host is slower at times.

    Dense attention first runs with cuDNN's, too: it makes a plan for each new length, which can take longer than all else.
    """
    found: list[Found] = [(None, None, {}) for _ in caches]
    for turn in range(turns):
        for i, (attention, make) in enumerate(caches.values()):
            for cudnn in (False, True) if attention == "sdpa" and turn == 0 else (False,):
                sizes = (batch, tokens, steps, RUNS // turns)
                found[i] = faster(found[i], measure(model, attention, make, *sizes, cudnn, check=turn == 0))
    return found


def decode_rows(
    model: Any, caches: dict[str, tuple[str, Any]], steps: int, cases: list[tuple[int, int]], most_layers: int, turns: int
) -> Iterator[dict[str, Any]]:
    """A row for each case: tokens a second with the dense cache and with ours."""
    all_layers = model.model.layers
    for batch, tokens in cases:
        layers = fitting_layers(model, batch, tokens, min(most_layers, len(all_layers)))
        use_layers(model, all_layers, layers)
        found = measure_in_turn(model, caches, batch, tokens, steps, turns)
        (dense, dense_error, dense_more), (ours, our_error, our_more) = found
        wrong = our_error is not None and dense_error is not None and not our_error < LARGEST_RATIO * dense_error
        if wrong or dense_error is None:
            ours = None
        yield {
            "id": f"{'-'.join(caches)}-{batch}x{tokens}",
            "batch": batch,
            "context": tokens,
            "layers": layers,
            "caches": list(caches),
            "dense_with_cudnn": dense_more.get("cudnn"),
            "dense_tokens_per_s": dense and round(dense, 2),
            "ours_tokens_per_s": ours and round(ours, 2),
            "ratio": round(ours / dense, 3) if ours and dense else None,
            "dense_logits_error": dense_error and round(dense_error, 5),
            "ours_logits_error": our_error and round(our_error, 5),
            "wrong": wrong,
            **{f"{name}_{key}": more.get(key) for key in ("bytes", "peak_bytes") for name, more in
               (("dense", dense_more), ("ours", our_more))},
        }  # fmt: skip
    use_layers(model, all_layers, len(all_layers))


@torch.inference_mode()
def memory_rows(model: Any, tokens: int) -> Iterator[dict[str, Any]]:
    """Bytes of the cache and peaks of a real prefill and of decoding, for both caches; the peaks without the weights."""
    dense: dict[str, Any] = {}
    for name, attention, make in (("dynamic", "sdpa", DynamicCache), ("turboquant", "tq4", TurboQuantCache)):
        model.set_attn_implementation(attention)
        cache = make(config=model.config)
        release()
        weights = peak_bytes()
        ids = torch.ones((1, tokens), dtype=torch.long, device=model.device)
        model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        prefill = peak_bytes() - weights
        synchronize()
        release()
        for _ in range(4):
            model(ids[:, :1], **{CACHE_ARGUMENT: cache})
        decode = peak_bytes() - weights
        row = {
            "id": f"memory-{name}",
            "context": tokens,
            "layers": len(cache.layers),
            "cache_bytes": bytes_of(cache),
            "prefill_peak_bytes": prefill,
            "decode_peak_bytes": decode,
        }
        for key in ("cache_bytes", "prefill_peak_bytes", "decode_peak_bytes") if dense else ():
            row[f"{key}_share"] = round(row[key] / max(dense[key], 1), 4)
        dense = row
        del cache
        yield row


def host_rows(
    model: Any, caches: dict[str, tuple[str, Any]], cases: list[tuple[int, int]], most_layers: int
) -> Iterator[dict[str, Any]]:
    """What limits an eager step, for each case and cache; nothing on a CPU, where a step is all the host's."""
    all_layers = model.model.layers
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each new length for longer than a step
    for batch, tokens in cases if model.device.type == "cuda" else []:
        use_layers(model, all_layers, fitting_layers(model, batch, tokens, min(most_layers, len(all_layers))))
        for name, (attention, make) in caches.items():
            release()
            cache = make(tokens)
            fill(cache, model, batch, tokens)
            sizes = {"batch": batch, "context": tokens, "layers": len(cache.layers)}
            yield {"id": f"host-{name}-{batch}x{tokens}", **sizes, **host_row(model, cache, attention, batch, tokens)}
            del cache
    torch.backends.cuda.enable_cudnn_sdp(True)
    use_layers(model, all_layers, len(all_layers))


def parse_cases(text: str) -> list[tuple[int, int]]:
    """Batch and context of each of "8x8192,1x8192"."""
    return [(int(b), int(n)) for b, n in (case.split("x") for case in text.split(","))]


def card() -> str:
    """What result files call the GPU: "h200" of "NVIDIA H200"."""
    return torch.cuda.get_device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compiled-layers", type=int, default=8, help="of the compiled pair")
    parser.add_argument("--memory-tokens", type=int, default=MEMORY_TOKENS, help="of the prompt of the part on memory")
    parser.add_argument("--steps", type=int, default=10, help="tokens of each of three timed runs")
    parser.add_argument("--parts", default="memory,compiled,eager,host", help="which of these, in their order")
    parser.add_argument("--cases", type=parse_cases, default=CASES, help="batch x context, separated by commas")
    parser.add_argument("--host-cases", type=parse_cases, default=HOST_CASES, help="the same for the part on the host")
    parser.add_argument("--quick", action="store_true", help="all parts in half a minute; what else is given counts")
    parser.add_argument("--device", choices=tuple(SHAPES), default="cuda")
    if "--quick" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = make_model(options.layers, options.device)
    config, room = model.config, WARMUP + RUNS * (options.steps + 1) + 8
    eager = {
        "dynamic": ("sdpa", lambda tokens: DynamicCache(config=config)),
        "turboquant": ("tq4", lambda tokens: TurboQuantCache(config)),
    }
    compiled = {
        "static": ("sdpa", lambda tokens: StaticCache(config=config, max_cache_len=tokens + room)),
        "turboquant-static": ("tq4", lambda tokens: TurboQuantStaticCache(config, max_cache_len=tokens + room)),
    }
    parts: dict[str, Callable[[], Any]] = {
        "memory": lambda: memory_rows(model, options.memory_tokens),
        "eager": lambda: decode_rows(model, eager, options.steps, options.cases, options.layers, RUNS),
        "compiled": lambda: decode_rows(model, compiled, options.steps, options.cases, options.compiled_layers, 1),
        "host": lambda: host_rows(model, eager, options.host_cases, options.layers),
    }
    env, rows = environment(transformers=transformers.__version__), []
    for part in options.parts.split(","):
        for row in parts[part]():
            rows.append(row)
            print(row, flush=True)
            write_results(options.out / f"hf-{card()}.json", env, rows)
    if wrong := [row["id"] for row in rows if row.get("wrong")]:
        raise SystemExit(f"logits of ours are {LARGEST_RATIO} times as far off as the dense cache's: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
