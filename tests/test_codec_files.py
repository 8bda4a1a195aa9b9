"""Saving and loading compressed vectors: round trips, everything that must be refused, and failing writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saved_codec import Metadata, Tensors, checksum, header, read, rewrite, rewrite_header
from turboquant_vllm import TQ4Codec, TQ4Tensor


@pytest.fixture
def codec() -> TQ4Codec:
    return TQ4Codec(64, seed=3)


@pytest.fixture
def saved(codec: TQ4Codec, tmp_path: Path, generator: torch.Generator) -> tuple[Path, TQ4Tensor]:
    t = codec.compress(torch.randn(2, 5, 64, generator=generator))
    path = tmp_path / "keys.safetensors"
    codec.save(path, t)
    return path, t


# Round trips


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("lead", [(), (0,), (7,), (2, 0, 3), (2, 3, 4)])
def test_round_trip(tmp_path: Path, generator: torch.Generator, head_dim: int, lead: tuple[int, ...]) -> None:
    codec = TQ4Codec(head_dim)
    t = codec.compress(torch.randn(*lead, head_dim, generator=generator))
    codec.save(tmp_path / "t", t)
    again = TQ4Codec(head_dim).load(str(tmp_path / "t"))
    assert isinstance(again, TQ4Tensor)
    assert torch.equal(again.codes, t.codes)
    assert torch.equal(again.norms, t.norms)
    assert torch.equal(codec.decompress(again), codec.decompress(t))


def test_views_of_one_buffer_can_be_saved(codec: TQ4Codec, tmp_path: Path, generator: torch.Generator) -> None:
    page = torch.randint(256, (10, 36), generator=generator, dtype=torch.uint8)
    page[:, 32:] = torch.rand(10, 1, generator=generator).view(torch.uint8)
    t = TQ4Tensor(page[::2, :32], page[::2, 32:].view(torch.float32))
    codec.save(tmp_path / "t", t)
    again = codec.load(tmp_path / "t")
    assert torch.equal(again.codes, t.codes)
    assert torch.equal(again.norms, t.norms[:, 0])


def test_what_was_loaded_can_be_saved_over_its_file(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor]) -> None:
    path, t = saved
    again = codec.load(path)
    codec.save(path, TQ4Tensor(again.codes[:1], again.norms[:1]))
    assert torch.equal(again.codes, t.codes)
    assert torch.equal(codec.load(path).codes, t.codes[:1])


def test_file_is_described_by_its_header(saved: tuple[Path, TQ4Tensor]) -> None:
    tensors, metadata = read(saved[0])
    assert {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()} == {
        "codes": (torch.uint8, (2, 5, 32)),
        "norms": (torch.float32, (2, 5)),
        "centroids": (torch.float32, (16,)),
        "rotation": (torch.float32, (64, 64)),
    }
    assert (metadata["format"], metadata["version"]) == ("turboquant-tq4", "2")
    assert json.loads(metadata["codec"]) == {"head_dim": 64, "seed": 3, "rotation_kind": "hadamard"}
    assert metadata["sha256"] == checksum(tensors, metadata)


def test_files_of_version_1_are_read(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor]) -> None:
    path, t = saved
    tensors, metadata = read(path)
    metadata.update(version="1", sha256=checksum(tensors))
    save_file(tensors, path, metadata)
    again = codec.load(path)
    assert torch.equal(again.codes, t.codes)
    assert torch.equal(again.norms, t.norms)
    tensors["codes"][0, 0, 0] ^= 1
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="expected checksum"):
        codec.load(path)


def test_haar_rotation_may_differ_in_its_last_bits(tmp_path: Path) -> None:
    writer, reader = TQ4Codec(80), TQ4Codec(80)
    t = writer.compress(torch.ones(80))
    writer.save(tmp_path / "t", t)
    reader.rotation = torch.nextafter(reader.rotation, torch.tensor(float("inf")))
    assert not torch.equal(reader.rotation, writer.rotation)
    assert torch.equal(reader.load(tmp_path / "t").codes, t.codes)
    reader.rotation = writer.rotation + 1e-4
    with pytest.raises(ValueError, match="expected the rotation of this codec"):
        reader.load(tmp_path / "t")


# Refusals


def test_missing_file(codec: TQ4Codec, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        codec.load(tmp_path / "nowhere")


@pytest.mark.parametrize("contents", [b"", b"no safetensors", b"\xff" * 100, b"PK\x03\x04" + bytes(200)])
def test_file_of_another_kind(codec: TQ4Codec, tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "t").write_bytes(contents)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        codec.load(tmp_path / "t")


@pytest.mark.parametrize("kept", [4, 100, 1000, -1])
def test_truncated_file(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], kept: int) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        codec.load(path)


@pytest.mark.parametrize("name", ["codes", "norms", "centroids", "rotation"])
def test_flipped_bit(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], generator: torch.Generator, name: str) -> None:
    path, _ = saved
    raw = bytearray(path.read_bytes())
    header_length = int.from_bytes(raw[:8], "little")
    start, stop = json.loads(raw[8 : 8 + header_length])[name]["data_offsets"]
    offset = int(torch.randint(start, stop, (), generator=generator))
    raw[8 + header_length + offset] ^= 1 << int(torch.randint(8, (), generator=generator))
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="expected checksum"):
        codec.load(path)


def test_every_flipped_bit_of_the_header_is_noticed(tmp_path: Path) -> None:
    codec = TQ4Codec(16)
    codec.save(tmp_path / "t", codec.compress(torch.ones(2, 16)))
    raw = (tmp_path / "t").read_bytes()
    for place in range(8 + int.from_bytes(raw[:8], "little")):
        for bit in range(8):
            changed = bytearray(raw)
            changed[place] ^= 1 << bit
            (tmp_path / "t").write_bytes(changed)
            with pytest.raises(ValueError, match="expected"):
                codec.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["codes"].update(dtype="F99"), "got tensor 'codes' of dtype 'F99'"),
        (lambda h: h["codes"].update(dtype=["U8"]), r"got tensor 'codes' of dtype \['U8'\]"),
        (lambda h: h["codes"].update(dtype="F32"), r"got tensor 'codes', torch.float32 \[2, 5, 32\], in bytes"),
        (lambda h: h["codes"].update(shape=[2, 5, -32]), r"got tensor 'codes' with shape \[2, 5, -32\]"),
        (lambda h: h["codes"].update(shape=[2, 5, 32.0]), r"got tensor 'codes' with shape \[2, 5, 32.0\]"),
        (lambda h: h["codes"].update(shape=[2**62, 2**62]), "got tensor 'codes', torch.uint8"),
        (lambda h: h["codes"].update(shape=320), "got tensor 'codes' with shape 320"),
        (lambda h: h["codes"].update(data_offsets=[0]), "got tensor 'codes' with data_offsets"),
        (lambda h: h["codes"].update(data_offsets=h["rotation"]["data_offsets"]), "got tensor '(codes|rotation)', torch"),
        (lambda h: h["codes"].update(more=1), "got tensor 'codes' described by"),
        (lambda h: h.update(codes=7), "got tensor 'codes' described by 7"),
        (lambda h: h.update(__metadata__=[]), r"got metadata \[\]"),
        (lambda h: h["__metadata__"].update(version=2), "got metadata .*'version': 2"),
        (lambda h: [h.pop(name) for name in list(h)], "got .* bytes of tensors where 0 were announced"),
    ],
)
def test_header_that_is_none(
    codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path, _ = saved
    rewrite_header(path, change)
    with pytest.raises(ValueError, match=f"expected a safetensors file, {message}"):
        codec.load(path)


def test_bytes_behind_the_last_tensor(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor]) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .* bytes of tensors"):
        codec.load(path)


def test_folders_are_no_files(codec: TQ4Codec, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        codec.load(tmp_path)


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        (lambda: TQ4Codec(128, seed=3), "expected head_dim 128, got 64"),
        (lambda: TQ4Codec(64, seed=4), r"this codec \(seed 4, hadamard\), got another \(seed 3, hadamard\)"),
        (lambda: TQ4Codec(64, seed=3, rotation="haar"), r"\(seed 3, haar\), got another \(seed 3, hadamard\)"),
    ],
)
def test_file_of_another_codec(saved: tuple[Path, TQ4Tensor], reader: Callable[[], TQ4Codec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader().load(saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(format="other"), "expected format 'turboquant-tq4', got 'other'"),
        (lambda t, m: m.pop("format"), "expected format 'turboquant-tq4', got None"),
        (lambda t, m: m.update(version="3"), "expected format version 1 or 2, got 3"),
        (lambda t, m: m.pop("version"), "expected format version 1 or 2, got None"),
        (lambda t, m: m.pop("codec"), "expected head_dim, seed and rotation_kind, got None"),
        (lambda t, m: m.update(codec="{"), "expected head_dim, seed and rotation_kind, got '{'"),
        (lambda t, m: m.update(codec="[64]"), "expected head_dim, seed and rotation_kind"),
        (lambda t, m: m.update(codec='{"head_dim": 64, "seed": 3}'), "expected head_dim, seed and rotation_kind"),
        (lambda t, m: m.update(codec="[" * 100_000), "expected head_dim, seed and rotation_kind"),
        (lambda t, m: header(m, head_dim=64.0), "expected head_dim to be a whole number that is not negative, got 64.0"),
        (lambda t, m: header(m, seed=-1), "expected seed to be a whole number that is not negative, got -1"),
        (lambda t, m: header(m, seed="3"), "expected seed to be a whole number that is not negative, got '3'"),
        (lambda t, m: header(m, seed=True), "expected seed to be a whole number that is not negative, got True"),
        (lambda t, m: header(m, rotation_kind="other"), "expected rotation_kind hadamard or haar, got 'other'"),
        (lambda t, m: header(m, rotation_kind=["haar"]), r"expected rotation_kind hadamard or haar, got \['haar'\]"),
        (lambda t, m: header(m, more=1), "expected head_dim, seed and rotation_kind, got .*more"),
        (lambda t, m: t.pop("norms"), r"expected codes, norms, centroids and rotation, got \['centroids', 'codes', 'rot"),
        (lambda t, m: t.update(more=torch.zeros(1)), "expected codes, norms, centroids and rotation, got"),
        (lambda t, m: t.update(codes=t["codes"][..., :31].clone()), r"codes torch.uint8 \[2, 5, 32\], got .* \[2, 5, 31\]"),
        (lambda t, m: t.update(codes=t["codes"].int()), r"expected codes torch.uint8 \[2, 5, 32\], got torch.int32"),
        (lambda t, m: t.update(codes=t["codes"][0, 0, 0].clone()), r"expected codes torch.uint8 \[2, 5, 32\], got .* \[\]"),
        (lambda t, m: t.update(norms=t["norms"][:, :4].clone()), r"expected codes torch.uint8 \[2, 4, 32\], got"),
        (lambda t, m: t.update(norms=t["norms"].double()), "expected norms torch.float32 .* got torch.float64"),
        (lambda t, m: t.update(centroids=torch.zeros(15)), r"expected centroids torch.float32 \[16\], got .* \[15\]"),
        (lambda t, m: t.update(centroids=-t["centroids"]), "expected the centroids of this codec, got others"),
        (lambda t, m: t.update(rotation=t["rotation"][:1].clone()), r"rotation torch.float32 \[64, 64\], got .* \[1, 64\]"),
        (lambda t, m: t.update(rotation=torch.full((64, 64), float("nan"))), "expected the rotation of this codec"),
    ],
)
def test_changed_contents(
    codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], change: Callable[[Tensors, Metadata], object], message: str
) -> None:
    path, _ = saved
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        codec.load(path)
    assert str(path) in str(caught.value)


def test_rewriting_alone_changes_nothing(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor]) -> None:
    path, t = saved
    rewrite(path, lambda tensors, metadata: None)
    assert torch.equal(codec.load(path).codes, t.codes)


def test_no_pickle_is_ever_read(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor]) -> None:
    path, t = saved
    torch.save(tuple(t), path)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        codec.load(path)


# Failing writes


def test_failing_replace_leaves_the_old_file(
    codec: TQ4Codec, saved: tuple[Path, TQ4Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, t = saved

    def fail(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no"):
            codec.save(path, TQ4Tensor(t.codes[:1], t.norms[:1]))
    assert os.listdir(path.parent) == [path.name]
    assert torch.equal(codec.load(path).codes, t.codes)


def test_disk_that_fills_up_leaves_the_old_file(codec: TQ4Codec, saved: tuple[Path, TQ4Tensor]) -> None:
    path, t = saved
    program = """
import resource, sys, torch
from turboquant_vllm import TQ4Codec
codec = TQ4Codec(64, seed=3)
t = codec.compress(torch.randn(10000, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    codec.save(sys.argv[1], t)
except OSError as error:
    print("refused:", error)
"""
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"refused: {path}: cannot be written")
    assert os.listdir(path.parent) == [path.name]
    assert torch.equal(codec.load(path).codes, t.codes)


def test_folder_that_is_missing(codec: TQ4Codec, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be written"):
        codec.save(tmp_path / "missing" / "t", codec.compress(torch.ones(64)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file/t", "folder", ""])
def test_places_where_no_file_can_be(codec: TQ4Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot be written"):
        codec.save(where, codec.compress(torch.ones(64)))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_only_compressed_tensors_of_this_codec_are_saved(codec: TQ4Codec, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="t must be a TQ4Tensor, got Tensor"):
        codec.save(tmp_path / "t", torch.zeros(3, 64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"t.codes must have shape \[40\], got \[32\]"):
        TQ4Codec(80).save(tmp_path / "t", codec.compress(torch.ones(64)))
    assert not list(tmp_path.iterdir())
