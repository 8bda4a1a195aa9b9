"""Train the text model of docs/quality.md: a Llama with head dimension 128 on Python sources and documentation.

    PYTHONPATH=src python benchmarks/quality_train_text.py --out FOLDER [--seconds 110]

The text is what stands on the machine: the standard library and the installed packages of the interpreter that runs
this, sources and documentation, each text once. Whole packages (or, inside large ones, their first-level parts) are held
out; the folder that is written holds the model, its tokenizer and the held-out tokens. A smoke test on a CPU:

    PYTHONPATH=src python benchmarks/quality_train_text.py --out /tmp/smoke --steps 2 --batch 1 --megabytes 2 \
        --context 128 --layers 1 --hidden 128
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from common import environment
from quality_training import train
from turboquant_vllm.demo.text import END_OF_TEXT, Document, encode, train_tokenizer, windows

VOCABULARY = 8192
SEED = 1234
_SUFFIXES = frozenset({".md", ".py", ".pyi", ".rst", ".txt"})
_SKIPPED = frozenset({"__pycache__", "encodings", "pydoc_data", "licenses", "LICENSES"})
_HELD_OUT_PERCENT = 3
_SMALLEST, _LARGEST = 400, 200_000  # bytes: shorter files say nothing, longer ones are tables


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def is_held_out(path: str) -> bool:
    """Whether the file at ``path``, relative to the folder it was found in, is kept from training."""
    part = "/".join(PurePosixPath(path).parts[:2])
    return _digest(f"{SEED}:{part}")[0] * 100 < 256 * _HELD_OUT_PERCENT


def gather(megabytes: float) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and held-out ones, up to so many megabytes in all, in an order that looks random."""
    paths = sysconfig.get_paths()
    roots = sorted({Path(paths[name]) for name in ("stdlib", "purelib", "platlib")}, key=lambda root: -len(root.parts))
    roots += [root for root in map(Path, ("/usr/lib/python3/dist-packages",)) if root.is_dir() and root not in roots]
    found: dict[Path, str] = {}
    for root in roots:
        for file in root.rglob("*"):
            if file.suffix in _SUFFIXES and file not in found and _SKIPPED.isdisjoint(file.parts) and file.is_file():
                found[file] = file.relative_to(root).as_posix()
    training: list[Document] = []
    held_out: list[Document] = []
    seen: set[bytes] = set()
    left = megabytes * 1e6
    for file, path in sorted(found.items(), key=lambda item: _digest(item[1])):
        if not _SMALLEST <= file.stat().st_size <= _LARGEST:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if (content := _digest(text)) in seen:
            continue
        seen.add(content)
        (held_out if is_held_out(path) else training).append(Document(path, text))
        left -= len(text)
        if left <= 0:
            break
    if not training or not held_out:
        raise FileNotFoundError(f"text: expected files to train on and to hold out in {roots}, found too few")
    return training, held_out


def make_model(tokenizer: Tokenizer, context: int, layers: int, hidden: int, head_dim: int) -> LlamaForCausalLM:
    separator = tokenizer.token_to_id(END_OF_TEXT)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=1024 // head_dim,
        num_key_value_heads=256 // head_dim,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=separator,
        eos_token_id=separator,
        pad_token_id=None,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def mean_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats over windows ``[batch, context + 1]``."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: torch.Tensor) -> float:
    """Mean loss over held-out windows, one at a time."""
    model.eval()
    losses = [mean_loss(model, window[None]).item() for window in held_out]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, created if missing")
    parser.add_argument("--seconds", type=float, default=110.0, help="time for the training itself")
    parser.add_argument("--steps", type=int, default=None, help="so many steps instead")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--megabytes", type=float, default=130.0, help="how much text to read")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--held-out-windows", type=int, default=64, help="windows of held-out tokens to keep")
    args = parser.parse_args()

    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, held_out = gather(args.megabytes)
    tokenizer = train_tokenizer(training[: len(training) // 8], VOCABULARY)
    tokens = encode(training, tokenizer)
    kept = windows(encode(held_out, tokenizer), args.context)
    kept = kept[torch.linspace(0, len(kept) - 1, min(args.held_out_windows, len(kept))).long()]
    size = sum(len(document.text.encode()) for document in training)
    print(f"{len(training)} files, {size:,} bytes, {tokens.numel():,} tokens; {len(kept)} windows held out; "
          f"{time.perf_counter() - start:.1f} s", flush=True)  # fmt: skip

    model: Any = make_model(tokenizer, args.context, args.layers, args.hidden, args.head_dim)
    model = model.to(device)
    if device.type == "cuda":
        model = model.bfloat16()
    parameters = sum(p.numel() for p in model.parameters())
    tokens, on_device = tokens.to(device), kept.to(device)
    generator = torch.Generator().manual_seed(SEED)
    span = torch.arange(args.context + 1, device=device)

    def loss_of(step: int) -> torch.Tensor:
        first = torch.randint(tokens.numel() - args.context, (args.batch, 1), generator=generator).to(device)
        return mean_loss(model, tokens[first + span])

    result = train(
        model,
        loss_of,
        seconds=args.seconds,
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=0.1,
        report=lambda: {"held_out": round(evaluate(model, on_device[:4]), 4)},
    )
    loss = evaluate(model, on_device)
    model.save_pretrained(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    save_file({"windows": kept.int().contiguous()}, args.out / "held_out.safetensors")
    seen = result["steps"] * args.batch * args.context
    record = {
        "environment": environment(),
        "parameters": parameters,
        "seed": SEED,
        "text": {"files": len(training), "bytes": size, "tokens": tokens.numel(), "held_out_windows": len(kept)},
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "tokens_seen": seen,
        "held_out_perplexity": math.exp(loss),
        **result,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{parameters:,} parameters, {seen:,} tokens seen, {seen / result['seconds']:,.0f} tokens/s; "
          f"held-out perplexity {math.exp(loss):.3f}; {time.perf_counter() - start:.1f} s in all")  # fmt: skip


if __name__ == "__main__":
    main()
