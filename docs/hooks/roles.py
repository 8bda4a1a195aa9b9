"""How docstrings are read for the site.

They name other objects as Sphinx does (`:func:` and the like): links where there is a page. And where arguments share a line
(``k, v: ...``), each gets it.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`")
_SHARED = re.compile(r"^( *)(\w+(?:, \w+)+)(: .*\n(?:\1 +.*\n|\n(?=\1 ))*)", re.MULTILINE)


def _link(found: re.Match[str]) -> str:
    name = found[1]
    return f'<autoref optional identifier="{name}"><code>{name.removeprefix("turboquant_vllm.")}</code></autoref>'


def _each(found: re.Match[str]) -> str:
    indent, names, text = found.groups()
    return "".join(f"{indent}{name}{text}" for name in names.split(", "))


def read(docstring: str) -> str:
    """The docstring as the site's parser understands it."""
    before, args, rest = docstring.partition("Args:\n")
    arguments, end, after = rest.partition("\n\n")
    return _ROLE.sub(_link, before + args + _SHARED.sub(_each, arguments + "\n") + end.removeprefix("\n") + after)


class Roles(Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = read(obj.docstring.value)
