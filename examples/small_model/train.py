"""Train the demo's language model on the Python standard library, tokenizer included.

    PYTHONPATH=src python examples/small_model/train.py --out FOLDER

A Llama of about 5 M parameters with grouped-query attention and a head dimension of 64, trained on the sources of the
interpreter that runs the script. So small a text is seen many times over; how often is best is decided on the
validation split: each number given to --epochs is one full training from the same initial weights, with its own cosine
schedule, and the checkpoint with the lowest validation loss of all is kept. The test split is read once, at the end,
by the weights as they are stored (fp16).

On one H200 it takes about two minutes. A smoke test on a CPU:

    PYTHONPATH=src python examples/small_model/train.py --out /tmp/smoke --steps 3 --batch 2 --eval-windows 2
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from turboquant_vllm.demo.text import END_OF_TEXT, Split, encode, gather, train_tokenizer, windows

CONTEXT = 1024
VOCABULARY = 4096
SEED = 1234


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    separator = tokenizer.token_to_id(END_OF_TEXT)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=separator,
        eos_token_id=separator,
        pad_token_id=None,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def mean_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats of the last CONTEXT tokens of each window `[batch, CONTEXT + 1]`."""
    device = next(model.parameters()).device
    batch = batch.to(device, non_blocking=True)
    with torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext():
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # [batch, CONTEXT, VOCABULARY]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: torch.Tensor, batch: int = 16) -> float:
    """Mean negative log-likelihood in nats over `held_out` windows `[n, CONTEXT + 1]`."""
    model.eval()
    total = sum(mean_loss(model, part).item() * len(part) for part in held_out.split(batch))
    model.train()
    return total / len(held_out)


def batches(tokens: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless windows `[batch, CONTEXT + 1]`: each epoch cuts `tokens` `[n]` anew at a random offset and shuffles."""
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        cut = windows(tokens[offset:], CONTEXT)
        for chosen in torch.randperm(len(cut), generator=generator).split(batch):
            if len(chosen) == batch:
                yield cut[chosen.to(cut.device)]


@dataclass
class Result:
    """One training: its schedule, its losses in nats at the steps looked at, and the best weights on validation."""

    epochs: float
    steps: int
    seconds: float
    log: list[dict[str, float]]
    best_step: int
    best_validation_loss: float
    weights: dict[str, torch.Tensor]


def train(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    validation: torch.Tensor,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    seconds: float,
) -> Result:
    """Train for `steps` steps, or fewer when these would outlast `seconds`: the cosine then comes down sooner."""
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not model.get_input_embeddings().weight]
    others = [p for p in model.parameters() if p.ndim < 2 or p is model.get_input_embeddings().weight]
    on_gpu = tokens.device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=on_gpu,
    )
    source = batches(tokens, batch, torch.Generator().manual_seed(SEED))
    warm_up = min(200, steps // 10)
    look_every = max(1, steps // 25)
    result = Result(steps * batch * CONTEXT / tokens.numel(), 0, 0.0, [], 0, math.inf, {})
    running = torch.zeros((), device=tokens.device)
    since_look = 0
    start = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        elapsed = time.perf_counter() - start
        progress = max((step - 1 - warm_up) / (steps - warm_up), elapsed / seconds, 0.0)
        rate = learning_rate * min(1.0, step / (warm_up + 1)) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = mean_loss(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        since_look += 1
        out_of_time = progress >= 1.0
        if step % look_every == 0 or step == steps or out_of_time:
            validation_loss = evaluate(model, validation)
            entry = {"step": step, "train": running.item() / since_look, "validation": validation_loss}
            result.log.append({name: round(value, 4) for name, value in entry.items()})
            running.zero_()
            since_look = 0
            elapsed = time.perf_counter() - start
            print(
                f"step {step:5d}/{steps}  train {entry['train']:.4f}  validation {validation_loss:.4f}"
                f"  lr {rate:.2e}  {step * batch * CONTEXT / elapsed:,.0f} tokens/s  {elapsed:.0f} s",
                flush=True,
            )
            if validation_loss < result.best_validation_loss:
                result.best_step, result.best_validation_loss = step, validation_loss
                result.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        result.steps = step
        if out_of_time:
            break
    result.seconds = time.perf_counter() - start
    return result


def unigram_loss(train_tokens: torch.Tensor, test: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats of the test targets under token frequencies with add-one smoothing."""
    counts = torch.bincount(train_tokens.flatten().cpu(), minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log()[test[:, 1:].cpu()].mean().item()


def continuations(model: LlamaForCausalLM, tokenizer: Tokenizer, test: torch.Tensor, count: int) -> list[dict[str, str]]:
    """Continue `count` held-out prompts of 96 tokens by 64 tokens, greedily and sampled."""
    model.eval()
    separator = tokenizer.token_to_id(END_OF_TEXT)
    found = []
    for index in torch.linspace(0, len(test) - 1, count).long().tolist():
        prompt = test[index : index + 1, :96].to(model.device)
        item = {"prompt": tokenizer.decode(prompt[0].tolist(), skip_special_tokens=False)}
        for name, options in {
            "greedy": {"do_sample": False},
            "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 40},
        }.items():
            torch.manual_seed(SEED)
            output = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=64,
                pad_token_id=separator,
                **options,
            )
            item[name] = tokenizer.decode(output[0, prompt.shape[1] :].tolist(), skip_special_tokens=False)
        item["held_out"] = tokenizer.decode(test[index, 96:160].tolist(), skip_special_tokens=False)
        found.append(item)
    return found


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model in fp16 and the tokenizer so that transformers' Auto classes load them."""
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, created if missing")
    parser.add_argument("--stdlib", type=Path, default=None, help="standard library to read (default: this Python's)")
    parser.add_argument("--epochs", type=float, nargs="+", default=[8, 20], help="lengths of the trainings to try")
    parser.add_argument("--steps", type=int, default=None, help="train once, for so many steps, whatever --epochs says")
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {CONTEXT} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--seconds", type=float, default=100.0, help="time for all trainings; schedules shrink to fit")
    parser.add_argument("--eval-windows", type=int, default=64, help="validation windows looked at in between")
    parser.add_argument("--continuations", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--date", default=None, help="date to record (default: today)")
    args = parser.parse_args()

    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    documents = gather(args.stdlib)
    tokenizer = train_tokenizer(documents["train"], VOCABULARY)
    tokens = {split: encode(found, tokenizer) for split, found in documents.items()}
    size = {split: sum(len(document.text.encode()) for document in found) for split, found in documents.items()}
    for split in documents:
        print(f"{split:<10}  {len(documents[split])} files  {size[split]:,} bytes  {tokens[split].numel():,} tokens")
    print(f"tokenizer and text: {time.perf_counter() - start:.1f} s", flush=True)

    train_tokens = tokens["train"].to(args.device)
    validation = windows(tokens["validation"], CONTEXT)
    spread = torch.linspace(0, len(validation) - 1, min(args.eval_windows, len(validation))).long()
    validation = validation[spread].to(args.device)
    test = windows(tokens["test"], CONTEXT)
    if args.steps is not None:
        lengths = [args.steps]
        test = test[: args.eval_windows]
    else:
        lengths = [round(epochs * train_tokens.numel() / (args.batch * CONTEXT)) for epochs in args.epochs]
    initial = make_model(tokenizer)
    parameters = sum(p.numel() for p in initial.parameters())
    print(f"{parameters:,} parameters, {args.device}", flush=True)
    results = []
    for steps in lengths:
        model = copy.deepcopy(initial).to(args.device)
        results.append(
            train(
                model,
                train_tokens,
                validation,
                steps=steps,
                batch=args.batch,
                learning_rate=args.learning_rate,
                weight_decay=args.weight_decay,
                seconds=args.seconds * steps / sum(lengths),
            )
        )
    best = min(results, key=lambda result: result.best_validation_loss)
    final = copy.deepcopy(initial)
    final.load_state_dict(best.weights)
    final.half()
    save(final, tokenizer, args.out)

    stored = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    largest = max(p.abs().max().item() for p in stored.parameters())
    if not math.isfinite(largest):
        raise RuntimeError(f"weights: expected all finite in fp16, got {largest}")
    test_loss = evaluate(stored, test)
    unigram = unigram_loss(train_tokens, test)
    written = continuations(stored, tokenizer, test, args.continuations)
    for item in written:
        for name, text in item.items():
            print(f"--- {name}\n{text}")
    bytes_per_token = size["test"] / tokens["test"].numel()
    splits: dict[Split, dict[str, int]] = {
        split: {"files": len(documents[split]), "bytes": size[split], "tokens": tokens[split].numel()} for split in documents
    }
    record = {
        "date": args.date or datetime.date.today().isoformat(),
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "stdlib", "date")},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "stdlib": f"Python {platform.python_version()}" if args.stdlib is None else args.stdlib.name,
        "splits": splits,
        "parameters": parameters,
        "batch_tokens": args.batch * CONTEXT,
        "seed": SEED,
        "seconds_in_all": round(time.perf_counter() - start, 1),
        "steps": best.best_step,
        "tokens_seen": best.best_step * args.batch * CONTEXT,
        "largest_weight": largest,
        "test_perplexity": math.exp(test_loss),
        "test_bits_per_byte": test_loss / math.log(2) / bytes_per_token,
        "unigram_test_perplexity": math.exp(unigram),
        "trainings": [
            {
                "epochs": round(result.epochs, 2),
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "best_step": result.best_step,
                "best_validation_loss": result.best_validation_loss,
                "kept": result is best,
                "losses": result.log,
            }
            for result in results
        ],
        "continuations": written,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(
        f"kept {best.epochs:.1f} epochs, step {best.best_step}: test perplexity {math.exp(test_loss):.2f}"
        f" ({record['test_bits_per_byte']:.3f} bits/byte), unigram {math.exp(unigram):.1f};"
        f" {record['seconds_in_all']} s in all"
    )


if __name__ == "__main__":
    main()
