"""Figures in README and in the tables of docs/performance.md are those of the result files that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rows_of(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / name).read_text())["rows"]
    return rows


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a row."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def tables_from_files() -> list[tuple[str, list[str], list[list[str]]]]:
    """Of docs/performance.md the first table behind each paragraph that begins with ``From `FILE.json```."""
    found = []
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for part in re.split(r"\n(?=(?:\*\*[^*\n]+\*\*, from|From) `[\w-]+\.json`)", text)[1:]:
        name = re.search(r"`([\w-]+\.json)`", part)
        table = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)
        if name and table and part[: table.start()].count("\n\n") <= 1:
            lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table[0].splitlines()]
            found.append((name[1], lines[0], lines[2:]))
    return found


def test_there_are_tables_to_look_at() -> None:
    assert len(tables_from_files()) >= 4


@pytest.mark.parametrize(("name", "header", "lines"), tables_from_files(), ids=lambda x: x if isinstance(x, str) else "")
def test_tables_of_the_performance_page(name: str, header: list[str], lines: list[list[str]]) -> None:
    known = [scale * number for row in rows_of(name) for number in numbers(row) for scale in (1, 1000)]
    looked_at = 0
    for cells in lines:
        for title, cell in zip(header[1:], cells[1:], strict=True):
            if "asked" in title:
                continue
            for number in re.findall(r"\d+\.\d+", re.sub(r"\(.*?\)", "", cell)):
                unit = 0.5 * 10.0 ** -len(number.split(".")[1])
                # The digit after a half may have been rounded in the file, too.
                assert any(abs(value - float(number)) <= 1.02 * unit for value in known), (cells[0], title, number)
                looked_at += 1
    assert looked_at > 5


def test_speeds_in_the_readme() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    calls = {row["id"]: row for row in rows_of("decode-h200.json") if row["scope"] == "call"}
    a, g, f = (f"{calls[name]['ratio']:.1f}" for name in "agf")
    slower = [100 * (row["offsets_ratio"] - 1) for row in calls.values() if row["offsets_ratio"] > 1.005]
    assert f"decodes 16 sequences of 32768 tokens {a} times as fast, 64 of 1024 {g} times, and one of 8192 {f} times" in text
    assert f"keys with offsets take {min(slower):.0f} to {max(slower):.0f} % more time" in text
    serving = rows_of("serving-h200.json")
    pages = [100 * (1 / row["ratio"] - 1) for row in serving if row["id"].startswith("paged-")]
    assert f"pages take {min(pages):.0f} to {max(pages):.0f} % longer than a dense cache" in text
    prompts = [row["ratio"] for row in serving if row["id"].startswith(("prefill", "chunk"))]
    assert f"long prompts are read at {min(prompts):.1f} to {max(prompts):.1f} times the speed of dense attention" in text


def test_vllm_in_the_readme() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = {row["id"]: row for row in rows_of("vllm-h200.json")}
    middle, full = rows["b32-8k"], rows["capacity-served"]
    assert f"takes {middle['against_bf16']:.2f} of bf16's time and {middle['against_fp8']:.2f} of fp8's" in text
    assert f"it gives {full['against_bf16']:.1f} times bf16's tokens a second" in text
    one, some = (f"{rows[name]['against_bf16']:.2f}" for name in ("short-1", "short-32"))
    assert f"one request at 1024 takes {one} of bf16's time, and 32 took {some} in that run" in text
    one, some = (f"{busy_ratio(rows[name]['step']):.2f}" for name in ("host-1", "host-32"))
    assert f"what the GPU runs takes {one} and {some} of bf16's" in text


def busy_ratio(step: dict[str, dict[str, float]], other: str = "bf16") -> float:
    """Of the time in which TQ4's kernels run in a step to that of another cache's."""
    return step["tq4"]["busy_ms"] / step[other]["busy_ms"]


@pytest.mark.parametrize(("name", "times"), [("vllm-h200.json", False), ("vllm-tp2-h200.json", True)])
def test_tables_of_hosts(name, times):
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = {row["id"]: row for row in rows_of(name)}
    for case, label in (("host-1", "1 x 1024"), ("host-32k", "1 x 32768"), ("host-32", "32 x 1024")):
        step = rows[case]["step"]
        parts = ("kernel_ms", "collective_ms", "host_ms") if times else ("busy_ms", "host_ms")
        cells = [", ".join(f"{step[cache][part]:.2f}" for part in parts) for cache in ("tq4", "bf16", "fp8")]
        ratios = [] if times else [f"{busy_ratio(step, other):.2f}" for other in ("bf16", "fp8")]
        assert f"| {' | '.join([label, *cells, *ratios])} |" in text


def test_quality_in_the_readme() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def span(name: str, digits: int) -> str:
        rows = [row for row in rows_of("quality-real.json") if row["model"] == "smollm2-135m" and row["format"] == name]
        found = sorted(row["increase_percent"] for row in rows)
        return f"{found[0]:.{digits}f} to {found[-1]:.{digits}f} %"

    assert f"SmolLM2-135M loses {span('tq4', 1)} of perplexity with scales from a text" in text
    assert f"{span('tq4-weights', 1)} with those of its weights" in text
    assert f"plain TQ4 costs {span('plain', 0)}, int4 per token {span('int4', 0)} and fp8 {span('fp8', 1)}" in text
