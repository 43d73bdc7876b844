"""The reference: every score of every block in memory, ordinary differentiable torch operations, and nothing clever.

It takes ``O(B * (2 B + M + N))`` memory a Matryoshka dim. The other backends are held to it, and it alone has second
derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gist_fast.functional.backends.interface import LN2, Distilled, GuidedRows
from gist_fast.functional.backends.kept import MASKED
from gist_fast.functional.blocks import Block
from gist_fast.functional.operands import Operands, Student, accumulation_dtype


def forward(operands: Operands, blocks: Sequence[Block], temperature: Tensor) -> GuidedRows:
    """The loss of each row, from all its scores at once; `temperature` is needed for the statistics alone."""
    decided = [decide(operands, block) for block in blocks]
    softmaxes = [
        [k for k, block in enumerate(blocks) if block.softmax == softmax]
        for softmax in range(1 + max(block.softmax for block in blocks))
    ]
    found = []
    for student in operands.matryoshka:
        scores = [_scaled(_scores(student.operands, block), block, operands) for block in blocks]
        logits = [
            score.masked_fill(left_out, -math.inf) for score, (left_out, _, _) in zip(scores, decided, strict=True)
        ]
        found.append([_softmax(student, torch.cat([logits[k] for k in own], dim=1)) for own in softmaxes])
    loss, lse2 = (torch.stack([torch.cat([one[n] for one in each]) for each in found]) for n in (0, 1))
    hardest = torch.stack([one[2] for one in found[0]]).amax(dim=0)
    if operands.guide_thresholds is not None:
        # NaN thresholds mask nothing; carry them into the loss, where they are seen.
        nothing = (operands.guide_thresholds - operands.guide_thresholds).detach().to(loss.dtype)
        loss = loss + nothing.repeat(loss.shape[1] // len(nothing))
    to_cosine = LN2 * temperature.detach().to(loss.dtype)
    return GuidedRows(
        loss=loss,
        lse2=lse2,
        positive=operands.matryoshka[0].positives.detach() * to_cosine,
        hardest=hardest * to_cosine,
        masked=torch.stack([masked.sum() for _, masked, _ in decided]),
        easy_negatives=torch.stack([easy.sum() for _, _, easy in decided]),
        mask_bits=loss.new_empty(0, dtype=torch.uint8),
    )


def _softmax(student: Student, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B]`` each: loss, base-2 logsumexp and maximum of the negatives' logits ``[B, W]``, -inf where masked."""
    # The base-2 logits of the operands, back in units of the natural logarithm.
    everything = LN2 * torch.cat([student.positives[:, None], logits], dim=1)
    loss = torch.logsumexp(everything, dim=1) - LN2 * student.positives
    logits = logits.detach()
    return loss, torch.logsumexp(LN2 * logits, dim=1) / LN2, logits.amax(dim=1)


@torch.no_grad()
def decide(operands: Operands, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """``[rows, columns]`` bools: what does not count; what of it the guide or the group masked; what is easy."""
    excluded = _excluded(block, operands.student[0].device)
    masked = torch.zeros_like(excluded)
    if block.guided and operands.guide is not None and operands.guide_thresholds is not None:
        masked |= masked_by_guide(_scores(operands.guide, block), operands.guide_thresholds)
    for rows, columns in operands.groups_of(block):
        masked |= rows[:, None] == columns
    masked &= ~excluded
    easy = torch.zeros_like(excluded)
    if operands.student_thresholds is not None:
        easy = easy_for_student(_scores(operands.student, block), operands.student_thresholds) & ~masked & ~excluded
    return masked | easy | excluded, masked, easy


def masked_by_guide(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Which of the guide's scores ``[rows, columns]`` are above their row's threshold, ``[rows]``."""
    return scores > thresholds[:, None]


def easy_for_student(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Which of the student's scores ``[rows, columns]`` are below their row's threshold, ``[rows]``."""
    return scores < thresholds[:, None]


def _scaled(logits: Tensor, block: Block, operands: Operands) -> Tensor:
    """The logits with what hardness weighting adds to them, which has no derivative."""
    if block.scaled == "none":
        return logits
    own, others = operands.logit_scales_of(block)
    factor = torch.ones_like(logits) if others is None else others.expand_as(logits).clone()
    if block.own_negative is not None:
        factor.diagonal(block.own_negative).fill_(1.0 if own is None else own)
    return logits + ((factor - 1) * logits).detach()


def _scores(operands: Sequence[Tensor], block: Block) -> Tensor:
    """``[rows, columns]``. Half types are multiplied and summed in float32: their rounding is the operands' alone."""
    dtype = accumulation_dtype(operands[0].dtype)
    rows = operands[block.row_operand][block.row_start : block.row_start + block.rows]
    return rows.to(dtype) @ operands[block.column_operand].to(dtype).T


def distil(operands: Operands, blocks: Sequence[Block], guide_temperature: float) -> Distilled:
    """See `Distilled`, differentiable by the student's embeddings and the temperature."""
    assert operands.guide is not None
    softmaxes = range(1 + max(block.softmax for block in blocks))

    def logits(of: Sequence[Tensor], factor: float) -> list[Tensor]:
        device = of[0].device
        scores = [(factor * _scores(of, block)).masked_fill(_excluded(block, device), -MASKED) for block in blocks]
        return [
            torch.cat([s for s, block in zip(scores, blocks, strict=True) if block.softmax == k], dim=1)
            for k in softmaxes
        ]

    with torch.no_grad():
        by_guide = logits(operands.guide, 1 / guide_temperature)
        # Scores in the guide's type, sums in the student's.
        by_guide = [x.to(accumulation_dtype(operands.student[0].dtype)) for x in by_guide]
        guide_lse = [x.logsumexp(1) for x in by_guide]
        shares = [(x - lse[:, None]).exp() for x, lse in zip(by_guide, guide_lse, strict=True)]
        guide_mean = [_mean(share, x) for share, x in zip(shares, by_guide, strict=True)]
    by_student = [logits(student.operands, LN2) for student in operands.matryoshka]
    return Distilled(
        torch.stack([torch.cat([x.logsumexp(1) for x in level]) for level in by_student]),
        torch.stack([torch.cat([_mean(*each) for each in zip(shares, level, strict=True)]) for level in by_student]),
        torch.cat(guide_lse),
        torch.cat(guide_mean),
    )


def _mean(shares: Tensor, logits: Tensor) -> Tensor:
    """``[B]`` of the entries that are not out of reach."""
    return (shares.to(logits.dtype) * logits.masked_fill(logits <= -MASKED / 2, 0.0)).sum(1)


def _excluded(block: Block, device: torch.device) -> Tensor:
    """``[rows, columns]``, bool: what never counts."""
    excluded = torch.zeros(block.rows, block.columns, dtype=torch.bool, device=device)
    if block.excluded is not None:
        excluded.diagonal(block.excluded).fill_(True)
    return excluded
