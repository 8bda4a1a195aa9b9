"""Multiplying by a rotation on half-precision matrix units, without losing its precision.

A float32 matrix is the sum of a few half-precision ones, and a product with it the sum of as many products, each exact
and accumulated in float32. Entries of an orthogonal matrix are at most 1: times 2^8, remainders stay clear of float16's
subnormals. So products here come out ``LIFT`` times too large, and the caller divides.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIFT = tl.constexpr(256.0)


@triton.jit
def half_parts(matrix, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    """``LIFT * matrix`` as a tuple of COUNT tensors of ``DTYPE`` that sum to it: 11 bits each in float16, 8 in bfloat16."""
    rest = matrix * LIFT
    parts = ()
    for _ in tl.static_range(COUNT):
        part = rest.to(DTYPE)
        rest -= part.to(tl.float32)
        parts = parts + (part,)
    return parts


@triton.jit
def rotate(x, matrix, acc, HALF: tl.constexpr):
    """``acc + LIFT * x @ matrix`` for float32 ``matrix``; with HALF to 16 bits on half-precision units, else in float32."""
    if HALF:
        DTYPE: tl.constexpr = tl.bfloat16 if x.dtype == tl.float32 else x.dtype
        parts = half_parts(matrix, DTYPE, 2)
        high = x.to(DTYPE)
        acc = tl.dot(high, parts[0], acc)
        acc = tl.dot(high, parts[1], acc)
        if x.dtype == tl.float32:
            acc = tl.dot((x - high.to(tl.float32)).to(DTYPE), parts[0], acc)
        return acc
    else:
        return tl.dot(x.to(tl.float32), matrix * LIFT, acc, input_precision="ieee")
