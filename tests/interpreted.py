"""Triton kernels without an accelerator: import this before any module with kernels.

The interpreter runs them on tensors in host memory, one program after the other. It cuts numbers
off to make them bf16, and takes the bits of bf16 for whole numbers when it multiplies matrices or
converts integers: put right here. It fuses nothing and adds up in an order of its own, so bits may
be compared between two interpreted kernels, not with a device.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _rounding_cast(self: Any, source: Any, to: Any) -> Any:
    if to.scalar != tl.bfloat16:
        return _cast(self, _widened(source), to)
    numbers = torch.from_numpy(_widened(source).data.astype(np.float32))
    return TensorHandle(numbers.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)


def _dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), *rest)


InterpreterBuilder.cast_impl = _rounding_cast
InterpreterBuilder.create_dot = _dot_of_numbers


def _call_without_patching_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A kernel's call of another function. Triton exchanges the words of its language before each;
    once they are exchanged, that is half of all time."""
    used = [module for module in self.fn.__globals__.values() if module in (tl, tl.core)]
    if any(tl.core.is_builtin(module.load) for module in used):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


InterpretedFunction.__call__ = _call_without_patching_anew
