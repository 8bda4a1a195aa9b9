"""Every causal language model family of the installed transformers, tiny and with random weights, over caches of 4 bits.

    python benchmarks/families.py                   measure all families: benchmarks/results/families.json
    python benchmarks/families.py llama gemma3      some, and print them; --update puts their rows into the file
    python benchmarks/families.py --table           print the tables of docs/models.md; --write puts them there

Each family's logits with attention "tq4" over a cache of 4 bits are compared with those of the model's own attention over the
same values: `growing`, in a TurboQuantCache; `padded`, on the left; `static`, in a TurboQuantStaticCache; `chunks`, a prompt in
pieces without exact prefill (all of these over plain TQ4, against a dense cache whose vectors have been through compress and
decompress); `offsets`, in a cache whose keys have offsets, against one that gives them decompressed. A family that refuses
"tq4" is compared with its own attention over a TurboQuantCache, `decompressed`.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import math
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import eager_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from common import RESULTS, environment, write_results
from families_configs import tiny_config
from families_tables import TABLES, WAYS, same, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hf_models import oracle_attention, plain_cache, plain_static_cache, reference_cache
from turboquant_vllm import TQ4Codec
from turboquant_vllm.hf import ATTENTION_NAME, CACHE_ARGUMENT, TurboQuantCache, attention_forward, register
from turboquant_vllm.hf.packing import why_dense

RESULT = RESULTS / "families.json"
Row = dict[str, Any]
Cache = Any
TRACE = bool(os.environ.get("FAMILIES_TRACE"))  # where refusals come from
SECONDS, MOST_PARAMETERS = 60, 3_000_000
_CUTS = ((0, 11), (11, 12), (12, 13), (13, 18), (18, 23))
_SINGLE_STEPS = ((0, 11), *((token, token + 1) for token in range(11, 16)))
_CHUNKS = ((0, 7), (7, 14), (14, 19))
_LENGTHS, _LONGEST = (13, 6, 6, 12), 13


class Family:
    """Two copies of a tiny model, with its own attention and, unless it refuses, with "tq4".

    Args:
        kind: class of the configuration.
        dtype: of weights and states.
    """

    def __init__(self, kind: Any, dtype: torch.dtype) -> None:
        config = tiny_config(kind)
        with torch.device("meta"):
            size = sum(x.numel() for x in _build(config, None).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size} parameters in spite of the small sizes that were set")
        self.config, self.dtype = config, dtype
        self.own = _build(config, "eager").to(dtype).eval()
        for name, parameter in self.own.named_parameters():
            if "sinks" in name:
                torch.nn.init.normal_(parameter)
        self.refusal, self.tq4 = "", None
        try:
            self.tq4 = self.with_attention(ATTENTION_NAME)
        except Exception as error:
            self.refusal = _words(error)
        self.ids = torch.randint(3, 80, (4, 24), generator=torch.Generator().manual_seed(0))
        self.cuts: Sequence[tuple[int, int]] = _CUTS

    def with_attention(self, name: str) -> Any:
        """The same weights with another attention."""
        model = _build(self.config, name).to(self.dtype).eval()
        model.load_state_dict(self.own.state_dict())
        return model

    @cached_property
    def formula(self) -> Any:
        """The same weights with attention as its formula says, throughout in the dtype of the model."""
        return self.with_attention("oracle")

    def logits(self, model: Any, cache: Cache, cuts: Sequence[tuple[int, int]], padded: bool = False) -> torch.Tensor:
        """Logits of all tokens that are none of the padding, ``[tokens, vocabulary]``."""
        ids = self.ids if padded else self.ids[:2]
        mask = torch.ones_like(ids)
        if padded:
            for row, length in enumerate(_LENGTHS):
                mask[row, : _LONGEST - length] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        takes = inspect.signature(model.forward).parameters
        found = []
        for start, stop in cuts:
            how: dict[str, Any] = {CACHE_ARGUMENT: cache, "use_cache": True}
            if padded:
                how["attention_mask"] = mask[:, :stop]
                how |= {"position_ids": positions[:, start:stop]} if "position_ids" in takes else {}
            found.append(model(ids[:, start:stop], **how).logits[:, -(stop - start) :][mask[:, start:stop].bool()])
        return torch.cat(found).double()

    def reference(self, way: str, model: Any) -> torch.Tensor:
        """What a way must give: another attention over the same values."""
        cache = TurboQuantCache(model.config) if way == "offsets" else reference_cache(model, exact_prefill=way != "chunks")
        return self.logits(model, cache, *self.calls(way))

    def calls(self, way: str) -> tuple[Sequence[tuple[int, int]], bool]:
        """How a way cuts the text, and whether it has padding."""
        if way == "padded":
            several = ((_LONGEST + 2, _LONGEST + 5),) if self.cuts is _CUTS else ()
            return ((0, _LONGEST), (_LONGEST, _LONGEST + 1), (_LONGEST + 1, _LONGEST + 2), *several), True
        return (_CHUNKS if way == "chunks" else self.cuts), False

    def packed(self, way: str) -> tuple[Any, Cache]:
        """The model and the cache that a way is about."""
        if way == "decompressed":
            return self.own, plain_cache(self.own.config)
        if self.tq4 is None:
            raise _RefusedError(self.refusal)
        config = self.tq4.config
        if way == "static":
            return self.tq4, plain_static_cache(config, max_cache_len=64)
        if way == "offsets":
            return self.tq4, TurboQuantCache(config)
        return self.tq4, plain_cache(config, exact_prefill=way != "chunks")

    def compare(self, way: str) -> Row:
        """``{"difference": ...}``, ``{"refused": words}``, or ``{"not_comparable": words}`` where transformers itself cannot.

        The model's own attention computes its softmax in float32, which has no room for the masks of rows that see nothing in
        float64. Where that gives NaN, or another result than ours, attention as its formula says is asked, too.
        """
        try:
            if way == "static":
                self.check_static()
            want = self.reference(way, self.own)
        except Exception as error:
            return {"not_comparable": _words(error)}
        try:
            got = self.logits(*self.packed(way), *self.calls(way))
        except Exception as error:
            if TRACE:
                traceback.print_exc()
            return {"refused": _words(error)}
        found: Row = {"difference": relative(got, want)}
        if same(found, _name(self.dtype)) or way == "decompressed":
            return found
        try:
            formula = relative(got, self.reference(way, self.formula))
        except Exception as error:
            return {**found, "formula": _words(error)}
        return {"difference": formula, "reference": "formula", "eager": found["difference"]}

    def check_static(self) -> None:
        """Whether the model takes transformers' own cache of fixed size."""
        want = self.logits(self.own, DynamicCache(config=self.own.config), self.cuts)
        got = self.logits(self.own, StaticCache(config=self.own.config, max_cache_len=64), self.cuts)
        if not same({"difference": (found := relative(got, want))}, _name(self.dtype)):
            raise _RefusedError(f"transformers' own StaticCache changes the logits by {found}")


class _Calls:
    """Attention "tq4" that counts its calls, for some models never make one."""

    count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return attention_forward(*args, **kwargs)


class _RefusedError(Exception):
    """Carries the words of another exception."""


def relative(got: torch.Tensor, want: torch.Tensor) -> float | None:
    """Largest difference over the largest value, two digits; None where a logit is no number."""
    found = ((got - want).abs().max() / want.abs().max()).item()
    return float(f"{found:.1e}") if math.isfinite(found) else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _build(config: Any, attention: str | None) -> Any:
    how = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **how, experts_implementation="eager")


def _words(error: BaseException) -> str:
    if isinstance(error, _RefusedError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@torch.no_grad()
def measure(kind: Any) -> Row:
    """The row of the family whose configurations are of the class ``kind``."""
    register()
    AttentionInterface.register("oracle", oracle_attention)
    AttentionMaskInterface.register("oracle", eager_mask)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    row: Row = {"model_type": kind.model_type, "class": model_class.__name__, "built": False}
    words = ""
    for dtype in (torch.float64, torch.float32):
        try:
            family = Family(kind, dtype)
        except Exception as error:
            if TRACE:
                traceback.print_exc()
            return {**row, "why": _words(error)}
        row["built"] = True
        if CACHE_ARGUMENT not in inspect.signature(family.own.forward).parameters:
            return {**row, "why": f"the model takes no {CACHE_ARGUMENT}"}
        try:
            return {**row, **_measure(family)}
        except Exception as error:  # a model that does not run in float64 may run in float32
            words = words or _words(error)
    return {**row, "why": words}


def _measure(family: Family) -> Row:
    config = family.own.config
    try:
        exact = family.logits(family.own, DynamicCache(config=config), family.cuts)
    except Exception:
        family.cuts = _SINGLE_STEPS
        exact = family.logits(family.own, DynamicCache(config=config), family.cuts)
    reasons, cache = why_dense(config), reference_cache(family.own)
    moved = relative(family.logits(family.own, cache, family.cuts), exact)
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    dense: dict[str, int] = {}
    for reason in filter(None, reasons):
        dense[reason] = dense.get(reason, 0) + 1
    row: Row = {
        "dtype": _name(family.dtype),
        "steps": "several tokens" if family.cuts is _CUTS else "one token",
        "head_dim": sorted({x.shape[-1] for x in keys if isinstance(x, torch.Tensor) and x.numel()}),
        "packed": reasons.count(""),
        "dense": dense,
        "moved": moved,  # by 4 bits: a model that does not read its cache would show nothing
    }
    calls = _Calls()
    AttentionInterface.register(ATTENTION_NAME, calls)
    ways = {way: family.compare(way) for way in WAYS}
    row["attention_calls"] = calls.count
    if family.dtype == torch.float64 and any(way.get("difference", 0) is None for way in ways.values()):
        narrow = Family(type(config), torch.float32)
        narrow.cuts = family.cuts
        for way, found in ways.items():
            if found.get("difference", 0) is None:
                ways[way] = {**narrow.compare(way), "dtype": "float32"}
    if "refused" in ways["growing"]:
        ways["decompressed"] = family.compare("decompressed")
    return {**row, "ways": ways}


def measure_apart(kind: Any, seconds: float = SECONDS) -> Row:
    """As :func:`measure`, in a process of its own, which is ended after ``seconds``."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()

    def work() -> None:
        queue.put(measure(kind))

    process = context.Process(target=work)
    process.start()
    end = time.monotonic() + seconds
    while queue.empty() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.02)
    row: Row = {"model_type": kind.model_type, "class": "", "built": False}
    if not queue.empty():
        row = queue.get()
    elif process.is_alive():
        row["why"] = f"took more than {seconds:.0f} s"
    else:
        row["why"] = f"its process ended with {process.exitcode}"
    process.kill()
    process.join()
    return row


def kinds(names: Sequence[str] = ()) -> list[Any]:
    """Classes of the configurations of all families, or of those named."""
    found = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
    return [found[name] for name in names or sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all, if none is named")
    parser.add_argument("--update", action="store_true", help="replace the rows of the families that are named")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the tables of the result file")
    parser.add_argument("--write", action="store_true", help="measure nothing; put the tables into docs/models.md")
    args = parser.parse_args()
    if args.table or args.write:
        print(*(f"{name}\n\n{make()}\n" for name, make in TABLES.items() if args.table), sep="\n", end="")
        if args.write:
            write()
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for head_dim in (16, 32, 64):  # tables that each process would make by itself
        _ = TQ4Codec(head_dim).key_tables
    rows, start = [], time.time()
    for kind in kinds(args.families):
        rows.append(measure_apart(kind))
        print(json.dumps(rows[-1]), flush=True)
    print(f"{len(rows)} families, {time.time() - start:.0f} s", file=sys.stderr)
    if args.update:
        new = {row["model_type"]: row for row in rows}
        rows = [new.pop(row["model_type"], row) for row in json.loads(RESULT.read_text())["rows"]]
    if args.update or not args.families:
        write_results(RESULT, environment(transformers=transformers.__version__), rows)


if __name__ == "__main__":
    main()
