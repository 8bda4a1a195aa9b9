"""The pages: code blocks run, commands exist, promises have tests, messages are those of the source, pictures and their words
show what result files hold."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from error_messages import MARK, SOURCE, raised, says

pytest.importorskip("matplotlib")

import pictures
import pictures_explained
import pictures_measured

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))])
# Their examples run where what they need is tested.
ELSEWHERE = {"huggingface.md": "test_hf_docs.py", "serving.md": "test_paged_attention.py", "README.md": "test_package.py"}


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def docstrings() -> list[tuple[str, str]]:
    """Docstrings of the package that have an example, by where they are."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if "```python" in text:
                    found.append((f"{path.relative_to(SOURCE)}:{getattr(node, 'name', '')}", text))
    return found


# Code


def examples() -> list[Any]:
    found = []
    for page in PAGES:
        if page.name not in ELSEWHERE:
            found += [(f"{page.name}-{i}", code) for i, code in enumerate(blocks(page.read_text(encoding="utf-8")))]
    for where, text in docstrings():
        inner = re.sub(r"^ +(?=```)", "", text, flags=re.MULTILINE)
        found += [(where, re.sub(r"^    ", "", code, flags=re.MULTILINE)) for code in blocks(inner)]
    return [pytest.param(code, id=name) for name, code in found]


@pytest.mark.parametrize("code", examples())
def test_every_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not torch.cuda.is_available():
        # Tensors without contents still check names, shapes and dtypes.
        code = code.replace('device="cuda"', 'device="meta"')
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_examples_that_run_elsewhere_do() -> None:
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / "tests" / test).read_text(encoding="utf-8")
    assert len(examples()) > 10


def test_every_block_is_of_a_kind_that_is_looked_at() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences) <= {"python", ""}, page.name
        assert fences.count("") == fences.count("python"), page.name


def commands() -> list[tuple[str, str]]:
    """Commands of this repository that pages name, on lines of their own or within text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"\n {6,}(?=[\[-])", " ", text)  # long usage lines go on
        for code in re.findall(r"^    (.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text):
            code = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", code.split("#")[0].strip())
            if re.match(r"(?:make|turboquant|bash) |(?:python3?|\.venv/bin/python) ", code):
                found.append((page.name, code))
    return found


def test_every_command_exists() -> None:
    typer = pytest.importorskip("typer")
    from turboquant_vllm import cli

    known = typer.main.get_command(cli._application()).commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    seen = set()
    for page, command in commands():
        program, first, *rest = command.split()
        seen.add((program, first))
        where = f"{page}: {command}"
        if program == "make":
            assert first in targets, where
        elif program == "turboquant":
            assert first in known, where
            options = {name for parameter in known[first].params for name in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", " ".join(rest))) <= options | {"--help"}, where
        elif first == "-m":
            assert importlib.util.find_spec(rest[0].removesuffix("`")) is not None, where
        elif not first.startswith("-"):
            path = ROOT / first
            assert path.is_file(), where
            if path.suffix == ".py":
                source = path.read_text(encoding="utf-8")
                for option in re.findall(r"(--[a-z-]+)", " ".join(rest)):
                    assert f'"{option}"' in source, where
    assert {("make", "demo"), ("turboquant", "verify"), ("python", "docs/pictures/pictures.py")} <= seen


# Promises and messages


def test_every_promise_has_its_tests() -> None:
    site = hooks()
    page = (DOCS / "promises.md").read_text(encoding="utf-8")
    promises = site.promises(page)
    assert len(promises) == len(re.findall(r"^- ", page, re.MULTILINE)) > 30
    for _, tests in promises:
        for path, group, name in tests:
            assert name.startswith("test_")
            assert f"def {name}(" in site.source_of(path, group, name)
    # Contracts are run by somebody.
    inherited = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for group in {group for _, tests in promises for _, group, _ in tests if group}:
        assert re.search(rf"class Test\w+\([^)]*\b{group}\b", inherited), group


def test_promises_unfold_to_their_tests() -> None:
    page = hooks()._PROMISE.sub(hooks()._with_tests, "- One.\n  `tests/test_docs.py::test_promises_unfold_to_their_tests`\n")
    assert page.startswith('- One.\n\n    ??? test "`test_promises_unfold_to_their_tests`, tests/test_docs.py"\n')
    assert "        def test_promises_unfold_to_their_tests() -> None:" in page


# What only a mistake of ours can raise.
INTERNAL = {
    f"params of {MARK} may hold the codes P q Q i I f d, got {MARK}",
    f"params {MARK} of {MARK} are (offset, size) {MARK}, the kernel takes {MARK}",
    f"{MARK} takes {MARK}, got {MARK} arguments: {MARK}",
    f"the compile log has no resource usage for {MARK}:\n{MARK}",
    "no home directory",
}


def test_troubleshooting_quotes_every_message_and_no_other() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [a or b for a, b in re.findall(r"^\| (?:``(.+?)``|`(.+?)`) \|", page, re.MULTILINE)]
    messages = [message for message in raised() if message.text not in INTERNAL]
    assert len(messages) > 200
    assert not [quote for quote in quoted if not any(says(quote, message.text) for message in messages)]
    assert not [message for message in messages if not any(says(quote, message.text) for quote in quoted)]
    assert {message.text for message in raised()} >= INTERNAL


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ('raise ValueError(f"x must be {a}{b}, got {c!r}")', f"x must be {MARK}, got {MARK}"),
        ('def _why_not(): return f"no {x}"', f"no {MARK}"),
        ('warnings.warn("a warning")', "a warning"),
        ('logger.warning("%s is %d", a, b)', f"{MARK} is {MARK}"),
        ('NEEDS = "this"\nraise ImportError(f"{NEEDS}; got {x}")', f"this; got {MARK}"),
    ],
)
def test_messages_are_found(source: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text(source)
    monkeypatch.setattr("error_messages.SOURCE", tmp_path)
    assert [message.text for message in raised()] == [text]
    assert says(text, text)
    assert not says(text, "some other words")


# Pictures and numbers


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_show_what_their_data_are(name: str) -> None:
    drawn = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert pictures.digest(pictures.PICTURES[name].show()) in drawn, "python docs/pictures/pictures.py --write"


def test_pages_say_what_the_pictures_show() -> None:
    said = set()
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert pictures.fill(page) == text, page.name
        said |= set(re.findall(r"pictures\.py (\w+) --caption", text))
    assert said >= set(pictures.PICTURES) - {"decode"}


def test_the_command_draws_all_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path)])
    runpy.run_path(str(DOCS / "pictures" / "pictures.py"), run_name="__main__")
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(pictures.PICTURES)
    assert capsys.readouterr().out.count(".svg") == len(pictures.PICTURES)
    for path in tmp_path.iterdir():
        committed = (DOCS / "pictures" / path.name).read_text(encoding="utf-8")
        assert re.findall(r"\b[0-9a-f]{64}\b", path.read_text(encoding="utf-8")) == re.findall(r"\b[0-9a-f]{64}\b", committed)


@pytest.mark.parametrize("name", ["steps", "quality", "decode", "roofline"])
def test_measured_pictures_follow_the_result_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = pictures.PICTURES[name].show
    before = show()

    def doubled(x: Any) -> Any:
        if isinstance(x, dict):
            keep = ("context", "batch", "layers", "shape", "decode")
            return {key: value if key in keep else doubled(value) for key, value in x.items()}
        return [doubled(y) for y in x] if isinstance(x, list) else 2 * x if isinstance(x, float) else x

    for path in pictures_measured.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(json.dumps(doubled(json.loads(path.read_text(encoding="utf-8")))))
    monkeypatch.setattr(pictures_measured, "RESULTS", tmp_path)
    after = show()
    assert pictures.digest(after) != pictures.digest(before)
    if name == "quality":
        for old, new in zip(before["models"], after["models"], strict=True):
            for a, b in zip(old["points"], new["points"], strict=True):
                assert b["kl"] == pytest.approx(2 * a["kl"], abs=1e-3)


def test_the_newest_file_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in pictures_measured.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(pictures_measured, "RESULTS", tmp_path)
    for name, later in (("hf-h200.json", "hf-another.json"), ("decode-contexts-h200.json", "decode-contexts-another.json")):
        content = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        content["environment"] |= {"gpu": "another", "date": "9999-01-01", "revision": "another"}
        (tmp_path / later).write_text(json.dumps(content))
    assert {pictures.PICTURES[name].show()["gpu"] for name in ("steps", "decode")} == {"another"}
    # What is known of an older file alone is not said of a newer one.
    assert "plain TQ4" not in pictures.caption("steps")
    assert "`hf-another.json`" in pictures.caption("steps")


def test_keys_of_the_picture_are_those_of_the_model() -> None:
    pytest.importorskip("transformers")
    from pictures_keys import measure

    kept, again = pictures_explained.offset(), measure()
    assert kept.keys() == again.keys()
    for name, values in kept.items():
        # Sums of a model's float32 differ by 1e-5. A code that this moves lies half way between two levels, where both are as
        # far off; an offset's coordinate, kept in 8 bits, may move by a step of some hundredths.
        torch.testing.assert_close(torch.tensor(values).double(), torch.tensor(again[name]).double(), atol=0.05, rtol=0.02)


# Of measurements: in these pages they stand between the comments of a command that makes them.
UNITS = r"%|x\b|times\b|ms\b|us\b|milliseconds|microseconds|seconds\b|nats\b|GB|TB|tokens/s|tokens a second"
GENERATED = r"<!-- python (?:docs|benchmarks)/.*? -->\n.*?<!-- end -->"


@pytest.mark.parametrize(
    "page", ["index.md", "kernels.md", "how.md", "formats.md", "promises.md", "not-claimed.md", "troubleshooting.md"]
)
def test_no_figure_is_written_by_hand(page: str) -> None:
    text = re.sub(GENERATED, "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert not re.findall(rf"\d[\d.,]*\s?(?:{UNITS})", text)


def test_pictures_are_for_narrow_pages() -> None:
    for name in pictures.PICTURES:
        head = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")[:600]
        width = float(re.search(r'width="([\d.]+)pt"', head)[1])  # type: ignore[index]
        assert 200 < width < 400


# Reference, tours


def public_names(module: str) -> set[str]:
    """What a module's ``__all__`` says, without importing it."""
    path = SOURCE / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def test_every_public_name_has_its_place_in_the_reference() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("api/*.md"))
    shown = set(re.findall(r"^::: (\S+)", pages, re.MULTILINE))
    names = {f"turboquant_vllm.{name}" for name in public_names("") - {"__version__"}}
    names |= {f"turboquant_vllm.triton.flash_attention{kind}" for kind in ("_tq4_kv", "_tq4", "")}
    for module in ("hf", "hf.calibration", "verify", "demo"):
        names |= {f"turboquant_vllm.{module}.{name}" for name in public_names(module)}
    names |= {f"turboquant_vllm.{module}.run_{module}" for module in ("bench", "doctor")}
    assert names <= shown


def test_tours_hold_no_outputs_and_compile() -> None:
    tours = sorted(DOCS.glob("tours/*.ipynb"))
    assert len(tours) == 2
    for path in tours:
        book = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code), path.name
        compile("\n".join("".join(cell["source"]) for cell in code), path.name, "exec")


def test_every_page_has_its_place_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in [*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *DOCS.glob("tours/*.ipynb")]:
        page = path.relative_to(DOCS).with_suffix(".md").as_posix()
        assert re.search(rf"[ :]{re.escape(page)}$", menu, re.MULTILINE), page
