"""The reference: every score of every block in memory, ordinary differentiable torch operations, and nothing clever.

It takes ``O(B * (2 B + M + N))`` memory, and is what the other backends are held to. Second derivatives work here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gist_fast.backends.interface import LN2, GuidedRows
from gist_fast.blocks import Block
from gist_fast.operands import Operands, accumulation_dtype


def forward(operands: Operands, blocks: Sequence[Block], temperature: Tensor) -> GuidedRows:
    """The loss of each row, from all its scores at once; `temperature` is needed for the statistics alone."""
    negatives, masked = [], []
    for block in blocks:
        logits = _scores(operands.student, block)
        excluded = torch.zeros_like(logits, dtype=torch.bool)
        if block.excluded is not None:
            excluded.diagonal(block.excluded).fill_(True)
        mask = torch.zeros_like(excluded)
        if operands.guide is not None and operands.limits is not None:
            guide = _scores(operands.guide, block).detach()
            mask = (guide > operands.limits[:, None]) & ~excluded
        masked.append(mask.sum())
        negatives.append(logits.masked_fill(mask | excluded, -math.inf))
    logits = torch.cat(negatives, dim=1)
    everything = torch.cat([operands.positives[:, None], logits], dim=1)
    # The base-2 logits of the operands, back in units of the natural logarithm.
    loss = torch.logsumexp(LN2 * everything, dim=1) - LN2 * operands.positives
    if operands.limits is not None:
        # NaN limits mask nothing; carry them into the loss, where they are seen.
        loss = loss + (operands.limits - operands.limits).detach().to(loss.dtype)
    to_cosine = LN2 * temperature.detach().to(loss.dtype)
    hardest = logits.detach().amax(dim=1)
    return GuidedRows(
        loss=loss,
        lse2=torch.logsumexp(LN2 * logits.detach(), dim=1) / LN2,
        positive=operands.positives.detach() * to_cosine,
        hardest=hardest * to_cosine,
        masked=torch.stack(masked),
        bits=loss.new_empty(0, dtype=torch.uint8),
    )


def _scores(operands: Sequence[Tensor], block: Block) -> Tensor:
    """``[rows, columns]``. Half types are multiplied and summed in float32: their rounding is the operands' alone."""
    dtype = accumulation_dtype(operands[0].dtype)
    rows = operands[block.row_operand][block.row_start : block.row_start + block.rows]
    return rows.to(dtype) @ operands[block.column_operand].to(dtype).T
