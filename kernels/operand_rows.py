"""The embeddings of several operands in one launch: which of them a program's rows are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def pick(values, k):
    """The k-th of a tuple, k being known to the program alone."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(k == i, values[i], found)
    return found


@triton.jit
def find_rows(sizes, ROWS: tl.constexpr):
    """Of a program that has ROWS rows of one operand: which operand, its first row in the stack, the program's rows in
    the operand, ``[ROWS]``, and how many rows the operand has; see `operand_rows`."""
    program = tl.program_id(0)
    operand, first_program, first_row = 0, 0, 0
    programs, rows = 0, 0
    for i in tl.static_range(1, len(sizes)):
        programs += tl.cdiv(sizes[i - 1] >> 1, ROWS)
        rows += sizes[i - 1] >> 1
        operand = tl.where(program >= programs, i, operand)
        first_program = tl.where(program >= programs, programs, first_program)
        first_row = tl.where(program >= programs, rows, first_row)
    return operand, first_row, (program - first_program) * ROWS + tl.arange(0, ROWS), pick(sizes, operand) >> 1


def operand_rows(embeddings: Sequence[Tensor]) -> dict[str, Any]:
    """Embeddings ``[N_k, D]`` of a model's operands, of one type, as kernels take them: by name, a tuple each.

    Of what is in a tuple Triton always compiles in whether a number is 1 or a multiple of 16, and whether 16 bytes
    divide an address. That is wanted of strides and of embeddings, which are alike in every batch but for odd layouts.
    A number of rows goes as ``2 N + 1``, which is neither, or the last batch of an epoch would have kernels compiled.
    """
    return {
        "embeddings": tuple(embeddings),
        "sizes": tuple(2 * len(x) + 1 for x in embeddings),
        "row_strides": tuple(x.stride(0) for x in embeddings),
        "column_strides": tuple(x.stride(1) for x in embeddings),
    }


def row_grid(embeddings: Sequence[Tensor], rows: int) -> tuple[int]:
    """How many programs of `rows` rows that takes, each of one operand."""
    return (sum(triton.cdiv(len(x), rows) for x in embeddings),)
