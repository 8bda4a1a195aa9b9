"""The demo's measurements: one model with exact attention, the same model with TQ4 attention, the same text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turboquant_vllm import lloyd_max
from turboquant_vllm.demo import text
from turboquant_vllm.demo.attention import ATTENTION_NAME, Observer, register
from turboquant_vllm.quality.attention import Model, no_loading_bar
from turboquant_vllm.quality.caches import CacheFormat, known_formats
from turboquant_vllm.quality.measure import compare_many, compare_windows, perplexity

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load(folder: Path, device: torch.device) -> tuple[Tokenizer, Model, Model]:
    """Tokenizer, model with exact attention (sdpa) and model with TQ4 attention: float32 on a CPU, else bfloat16.

    Raises:
        FileNotFoundError: `folder` holds no model.
    """
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            where = "; the demo's own model is in the repository, not in what is installed from it"
            raise FileNotFoundError(f"model: expected {name} in {folder}, found none{where}")
    register()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    models: list[Model] = []
    with no_loading_bar():
        for attention in ("sdpa", ATTENTION_NAME):
            model: Model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
            models.append(model.to(device).eval())
    exact, quantised = models
    return Tokenizer.from_file(str(folder / "tokenizer.json")), exact, quantised


def held_out_windows(tokenizer: Tokenizer, length: int, count: int) -> torch.Tensor:
    """`count` windows of held-out text spread evenly over all of it, or all when there are fewer.

    Returns:
        Token ids int64 `[count, length + 1]`: inputs and, shifted by one, targets.
    """
    found = text.windows(text.encode(text.gather()["test"], tokenizer), length)
    return found[torch.linspace(0, len(found) - 1, min(count, len(found)), device=found.device).long()]


def compare(
    exact: Model, quantised: Model, windows: torch.Tensor, advance: Callable[[], None]
) -> tuple[dict[str, Any], Observer]:
    """Both models' losses and agreement on `windows` `[n, length + 1]`, and what the quantiser did on the way.

    Args:
        exact, quantised: from `load`.
        windows: token ids on the models' device.
        advance: called after each window.

    Returns:
        Figures by name, and the observer with the histograms of keys and values.
    """
    observer = Observer()
    scores = compare_windows(
        lambda ids: exact(ids, use_cache=False).logits,
        lambda ids: quantised(ids, use_cache=False, observer=observer).logits,
        windows.split(1),
        advance,
    )
    count = scores.exact.numel()
    config = exact.config
    bf16 = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * torch.bfloat16.itemsize
    tq4 = observer.bytes / count
    figures = {
        "windows": len(windows),
        "tokens": count,
        "head_dim": config.head_dim,
        "bytes_per_token": {"bf16": bf16, "tq4": tq4},
        "compression": bf16 / tq4,
        "perplexity": {"exact": perplexity(scores.exact), "tq4": perplexity(scores.other)},
        "perplexity_change_percent": 100 * scores.increase,
        "argmax_agreement": scores.agrees.float().mean().item(),
        "attention_error": observer.attention_error,
        "vector_error": {**observer.vector_error, "expected": config.head_dim * lloyd_max(config.head_dim, 4).mse},
    }
    return figures, observer


def compare_formats(exact: Model, windows: torch.Tensor, advance: Callable[[], None]) -> list[dict[str, Any]]:
    """What the formats of `turboquant verify` lose on `windows` `[n, length + 1]`, whose every token reads them.

    Returns:
        For each format its name and title, bytes of a token, perplexity and its increase in percent, mean divergence in nats
        and agreement.
    """
    from turboquant_vllm.hf import CACHE_ARGUMENT

    def logits(cached: CacheFormat, ids: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = exact(ids, **{CACHE_ARGUMENT: cached.make(exact, ())}).logits
        return answer

    config, known, found = exact.config, known_formats(), []
    others = [partial(logits, cached) for cached in known]
    of_all = compare_many(lambda ids: exact(ids, use_cache=False).logits, others, windows.split(1), advance)
    for cached, scores in zip(known, of_all, strict=True):
        each = cached.key_bytes(config.head_dim) + cached.value_bytes(config.head_dim)
        found.append(
            {
                "format": cached.name,
                "title": cached.title,
                "bytes_per_token": config.num_hidden_layers * config.num_key_value_heads * each,
                "perplexity": perplexity(scores.other),
                "increase_percent": 100 * scores.increase,
                "kl": scores.kl.double().mean().item(),
                "agreement": scores.agrees.float().mean().item(),
            }
        )
    return found


@torch.inference_mode()
def continue_prompt(
    exact: Model,
    quantised: Model,
    tokenizer: Tokenizer,
    tokens: torch.Tensor,
    prompt: int,
    new: int,
) -> dict[str, Any]:
    """Greedy continuations of the first `prompt` of `tokens` `[n]` by up to `new` tokens, under both models; the second keeps
    its keys and values in 4 bits from token to token.

    Returns:
        Texts "prompt", "exact", "tq4" and "held_out" (what the file says), and "same_tokens", the length of the
        continuations' common beginning.
    """
    from turboquant_vllm import hf

    hf.register()
    inputs = tokens[None, :prompt].to(exact.device)
    written = {}
    for name, model in (("exact", exact), ("tq4", quantised)):
        cache = None
        if name == "tq4":
            model.set_attn_implementation(hf.ATTENTION_NAME)
            cache = hf.TurboQuantCache(model.config, exact_prefill=False)
        output = model.generate(
            inputs,
            **{hf.CACHE_ARGUMENT: cache},
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=model.config.eos_token_id,
        )
        written[name] = output[0, prompt:].tolist()
    quantised.set_attn_implementation(ATTENTION_NAME)
    pairs = enumerate(zip(written["exact"], written["tq4"], strict=False))
    shortest = min(len(ids) for ids in written.values())
    texts = {
        "prompt": tokens[:prompt].tolist(),
        **written,
        "held_out": tokens[prompt : prompt + new].tolist(),
    }
    return {
        **{name: tokenizer.decode(ids) for name, ids in texts.items()},
        "same_tokens": next((index for index, (left, right) in pairs if left != right), shortest),
        "new_tokens": len(written["exact"]),
    }
