"""The benchmarks behind docs/quality.md, at tiny sizes: formats to compare with, the recall task, training, the page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

import quality_tables
from quality_formats import FormatCache, Halves, Outliers, exact, fp8, int4
from quality_train_recall import VALUES, load, make_model, sample
from quality_training import train
from turboquant_vllm import TQ4Codec
from turboquant_vllm.hf import CACHE_ARGUMENT
from turboquant_vllm.quality.attention import cache_format
from turboquant_vllm.quality.formats import TQ4Format

Randn = Callable[..., torch.Tensor]


def test_int4_has_sixteen_even_levels_between_the_extremes(randn: Randn) -> None:
    x = randn(3, 50, 64)
    again, same = int4(0, x, x)
    assert torch.equal(again, same)
    for row, got in zip(x.flatten(0, 1), again.flatten(0, 1), strict=True):
        assert len(got.unique()) <= 16
        step = (row.max() - row.min()) / 15
        # The numbers kept in half precision move every level by a little.
        assert (got - row).abs().max() <= 0.5 * step * 1.01 + 15 * step * 2e-3
    constant = torch.full((1, 4), 3.0)
    assert torch.equal(int4(0, constant, constant)[0], constant)


def test_fp8_rounds_to_three_bits_and_saturates() -> None:
    x = torch.tensor([1.0, 1.06, 1.07, 300.0, 1e4, -1e4, 0.0])
    assert fp8(0, x, x)[0].tolist() == [1.0, 1.0, 1.125, 288.0, 448.0, -448.0, 0.0]


def test_halves_are_vectors_of_their_own(randn: Randn) -> None:
    key, value = randn(2, 3, 5, 128), randn(2, 3, 5, 128)
    again = Halves(TQ4Format("norm", "unbiased", seed=4))(0, key, value)
    for x, got, scale in zip((key, value), again, ("norm", "unbiased"), strict=True):
        codec = TQ4Codec(64, seed=4, scale=scale)
        halves = [codec.decompress(codec.compress(half)) for half in x.chunk(2, -1)]
        torch.testing.assert_close(got, torch.cat(halves, -1))


def test_outliers_change_no_scores_by_themselves(randn: Randn) -> None:
    key, value = randn(1, 2, 9, 64), randn(1, 2, 9, 64)
    seen = []

    def keep(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(key / original)
        return exact(layer, key, value)

    original = key
    again, same = Outliers(keep, 100, 4)(3, key, value)
    torch.testing.assert_close(again, key)
    assert same is value
    factors = seen[0].reshape(-1, 64)
    assert (factors[0].round() == 100).sum() == 4
    assert torch.allclose(factors, factors[0].expand_as(factors))
    hard = Outliers(TQ4Format(), 100, 4)(3, key, value)[0]
    assert (hard - key).norm() > 2 * (TQ4Format()(3, key, value)[0] - key).norm()


def test_a_format_cache_holds_what_the_format_returns(generator: torch.Generator) -> None:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.3,
    )  # fmt: skip
    model: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").double().eval()
    ids = torch.randint(50, (2, 20), generator=generator)
    with torch.inference_mode():
        with cache_format(model, TQ4Format()):
            expected = model(ids).logits
        cache = FormatCache(TQ4Format())
        parts = [model(part, **{CACHE_ARGUMENT: cache}).logits for part in ids.split((13, 1, 6), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-3, atol=1e-3)


def test_recall_sequences_can_be_answered_from_the_context_alone(generator: torch.Generator) -> None:
    ids, answers, positions = sample(5, 12, 30, 40, generator)
    assert ids.shape == (5, 2 * 42)
    for row, right in zip(ids.tolist(), answers.tolist(), strict=True):
        keys, values = row[:24:2], row[1:24:2]
        assert len(set(keys)) == 12
        assert all(key < 40 for key in keys)
        assert all(40 <= value < 40 + VALUES for value in values)
        said = dict(zip(keys, values, strict=True))
        assert [said[row[position]] for position in positions.tolist()] == right
        assert [row[position + 1] for position in positions.tolist()] == right


def test_the_recall_model_sees_no_future_and_is_saved(tmp_path: Path, generator: torch.Generator) -> None:
    model = make_model(40, 64, 100).eval()
    ids = torch.randint(40 + VALUES, (1, 30), generator=generator)
    changed = ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 40
    with torch.inference_mode():
        logits = model(ids)
        torch.testing.assert_close(model(changed)[:, :20], logits[:, :20])
        assert not torch.allclose(model(changed)[:, 20], logits[:, 20])
        model.save(tmp_path)
        assert torch.equal(load(tmp_path, torch.device("cpu"))(ids), logits)


def test_training_learns_and_stops_when_told(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1).bfloat16()
    target = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def loss_of(step: int) -> torch.Tensor:
        x = torch.randn(64, 4, generator=generator)
        return (model(x.bfloat16()).float().squeeze(-1) - x @ target).square().mean()

    result = train(model, loss_of, seconds=1e9, steps=300, learning_rate=0.05, weight_decay=0.0)
    assert result["steps"] == 300
    assert result["log"][0]["loss"] > 50 * result["log"][-1]["loss"]
    # bfloat16 holds the target; what is left is the last bit of it.
    torch.testing.assert_close(model.weight.detach().float()[0], target, rtol=0.01, atol=0.02)
    with pytest.raises(RuntimeError, match="loss: expected a finite one, got nan"):
        train(
            model,
            lambda _: model(torch.ones(1, 4).bfloat16()).sum() * float("nan"),
            seconds=9,
            steps=1,
            learning_rate=0.1,
            weight_decay=0,
        )


def test_the_page_holds_what_its_commands_print() -> None:
    page = quality_tables.PAGE.read_text(encoding="utf-8")
    begins = "<!-- python benchmarks/quality_tables.py "
    assert set(quality_tables.TABLES) == {line.split()[3] for line in page.splitlines() if line.startswith(begins)}
    assert quality_tables.fill(page) == page
    name = next(iter(quality_tables.TABLES))
    printed = subprocess.run(
        [sys.executable, quality_tables.__file__, name], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed in page
