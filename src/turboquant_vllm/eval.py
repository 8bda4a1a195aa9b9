"""lm-eval over a 4-bit cache, log-likelihood tasks included; needs the extra `eval`.

    python -m turboquant_vllm.eval --model turboquant --model_args pretrained=MODEL --tasks arc_easy --batch_size 8

lm-eval's own model calls transformers without a cache where it scores log-likelihoods, so a cache given to it would change
nothing there. :class:`TurboQuantLM` passes a fresh :class:`turboquant_vllm.hf.TurboQuantCache` in every call; all tokens,
also those of the same call, are attended to as that cache returns them. With `attn_implementation=tq4` among the model's
arguments, which lm-eval's own `hf` takes here as well, attention reads the codes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    missing = str(error.name).split(".")[0]
    message = f"turboquant_vllm.eval needs {missing}: pip install turboquant-vllm[eval]"
    if __name__ == "__main__":
        sys.exit(message)
    raise ModuleNotFoundError(message) from error

from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, register

__all__ = ["TurboQuantLM", "main"]

register()


@register_model("turboquant")
class TurboQuantLM(HFLM):
    """lm-eval's Hugging Face model with a cache in 4 bits.

    Args:
        seed: of the rotations.
        skip_layers: layers to keep exact, ints or a string such as "0/1/31"; negative ones count from the end.
        key_offsets: keep keys around offsets; False: plain TQ4.
        key_scales: path of a file of `turboquant calibrate`; None: the scales that the cache finds for the model.
        more: as lm-eval's ``HFLM``.

    Raises:
        ValueError: the model is no causal language model, a layer is named that it does not have, or scales are
            another model's.
    """

    def __init__(
        self,
        *args: Any,
        seed: int = 0,
        skip_layers: str | int | list[int] = "",
        key_offsets: bool = True,
        key_scales: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        if self.backend != "causal":
            raise ValueError(f"pretrained: expected a causal language model, got a {self.backend} one")
        self._options: dict[str, Any] = {"seed": int(seed), "skip_layers": _layers(skip_layers), "key_offsets": key_offsets}
        self._options["key_scales"] = key_scales
        self._cache()  # a wrong argument fails here, not in the first call

    def _cache(self) -> TurboQuantCache:
        return TurboQuantCache(self.model, exact_prefill=False, **self._options)

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[batch, length, vocabulary]`` of token ids ``[batch, length]``, padded on the right."""
        device, dtype = self.device.type, self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(device_type=device, dtype=dtype, enabled=dtype is not None):
            logits: torch.Tensor = self.model(inps, **{CACHE_ARGUMENT: self._cache()}, use_cache=True).logits
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        options[CACHE_ARGUMENT] = self._cache()
        written: torch.Tensor = super()._model_generate(context, max_length, stop, **options)
        return written


def _layers(skip_layers: str | int | list[int]) -> list[int]:
    if isinstance(skip_layers, int):
        return [skip_layers]
    if not isinstance(skip_layers, str):
        return list(skip_layers)
    try:
        return [int(name) for name in skip_layers.split("/") if name.strip()]
    except ValueError:
        raise ValueError(f"skip_layers: expected layer numbers between slashes, got {skip_layers!r}") from None


def main() -> None:
    """lm-eval's command line, with the model "turboquant" in it."""
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())


if __name__ == "__main__":
    main()
