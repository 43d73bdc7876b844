"""Functions of numbers that every kernel of rows shares, exact enough in float32."""

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2.0))
LOG2_E = tl.constexpr(math.log2(math.e))
ZERO_NORM = tl.constexpr(1e-12)


@triton.jit
def operand_norm(temperature):
    """``sqrt(log2(e) / temperature)``: the norm of every student operand."""
    return tl.sqrt(1.0 / tl.load(temperature) * LOG2_E)


@triton.jit
def inverse(norm):
    """One over a norm, 0 of a zero vector; NaN of a norm that is infinite or NaN, or an overflow would make a zero
    vector of a row, silently."""
    is_zero = norm <= ZERO_NORM
    return tl.where(is_zero, 0.0, 1.0 / tl.where(is_zero, 1.0, norm)) + (norm - norm)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for x from 0 to 1, of full relative precision where x is next to nothing."""
    one_more = 1.0 + x
    # What is lost in the sum is lost in the quotient too.
    return tl.where(one_more == 1.0, x, tl.log(one_more) * x / tl.where(one_more == 1.0, 1.0, one_more - 1.0))


@triton.jit
def softplus2(x):
    """``log2(1 + 2^x)``: how much a base-2 logit x grows by one more term of 0."""
    return tl.maximum(x, 0.0) + log1p(tl.exp2(-tl.abs(x))) / LN2


@triton.jit
def sigmoid2(x):
    """``2^x / (1 + 2^x)``"""
    return 1.0 / (1.0 + tl.exp2(-x))
