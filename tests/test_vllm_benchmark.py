"""What the benchmark of vLLM writes: rows of this run, and those of an earlier one beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.fixture
def results(tmp_path):
    vllm_serving = pytest.importorskip("vllm_serving")
    return vllm_serving.Results(tmp_path / "new.json", {})


def measured(results, case, tq4, bf16):
    for cache, value in (("tq4", tq4), ("bf16", bf16)):
        results.add(case, cache, {"value": value})


def test_rows_of_an_earlier_run_stay_and_say_of_which_revision_they_are(results, tmp_path):
    earlier = [{"id": "b32-8k", "against_bf16": 9.0}, {"id": "capacity", "revision": "a"}, {"id": "capacity-served"}]
    (tmp_path / "old.json").write_text(json.dumps({"environment": {"revision": "b"}, "rows": earlier}))
    results.keep(tmp_path / "old.json")
    measured(results, "b32-8k", 3.0, 6.0)
    assert [(row["id"], row.get("revision")) for row in results.rows()] == [
        ("b32-8k", None), ("capacity", "a"), ("capacity-served", "b"),
    ]  # fmt: skip
    assert results.rows()[0]["against_bf16"] == 0.5


def test_a_case_that_failed_replaces_an_earlier_row(results, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"environment": {"revision": "b"}, "rows": [{"id": "short-1"}]}))
    results.keep(tmp_path / "old.json")
    results.add("short-1", "tq4", {"error": "out of memory"})
    (row,) = results.rows()
    assert row["errors"] == {"tq4": "out of memory"}
    assert "revision" not in row
