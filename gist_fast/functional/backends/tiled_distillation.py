"""Distillation from the guide in plain PyTorch, tile by tile; see `gist_fast.functional.distillation`.

A tile's scores by guide and student are there together, so one pass gives both logsumexps and both means under the
guide's softmax: the running sums of ``2^t``, ``2^t t`` and ``2^t z`` with base-2 logits t by the guide and z by the
student are all scaled by the same maximum of t. The backward pass computes both again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gist_fast.functional.backends import around_tiles
from gist_fast.functional.backends.interface import LARGEST_WEIGHT, LN2, Distilled, Problem
from gist_fast.functional.backends.kept import MASKED
from gist_fast.functional.backends.tiled import Side, Tile, Workspace, accumulate, across, sides, tiles


def forward(problem: Problem, guide_temperature: float) -> Distilled:
    """See `gist_fast.functional.backends.interface.DistillingBackend`."""
    operands = around_tiles.prepare_operands(problem)
    work, factor = Workspace(operands), math.log2(math.e) / guide_temperature
    dims, rows = len(operands.matryoshka), problem.config.softmaxes * problem.rows
    like = operands.matryoshka[0].positives
    maximum, guide_maximum = like.new_full((dims, rows), -MASKED), like.new_full((rows,), -MASKED)
    total, mean = (torch.zeros_like(maximum) for _ in range(2))
    guide_total, guide_mean = (torch.zeros_like(guide_maximum) for _ in range(2))
    for tile in tiles(problem.blocks):
        by_guide = _guide_logits(work, tile, factor)
        shared = []
        for side in sides(tile):
            at, axis = side.softmax, side.axis
            risen = torch.maximum(guide_maximum[at], by_guide.amax(axis))
            shrunk = (guide_maximum[at] - risen).exp2_()
            guide_maximum[at] = risen
            weights = work.buffer(f"weights {axis}", *tile.shape)
            torch.sub(by_guide, risen.unsqueeze(axis), out=weights).exp2_()
            # Of a row that has nothing else yet they would be 1.
            weights.diagonal(tile.excluded).fill_(0.0)
            guide_total[at] = guide_total[at] * shrunk + weights.sum(axis)
            guide_mean[at] = guide_mean[at] * shrunk + (weights * by_guide).sum(axis)
            shared.append((side, weights, shrunk))
        for dim in range(dims):
            logits = work.student_scores(tile, dim)
            logits.diagonal(tile.excluded).fill_(-MASKED)
            for side, weights, shrunk in shared:
                at, axis = side.softmax, side.axis
                mean[dim, at] = mean[dim, at] * shrunk + (weights * logits).sum(axis)
                accumulate(maximum[dim, at], total[dim, at], logits, axis, work.scratch(tile))
    none = guide_maximum <= -MASKED / 2
    divisor = guide_total.masked_fill(none, 1.0)
    lse = (maximum + total.log2()).masked_fill_(none, -MASKED)
    guide_lse = (guide_maximum + divisor.log2()).masked_fill_(none, -MASKED)
    return Distilled(LN2 * lse, LN2 * mean / divisor, LN2 * guide_lse, LN2 * guide_mean / divisor)


def backward(
    problem: Problem, guide_temperature: float, by_lse: Tensor, by_mean: Tensor, lse: Tensor, guide_lse: Tensor
) -> list[Tensor]:
    """See `gist_fast.functional.backends.interface.DistillingBackend`."""
    operands = around_tiles.prepare_operands(problem)
    work, factor = Workspace(operands), math.log2(math.e) / guide_temperature
    # By a base-2 logit, hence ln 2; and as large as operands of half types take.
    weights = LN2 * torch.stack([by_lse, by_mean]).to(lse.dtype)
    largest = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
    weights = weights / largest * LARGEST_WEIGHT
    lse2, guide_lse2 = lse / LN2, guide_lse / LN2
    found = [[torch.zeros_like(u, dtype=lse.dtype) for u in student.operands] for student in operands.matryoshka]
    for tile in tiles(problem.blocks):
        by_guide = _guide_logits(work, tile, factor)
        for dim in range(len(operands.matryoshka)):
            logits = work.student_scores(tile, dim)
            dlogits = work.dlogits(tile)
            for side in sides(tile):
                both = (
                    _weighed(logits, lse2[dim], weights[0, dim], side, work, tile),
                    _weighed(by_guide, guide_lse2, weights[1, dim], side, work, tile, "guide's"),
                )
                if side.axis == 1:
                    torch.add(*both, out=dlogits)
                else:
                    dlogits.add_(both[0]).add_(both[1])
            dlogits.diagonal(tile.excluded).fill_(0.0)
            work.add_products(found[dim], dlogits, tile, dim)
    students = [(each.operands, each.norms) for each in operands.matryoshka]
    return around_tiles.by_embedding(found, students, None, problem, largest / LARGEST_WEIGHT)


def _guide_logits(work: Workspace, tile: Tile, factor: float) -> Tensor:
    """The guide's base-2 logits ``[r, c]``, what never counts out of reach."""
    logits = work.guide_scores(tile).mul_(factor)
    logits.diagonal(tile.excluded).fill_(-MASKED)
    return logits


def _weighed(
    logits: Tensor, lse2: Tensor, weights: Tensor, side: Side, work: Workspace, tile: Tile, name: str = "student's"
) -> Tensor:
    """``weight * 2^(logit - lse2)`` of a side's rows."""
    out = work.buffer(name, *tile.shape)
    torch.sub(logits, across(lse2[side.softmax], side), out=out).exp2_()
    return out.mul_(across(weights[side.softmax], side))
