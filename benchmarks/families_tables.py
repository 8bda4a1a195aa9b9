"""The tables of docs/models.md, from the result file of families.py.

python benchmarks/families_tables.py checked    print one table; `--help` names them all
python benchmarks/families_tables.py --write    replace all tables of docs/models.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

from quality_tables import RESULTS, ROOT, fill, table

PAGE = ROOT / "docs" / "models.md"
WAYS = ("growing", "padded", "static", "chunks", "offsets")
# Largest relative difference of logits that counts as the same. Models compute norms, positions and, in their own attention,
# softmax in float32 whatever their dtype; 4 bits move the logits a thousand times as far.
SAME = {"float64": 1e-5, "float32": 1e-3}
Row = dict[str, Any]


@cache
def load() -> tuple[Row, list[Row]]:
    """Environment and rows of the result file."""
    content = json.loads((RESULTS / "families.json").read_text())
    return content["environment"], content["rows"]


def same(way: Row, dtype: str) -> bool:
    """Whether a way's difference is that of rounding."""
    return way.get("difference") is not None and way["difference"] < SAME[way.get("dtype", dtype)]


def differing(row: Row) -> list[str]:
    """The ways in which a family's logits differ by more than rounding."""
    return [way for way, found in row.get("ways", {}).items() if "difference" in found and not same(found, row["dtype"])]


def group(row: Row) -> str:
    """The table that a row belongs to."""
    if "ways" not in row:
        return "not_run" if row["built"] else "not_built"
    if differing(row):
        return "different"
    if not row["packed"]:
        return "dense"
    return "checked" if "difference" in row["ways"]["growing"] else "refused"


def _rows(name: str) -> list[Row]:
    return [row for row in load()[1] if group(row) == name]


def _said(found: Row) -> str:
    """The words with which a way was refused or could not be compared, without figures of a single family."""
    words = found.get("refused") or found.get("not_comparable") or ""
    return re.sub("(changes the logits) by .*", r"\1", words)


def _notes() -> dict[str, str]:
    """A number for all words with which a way was refused or could not be compared."""
    words: dict[str, str] = {}
    for row in load()[1]:
        for found in row.get("ways", {}).values():
            if said := _said(found):
                words.setdefault(said, f"[{len(words) + 1}]")
    return words


def _cell(found: Row) -> str:
    if said := _said(found):
        return _notes()[said]
    return "NaN" if found["difference"] is None else f"{found['difference']:.0e}"


def _dense(row: Row) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in row["dense"].items())


def _ways(name: str) -> str:
    lines = []
    for row in _rows(name):
        attention = "tq4" if row["attention_calls"] else "its own"
        layers = f"{row['packed']} of {row['packed'] + sum(row['dense'].values())}"
        cells = (_cell(row["ways"][way]) for way in WAYS)
        lines.append((row["model_type"], ", ".join(map(str, row["head_dim"])), layers, _dense(row), attention, *cells))
    return table(("family", "head dim", "layers in 4 bits", "dense layers", "attention", *WAYS), lines)


def summary() -> str:
    """How many families are in which group."""
    what = {
        "checked": "compared in all ways that transformers and the caches offer, the same up to rounding",
        "different": "different in some way",
        "dense": "run, but no layer is one that is kept in 4 bits",
        "refused": '"tq4" refuses; other attentions take the same cache',
        "not_run": "built, but not run with a cache",
        "not_built": "not built",
    }
    lines = [
        (f"[{name.replace('_', ' ')}](#{name.replace('_', '-')})", str(len(_rows(name))), said) for name, said in what.items()
    ]
    return table(("group", "families", "what"), [*lines, ("all", str(len(load()[1])), "")])


def checked() -> str:
    """Families whose logits are the same over 4 bits and over a dense cache of the same values."""
    return _ways("checked")


def different() -> str:
    """Families whose logits are not."""
    return _ways("different")


def dense() -> str:
    """Families of which nothing is packed."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in _rows("dense"):
        growing = row["ways"]["growing"]
        name = row["model_type"] + (f" {_cell(growing)}" if "refused" in growing else "")
        found[" and ".join(row["dense"]) or "no layers with a cache"].append(name)
    return table(("layers have", "families"), [(reason, ", ".join(names)) for reason, names in sorted(found.items())])


def refused() -> str:
    """Families that refuse attention "tq4", and what their own attention makes of the same cache."""
    lines = []
    for row in _rows("refused"):
        own = row["ways"]["decompressed"]
        lines.append((row["model_type"], row["ways"]["growing"]["refused"], _cell(own)))
    return table(("family", "words", "own attention"), lines)


def notes() -> str:
    """The words behind the numbers in brackets."""
    return table(("", "words"), [(number, f"`{words}`") for words, number in _notes().items()])


def not_run() -> str:
    """Families that were built and do not run with a cache."""
    return _why("not_run")


def not_built() -> str:
    """Families that were not built."""
    return _why("not_built")


def _why(name: str) -> str:
    return table(("family", "why"), [(row["model_type"], row["why"]) for row in _rows(name)])


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make for make in (summary, checked, different, dense, refused, not_run, not_built, notes)
}


def write() -> None:
    """Replace all tables of the page."""
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), TABLES, "families_tables"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(TABLES))
    parser.add_argument("--write", action="store_true", help="replace the tables of the page")
    args = parser.parse_args()
    if args.name:
        print(TABLES[args.name]())
    if args.write:
        write()


if __name__ == "__main__":
    main()
