"""`turboquant verify`: its verify_figures against direct computation, formats and layers, and what it recommends."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("typer")

from transformers import (
    AutoTokenizer,
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaForCausalLM,
)

from turboquant_vllm import TQ4Codec, verify
from turboquant_vllm.calibration import save_key_scales
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.demo.text import windows
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache
from turboquant_vllm.hf.calibration import key_scales_from_model
from turboquant_vllm.quality.attention import cache_format
from turboquant_vllm.quality.caches import CacheFormat, choose_formats, known_formats
from turboquant_vllm.quality.formats import TQ4Format
from turboquant_vllm.quality.measure import perplexity
from turboquant_vllm.verify import run_verify
from turboquant_vllm.verify.layers import layer_errors
from turboquant_vllm.verify.run import to_use
from verify_cases import CONTEXT, WINDOWS, both, demo_model, invoke, saved, tiny


@pytest.fixture(scope="module")
def model() -> Any:
    return demo_model()


# Figures


def test_figures_are_those_of_a_direct_computation(verify_figures: dict[str, Any], verify_text: Path, model: Any) -> None:
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(verify_text.read_text(encoding="utf-8"))["input_ids"])
    losses: dict[str, list[torch.Tensor]] = {"exact": [], "tq4": []}
    kl, tvd, agree = [], [], []
    for i in range(WINDOWS):
        window = ids[i * CONTEXT : (i + 1) * CONTEXT + 1]
        with torch.inference_mode():
            p, q = (read(window[None, :-1])[0].double().log_softmax(-1) for read in both(model))
        for name, found in (("exact", p), ("tq4", q)):
            losses[name].append(F.nll_loss(found, window[1:], reduction="none"))
        kl.append((p.exp() * (p - q)).sum(-1))
        tvd.append((p.exp() - q.exp()).abs().sum(-1) / 2)
        agree.append(p.argmax(-1) == q.argmax(-1))
    for name in losses:
        expected = perplexity(torch.cat(losses[name]))
        assert verify_figures["perplexity"][name] == pytest.approx(expected, rel=1e-4)
        low, high = verify_figures["perplexity_interval"][name]
        assert low < expected < high
    increase = 100 * (verify_figures["perplexity"]["tq4"] / verify_figures["perplexity"]["exact"] - 1)
    assert verify_figures["increase_percent"] == pytest.approx(increase, abs=1e-3)
    low, high = verify_figures["increase_percent_interval"]
    assert low < increase < high
    assert verify_figures["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=0.01)
    assert verify_figures["agreement"] == pytest.approx(torch.cat(agree).double().mean().item(), abs=2 / (CONTEXT * WINDOWS))
    assert verify_figures["tvd"] == pytest.approx(torch.cat(tvd).mean().item(), rel=0.01)
    assert verify_figures["tokens"] == CONTEXT * WINDOWS
    (row,) = verify_figures["formats"]
    assert (row["format"], row["title"], row["perplexity"]) == ("plain", "TQ4", verify_figures["perplexity"]["tq4"])
    for name in ("increase_percent", "increase_percent_interval", "kl", "tvd", "agreement"):
        assert row[name] == verify_figures[name]


def test_figures_of_the_cache_and_its_layers(verify_figures: dict[str, Any]) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    assert verify_figures["bytes_per_token"] == {"bf16": layers * heads * 2 * 64 * 2, "tq4": layers * heads * 2 * 36}
    assert [item["layer"] for item in verify_figures["layers"]] == list(range(layers))
    for item in verify_figures["layers"]:
        assert item["key_error"] == pytest.approx(math.sqrt(0.009132), rel=0.15)
        assert item["value_error"] == pytest.approx(math.sqrt(0.009132), rel=0.15)
        assert 0.02 < item["attention_error"] < 0.3
    shares = [item["kl_share"] for item in verify_figures["contributors"]]
    assert sorted(item["layer"] for item in verify_figures["contributors"]) == list(range(layers))
    assert shares == sorted(shares, reverse=True)
    assert all(0 < share < 1 for share in shares)
    assert sum(shares) == pytest.approx(1)
    assert json.loads(json.dumps(verify_figures)) is not None


def test_layers_are_those_that_the_cache_packs(verify_text: Path, tmp_path: Path) -> None:
    config = Gemma3nTextConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=[64] * 4, num_hidden_layers=4, num_kv_shared_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=4096, laurel_rank=8, altup_num_inputs=2,
    )  # fmt: skip
    folder = saved(Gemma3nForCausalLM(config), tmp_path)
    found = run_verify(str(folder), verify_text, 64, count=1, max_ppl_increase=1e6, device="cpu", formats=("plain",))
    assert [item["layer"] for item in found["layers"]] == TurboQuantCache(config).packed_layers == [0, 1]
    assert sorted(item["layer"] for item in found["contributors"]) == [0, 1]
    assert found["cached_layers"] == 2
    assert found["bytes_per_token"] == {"bf16": 2 * 2 * 2 * 16 * 2, "tq4": 2 * 2 * 2 * (8 + 4)}


def test_dense_layers_are_exact_and_take_their_bytes(verify_text: Path, verify_figures: dict[str, Any]) -> None:
    found = run_verify(
        str(MODEL), verify_text, CONTEXT, max_ppl_increase=0, dense_layers=range(6), device="cpu", count=1, formats=("plain",)
    )
    assert found["perplexity"]["tq4"] == found["perplexity"]["exact"]
    assert (found["kl"], found["agreement"], found["increase_percent"]) == (0, 1, 0)
    assert found["passed"]
    assert found["contributors"] == []
    assert found["bytes_per_token"]["tq4"] == found["bytes_per_token"]["bf16"] == verify_figures["bytes_per_token"]["bf16"]


def test_recommendation_is_measured_and_keeps_the_limit(verify_text: Path, verify_figures: dict[str, Any]) -> None:
    assert verify_figures["recommendation"]["text"] == "all layers in TQ4"
    limit = 0.6 * verify_figures["increase_percent"]
    assert limit > 0
    found = run_verify(str(MODEL), verify_text, CONTEXT, max_ppl_increase=limit, device="cpu", seed=2, formats=("plain",))
    assert not found["passed"]
    advice = found["recommendation"]
    order = [item["layer"] for item in found["contributors"]]
    assert advice["dense_layers"] == sorted(order[: len(advice["dense_layers"])])
    assert len(advice["dense_layers"]) in (1, 2)  # of six layers, so at most three, and the number doubles
    assert advice["within_limit"] == (advice["increase_percent"] <= limit)
    again = run_verify(
        str(MODEL),
        verify_text,
        CONTEXT,
        max_ppl_increase=1000,
        dense_layers=advice["dense_layers"],
        device="cpu",
        seed=2,
        formats=("plain",),
    )
    assert again["increase_percent"] == pytest.approx(advice["increase_percent"], abs=1e-4)
    assert again["bytes_per_token"]["tq4"] == advice["bytes_per_token"]
    assert verify_figures["bytes_per_token"]["tq4"] < advice["bytes_per_token"] < verify_figures["bytes_per_token"]["bf16"]


def test_windows_begin_as_the_tokenizer_begins_a_text(
    verify_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = tiny(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $0", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    seen: list[torch.Tensor] = []
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, ids, **kw: seen.append(ids) or forward(self, ids, **kw))
    found = run_verify(str(folder), verify_text, CONTEXT, device="cpu", formats=("plain",))
    starts = {tuple(ids[0].tolist()) for ids in seen if ids.shape[1] == CONTEXT}
    assert len(starts) == found["windows"] == WINDOWS
    assert {start[0] for start in starts} == {0}
    plain = tokenizer.encode(verify_text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    assert tuple(plain[: CONTEXT - 1]) in {start[1:] for start in starts}


# Formats


def twice(head_dim: int) -> int:
    return 2 * head_dim


EXACT = CacheFormat("bf16", "exact", lambda model, dense: DynamicCache(config=model.config), twice, twice)


def test_formats_stand_side_by_side(
    verify_text: Path, verify_figures: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = run_verify(
        str(MODEL), verify_text, CONTEXT, max_ppl_increase=1000, device="cpu", formats=[EXACT, *known_formats(2)]
    )
    rows = {row["format"]: row for row in found["formats"]}
    assert list(rows) == ["bf16", "plain", "offsets", "tq4"]
    assert rows["plain"] == verify_figures["formats"][0]
    exact = rows["bf16"]
    # With a cache the keys' places in memory are others, and sums may be ordered otherwise.
    assert (exact["kl"], exact["tvd"], exact["agreement"]) == pytest.approx((0, 0, 1), abs=1e-5)
    vectors, plain = 6 * 2, 6 * 2 * 2 * (32 + 4)
    assert exact["bytes_per_token"] == found["bytes_per_token"]["bf16"] == vectors * 2 * 128
    assert rows["plain"]["bytes_per_token"] == plain
    # A group of 64 keys has an offset and an outlier in 8 bits, and four numbers.
    assert rows["offsets"]["bytes_per_token"] == rows["tq4"]["bytes_per_token"] == plain + vectors * (2 * 64 + 16) / 64
    assert found["format"] == found["recommendation"]["format"] == min(list(rows)[1:], key=lambda name: rows[name]["kl"])
    assert found["kl"] == rows[found["format"]]["kl"]
    assert found["key_scales"] == "weights"
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: found)
    printed = invoke(MODEL).stdout
    assert all(f"{row['title']} " in printed and f"{row['kl']:.5f}" in printed for row in found["formats"])
    assert f"{100 * (1 - rows['plain']['tvd']):.1f} %" in printed

    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(verify_text.read_text(encoding="utf-8"))["input_ids"])
    scales = key_scales_from_model(model)
    kl = []
    for window in windows(ids, CONTEXT)[:, None, :-1]:
        cache = TurboQuantCache(model.config, seed=2, exact_prefill=False, key_offsets=True, key_scales=scales)
        with torch.inference_mode():
            p, q = (model(window, **{CACHE_ARGUMENT: c}).logits.double().log_softmax(-1) for c in (DynamicCache(), cache))
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert rows["tq4"]["kl"] == pytest.approx(sum(kl) / len(kl), rel=0.01)


def test_formats_are_chosen_by_name() -> None:
    known = known_formats()
    assert [one.name for one in choose_formats(known, ())] == ["plain", "offsets", "tq4"]
    assert [one.name for one in choose_formats(known, ("tq4", "plain"))] == ["plain", "tq4"]
    assert choose_formats(known, [EXACT]) == [EXACT]
    result = invoke(MODEL, "--format", "plain", "--format", "int3")
    assert (result.exit_code, result.stderr) == (2, "error: format: expected some of plain, offsets, tq4, got int3\n")


def test_key_scales_are_those_that_a_cache_would_have(verify_text: Path, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", initializer_range=0.3)
    model = LlamaForCausalLM.from_pretrained(folder)
    options: dict[str, Any] = {"count": 1, "max_ppl_increase": 1000, "device": "cpu", "formats": ("tq4",)}
    weights = run_verify(str(folder), verify_text, CONTEXT, **options)
    assert weights["key_scales"] == "weights"
    assert weights["recommendation"]["cache"] == "TurboQuantCache(model, key_offsets=True)"  # which finds the same
    other = {layer: torch.linspace(0.5, 2, 32)[None] for layer in range(2)}
    save_key_scales(tmp_path / "scales.safetensors", other, model.config, source="test")
    given = run_verify(str(folder), verify_text, CONTEXT, key_scales=tmp_path / "scales.safetensors", **options)
    assert given["key_scales"] == str(tmp_path / "scales.safetensors")
    path = f"key_scales='{tmp_path}/scales.safetensors'"
    assert given["recommendation"]["cache"] == f"TurboQuantCache(model, key_offsets=True, {path})"
    shutil.copy(tmp_path / "scales.safetensors", folder / "turboquant.safetensors")
    found = run_verify(str(folder), verify_text, CONTEXT, **options)
    assert found["key_scales"] == str(folder / "turboquant.safetensors")
    assert found["kl"] == given["kl"] != weights["kl"]
    (folder / "turboquant.safetensors").write_bytes(b"something else")
    result = invoke(folder, "--text", verify_text, "--context", CONTEXT)
    assert result.exit_code == 2
    assert re.match("error: .*turboquant.safetensors", result.stderr), result.stderr


def row(name: str, kl: float, size: float, within: bool) -> dict[str, Any]:
    return {"format": name, "kl": kl, "bytes_per_token": size, "within_limit": within}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row("a", 0.3, 100, True), row("b", 0.1, 200, True)], "a"),  # the smaller one will do
        ([row("a", 0.3, 100, False), row("b", 0.1, 200, True)], "b"),  # it will not
        ([row("a", 0.3, 100, True), row("b", 0.1, 106, True)], "b"),  # nearly of the same size
        ([row("a", 0.3, 100, True), row("b", 0.1, 106, False)], "a"),
        ([row("a", 0.3, 100, False), row("b", 0.1, 200, False)], "b"),  # none will do: the best of them
    ],
)
def test_which_format_to_use(rows: list[dict[str, Any]], expected: str) -> None:
    assert to_use(rows)["format"] == expected


# Layers


def test_a_layers_share_is_what_it_does_alone(verify_figures: dict[str, Any], verify_text: Path, model: Any) -> None:
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(verify_text.read_text(encoding="utf-8"))["input_ids"])[
        None, :CONTEXT
    ]
    parts = []
    with torch.inference_mode():
        p = model(ids).logits.double().log_softmax(-1)
        for layer in range(6):
            with cache_format(model, TQ4Format(seed=2, dense_layers=set(range(6)) - {layer})):
                q = model(ids).logits.double().log_softmax(-1)
            parts.append((p.exp() * (p - q)).sum(-1).mean().item())
    shares = {item["layer"]: item["kl_share"] for item in verify_figures["contributors"]}
    assert [shares[layer] for layer in range(6)] == pytest.approx([part / sum(parts) for part in parts], rel=0.02)


class Scaled(DynamicCache):
    """A cache that gives values back a tenth too small."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = super().update(key, value, *args, **kwargs)
        return key, 0.9 * value


def test_layer_errors_are_those_of_the_exact_models_layers(model: Any, verify_text: Path) -> None:
    ids = torch.arange(40)[None]
    errors = layer_errors(model, ids, [1, 4], lambda dense: Scaled(config=model.config))
    assert errors.relative("keys") == {1: 0, 4: 0}
    # Attention and its output projection are linear in the values, and layer 4 does not see what layer 1 did.
    assert errors.relative("values") == pytest.approx({1: 0.1, 4: 0.1}, rel=1e-5)
    assert errors.relative("attention") == pytest.approx({1: 0.1, 4: 0.1}, rel=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_default_scale_is_the_codecs() -> None:
    assert TQ4Format().key_scale == TQ4Format().value_scale == TQ4Codec(64).scale
