"""Make the tables of docs/formats-study.md and docs/calibration.md from the result files of quality_keys.py.

python benchmarks/quality_keys_tables.py rules      print one table; `--help` names them all
python benchmarks/quality_keys_tables.py --write    replace all tables of the pages
"""

from __future__ import annotations

import argparse
from typing import Any

from quality_tables import ROOT, Row, fill, load, table

PAGES = [ROOT / "docs" / name for name in ("formats-study.md", "calibration.md")]
_MODELS = {"smollm2-135m": "SmolLM2", "gemma3-270m": "Gemma 3"}


def _prompts(name: str, **wanted: Any) -> list[Row]:
    """Rows of one format in a result file, one for each context."""
    fields = {"group": 64, "scales": "text", "basis": "rotated", "exact": False, "values": False, "format": "keys"} | wanted
    return [row for row in load(name)[1] if all(row.get(field) == value for field, value in fields.items())]


def _line(title: str, rows: list[Row]) -> tuple[str, ...]:
    kl = [f"{row['kl']:.4f}" for row in rows]
    return (title, *kl, *(f"{row['increase_percent']:+.1f} %" for row in rows[-1:]))


_FP8: Row = {"format": "fp8", "group": None, "scales": None, "basis": None, "exact": None, "values": None}
_PLAIN: Row = {"format": "plain", "group": 0, "scales": "ones"}


def prompts() -> str:
    """Formats of keys, and of keys and values."""
    lines = [
        ("fp8 keys and values", _FP8),
        ("plain TQ4 keys", _PLAIN),
        ("groups of 64", {}),
        ("groups of 128", {"group": 128}),
        ("64, no scales", {"scales": "ones"}),
        ("64, offsets and outlying keys rounded before the rotation", {"basis": "model"}),
        ("64, offsets and outlying keys not rounded", {"exact": True}),
        ("128, rounded before the rotation", {"group": 128, "basis": "model"}),
        ("128, not rounded", {"group": 128, "exact": True}),
        ("plain TQ4 keys and values", {**_PLAIN, "values": True}),
        ("keys in groups of 64, values", {"values": True}),
        ("keys in groups of 128, values", {"group": 128, "values": True}),
    ]
    rows = [_line(title, _prompts("keys-h200", **wanted)) for title, wanted in lines]
    return table(("", "56", "512", "2048", "perplexity at 2048"), rows)


def scales() -> str:
    """Ways to find channel scales."""
    lines = [
        ("none", "ones"),
        ("text, groups' means and outlying keys taken away", "text"),
        ("text, groups' means taken away", "text, groups"),
        ("text, the mean of all keys taken away", "text, all keys"),
        ("text, both channels of a RoPE pair alike", "text, halves averaged"),
        ("the first of 8 windows of that text (2048 tokens)", "text, one window"),
        ("weights, both channels of a RoPE pair alike", "weights, halves averaged"),
    ]
    rows = [_line(title, _prompts("keys-h200", scales=name)) for title, name in lines]
    return table(("scales", "56", "512", "2048", "perplexity at 2048"), rows)


def _rules(model: str, prompt: int, step: int) -> list[Row]:
    wanted = {"model": model, "prompt": prompt, "step": step}
    return [row for row in load("keys-rules")[1] if all(row[field] == value for field, value in wanted.items())]


def _attention(rows: list[Row], **rule: Any) -> str:
    """KL in thousandths of a nat under a rule."""
    fields = {"prior": "rest", "all_keys": False, "again": [], "count": 1e9} | rule
    found = [row["attention_kl"] for row in rows if row["rule"] == fields]
    return f"{1000 * found[0]:.2f}" if found else ""


def _whole(rows: list[Row]) -> str:
    return f"{1000 * next(row['attention_kl'] for row in rows if row['rule'] == 'whole'):.2f}"


def rules() -> str:
    """Groups that begin with n keys behind another group."""
    rows = []
    for model, name in _MODELS.items():
        for step in (1, 4, 8, 16, 32):
            if found := _rules(model, 512, step):
                # A lone key is the outlying one: whatever the group before counts as, the offset is its mean.
                weights = [_attention(found, count=count) if step > 1 else "" for count in (0, 2, 4, 8, 16, 32)]
                if step == 1:
                    weights[0] = _attention(found, prior="zero", count=0)
                copied = _attention(found, prior="offset")
                rows.append((f"{name}, n = {step}", *weights, _attention(found), copied, _whole(found)))
    header = ("weight of the group before", "0", "2", "4", "8", "16", "32", "all", "its offset alone", "whole groups")
    return table(header, rows)


def first() -> str:
    """The first group of a sequence."""
    slots = [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), tuple(range(1, 9)), (8,), (16,)]
    rows = []
    for model, name in _MODELS.items():
        for prompt in (1, 2, 4, 8, 20):
            if found := _rules(model, prompt, 1):
                rows.append((f"{name}, {prompt}", *(_attention(found, again=list(x)) for x in slots), _whole(found)))
    header = ("tokens of the prompt", "never", "1", "1, 2", "1 to 3", "1 to 4", "1 to 8", "8", "16", "whole group")
    return table(header, rows)


def bias() -> str:
    """Planted biases."""
    found = [row for row in load("keys-bias")[1] if row.get("basis") != "model"]
    kinds: dict[tuple[str, str], list[str]] = {}
    for row in found:
        scaled = {"ones": "", "text": ", scales"}[row.get("scales", "ones")]
        title = (
            f"groups of {row['group']}{scaled}"
            if row["format"] == "keys"
            else {"fp8": "fp8", "plain": "plain TQ4"}[row["format"]]
        )
        kinds.setdefault((title, ""), []).append(f"{row['error']:.2f}")
    titles = {"none": "none", "slow": "slow", "fast": "fast"}
    columns = dict.fromkeys((row["bias"], tuple(row["channels"])) for row in found)
    header = ("keys", *(f"{titles[name]} {', '.join(map(str, channels))}".strip() for name, channels in columns))
    return table(header, [(title, *values) for (title, _), values in kinds.items()])


TABLES = {"prompts": prompts, "scales": scales, "rules": rules, "first": first, "bias": bias}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(TABLES))
    parser.add_argument("--write", action="store_true", help="replace the tables of the pages")
    args = parser.parse_args()
    if args.name:
        print(TABLES[args.name]())
    if args.write:
        for page in PAGES:
            page.write_text(fill(page.read_text(encoding="utf-8"), TABLES, "quality_keys_tables"), encoding="utf-8")


if __name__ == "__main__":
    main()
