"""`turboquant verify`: its figures against direct computation, its verdicts, and one clear line for what it cannot do."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("typer")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from typer.testing import CliRunner

from turboquant_vllm import TQ4Codec, cli, verify
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.demo.text import gather, windows
from turboquant_vllm.hf import TurboQuantCache
from turboquant_vllm.quality.attention import cache_format
from turboquant_vllm.quality.formats import TQ4Format
from turboquant_vllm.quality.measure import compare_windows, perplexity
from turboquant_vllm.verify import run_verify

CONTEXT, WINDOWS = 96, 3


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli._application(), ["verify", *map(str, arguments)])


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """Three windows of held-out text and a bit, on which 4 bits are worse: on so little text they may also be better."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for document in reversed(gather()["test"]):
        ids = tokenizer(document.text, verbose=False)["input_ids"][: CONTEXT * WINDOWS + 7]
        if len(ids) < CONTEXT * WINDOWS + 7:
            continue
        if compare_windows(*both(model), windows(torch.tensor(ids), CONTEXT).split(1)).increase > 0.005:
            path.write_text(tokenizer.decode(ids), encoding="utf-8")
            return path
    pytest.fail("no text on which 4 bits are worse")


def both(model: Any) -> tuple[Any, Any]:
    """The model's logits with the exact cache, and with TQ4 of seed 2."""

    def tq4(ids: torch.Tensor) -> torch.Tensor:
        with cache_format(model, TQ4Format(seed=2)):
            return model(ids).logits

    return lambda ids: model(ids).logits, tq4


@pytest.fixture(scope="module")
def figures(text: Path) -> dict[str, Any]:
    return run_verify(str(MODEL), text, CONTEXT, max_ppl_increase=1000, device="cpu", seed=2)


def tiny(folder: Path, **changes: Any) -> Path:
    """A random Llama with the demo's tokenizer."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=1, bos_token_id=0, eos_token_id=0, **(sizes | changes))
    return saved(LlamaForCausalLM(config), folder)


def saved(model: Any, folder: Path) -> Path:
    """A model's folder, with the demo's tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


# Figures


def test_figures_are_those_of_a_direct_computation(figures: dict[str, Any], text: Path, model: Any) -> None:
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(text.read_text(encoding="utf-8"))["input_ids"])
    losses: dict[str, list[torch.Tensor]] = {"exact": [], "tq4": []}
    kl, agree = [], []
    for i in range(WINDOWS):
        window = ids[i * CONTEXT : (i + 1) * CONTEXT + 1]
        with torch.inference_mode():
            p, q = (read(window[None, :-1])[0].double().log_softmax(-1) for read in both(model))
        for name, found in (("exact", p), ("tq4", q)):
            losses[name].append(F.nll_loss(found, window[1:], reduction="none"))
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
    for name in losses:
        expected = perplexity(torch.cat(losses[name]))
        assert figures["perplexity"][name] == pytest.approx(expected, rel=1e-4)
        low, high = figures["perplexity_interval"][name]
        assert low < expected < high
    increase = 100 * (figures["perplexity"]["tq4"] / figures["perplexity"]["exact"] - 1)
    assert figures["increase_percent"] == pytest.approx(increase, abs=1e-3)
    low, high = figures["increase_percent_interval"]
    assert low < increase < high
    assert figures["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=0.01)
    assert figures["agreement"] == pytest.approx(torch.cat(agree).double().mean().item(), abs=2 / (CONTEXT * WINDOWS))
    assert figures["tokens"] == CONTEXT * WINDOWS


def test_figures_of_the_cache_and_its_layers(figures: dict[str, Any]) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    assert figures["bytes_per_token"] == {"bf16": layers * heads * 2 * 64 * 2, "tq4": layers * heads * 2 * 36}
    assert [item["layer"] for item in figures["layers"]] == list(range(layers))
    for item in figures["layers"]:
        assert item["key_error"] == pytest.approx(math.sqrt(0.009132), rel=0.15)
        assert item["value_error"] == pytest.approx(math.sqrt(0.009132), rel=0.15)
        assert 0.02 < item["attention_error"] < 0.3
    shares = [item["kl_share"] for item in figures["contributors"]]
    assert sorted(item["layer"] for item in figures["contributors"]) == list(range(layers))
    assert shares == sorted(shares, reverse=True)
    assert all(-0.5 < share < 1 for share in shares)
    assert 0.5 < sum(shares) < 1.5
    assert json.loads(json.dumps(figures)) is not None


def test_layers_are_those_that_the_cache_packs(text: Path, tmp_path: Path) -> None:
    config = Gemma3nTextConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=[64] * 4, num_hidden_layers=4, num_kv_shared_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=4096, laurel_rank=8, altup_num_inputs=2,
    )  # fmt: skip
    found = run_verify(str(saved(Gemma3nForCausalLM(config), tmp_path)), text, 64, count=1, max_ppl_increase=1e6, device="cpu")
    assert [item["layer"] for item in found["layers"]] == TurboQuantCache(config).packed_layers == [0, 1]
    assert sorted(item["layer"] for item in found["contributors"]) == [0, 1]
    assert found["cached_layers"] == 2
    assert found["bytes_per_token"] == {"bf16": 2 * 2 * 2 * 16 * 2, "tq4": 2 * 2 * 2 * (8 + 4)}


def test_dense_layers_are_exact_and_take_their_bytes(text: Path, figures: dict[str, Any]) -> None:
    found = run_verify(str(MODEL), text, CONTEXT, max_ppl_increase=0.0, dense_layers=range(6), device="cpu", count=2)
    assert found["perplexity"]["tq4"] == found["perplexity"]["exact"]
    assert (found["kl"], found["agreement"], found["increase_percent"]) == (0, 1, 0)
    assert found["passed"]
    assert found["contributors"] == []
    assert found["bytes_per_token"]["tq4"] == found["bytes_per_token"]["bf16"] == figures["bytes_per_token"]["bf16"]


def test_recommendation_is_measured_and_keeps_the_limit(text: Path, figures: dict[str, Any]) -> None:
    assert figures["recommendation"]["text"] == "all layers in TQ4"
    limit = 0.6 * figures["increase_percent"]
    assert limit > 0
    found = run_verify(str(MODEL), text, CONTEXT, max_ppl_increase=limit, device="cpu", seed=2)
    assert not found["passed"]
    advice = found["recommendation"]
    order = [item["layer"] for item in found["contributors"]]
    assert advice["dense_layers"] == sorted(order[: len(advice["dense_layers"])])
    assert len(advice["dense_layers"]) in (1, 2)  # of six layers, so at most three, and the number doubles
    assert advice["within_limit"] == (advice["increase_percent"] <= limit)
    again = run_verify(
        str(MODEL), text, CONTEXT, max_ppl_increase=limit, dense_layers=advice["dense_layers"], device="cpu", seed=2
    )
    assert again["increase_percent"] == pytest.approx(advice["increase_percent"], abs=1e-4)
    assert again["bytes_per_token"]["tq4"] == advice["bytes_per_token"]
    assert figures["bytes_per_token"]["tq4"] < advice["bytes_per_token"] < figures["bytes_per_token"]["bf16"]


def test_windows_begin_as_the_tokenizer_begins_a_text(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = tiny(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $0", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    seen: list[torch.Tensor] = []
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, ids, **kw: seen.append(ids) or forward(self, ids, **kw))
    found = run_verify(str(folder), text, CONTEXT, device="cpu")
    starts = {tuple(ids[0].tolist()) for ids in seen if ids.shape[1] == CONTEXT}
    assert len(starts) == found["windows"] == WINDOWS
    assert {start[0] for start in starts} == {0}
    plain = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    assert tuple(plain[: CONTEXT - 1]) in {start[1:] for start in starts}


# The command


def test_command_prints_saves_and_passes(
    text: Path, figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "new" / "verify.json"
    arguments = (MODEL, "--text", text, "--context", CONTEXT, "--json", out, "--seed", 2, "--device", "cpu", "--dense", "")
    result = invoke(*arguments, "--max-ppl-increase", 1000)
    assert result.exit_code == 0, result.output
    saved = json.loads(out.read_text())
    assert {name: value for name, value in saved.items() if name != "seconds"} == {
        name: value for name, value in json.loads(json.dumps(figures)).items() if name != "seconds"
    }
    for expected in (
        f"{figures['perplexity']['tq4']:.4f}",
        f"{figures['increase_percent']:+.2f} %",
        "passed",
        "all layers in TQ4",
    ):
        assert expected in result.stdout


def test_command_fails_above_the_limit(text: Path) -> None:
    result = invoke(MODEL, "--text", text, "--context", CONTEXT, "--windows", 1, "--max-ppl-increase", 0, "--device", "cpu")
    increase = run_verify(str(MODEL), text, CONTEXT, count=1, max_ppl_increase=0, device="cpu")["increase_percent"]
    assert result.exit_code == (1 if increase > 0 else 0)
    assert ("FAILED" in result.stdout) == (increase > 0)


def broken_json(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{", encoding="utf-8")
    return folder


def no_cache(folder: Path) -> Path:
    config = MambaConfig(vocab_size=4096, hidden_size=32, state_size=4, num_hidden_layers=1)
    return saved(MambaForCausalLM(config), folder)


def encoder(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return saved(BertLMHeadModel(BertConfig(vocab_size=4096, **sizes)), folder)


def not_a_number(folder: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(tiny(folder))
    model.lm_head.weight.data[7] = math.nan
    model.save_pretrained(folder)
    return folder


def latent(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ranks = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    config = DeepseekV3Config(vocab_size=4096, num_key_value_heads=2, first_k_dense_replace=1, **sizes, **ranks)
    return saved(DeepseekV3ForCausalLM(config), folder)


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "model: expected a folder or the name of a model on the hub, found no "),
        (empty, "model: expected a config.json in "),
        (broken_json, "model: "),
        (no_cache, r"model: expected one whose cache can be kept in 4 bits, .* \(MambaForCausalLM\) has linear attention"),
        (encoder, r"model: expected one with a cache of keys and values, .* \(BertLMHeadModel\) keeps none"),
        (lambda folder: tiny(folder, head_dim=8), "layer 0: expected an even head dimension from 16 to 256, got 8; leave it"),
        (not_a_number, "model: expected finite likelihoods, .* gives nan with an exact cache"),
        (latent, r"model: expected one whose cache can be kept in 4 bits, .* has multi-head latent attention"),
    ],
)
def test_a_model_that_cannot_be_verified_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    result = invoke(make(tmp_path / "model"), "--context", 8, "--windows", 1, "--device", "cpu")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.match(f"error: {message}", result.stderr), result.stderr
    assert result.stdout == ""


def test_what_cannot_be_packed_may_be_left_exact(text: Path, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", head_dim=8)
    found = run_verify(str(folder), text, 16, count=1, dense_layers=(0, 1), device="cpu")
    assert (found["increase_percent"], found["recommendation"]["dense_layers"]) == (0, [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "text: expected a file, found none at nowhere.txt"),
        (("--text", "short.txt", "--context", 100), "text: expected more tokens than the context of 100, got "),
        (("--text", "latin.txt"), "text: expected UTF-8 in latin.txt, got "),
        (("--context", 1), "context: expected at least 2 tokens, got 1"),
        (("--context", 2000), "context: expected at most the model's 1024 tokens, got 2000"),
        (("--windows", 0), "windows: expected at least 1, got 0"),
        (("--dense", "0,x"), "dense: expected numbers of layers between commas, got '0,x'"),
        (("--dense", "6"), "dense layers: expected some of the cached layers 0, 1, 2, 3, 4, 5, got 6"),
        (("--max-ppl-increase", -1), "max_ppl_increase: expected a percentage of at least 0, got -1.0"),
        (("--max-ppl-increase", "nan"), "max_ppl_increase: expected a percentage of at least 0, got nan"),
        (("--max-ppl-increase", "inf"), "max_ppl_increase: expected a percentage of at least 0, got inf"),
        (("--device", "tpu"), "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("def f(x):\n    return x\n", encoding="utf-8")
    Path("latin.txt").write_bytes("é".encode("latin-1") * 9)
    result = invoke(MODEL, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}"), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def copy_of_the_demo(folder: Path, **config: Any) -> Path:
    """The demo's model with a changed configuration."""
    folder.mkdir()
    for file in MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(before | config), encoding="utf-8")
    return folder


def pointer(folder: Path) -> Path:
    (copy_of_the_demo(folder) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    return folder


def cut(folder: Path) -> Path:
    copy_of_the_demo(folder)
    (folder / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:100_000])
    return folder


def few_tokens(folder: Path) -> Path:
    copy_of_the_demo(folder, vocab_size=100)
    tensors = load_file(MODEL / "model.safetensors")
    save_file({name: x[: 100 if len(x) == 4096 else None].clone() for name, x in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def without(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        copy_of_the_demo(folder)
        tensors = load_file(MODEL / "model.safetensors")
        kept = {name: x for name, x in tensors.items() if not name.endswith(names)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pointer, r"model: expected the file itself, .*model.safetensors is a pointer of git-lfs: git lfs pull"),
        (cut, "model: expected a causal language model, .* gives SafetensorError: "),
        (
            lambda folder: copy_of_the_demo(folder, intermediate_size=640),
            r"model: expected weights in the shapes of the configuration of .*: model.layers.0.mlp.* has \[.*\] in the file, "
            r"\[.*640.*\] in the model and 17 more",
        ),
        (few_tokens, "tokenizer: expected tokens below 100, the rows of the model's embedding, got "),
        (
            without("layers.1.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"),
            "model: expected weights for every parameter, the files of .* lack model.layers.0.self_attn.v_proj.* and 1 more",
        ),
    ],
)
def test_files_that_are_no_model_are_one_line(tmp_path: Path, text: Path, make: Any, message: str) -> None:
    result = invoke(make(tmp_path / "model"), "--text", text, "--context", 16, "--windows", 1, "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.match(f"error: {message}", result.stderr), result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTry another day."), "OutOfMemoryError: CUDA out of memory."),
        (MemoryError(), "MemoryError"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (RuntimeError("a kernel\nfailed"), "RuntimeError: a kernel"),
        (EOFError(), "EOFError"),
        (SystemExit(0), "SystemExit: 0"),
        (BrokenPipeError(32, "Broken pipe"), r"\[Errno 32\] Broken pipe"),
    ],
)
def test_whatever_raises_is_no_measurement(
    text: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    result = invoke(MODEL, "--text", text, "--context", 16, "--windows", 1, "--device", "cpu")
    assert result.exit_code == 2
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def test_without_the_extra_nothing_was_measured() -> None:
    program = "import sys; sys.modules['typer'] = None; from turboquant_vllm.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", program, "verify", "x"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "pip install turboquant-vllm[cli]" in run.stderr


def test_weights_that_the_model_has_no_place_for_are_named(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = copy_of_the_demo(tmp_path / "model", num_hidden_layers=5)
    result = invoke(folder, "--text", text, "--context", 16, "--windows", 1, "--max-ppl-increase", 1000, "--device", "cpu")
    assert result.exit_code == 0
    assert "note: the model has no place for 9 tensors of its files, such as model.layers.5." in result.stdout
    assert result.stderr == ""


# What is written


def unused(*_: object, **__: object) -> Any:
    raise AssertionError("a long run before anybody looked whether its result can be written")


@pytest.mark.parametrize(("name", "reason"), [("file/x.json", "ot a directory|File exists"), ("folder", "Is a directory")])
def test_a_result_that_cannot_be_written_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(verify, "run_verify", unused)
    result = invoke(MODEL, "--json", tmp_path / name)
    assert result.exit_code == 2
    assert re.fullmatch(rf"error: .*({reason}).*\n", result.stderr), result.stderr


def test_a_run_that_fails_leaves_the_earlier_result(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new/new.json"):
        assert invoke("nowhere/at/all", "--json", tmp_path / name).exit_code == 2
    assert (tmp_path / "old.json").read_text() == "old"
    assert not (tmp_path / "new" / "new.json").exists()


def test_what_was_measured_is_not_lost_with_the_file(figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: figures)
    result = invoke(MODEL, "--json", "/dev/full")
    assert result.exit_code == 2
    assert result.stderr == "error: [Errno 28] No space left on device\n"
    assert "recommendation" in result.stdout


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("there", [True, False])
def test_a_reader_who_left_changes_neither_file_nor_status(
    figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool, status: int, there: bool
) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: {**figures, "passed": passed})
    with open(write, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed if there else None)
        arguments = ["verify", str(MODEL), "--json", str(tmp_path / "verify.json")]
        assert cli._application()(arguments, standalone_mode=False) == status
    assert json.loads((tmp_path / "verify.json").read_text())["kl"] == figures["kl"]


def test_names_and_terminals_need_not_be_ascii(
    figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in letters that the terminal has not, and one in bytes that are no letters at all, with a code for an emoji."""
    name = "modèle-模型-\udce9 :smile: [red]"
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: {**figures, "model": name})
    monkeypatch.setattr(sys, "argv", ["turboquant", "verify", name, "--json", str(tmp_path / "résultat.json")])
    monkeypatch.setenv("COLUMNS", "300")
    for encoding, expected in (("ascii", r"mod\xe8le-\u6a21\u578b-\udce9 :smile: [red]"), ("utf-8", r"modèle-模型-\udce9 :s")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        assert expected in written.getvalue().decode(encoding)
    assert json.loads((tmp_path / "résultat.json").read_text(encoding="utf-8"))["model"] == name


def test_standard_output_that_cannot_be_written_is_an_error(
    figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: figures)
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli._application()(["verify", str(MODEL)], standalone_mode=False) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_the_default_scale_is_the_codecs() -> None:
    assert TQ4Format().key_scale == TQ4Format().value_scale == TQ4Codec(64).scale
