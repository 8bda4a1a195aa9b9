"""Triton's interpreter in a child process: it must be chosen before triton is imported, and then holds for the process.

Arguments and results travel through shared memory, so a tensor keeps its strides, its place in its buffer, and whatever
stands around it there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from typing import Any

import pytest
import torch
import torch.multiprocessing
from packaging.version import Version

from attention_cases import poisoned_memory

_VERSIONS = {name: Version(metadata.version(name)) for name in ("triton", "numpy")}
# Of modules whose tests run there.
in_interpreter = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(
        _VERSIONS["triton"] < Version("3.7") and _VERSIONS["numpy"] >= Version("2.4"),
        reason="the interpreter of Triton 3.6 needs numpy < 2.4",
    ),
]


class Interpreter:
    """Calls functions of ``turboquant_vllm`` in a child process whose Triton kernels are interpreted."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._child = ProcessPoolExecutor(max_workers=1, mp_context=context)
        with pytest.MonkeyPatch.context() as patch:
            # The child inherits it before its first import.
            patch.setenv("TRITON_INTERPRET", "1")
            self._child.submit(_start).result()

    def call(self, path: str, *args: Any, patch: dict[str, Any] | None = None) -> Any:
        """``module:function`` of turboquant_vllm on ``args``; ``patch`` sets ``module:name`` to a value meanwhile."""
        return self._child.submit(_call, path, args, patch or {}).result()

    def close(self) -> None:
        self._child.shutdown()


def _start() -> None:
    torch.set_num_threads(1)
    _prepare_modules_once()
    _look_up_types_once()


def _prepare_modules_once() -> None:
    """Triton prepares its language for the interpreter whenever a kernel calls a function, which is more than half of all time,
    and leaves it so. Here it does at a launch, as always, and at the first call of a function of each module. A language that
    is not prepared raises an error wherever it is used."""
    from triton.runtime.interpreter import InterpretedFunction

    prepare_and_call, prepared = InterpretedFunction.__call__, set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(self.fn.__module__)
        return prepare_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def _look_up_types_once() -> None:
    """For every operation Triton makes a table of number types anew, a tenth of the time that is left."""
    from triton.runtime import interpreter

    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)
    interpreter._get_np_dtype = lambda x: look_up(x) if x.scalar.is_ptr() else known(x.scalar)


def _call(path: str, args: tuple[Any, ...], patch: dict[str, Any]) -> Any:
    function = _find(path)
    assert importlib.import_module("turboquant_vllm.triton.config").INTERPRETED
    with poisoned_memory(), contextlib.ExitStack() as stack:
        for target, value in patch.items():
            stack.enter_context(_patched(target, value))
        return function(*args)


def _find(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(f"turboquant_vllm.{module}"), name)


@contextlib.contextmanager
def _patched(path: str, value: Any) -> Iterator[None]:
    before, (module, name) = _find(path), path.split(":")
    setattr(importlib.import_module(f"turboquant_vllm.{module}"), name, value)
    try:
        yield
    finally:
        setattr(importlib.import_module(f"turboquant_vllm.{module}"), name, before)
