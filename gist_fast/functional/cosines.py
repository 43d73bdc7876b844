"""Cosine similarities of embeddings row by row, made of differentiable torch operations, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gist_fast.functional.operands import PIECE, ZERO_NORM, accumulation_dtype


def unit_vectors(x: Tensor) -> Tensor:
    """Rows of norm 1, in the type of ``x [N, D]``; those of zeros stay, and have no gradient. NaN where the norm is not
    finite: divided by infinity, an overflow would be a zero vector, unseen."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    bad = (norm - norm).detach()
    # Where nothing is divided, either.
    return torch.where(norm > ZERO_NORM, x / norm.clamp_min(ZERO_NORM) + bad, x.detach())


def row_cosines(x: Tensor, y: Tensor) -> Tensor:
    """``[N]``, accumulation type: of row i of ``x [N, D]`` with row i of ``y [N, D]``; 0 where either is zero.

    Of large ones the unit vectors are made in pieces, and again in the backward pass, so that they are never all in
    memory.
    """
    if x.numel() <= PIECE or torch.compiler.is_compiling():
        return _row_cosines(x, y)
    step = max(1, PIECE // x.shape[1])
    pieces = zip(x.split(step), y.split(step), strict=True)
    return torch.cat([checkpoint(_row_cosines, *piece, use_reentrant=False) for piece in pieces])


def _row_cosines(x: Tensor, y: Tensor) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    return (unit_vectors(x.to(dtype)) * unit_vectors(y.to(dtype))).sum(dim=1)
