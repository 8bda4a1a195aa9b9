"""Windows of token ids from a text, as models read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.demo.text import windows

__all__ = ["longest_context", "read_text", "token_windows"]


def read_text(path: Path) -> str:
    """A text in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"text: expected a file, found none at {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected UTF-8 in {path}, got {error.reason} at byte {error.start}") from error


def longest_context(config: Any, context: int | None, default: int) -> int:
    """``context`` if the model reads so many tokens; without one, ``default`` or the longest that it reads.

    Raises:
        ValueError: fewer than 2 tokens, or more than the model reads.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return min(default, longest or default)
    if context < 2:
        raise ValueError(f"context: expected at least 2 tokens, got {context}")
    if longest and context > longest:
        raise ValueError(f"context: expected at most the model's {longest} tokens, got {context}")
    return context


def token_windows(tokenizer: Any, content: str, name: str, context: int, count: int) -> torch.Tensor:
    """At most ``count`` windows of ``context`` tokens and one more, spread evenly over a text: int64 ``[n, context + 1]``.

    Raises:
        ValueError: the text, called ``name``, has no more than ``context`` tokens.
    """
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    # Where the tokenizer begins every text with a token, each window begins with it too: models are at a loss without.
    first = tokenizer.bos_token_id
    begin = [] if first is None or tokenizer("a")["input_ids"][:1] != [first] else [first]
    length = context - len(begin)
    if len(ids) <= length:
        raise ValueError(f"text: expected more tokens than the context of {context}, got {len(ids)} in {name}")
    found = windows(torch.tensor(ids, device="cpu"), length)
    found = found[torch.linspace(0, len(found) - 1, min(count, len(found)), device="cpu").long()]
    return torch.cat([torch.tensor(begin, dtype=found.dtype, device="cpu").expand(len(found), -1), found], 1)
