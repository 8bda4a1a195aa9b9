"""Keys of the demo's model, for the picture of what an offset does: `python docs/pictures/pictures_keys.py` writes keys.json.

64 tokens of the licence are one group. Their keys of one layer and head, behind RoPE, are compressed twice, as plain TQ4 and
around an offset, and read back; what is written are the keys in the plane that shows most of them, and how far off each comes
back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from turboquant_vllm import TQ4Codec
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.hf import CACHE_ARGUMENT

HERE = Path(__file__).parent
LAYER, HEAD, TOKENS = 1, 0, 64


def read_keys() -> torch.Tensor:
    """Keys of one head, float64 ``[TOKENS, D]``."""
    text = (HERE.parents[1] / "LICENSE").read_text(encoding="utf-8")
    tokens = PreTrainedTokenizerFast.from_pretrained(MODEL)(text[:2000], return_tensors="pt")["input_ids"][:, :TOKENS]
    model, cache = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), DynamicCache()
    with torch.no_grad():
        model(tokens, **{CACHE_ARGUMENT: cache})
    return cache.layers[LAYER].keys[0, HEAD].double()


def plane(keys: torch.Tensor) -> torch.Tensor:
    """An orthonormal pair ``[D, 2]``: towards the mean of the keys, and the direction beside it in which they differ most."""
    towards = keys.mean(0) / keys.mean(0).norm()
    beside = keys - keys.mean(0)
    beside -= torch.outer(beside @ towards, towards)
    most = torch.linalg.svd(beside).Vh[0]
    return torch.stack([towards, most * most[most.abs().argmax()].sign()], 1)


def measure() -> dict[str, Any]:
    """What the picture shows: points in the plane, lengths of errors, and their root mean square over that of the keys."""
    keys = read_keys()
    codec, axes = TQ4Codec(keys.shape[1]), plane(keys)
    plain = codec.decompress(codec.compress(keys), torch.float64)
    around = codec.compress_keys(keys[None])
    again = codec.decompress(around, torch.float64)[0]

    def away(x: torch.Tensor) -> list[float]:
        return [round(v, 3) for v in (x - keys).norm(dim=1).tolist()]

    def error(x: torch.Tensor) -> float:
        return round(((x - keys).norm() / keys.norm()).item(), 4)

    return {
        "layer": LAYER,
        "head": HEAD,
        "keys": [[round(v, 3) for v in row] for row in (keys @ axes).tolist()],
        "plain": away(plain),
        "offsets": away(again),
        "outlier": int((around.norms[0] < 0).nonzero().item()),
        "plain_error": error(plain),
        "offsets_error": error(again),
    }


if __name__ == "__main__":
    (HERE / "keys.json").write_text(json.dumps(measure(), separators=(",", ":")) + "\n", encoding="utf-8")
