"""Channel scales: what they are worth, how they are counted, and the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turboquant_vllm import TQ4Codec, __version__
from turboquant_vllm.calibration import (
    FILE_NAME,
    KeyStatistics,
    channel_scales,
    find_key_scales,
    load_key_scales,
    model_identity,
    save_key_scales,
)
from turboquant_vllm.files import read_tensors, write_tensors

Randn = Callable[..., torch.Tensor]


def config(**changes: Any) -> Any:
    given = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    }
    return SimpleNamespace(**{**given, **changes})


def test_scales_make_the_error_of_scores_smallest(randn: Randn) -> None:
    """Against every other w near by, in the error that codes make: spread evenly over the channels of w * k."""
    squares, variances = randn(3, 64).exp().double(), randn(3, 64).exp().double()
    w = channel_scales(squares, variances)
    assert (w.dtype, w.shape) == (torch.float32, (3, 64))

    def error(w: torch.Tensor) -> torch.Tensor:
        w = w.double()
        return (squares / w.square()).sum(-1) * (w.square() * variances).sum(-1)

    for step in (0.01, 0.1, 1.0):
        assert (error(w * (step * randn(3, 64)).exp()) >= error(w) * (1 - 1e-5)).all()  # 1e-5: the floors of a thousandth
    assert (error(w) < 0.9 * error(torch.ones_like(w))).all()


def test_scales_lower_the_error_of_scores_through_the_codec(randn: Randn) -> None:
    key, query = randn(4000, 64) * randn(64).exp(), randn(500, 64) * randn(64).exp()
    w = channel_scales(query.square().mean(0), key.var(0))
    codec = TQ4Codec(64)
    exact = query.double() @ key.T.double()

    def error(w: torch.Tensor) -> float:
        again = codec.decompress(codec.compress(key * w)) / w
        return (query.double() @ again.T.double() - exact).norm().item()

    assert error(w) < 0.8 * error(torch.ones(64))


def test_scales_have_geometric_mean_one_and_bounds(randn: Randn) -> None:
    w = channel_scales(randn(5, 32).exp(), randn(5, 32).exp())
    torch.testing.assert_close(w.log().mean(-1), torch.zeros(5), atol=1e-6, rtol=0)
    assert torch.equal(channel_scales(torch.ones(2, 16), 7 * torch.ones(2, 16)), torch.ones(2, 16))
    wild = channel_scales(10 ** (20 * randn(8, 64)), 10 ** (20 * randn(8, 64)))
    assert wild.isfinite().all()
    assert ((wild >= 1 / 32) & (wild <= 32)).all()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_head_that_says_nothing_has_ones(randn: Randn, bad: float, which: int) -> None:
    given = [randn(2, 32).exp(), randn(2, 32).exp()]
    given[which][1] = bad
    w = channel_scales(*given)
    assert torch.equal(w[1], torch.ones(32))
    assert torch.equal(w[0], channel_scales(given[0][0], given[1][0]))


def test_a_channel_that_is_never_used_keeps_a_finite_scale(randn: Randn) -> None:
    squares, variances = randn(1, 64).exp(), randn(1, 64).exp()
    squares[0, 3], variances[0, 5] = 0, 0
    w = channel_scales(squares, variances)
    assert 1 / 32 <= w[0, 3] < w[0].median() < w[0, 5] <= 32


def test_statistics_are_those_of_what_is_coded(randn: Randn) -> None:
    """Keys less the mean of their group, the farthest of each group left out, one group after the other by hand."""
    query, key = randn(2, 6, 150, 32) * randn(32).exp(), randn(2, 3, 150, 32) * randn(32).exp()
    key[:, :, 70] += 300  # a sink
    key = key + 50 * torch.arange(150)[:, None] // 64  # groups far apart
    statistics = KeyStatistics()
    for sequence in range(2):
        statistics.add(5, query[sequence : sequence + 1], key[sequence : sequence + 1])
    squares = query.double().square().unflatten(1, (3, 2)).mean((0, 2, 3))
    variances = torch.zeros(3, 32, dtype=torch.float64)
    for head in range(3):
        for sequence in range(2):
            for start in (0, 64):
                group = key[sequence, head, start : start + 64].double()
                far = int((group - group.mean(0)).norm(dim=1).argmax())
                rest = torch.cat([group[:far], group[far + 1 :]])
                variances[head] += rest.var(0) / 4
    found = statistics.scales()
    assert list(found) == [5]
    torch.testing.assert_close(found[5], channel_scales(squares, variances))


def test_a_short_text_is_one_group(randn: Randn) -> None:
    query, key = randn(1, 2, 20, 32), randn(1, 1, 20, 32) * randn(32).exp()
    statistics = KeyStatistics()
    statistics.add(0, query, key)
    far = int((key[0, 0] - key[0, 0].mean(0)).norm(dim=1).argmax())
    variance = torch.cat([key[0, 0, :far], key[0, 0, far + 1 :]]).var(0)
    torch.testing.assert_close(statistics.scales()[0], channel_scales(query.square().mean((0, 1, 2))[None], variance[None]))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_handful_of_tokens_gives_finite_scales(randn: Randn, length: int) -> None:
    statistics = KeyStatistics()
    statistics.add(0, randn(1, 2, length, 32), randn(1, 1, length, 32))
    w = statistics.scales()[0]
    assert w.shape == (1, 32)
    assert (w.isfinite() & (w > 0)).all()


@pytest.mark.parametrize("which", ["query", "key"])
def test_statistics_refuse_what_is_not_finite(randn: Randn, which: str) -> None:
    given = {"query": randn(1, 2, 70, 32), "key": randn(1, 1, 70, 32)}
    given[which][0, 0, 5, 7] = float("nan")
    with pytest.raises(ValueError, match="layer 3: expected finite queries and keys"):
        KeyStatistics().add(3, **given)


def test_the_file_comes_back(randn: Randn, tmp_path: Path) -> None:
    scales = {layer: randn(2, 64).exp() for layer in (1, 0, 10)}
    path = tmp_path / FILE_NAME
    assert find_key_scales(tmp_path, config()) is None
    save_key_scales(path, scales, config(_commit_hash="abc"), source="a text", text=b"words")
    for found in (load_key_scales(path, config()), find_key_scales(tmp_path, config())):
        assert found is not None
        assert list(found) == [0, 1, 10]
        assert all(torch.equal(found[layer], scales[layer]) for layer in scales)
    tensors, metadata = read_tensors(path, "turboquant-key-scales")
    assert set(tensors) == {"layers.0.key_scales", "layers.1.key_scales", "layers.10.key_scales"}
    assert metadata["text_sha256"] == hashlib.sha256(b"words").hexdigest()
    assert (metadata["source"], metadata["revision"], metadata["turboquant_vllm"]) == ("a text", "abc", __version__)
    assert json.loads(metadata["model"]) == model_identity(config())
    save_key_scales(path, scales, config(), source="weights")
    assert read_tensors(path, "turboquant-key-scales")[1]["text_sha256"] == "weights"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 512}, "hidden_size: expected 512, got 256"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: expected 4, got 2"),
        ({"num_hidden_layers": 3}, "num_hidden_layers: expected 3, got 2"),
        ({"head_dim": 128}, "head_dim: expected 128, got 64"),
        ({"model_type": "qwen2"}, "model_type: expected qwen2, got llama"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope: expected .*1000000.0.*, got .*10000.0"),
    ],
)
def test_the_file_of_another_model_is_refused(randn: Randn, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    save_key_scales(tmp_path / "x", {0: randn(2, 64).exp()}, config(), source="weights")
    with pytest.raises(ValueError, match=f"expected scales of this model, got those of another: {said}"):
        load_key_scales(tmp_path / "x", config(**changes))


def test_a_model_is_the_same_however_its_configuration_says_it() -> None:
    before_5 = config(rope_parameters=None, rope_theta=10000, rope_scaling=None, head_dim=None)
    assert model_identity(before_5) == model_identity(config())
    nested = SimpleNamespace(get_text_config=lambda decoder: config(), model_type="llava")
    assert model_identity(nested) == model_identity(config())
    by_type = {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in (("full", 1e6), ("sliding", 1e4))}
    ropes = model_identity(config(rope_parameters=by_type))["rope"]
    assert {kind: rope["theta"] for kind, rope in ropes.items()} == {"full": 1e6, "sliding": 1e4}
    assert model_identity(config(rope_parameters=None))["rope"] == {}
    assert model_identity(config(num_key_value_heads=None))["num_key_value_heads"] == 4


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("layers.0.scales", torch.ones(2, 64), "expected tensors layers.N.key_scales, got layers.0.scales"),
        ("layers.x.key_scales", torch.ones(2, 64), "expected tensors layers.N.key_scales"),
        ("layers.0.key_scales", torch.ones(64), "expected layers.0.key_scales float32 "),
        ("layers.0.key_scales", torch.ones(2, 64).half(), "expected layers.0.key_scales float32 "),
        ("layers.0.key_scales", torch.zeros(2, 64), "finite and positive"),
        ("layers.0.key_scales", torch.full((2, 64), float("nan")), "finite and positive"),
    ],
)
def test_scales_that_cannot_be_are_refused(tmp_path: Path, name: str, tensor: torch.Tensor, said: str) -> None:
    save_key_scales(tmp_path / "x", {0: torch.ones(2, 64)}, config(), source="weights")
    _, metadata = read_tensors(tmp_path / "x", "turboquant-key-scales")
    write_tensors(tmp_path / "x", {name: tensor}, metadata)
    with pytest.raises(ValueError, match=said):
        load_key_scales(tmp_path / "x", config())


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_key_scales(tmp_path / "missing", config())
    TQ4Codec(64).save(tmp_path / "cache", TQ4Codec(64).compress(torch.ones(1, 64)))
    with pytest.raises(ValueError, match="expected format 'turboquant-key-scales', got 'turboquant-tq4'"):
        load_key_scales(tmp_path / "cache", config())
    metadata = {"format": "turboquant-key-scales"}
    write_tensors(tmp_path / "other", {"layers.0.key_scales": torch.ones(2, 64)}, metadata)
    with pytest.raises(ValueError, match="got those of another: the file does not say which"):
        load_key_scales(tmp_path / "other", config())
