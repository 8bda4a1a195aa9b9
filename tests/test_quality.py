"""The quality package: scores of two models, bootstrap intervals, and a model's attention over a cache format."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from turboquant_vllm import TQ4Codec
from turboquant_vllm.demo.attention import ATTENTION_NAME as DEMO_ATTENTION
from turboquant_vllm.demo.attention import register
from turboquant_vllm.quality import measure
from turboquant_vllm.quality.attention import LayerErrors, Model, cache_format
from turboquant_vllm.quality.formats import TQ4Format
from turboquant_vllm.quality.measure import (
    agreement,
    bootstrap_interval,
    compare_many,
    compare_windows,
    kl_divergence,
    perplexity,
    token_scores,
    total_variation,
)

Randn = Callable[..., torch.Tensor]


def exact_format(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return key, value


def tiny_llama(attention: str = "sdpa", layers: int = 3) -> Model:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.3,
    )  # fmt: skip
    model: Model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_llama().double()  # in float32 the order of a sum may move a coordinate into the next cell


@pytest.fixture
def ids(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(50, (2, 40), generator=generator)


# Scores


def test_token_scores_are_what_they_say(randn: Randn, generator: torch.Generator) -> None:
    exact, other = 3 * randn(2, 30, 11), 3 * randn(2, 30, 11)
    targets = torch.randint(11, (2, 30), generator=generator)
    scores = token_scores(exact, other, targets)
    p, q = (x.double().softmax(-1) for x in (exact, other))
    for b in range(2):
        for i in range(30):
            assert scores.exact[b, i].item() == pytest.approx(-math.log(p[b, i, targets[b, i]]), rel=1e-5, abs=2e-6)
            assert scores.other[b, i].item() == pytest.approx(-math.log(q[b, i, targets[b, i]]), rel=1e-5, abs=2e-6)
            assert scores.kl[b, i].item() == pytest.approx(
                (p[b, i] * (p[b, i] / q[b, i]).log()).sum().item(), rel=1e-4, abs=2e-6
            )
            assert scores.agrees[b, i].item() == (exact[b, i].argmax() == other[b, i].argmax()).item()
            assert scores.tvd[b, i].item() == pytest.approx((p[b, i] - q[b, i]).abs().sum().item() / 2, abs=2e-6)
    assert scores.increase == pytest.approx(perplexity(scores.other) / perplexity(scores.exact) - 1, rel=1e-5)


def directly(exact: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL divergence and total variation distance by their definitions, in float64."""
    p, q = (x.double().log_softmax(-1) for x in (exact, other))
    terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
    return terms.sum(-1), (p.exp() - q.exp()).abs().sum(-1) / 2


@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("spread", [1.0, 8.0, 100.0])
def test_distances_are_those_of_a_direct_computation(randn: Randn, apart: float, spread: float) -> None:
    """A rounding error r of every log-probability moves KL by r sum |p - q| = 2 r TVD, and TVD by r at most."""
    exact = spread * randn(40, 3000)
    other = exact + apart * randn(40, 3000)
    kl, tvd = directly(exact, other)
    # log-softmax of numbers that span s is off by a few units in the last place of s, its terms' sum by a millionth.
    r = 4 * torch.finfo(torch.float32).eps * (exact.amax(-1) - exact.amin(-1)).double()
    got_kl, got_tvd = kl_divergence(exact, other), total_variation(exact, other)
    assert got_kl.dtype == got_tvd.dtype == torch.float32
    assert ((got_kl - kl).abs() <= 2 * r * tvd + r.square() + 1e-5 * kl).all()
    assert ((got_tvd - tvd).abs() <= r + 1e-5 * tvd).all()
    assert (got_kl >= 0).all()
    assert torch.equal(agreement(exact, other), exact.argmax(-1) == other.argmax(-1))
    # Definitions that hold in float64 hold there for the functions, too.
    torch.testing.assert_close(kl_divergence(exact.double(), other.double()), kl, rtol=1e-6, atol=1e-12)


def test_distances_of_equal_models_are_nothing(randn: Randn) -> None:
    logits = 20 * randn(2, 7, 500)
    assert torch.equal(kl_divergence(logits, logits), torch.zeros(2, 7))
    assert torch.equal(total_variation(logits, logits), torch.zeros(2, 7))
    assert agreement(logits, logits).all()
    # A constant more in every logit changes no probability; what it costs is its rounding.
    assert kl_divergence(logits, logits + 4).max() < 1e-9
    for distance in (kl_divergence, total_variation):
        assert distance(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32
        assert distance(logits[:, :0], logits[:, :0]).shape == (2, 0)


def test_distances_know_tokens_that_cannot_come() -> None:
    inf = math.inf
    exact = torch.tensor([[0.0, 0.0, -inf, -inf], [0.0, 0.0, 0.0, -inf], [0.0, -200.0, 0.0, 0.0], [math.nan, 0.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 0.0, 0.0, -inf], [0.0, 0.0, -inf, -inf], [0.0, -inf, 0.0, 0.0], [0.0, 0.0, 0.0, -inf]])
    kl, tvd = kl_divergence(exact, other), total_variation(exact, other)
    torch.testing.assert_close(kl[:3], torch.tensor([math.log(1.5), inf, inf]))
    torch.testing.assert_close(tvd[:3], torch.tensor([1 / 3, 1 / 3, 0.0]))
    assert kl[3].isnan()  # is not hidden
    assert tvd[3].isnan()
    far = torch.tensor([[0.0, -1e4, -1e30]]), torch.tensor([[-1e4, 0.0, -3e38]])
    torch.testing.assert_close(kl_divergence(*far), torch.tensor([1e4]))
    torch.testing.assert_close(total_variation(*far), torch.tensor([1.0]))


def test_distances_refuse_other_shapes(randn: Randn) -> None:
    for distance in (kl_divergence, total_variation, agreement):
        with pytest.raises(ValueError, match=r"logits: expected two tensors of one shape .* got \[3, 5\] and \[3, 6\]"):
            distance(randn(3, 5), randn(3, 6))
        with pytest.raises(ValueError, match="logits: expected two tensors of one shape"):
            distance(randn(3, 0), randn(3, 0))


def test_scores_need_little_memory(randn: Randn, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the text's length, some rows at a time; and what comes out is the same."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and not func.is_view:
                self.numel = max(self.numel, found.numel())
            return found

    exact, other = randn(3, 50, 400).bfloat16(), randn(3, 50, 400).bfloat16()
    targets = torch.randint(400, (3, 50), generator=generator)
    whole = token_scores(exact, other, targets)
    monkeypatch.setattr(measure, "_ELEMENTS", 7 * 400)
    with Largest() as largest:
        scores = token_scores(exact, other, targets)
        alone = kl_divergence(exact, other), total_variation(exact, other)
    assert largest.numel <= 7 * 400
    for got, want in zip(scores, whole, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(alone[0], whole.kl)
    assert torch.equal(alone[1], whole.tvd)


def test_several_models_share_the_exact_one(randn: Randn, generator: torch.Generator) -> None:
    tables = randn(3, 7, 7)
    windows = torch.randint(7, (5, 9), generator=generator)
    calls: list[int] = []

    def model(which: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def logits(ids: torch.Tensor) -> torch.Tensor:
            calls.append(which)
            return tables[which][ids]

        return logits

    found = compare_many(model(0), [model(1), model(2)], windows.split(2), lambda: calls.append(-1))
    assert calls == [0, 1, -1, 2, -1] * 3
    for which, scores in enumerate(found, 1):
        expected = compare_windows(model(0), model(which), windows.split(2))
        assert all(torch.equal(got, want) for got, want in zip(scores, expected, strict=True))


def test_windows_are_scored_in_order(randn: Randn, generator: torch.Generator) -> None:
    tables = randn(7, 7), randn(7, 7)
    windows = torch.randint(7, (5, 9), generator=generator)
    calls = []
    scores = compare_windows(lambda ids: tables[0][ids], lambda ids: tables[1][ids], windows.split(2), lambda: calls.append(1))
    expected = token_scores(tables[0][windows[:, :-1]], tables[1][windows[:, :-1]], windows[:, 1:])
    assert len(calls) == 3
    for got, want in zip(scores, expected, strict=True):
        assert torch.equal(got, want)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says(generator: torch.Generator) -> None:
    covered = 0
    for seed in range(200):
        losses = 2 + torch.randn(2, 64 * 60, generator=generator)
        low, high = bootstrap_interval(losses, seed=seed)
        covered += low < math.exp(2) < high
        # The standard error of the mean of 7680 independent numbers, to either side.
        assert math.log(high / low) == pytest.approx(2 * 1.96 / math.sqrt(7680), rel=0.35)
    assert 175 <= covered <= 200  # 190 expected, with a standard deviation of 3


def test_bootstrap_of_an_increase_is_paired(generator: torch.Generator) -> None:
    baseline = 2 + torch.randn(4, 640, generator=generator)
    losses = baseline + 0.01 + 0.001 * torch.randn(4, 640, generator=generator)
    low, high = bootstrap_interval(losses, baseline)
    assert low < math.expm1((losses - baseline).double().mean().item()) < high
    assert math.expm1(0.0095) < low < high < math.expm1(0.0105)
    wide = bootstrap_interval(losses)
    assert wide[1] / wide[0] - 1 > 20 * (high - low)


def test_bootstrap_of_neighbours_that_hang_together_is_wider(generator: torch.Generator) -> None:
    independent = torch.randn(1, 6400, generator=generator)
    together = independent[:, ::64].repeat_interleave(64, 1)
    spans = [math.log(high / low) for low, high in (bootstrap_interval(x) for x in (independent, together))]
    assert spans[1] > 5 * spans[0]


def test_bootstrap_counts_every_token(generator: torch.Generator) -> None:
    """Windows of 127 tokens whose later ones are easier, as they are: the interval is around the mean of all of them."""
    losses = 3 - torch.arange(127) / 127 + 0.01 * torch.randn(40, 127, generator=generator)
    low, high = bootstrap_interval(losses)
    assert low < perplexity(losses) < high
    low, high = bootstrap_interval(losses[:, :96], torch.full((40, 96), 2.0))
    assert low < math.expm1(losses[:, :96].double().mean().item() - 2) < high
    # Blocks of different sizes count by their sizes.
    losses = torch.arange(129.0).expand(40, -1) / 64 + 0.01 * torch.randn(40, 129, generator=generator)
    low, high = bootstrap_interval(losses)
    assert low < perplexity(losses) < high


def test_bootstrap_takes_texts_shorter_than_a_block() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0]])
    assert bootstrap_interval(losses) == pytest.approx((math.exp(2), math.exp(2)))


# Attention


def test_exact_format_changes_nothing(model: Model, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = model(ids).logits
        with cache_format(model, exact_format):
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_tq4_format_is_attention_over_the_compressed_cache(ids: torch.Tensor) -> None:
    register()
    # One layer, so that both compress the very same keys and values.
    model, compressed = tiny_llama(layers=1), tiny_llama(DEMO_ATTENTION, layers=1)
    with torch.inference_mode():
        with cache_format(model, TQ4Format()):
            logits = model(ids).logits
        expected = compressed(ids).logits
        assert (logits - model(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_tq4_format_compresses_what_it_is_told_to(randn: Randn) -> None:
    key, value = randn(1, 2, 9, 64), randn(1, 2, 9, 32)
    codec = TQ4Codec(64, seed=3, rotation="haar", scale="unbiased")
    again, same = TQ4Format("unbiased", None, seed=3, rotation="haar")(0, key, value)
    assert torch.equal(again, codec.decompress(codec.compress(key)))
    assert same is value
    same, again = TQ4Format(None, "least_squares")(0, key.bfloat16(), value.bfloat16())
    codec = TQ4Codec(32, scale="least_squares")
    assert again.dtype == same.dtype == torch.bfloat16
    assert torch.equal(again, codec.decompress(codec.compress(value.bfloat16()), torch.bfloat16))
    assert TQ4Format(dense_layers={2})(2, key, value) == (key, value)
    assert not torch.equal(TQ4Format(dense_layers={2})(1, key, value)[0], key)


def test_errors_are_those_of_each_layer(model: Model, ids: torch.Tensor) -> None:
    def halve(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (key, value) if layer == 0 else (key * (1 - 0.1 * layer), value * 0.5)

    errors = LayerErrors()
    with torch.inference_mode(), cache_format(model, halve, errors):
        model(ids)
        model(ids[:, :7])
    assert errors.relative("keys") == pytest.approx({0: 0.0, 1: 0.1, 2: 0.2}, rel=1e-5)
    assert errors.relative("values") == pytest.approx({0: 0.0, 1: 0.5, 2: 0.5}, rel=1e-5)
    attention = errors.relative("attention")
    assert attention[0] == 0
    assert 0.4 < attention[1] < 0.8
    assert errors.relative("nothing") == {}


def test_errors_add_up_over_calls(randn: Randn) -> None:
    got, exact = randn(20, 5), randn(20, 5)
    errors = LayerErrors()
    errors.add("x", 4, got[:6], exact[:6])
    errors.add("x", 4, got[6:], exact[6:])
    expected = (got - exact).double().norm() / exact.double().norm()
    assert errors.relative("x") == pytest.approx({4: expected.item()}, rel=1e-5)


def test_generation_reads_the_format_at_every_step(model: Model, ids: torch.Tensor) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = ids[:1, :20]
    with cache_format(model, TQ4Format()):
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        with torch.inference_mode():
            logits = model(written).logits
    assert torch.equal(logits[0, 19:-1].argmax(-1), written[0, 20:])


def test_the_model_is_as_before_after_an_error(model: Model, ids: torch.Tensor) -> None:
    def fail(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no such format")

    before = model.config._attn_implementation
    with torch.inference_mode():
        expected = model(ids).logits
        with pytest.raises(RuntimeError, match="no such format"), cache_format(model, fail):
            model(ids)
        assert model.config._attn_implementation == before
        assert torch.equal(model(ids).logits, expected)


def test_padding_stays_masked(model: Model, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    # Rotary positions are relative, so with exact keys it does not matter where the row begins.
    with torch.inference_mode(), cache_format(model, exact_format):
        batch = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, 9:]).logits
    torch.testing.assert_close(batch[1:, 9:], alone, rtol=1e-3, atol=1e-3)
