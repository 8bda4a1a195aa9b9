"""The demo: its text and split, its model, its attention function, and the figures that it prints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from turboquant_vllm import TQ4Codec
from turboquant_vllm.demo import compare, run, run_demo, text
from turboquant_vllm.demo.attention import ATTENTION_NAME, attention_forward

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def library():
    return text.gather()


@pytest.fixture(scope="module")
def loaded():
    return compare.load(run.MODEL, CPU)


# Text and split


def test_split_is_the_same_every_time_and_disjoint(library):
    again = text.gather()
    assert {split: [d.path for d in found] for split, found in library.items()} == {
        split: [d.path for d in found] for split, found in again.items()
    }
    modules = {split: {PurePosixPath(d.path).parts[0] for d in found} for split, found in library.items()}
    texts = {split: {d.text for d in found} for split, found in library.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not modules[one] & modules[other]
        assert not texts[one] & texts[other]


def test_split_does_not_depend_on_the_python_version():
    # The model was trained with these held out: another answer here would let it see its own test.
    assert {text.split_of(path) for path in ("random.py", "calendar.py", "http/client.py", "re/_parser.py")} == {"test"}
    assert {text.split_of(path) for path in ("argparse.py", "asyncio/tasks.py", "typing.py")} == {"train"}


@pytest.mark.parametrize(
    ("before", "after"),
    [("pathlib.py", "pathlib/_local.py"), ("datetime.py", "_pydatetime.py"), ("io.py", "_pyio.py")],
)
def test_a_module_that_moves_keeps_its_side(before, after):
    assert text.split_of(before) == text.split_of(after)


def test_text_leaves_tests_and_tables_out(library):
    paths = [d.path for found in library.values() for d in found]
    parts = {part for path in paths for part in PurePosixPath(path).parts}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "encodings", "entities.py"}
    assert "argparse.py" in parts
    assert len(library["test"]) < len(library["train"]) / 5


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="train split"):
        text.gather(tmp_path)


def test_windows_predict_every_token_once():
    tokens = torch.arange(23)
    found = text.windows(tokens, 5)
    assert found.shape == (4, 6)
    assert torch.equal(found[:, 1:].flatten(), tokens[1:21])
    assert torch.equal(found[:, :-1] + 1, found[:, 1:])
    with pytest.raises(ValueError, match=r"tokens: expected .* at least 24"):
        text.windows(tokens, 23)


def test_encoding_separates_documents_and_loses_nothing(loaded):
    tokenizer = loaded[0]
    documents = [text.Document("a.py", "x = 'é → 🙂'\n\tpass\r\n"), text.Document("b.py", "\n\n    y\n")]
    ids = text.encode(documents, tokenizer).tolist()
    assert ids[0] == tokenizer.token_to_id(text.END_OF_TEXT)
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded == "".join(text.END_OF_TEXT + d.text for d in documents)


# Model


def test_model_has_learned_far_more_than_token_frequencies(loaded, library):
    tokenizer, exact, _ = loaded
    windows = compare.held_out_windows(tokenizer, exact.config.max_position_embeddings, 4)
    with torch.inference_mode():
        logits = torch.cat([exact(window[None, :-1]).logits for window in windows])
    perplexity = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()

    seen = text.encode(library["train"][::8], tokenizer)
    counts = torch.bincount(seen, minlength=exact.config.vocab_size).double() + 1
    unigram = (-(counts / counts.sum()).log()[windows[:, 1:]].mean()).exp().item()
    assert perplexity < unigram / 10
    # The recorded figure is over all windows and one Python version, these are a few of another's.
    assert perplexity < 1.6 * json.loads((run.MODEL / "training.json").read_text())["test_perplexity"]


def test_model_weights_are_finite_and_its_file_is_small(loaded):
    assert all(p.isfinite().all() for p in loaded[1].parameters())
    assert sum(file.stat().st_size for file in run.MODEL.iterdir()) < 16 * 2**20


# Attention function


def layer(is_causal: bool = True) -> torch.nn.Module:
    module = torch.nn.Module()
    module.is_causal = is_causal
    module.layer_idx = 0
    return module


def inputs(q_len: int, kv_len: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, q_len, 64), (2, 2, kv_len, 64), (2, 2, kv_len, 64))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(("q_len", "kv_len", "scaling"), [(70, 70, None), (1, 33, 0.2), (5, 600, 0.125)])
def test_attention_is_attention_over_the_decompressed_cache(q_len, kv_len, scaling):
    q, k, v = inputs(q_len, kv_len)
    output, weights = attention_forward(layer(), q, k, v, None, scaling=scaling)
    codec = TQ4Codec(64)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    k64, v64 = (codec.decompress(codec.compress(x), torch.float64).repeat_interleave(2, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.double(), k64, v64, mask, scale=scaling).transpose(1, 2)
    assert weights is None
    assert output.shape == (2, q_len, 4, 64)
    # fp32 rounding only; quantisation itself moves the output a hundred thousand times as far.
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=2e-6)
    exact = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True).transpose(1, 2)
    assert (output - exact).norm() / exact.norm() > 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(2, 8, dtype=torch.bool)}, r"attention_mask: expected None .* got .*\(2, 8\)"),
        ({"dropout": 0.1}, r"dropout: expected 0, got 0\.1"),
        ({"is_causal": False}, "is_causal: expected causal"),
        ({"sliding_window": 4}, "sliding_window: expected None, got int"),
        ({"softcap": 30.0}, "softcap: expected None, got float"),
        ({"s_aux": torch.zeros(4)}, "s_aux: expected None, got Tensor"),
        ({"output_attentions": True}, "output_attentions: expected False"),
    ],
)
def test_attention_refuses_what_it_does_not_handle(options, message):
    q, k, v = inputs(8, 8)
    with pytest.raises(ValueError, match=message):
        attention_forward(layer(), q, k, v, **{"attention_mask": None, **options})


def test_attention_refuses_a_bidirectional_layer():
    q, k, v = inputs(8, 8)
    with pytest.raises(ValueError, match="is_causal"):
        attention_forward(layer(is_causal=False), q, k, v, None)


def test_model_refuses_a_padded_batch(loaded):
    _, exact, quantised = loaded
    assert (exact.config._attn_implementation, quantised.config._attn_implementation) == ("sdpa", ATTENTION_NAME)
    ids = torch.arange(8).repeat(2, 1)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        whole = quantised(ids, attention_mask=mask).logits
        assert whole.isfinite().all()
        mask[0, :3] = 0
        with pytest.raises(ValueError, match="attention_mask"):
            quantised(ids, attention_mask=mask)


# The whole demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new"
    return run_demo(out, device="cpu", windows=3), out


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_demo_writes_what_it_returns(demo):
    figures, out = demo
    assert json.loads((out / "demo.json").read_text()) == figures
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert all(math.isfinite(n) for n in numbers(figures))


def test_demo_figures_are_sane(demo, loaded):
    figures, config = demo[0], loaded[1].config
    assert (figures["windows"], figures["tokens"]) == (3, 3 * config.max_position_embeddings)
    vectors = 2 * config.num_hidden_layers * config.num_key_value_heads
    assert figures["bytes_per_token"] == {
        "bf16": vectors * 2 * config.head_dim,
        "tq4": vectors * (config.head_dim // 2 + 4),
    }
    exact, tq4 = figures["perplexity"]["exact"], figures["perplexity"]["tq4"]
    assert abs(tq4 - exact) > 1e-4 * exact
    assert figures["perplexity_change_percent"] == pytest.approx(100 * (tq4 / exact - 1))
    assert abs(figures["perplexity_change_percent"]) < 5
    assert 0.8 < figures["argmax_agreement"] < 1
    assert len(figures["attention_error"]) == config.num_hidden_layers
    assert all(0.02 < error < 0.25 for error in figures["attention_error"])
    errors = figures["vector_error"]
    assert errors["expected"] == pytest.approx(0.009132, abs=1e-6)
    assert errors["keys"] == pytest.approx(errors["expected"], rel=0.1)
    assert errors["values"] == pytest.approx(errors["expected"], rel=0.1)


def test_demo_compares_formats(demo, loaded):
    plain, offsets, scaled = demo[0]["formats"]
    vectors = loaded[1].config.num_hidden_layers * loaded[1].config.num_key_value_heads
    assert (plain["format"], offsets["format"], scaled["format"]) == ("plain", "offsets", "tq4")
    assert plain["bytes_per_token"] == demo[0]["bytes_per_token"]["tq4"]
    assert offsets["bytes_per_token"] == scaled["bytes_per_token"] == vectors * 72 * 33 / 32
    # All tokens of all windows, whichever way the codes are read.
    assert demo[0]["format_windows"] == demo[0]["windows"]
    assert plain["perplexity"] == pytest.approx(demo[0]["perplexity"]["tq4"], rel=1e-3)
    assert max(offsets["kl"], scaled["kl"]) < plain["kl"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_demo_on_a_gpu_agrees_with_the_cpu(demo, tmp_path):
    figures = run_demo(tmp_path, device="cuda", windows=3)
    assert figures["dtype"] == "bfloat16"
    assert figures["bytes_per_token"] == demo[0]["bytes_per_token"]
    # bfloat16 weights and activations move the loss by a few thousandths.
    assert figures["perplexity"]["exact"] == pytest.approx(demo[0]["perplexity"]["exact"], rel=0.02)
    assert figures["perplexity"]["tq4"] == pytest.approx(demo[0]["perplexity"]["tq4"], rel=0.02)
    assert figures["attention_error"] == pytest.approx(demo[0]["attention_error"], rel=0.1)


def test_demo_perplexity_is_the_models(demo, loaded):
    tokenizer, exact, _ = loaded
    windows = compare.held_out_windows(tokenizer, exact.config.max_position_embeddings, 3)
    with torch.inference_mode():
        loss = sum(exact(input_ids=w[None, :-1], labels=w[None, 1:], shift_labels=w[None, 1:]).loss for w in windows)
    assert demo[0]["perplexity"]["exact"] == pytest.approx(math.exp(loss.item() / 3), rel=1e-4)


def test_demo_continues_with_the_models_own_choices(demo, loaded):
    written = demo[0]["continuation"]
    tokenizer, exact, quantised = loaded
    prompt = compare.held_out_windows(tokenizer, exact.config.max_position_embeddings, 3)[1, :96]
    assert written["prompt"] == tokenizer.decode(prompt.tolist())
    # The first token is one plain forward call; the rest went through the cache.
    with torch.inference_mode():
        for name, model in (("exact", exact), ("tq4", quantised)):
            first = model(prompt[None]).logits[0, -1].argmax().item()
            assert written[name].startswith(tokenizer.decode([first]))
    assert 0 <= written["same_tokens"] <= written["new_tokens"]


def test_a_missing_package_is_one_clear_line(monkeypatch, tmp_path):
    find_spec = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    with pytest.raises(SystemExit, match=r"^error: the demo needs rich: pip install turboquant-vllm\[hf,cli\]$"):
        run.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"windows": 0}, ValueError, "windows: expected at least 1, got 0"),
        ({"device": "tpu"}, ValueError, "device: expected .* got 'tpu'"),
        ({"model": Path("nowhere")}, FileNotFoundError, "model: expected config.json in nowhere"),
    ],
)
def test_demo_refuses_bad_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run_demo(tmp_path, **options)


def test_a_folder_that_cannot_be_written_is_one_line_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: .*file"):
        run.main(["--out", str(tmp_path / "file")])


def test_importing_the_demo_imports_none_of_its_extras():
    heavy = "transformers", "tokenizers", "matplotlib", "rich"
    code = f"import sys, turboquant_vllm.demo; sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.stderr.strip() == ""
