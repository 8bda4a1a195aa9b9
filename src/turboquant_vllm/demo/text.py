"""The text of the demo: the Python standard library's own sources, split by module into train, validation and test.

The split hashes the name of a file's top-level module. It needs no list, gives every Python version the same answer,
and keeps a module on its side when a later Python turns it into a package (`pathlib.py` -> `pathlib/_local.py`) or
moves it behind an underscore (`datetime.py` -> `_pydatetime.py`): what was held out from training stays held out for
the demo, whichever interpreter runs it.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Literal["train", "validation", "test"]

END_OF_TEXT = "<|endoftext|>"

# Percent of all modules; the rest is for training.
_TEST_PERCENT = 6
_VALIDATION_PERCENT = 4
_SPLIT_SEED = 2

# Folders that hold no library code, only tests, generated tables or other people's packages.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
# Generated tables, by file name, and what a distributor or a build writes beside the library.
_SKIPPED_FILES = frozenset({"entities.py", "sitecustomize.py", "stringprep.py", "usercustomize.py"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "__phello__", "config-")


@dataclass(frozen=True)
class Document:
    """One source file: `path` relative to the standard library, with forward slashes, and its `text`."""

    path: str
    text: str


def split_of(path: str) -> Split:
    """Side of the split that the file at `path` (relative to the standard library, forward slashes) belongs to."""
    module = PurePosixPath(path).parts[0].removesuffix(".py")
    name = module.removeprefix("_py") if module.startswith("_py") else module.lstrip("_")
    digest = hashlib.sha256(f"{_SPLIT_SEED}:{name}".encode()).digest()
    percent = int.from_bytes(digest[:4], "big") % 100
    if percent < _TEST_PERCENT:
        return "test"
    if percent < _TEST_PERCENT + _VALIDATION_PERCENT:
        return "validation"
    return "train"


def gather(stdlib: Path | None = None) -> dict[Split, list[Document]]:
    """Read the standard library's sources and split them.

    Args:
        stdlib: folder to read; default: the standard library of the running interpreter.

    Returns:
        For each split, its documents in the order of their paths.

    Raises:
        FileNotFoundError: a split has no file, e.g. because the interpreter ships without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    documents: dict[Split, list[Document]] = {split: [] for split in get_args(Split)}
    relative = (file.relative_to(root) for file in root.rglob("*.py"))
    for path in sorted(path.as_posix() for path in relative if not _is_skipped(path)):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents[split_of(path)].append(Document(path, text))
    for split, found in documents.items():
        if not found:
            raise FileNotFoundError(f"stdlib: expected Python sources for the {split} split in {root}, found none")
    return documents


def _is_skipped(path: Path) -> bool:
    return (
        not _SKIPPED_FOLDERS.isdisjoint(path.parts)
        or path.name in _SKIPPED_FILES
        or path.parts[0].startswith(_SKIPPED_PREFIXES)
    )


def train_tokenizer(documents: Iterable[Document], vocabulary: int) -> Tokenizer:
    """Byte-level BPE with `vocabulary` entries: any text can be encoded, and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> torch.Tensor:
    """Token ids of all documents in order, one end-of-text token before each: int64 `[tokens]`."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    if separator is None:
        raise ValueError(f"tokenizer: expected one that knows {END_OF_TEXT!r}, got one without it")
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return torch.tensor(
        [token for encoding in encodings for token in (separator, *encoding.ids)], dtype=torch.int64, device="cpu"
    )


def windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Cut `tokens` `[n]` into windows of `length` inputs and one more token, so that each token is predicted once.

    Window i starts at token i * length; its inputs are `[:, :-1]`, its targets `[:, 1:]`. What is left at the end is
    dropped.

    Returns:
        A view of `tokens`, `[(n - 1) // length, length + 1]`.

    Raises:
        ValueError: there are fewer than `length` + 1 tokens.
    """
    if tokens.ndim != 1 or tokens.numel() <= length:
        raise ValueError(f"tokens: expected one dimension of at least {length + 1} tokens, got {tuple(tokens.shape)}")
    return tokens.unfold(0, length + 1, length)
