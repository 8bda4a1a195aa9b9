"""Others that read and write a file at the same time: threads, processes of any number, and whoever changes it in place."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from turboquant_vllm import TQ4Codec, TQ4Tensor, files


@pytest.fixture
def codec() -> TQ4Codec:
    return TQ4Codec(64, seed=3)


@pytest.fixture
def saved(codec: TQ4Codec, tmp_path: Path, generator: torch.Generator) -> tuple[Path, TQ4Tensor]:
    t = codec.compress(torch.randn(2, 5, 64, generator=generator))
    path = tmp_path / "keys.safetensors"
    codec.save(path, t)
    return path, t


def test_threads_save_to_one_path(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], generator: torch.Generator) -> None:
    path, t = saved
    contents = [t, codec.compress(torch.randn(500, 64, generator=generator))]

    def work(which: int) -> None:
        for _ in range(40):
            codec.save(path, contents[which % 2])
            found = codec.load(path)
            assert any(torch.equal(found.codes, x.codes) and torch.equal(found.norms, x.norms) for x in contents)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert os.listdir(path.parent) == [path.name]


def test_a_process_of_the_same_number_saves_to_the_same_path(
    codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, t = saved
    # As in another container that shares the folder: it writes its file from beginning to end while ours is half done.
    program = f"""
import os, sys, torch
os.getpid = lambda: {os.getpid()}
from turboquant_vllm import TQ4Codec
codec = TQ4Codec(64, seed=3)
codec.save(sys.argv[1], codec.compress(torch.ones(3, 64)))
"""
    write = files.save_file

    def interrupted(*args: Any, **options: Any) -> None:
        write(*args, **options)
        subprocess.run([sys.executable, "-c", program, str(path)], check=True)

    monkeypatch.setattr(files, "save_file", interrupted)
    codec.save(path, t)
    assert torch.equal(codec.load(path).codes, t.codes)
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_is_replaced_while_it_is_read(
    codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, t = saved
    other, read_entry = codec.compress(torch.ones(7, 64)), files._entry

    def interrupted(*args: Any) -> Any:
        codec.save(path, other)
        return read_entry(*args)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_entry", interrupted)
        assert torch.equal(codec.load(path).codes, t.codes)
    assert torch.equal(codec.load(path).codes, other.codes)


def test_what_was_read_is_no_part_of_the_file(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor]) -> None:
    path, t = saved
    again = codec.load(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(again.codes, t.codes)
    assert torch.equal(again.norms, t.norms)
    path.write_bytes(b"")  # what is mapped from a file ends with it
    assert torch.equal(again.codes, t.codes)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_new_files_are_for_whom_the_umask_says(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], mask: int) -> None:
    path, t = saved
    before = os.umask(mask)
    try:
        codec.save(path, t)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_longest_name(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor]) -> None:
    path, t = saved
    codec.save(path.with_name("n" * 255), t)
    assert torch.equal(codec.load(path.with_name("n" * 255)).codes, t.codes)
