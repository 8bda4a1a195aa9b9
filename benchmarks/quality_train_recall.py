"""Train the recall model of docs/quality.md: look one of thousands of keys up in the context, and say its value.

    PYTHONPATH=src python benchmarks/quality_train_recall.py --out FOLDER [--seconds 50]

A sequence is a list of pairs "key value", all keys different and all tokens random, and then some of the keys again: the
model must say the value that came with each. Nothing but exact retrieval over the whole context helps. Two layers do it:
each token's embedding is joined by one of the token before it, so that a value's position knows its key, and the second
layer has no positions, so that what was learned at one distance holds at every other. Lengths double as soon as the model
is right at the length before. A smoke test on a CPU:

    PYTHONPATH=src python benchmarks/quality_train_recall.py --out /tmp/smoke --steps 3 --keys 64 --hidden 128 --pairs 8
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from common import environment
from quality_training import train

SEED = 4321
VALUES = 256  # the last tokens of the vocabulary; those before are keys
_GOOD, _LOOK = 0.98, 16  # accuracy over the last steps at which the lengths double


class RecallModel(torch.nn.Module):
    """A transformers model whose token embeddings are joined by an embedding of the preceding token."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.previous = torch.nn.Embedding(body.config.vocab_size, body.config.hidden_size)
        torch.nn.init.normal_(self.previous.weight, std=0.02)

    def forward(self, ids: torch.Tensor, keep: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Token ids ``[batch, length]`` to logits ``[batch, kept, vocabulary]`` at the positions ``keep``."""
        before = functional.pad(self.previous(ids[:, :-1]), (0, 0, 1, 0))
        embeddings = self.body.get_input_embeddings()(ids) + before
        hidden = self.body.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.body.lm_head(hidden[:, keep])
        return logits

    def save(self, folder: Path) -> None:
        """Write to ``folder``."""
        self.body.save_pretrained(folder)
        save_file({"previous": self.previous.weight.detach()}, folder / "previous.safetensors")


def load(folder: Path, device: torch.device) -> RecallModel:
    """Read what :meth:`RecallModel.save` wrote, in the dtype that it was saved in."""
    model = RecallModel(SmolLM3ForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa"))
    previous = load_file(folder / "previous.safetensors")["previous"]
    model.previous = torch.nn.Embedding.from_pretrained(previous)
    return model.to(device).eval()


def make_model(keys: int, hidden: int, context: int) -> RecallModel:
    config_class: Any = SmolLM3Config  # its annotations lack head_dim, which its attention reads
    config = config_class(
        vocab_size=keys + VALUES,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        no_rope_layers=[1, 0],  # 0: a layer without positions
        use_sliding_window=False,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(SEED)
    return RecallModel(SmolLM3ForCausalLM._from_config(config, attn_implementation="sdpa"))


def sample(
    batch: int, pairs: int, queries: int, keys: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences on the generator's device.

    Returns:
        ids ``[batch, 2 * (pairs + queries)]``, values ``[batch, queries]`` to be said, and the positions ``[queries]`` to
        say them at.
    """
    device = generator.device
    order = torch.rand(batch, keys, generator=generator, device=device).argsort(1)[:, :pairs]
    values = torch.randint(keys, keys + VALUES, (batch, pairs), generator=generator, device=device)
    asked = torch.randint(pairs, (batch, queries), generator=generator, device=device)
    answers = values.gather(1, asked)
    names = torch.cat([order, order.gather(1, asked)], 1)
    ids = torch.stack([names, torch.cat([values, answers], 1)], -1).flatten(1)
    return ids, answers, torch.arange(2 * pairs, 2 * (pairs + queries), 2, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, created if missing")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--steps", type=int, default=None, help="so many steps instead")
    parser.add_argument("--keys", type=int, default=16384, help="different keys")
    parser.add_argument("--pairs", type=int, default=8192, help="pairs in the longest sequences: half its tokens")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32768, help="tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()

    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(args.keys, args.hidden, 4 * args.pairs).to(device)
    if device.type == "cuda":
        model = model.bfloat16()
    generator = torch.Generator(device).manual_seed(SEED)
    recent: deque[float] = deque(maxlen=_LOOK)
    reached = 4

    def loss_of(step: int) -> torch.Tensor:
        nonlocal reached
        if len(recent) == _LOOK and sum(recent) / _LOOK > _GOOD and reached < args.pairs:
            reached *= 2
            recent.clear()
        # Once at the full length, shorter ones are mixed in.
        pairs = reached if reached < args.pairs or step % 2 else max(8, args.pairs >> (step // 2 % 6))
        queries = min(pairs, 512)
        batch = min(512, max(2, args.tokens // (2 * (pairs + queries))))
        ids, answers, positions = sample(batch, pairs, queries, args.keys, generator)
        logits = model(ids, positions)
        if step % 2 or reached < args.pairs:
            recent.append((logits.argmax(-1) == answers).float().mean().item())
        return functional.cross_entropy(logits.flatten(0, 1).float(), answers.flatten())

    result = train(
        model,
        loss_of,
        seconds=args.seconds,
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=0.0,
        report=lambda: {"pairs": reached, "accuracy": round(sum(recent) / max(1, len(recent)), 4)},
    )
    model.save(args.out)
    record = {
        "environment": environment(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": SEED,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "keys": args.keys,
        **result,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{record['parameters']:,} parameters, {time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    main()
