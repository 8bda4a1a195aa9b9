"""What the package says when something is wrong, read from its source: constant text, and a mark for what is filled in."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src" / "turboquant_vllm"
MARK = "…"
_REASONS = ("why_not", "no_memory")  # functions that return what others raise


class Message(NamedTuple):
    """A message and where it is raised."""

    text: str
    where: str


def template(node: ast.expr, names: dict[str, str]) -> str:
    """Text of an expression that makes a string; a mark for each part that is neither written there nor one of ``names``."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name):
        return names.get(node.id, MARK)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, names) if isinstance(node.value, ast.Name) else MARK
    if isinstance(node, ast.JoinedStr):
        return re.sub(f"{MARK}+", MARK, "".join(template(part, names) for part in node.values))
    return MARK


def raised() -> list[Message]:
    """All errors, warnings and reasons of the package that have a text of their own."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        where = path.relative_to(SOURCE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        }
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        reasons = {node for f in functions if f.name.lstrip("_").startswith(_REASONS) for node in ast.walk(f)}
        for node in ast.walk(tree):
            if node in reasons and isinstance(node, ast.Return) and node.value is not None:
                text = template(node.value, names)
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = template(node.exc.args[0], names)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("warn", "warning") and node.args:
                text = re.sub("%[sd]", MARK, template(node.args[0], names))
            else:
                continue
            if text.strip(f"{MARK} "):
                found.append(Message(text, f"{where}:{node.lineno}"))
    return found


def says(quoted: str, message: str) -> bool:
    """Whether a page's quotation, with marks for any text, stands for a message of the source."""
    pattern = ".*".join(re.escape(part) for part in quoted.split(MARK))
    return re.fullmatch(pattern, message, re.DOTALL) is not None
