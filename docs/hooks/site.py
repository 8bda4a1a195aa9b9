"""What the site has beyond the files in docs/: tours with their outputs, pages of the root folder, tests behind promises.

Tours are executed when the site is built; a cell that raises ends the build. With TOURS=0 in the environment they are shown
as they are, without outputs, which is quicker while one writes.
"""

from __future__ import annotations

import ast
import os
import re
import textwrap
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOURS = ROOT / "docs" / "tours"
# Pages that GitHub wants in the root folder.
ROOT_PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_PROMISE = re.compile(r"^- (.*?)((?:\s*`tests/\w+\.py::[\w:]+`)+)$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"\[([\w-]+\.md)\]\((?=\1)\1")  # links whose text is a file's name, as they are read beside the source
_running: dict[str, Future[tuple[str, dict[str, bytes]]]] = {}  # executions of tours, by their pages
_NAME = re.compile(r"`(tests/\w+\.py)::(?:(\w+)::)?(\w+)`")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made, and begin to execute the tours, which takes as long as all other pages."""
    from mkdocs.structure.files import File

    for name, source in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    pool = ThreadPoolExecutor()
    for path in sorted(TOURS.glob("*.ipynb")):
        _running[f"tours/{path.stem}.md"] = pool.submit(run_tour, path)
        files.append(File.generated(config, f"tours/{path.stem}.md", content=f"# {path.stem}\n"))
    pool.shutdown(wait=False)
    return files


def run_tour(path: Path) -> tuple[str, dict[str, bytes]]:
    """Execute a notebook; its text with all outputs in Markdown, and the pictures in it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; says which and what.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    book = nbformat.read(path, as_version=4)
    client = NotebookClient(
        book,
        timeout=120,
        kernel_name="python3",
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(ROOT)}},
    )
    if os.environ.get("TOURS") != "0":
        # Of a package for bars in notebooks, which need one package more.
        client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})
    text, resources = MarkdownExporter().from_notebook_node(book, {"output_files_dir": f"{path.stem}_files"})
    text += f"\n\nThis page is the notebook `docs/tours/{path.name}` with what it printed when the site was built.\n"
    return text, resources.get("outputs", {})


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Tours with their outputs; behind a promise, the tests that hold it to its word, folded; pages by their titles."""
    name = page.file.src_uri
    if name in _running:
        from mkdocs.structure.files import File

        markdown, pictures = _running.pop(name).result()
        for picture, content in pictures.items():
            files.append(File.generated(config, f"tours/{picture}", content=content))
    if name == "promises.md":
        markdown = _PROMISE.sub(_with_tests, markdown)
    return _NAMED.sub(lambda found: f"[{_title(found[1])}]({found[1]}", markdown)


@cache
def _title(name: str) -> str:
    """What a page is called: its first line."""
    path = ROOT / "docs" / name
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ") if path.is_file() else name


def promises(markdown: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Sentences of the page, each with path, class (or nothing) and name of its tests."""
    return [(found[1], _NAME.findall(found[2])) for found in _PROMISE.finditer(markdown)]


def _with_tests(found: re.Match[str]) -> str:
    promise, names = found.groups()
    lines = [f"- {promise}", ""]
    for path, group, name in _NAME.findall(names):
        lines += [f'    ??? test "`{name}`, {path}"', "", "        ```python"]
        lines += [f"        {line}" for line in source_of(path, group, name).splitlines()]
        lines += ["        ```", ""]
    return "\n".join(lines)


@cache
def _functions(path: str) -> dict[tuple[str, str], str]:
    """Source of all functions of a file, by class and name."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = {}
    for outer in ast.parse(text).body:
        group = outer.name if isinstance(outer, ast.ClassDef) else ""
        for node in outer.body if isinstance(outer, ast.ClassDef) else [outer]:
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                found[group, node.name] = textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))
    return found


def source_of(path: str, group: str, name: str) -> str:
    """Source of a test, its decorators included.

    Raises:
        KeyError: there is no such test.
    """
    return _functions(path)[group, name]
