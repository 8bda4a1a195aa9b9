"""The sweep over model families behind docs/models.md: single families, what counts as the same, the page."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")

import transformers
from packaging.version import Version

import families
import families_tables
from families_tables import TABLES, WAYS, differing, group
from hf_models import one_thread  # noqa: F401
from quality_tables import fill

# Releases before 5.24 give it a cache of its own.
MAMBA = "dense" if Version(transformers.__version__) >= Version("5.24") else "not_run"


@pytest.mark.filterwarnings("ignore:.*keeps nothing in 4 bits")
@pytest.mark.parametrize(("name", "found_in"), [("llama", "checked"), ("falcon", "refused"), ("mamba", MAMBA)])
def test_a_family(name, found_in):
    (kind,) = families.kinds([name])
    row = families.measure_apart(kind)
    assert (group(row), differing(row)) == (found_in, [])
    if name == "llama":
        assert (row["packed"], row["dense"], row["head_dim"], row["dtype"]) == (2, {}, [32], "float64")
        assert row["moved"] > 0.01  # 4 bits show in the logits, so the cache is read
        assert list(row["ways"]) == list(WAYS)
        assert all(way["difference"] < 1e-5 for way in row["ways"].values())
        assert row["attention_calls"]
    if name == "falcon":
        assert row["ways"]["growing"] == {"refused": "KeyError: 'tq4'"}
        assert row["ways"]["decompressed"] == {"difference": 0.0}


def test_a_family_that_takes_too_long_is_ended():
    (kind,) = families.kinds(["llama"])
    assert families.measure_apart(kind, 0.01)["why"] == "took more than 0 s"


@pytest.mark.parametrize("difference", [1e-4, None])
def test_a_difference_is_shown(difference):
    row = {"built": True, "dtype": "float64", "packed": 2, "ways": {"growing": {"difference": difference}}}
    assert (group(row), differing(row)) == ("different", ["growing"])


def test_every_family_has_a_row():
    assert {row["model_type"] for row in families_tables.load()[1]} >= {"llama", "qwen3", "gemma3_text", "bloom", "mamba"}
    assert sum(line.startswith("| ") for name in ("checked", "different") for line in TABLES[name]().splitlines()) > 100


def test_families_that_were_checked_read_what_is_in_4_bits():
    rows = [row for row in families_tables.load()[1] if group(row) == "checked"]
    assert all(row["moved"] > 1e-4 for row in rows)


def test_the_page_holds_what_its_commands_print():
    page = families_tables.PAGE.read_text(encoding="utf-8")
    assert list(TABLES) == [line.split()[3] for line in page.splitlines() if line.startswith("<!-- python")]
    assert fill(page, TABLES, "families_tables") == page
    command = [sys.executable, families_tables.__file__, "refused"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout in page
