"""Triton, imported by this file alone, and only once a provider is asked for: importing tvc stays free of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

jit = triton.jit

# With TRITON_INTERPRET=1 set when triton is imported, kernels run on CPU tensors, without a compiler.
INTERPRETED = bool(triton.knobs.runtime.interpret)


# Triton's own two are functions of its language: called from Python they take longer than the launch they prepare.
def cdiv(number: int, block: int) -> int:
    """How many blocks hold `number` things."""
    return -(-number // block)


def power(number: int) -> int:
    """The lowest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def widened(dtype: torch.dtype) -> bool:
    """Whether factors of this dtype become float32 before `tl.dot`.

    Products of half-precision numbers are exact in the float32 that tensor cores add up in, so nothing is lost without.
    The interpreter would multiply the bit patterns of bfloat16.
    """
    return dtype == torch.float32 or INTERPRETED


def fitting(block: int, width: int, dtype: torch.dtype) -> int:
    """`block` rows of an operand of `tl.dot`, or fewer where they are so wide that several tiles would not fit.

    Float32 runs without tensor cores, from registers: larger tiles spill, and take a minute to compile.
    """
    room = (4096 if dtype == torch.float32 else 16384) // width
    return max(16, min(block, room))


@jit
def ordered(b_score):
    """int32 in the order of the scores, above the lowest int32: NaN counts as -inf, -0 as 0."""
    b_score = b_score.to(tl.float32)
    b_score = tl.where(b_score == b_score, b_score, float("-inf"))
    b_score = tl.where(b_score == 0.0, 0.0, b_score)
    b_bits = b_score.to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


__all__ = ["INTERPRETED", "cdiv", "fitting", "jit", "ordered", "power", "tl", "widened"]
