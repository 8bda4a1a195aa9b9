"""Without lm-eval: one line says what to install; and over a stand-in for its model, likelihoods read the cache."""

from __future__ import annotations

import runpy
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

MESSAGE = "turboquant_vllm.eval needs lm_eval: pip install turboquant-vllm[eval]"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("import turboquant_vllm.eval", f"ModuleNotFoundError: {MESSAGE}"),
        ("import runpy; runpy.run_module('turboquant_vllm.eval', run_name='__main__')", MESSAGE),
    ],
)
def test_without_lm_eval_one_line_says_what_to_install(how: str, expected: str) -> None:
    program = f"import sys; sys.modules['lm_eval'] = None; {how}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == expected
    assert expected != MESSAGE or run.stderr.strip() == MESSAGE


class StandIn:
    """What of lm-eval's `HFLM` ours builds on."""

    backend = "causal"
    device = torch.device("cpu")
    mixed_precision_dtype = None

    def __init__(self, model: Any) -> None:
        self.model = model


def lm_over_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    modules: dict[str, Any] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": StandIn},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "turboquant_vllm.eval", raising=False)
    return runpy.run_module("turboquant_vllm.eval")["TurboQuantLM"]


def test_all_tokens_of_a_likelihood_are_read_in_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache
    from turboquant_vllm.hf.calibration import key_scales_from_model
    from turboquant_vllm.quality.attention import cache_format
    from turboquant_vllm.quality.formats import TQ4Format

    lm_class = lm_over_the_stand_in(monkeypatch)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 32}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, initializer_range=0.3, **sizes)
    # In float32 the order of a sum may move a coordinate into the next cell.
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").double().eval()
    ids = torch.randint(50, (2, 30))
    got = lm_class(model, seed=2, skip_layers="0/-1", key_offsets=False)._model_call(ids)
    with torch.inference_mode():
        exact = model(ids).logits
        cache = TurboQuantCache(model, seed=2, exact_prefill=False, key_offsets=True, key_scales=key_scales_from_model(model))
        with_offsets = model(ids, **{CACHE_ARGUMENT: cache}).logits
        with cache_format(model, TQ4Format(seed=2, dense_layers={0, 2})):
            expected = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - exact).abs().max() > 0.01
    torch.testing.assert_close(lm_class(model, seed=2)._model_call(ids), with_offsets, rtol=1e-5, atol=1e-5)


def test_the_attention_that_reads_codes_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Whether another test has made it known must not matter.
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, "tq4", raising=False)
    assert "tq4" not in ALL_ATTENTION_FUNCTIONS
    lm_class = lm_over_the_stand_in(monkeypatch)

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, initializer_range=0.3, **sizes)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").double().eval()
    ids = torch.randint(50, (2, 30))
    expected = lm_class(model)._model_call(ids)
    model.set_attn_implementation("tq4")
    torch.testing.assert_close(lm_class(model)._model_call(ids), expected, rtol=1e-5, atol=1e-5)
