"""Negatives that are one anchor's alone: what they add to the loss of their row.

A column of own negatives has at most one text for each anchor, so its scores are numbers a row, in ``O(B D)``, and no
kernel of tiles is needed. With ``L_i`` the loss of row i by all that is compared in tiles, ``p_i`` the logit of its
positive and ``s_ik`` those of its own negatives that count,

    loss_i = log(exp(L_i) + sum_k exp(s_ik - p_i))

which is the softmax over both, since ``exp(L_i)`` is the sum over the others and the positive divided by
``exp(p_i)``. The derivative by ``L_i`` is at most 1, and ``L_i`` at least 0: nothing overflows or is divided by 0.

Guide, student threshold, groups and hardness weighting decide of them as of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gist_fast.functional.blocks import ANCHORS, FIRST_NEGATIVES, Block
from gist_fast.functional.cosines import row_cosines
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import (
    accumulation_dtype,
    check_finite,
    make_thresholds,
    nan_where_bad,
    ordinary,
    row_dots,
    tie_band,
    unit_rows,
)

DROPPED = -1e30
"""In the place of the logit of what does not count: so far down that its exponential, and its derivative, are 0."""


@dataclass(frozen=True)
class OwnNegatives:
    """``K`` columns of own negatives of ``B`` anchors."""

    numbers: tuple[int, ...]
    """``[K]``: which columns of negatives they are; the first is 0."""
    student: tuple[Tensor, ...]
    """``[N_k, D]``"""
    guide: tuple[Tensor, ...]
    """``[N_k, G]``; empty where no guide of its own decides about them."""
    rows: tuple[Tensor | None, ...]
    """``[N_k]``, int64: the anchor of each; None where row i is anchor i's."""
    groups: tuple[Tensor, ...]
    """``[N_k]``, int64; empty where they are in none."""


class Pairs(NamedTuple):
    """Anchors and positives, row by row."""

    student: tuple[Tensor, Tensor]
    """``[B, D]`` each."""
    guide: tuple[Tensor, ...]
    """``[B, G]`` each; empty without a guide that has embeddings of its own."""
    margins: Tensor | None
    """``[B]``, in the place of the one margin."""
    groups: Tensor | None
    """``[B]``, int64: what a negative's group is compared with."""


class OwnTerms(NamedTuple):
    """What own negatives add, at ``L`` Matryoshka dims."""

    log_sums: Tensor
    """``[L, B]``: logarithm of the sum over each row's of ``exp(s_ik - p_i)``, differentiable."""
    cosines: Tensor
    """``[L, K, B]``: 0 where a row has none, differentiable."""
    there: Tensor
    """``[K, B]``, bool: whether a row has one."""
    masked: Tensor
    """``[K, B]``, bool: those that a guide or their group masked."""
    easy: Tensor
    """``[K, B]``, bool: those of the others that the student ranks below the positive, where only hard ones count."""
    hardest: Tensor
    """``[B]``: the largest similarity that counts, at the largest dim, with what hardness weighting adds; or -inf."""
    guide: Tensor | None
    """``[K, B]``: their similarities by a guide of its own; 0 where a row has none. None without such a guide."""


class Columns(NamedTuple):
    """The columns of a batch: those compared in tiles, and own negatives."""

    student: tuple[Tensor, ...]
    """Anchors, positives, and the columns of negatives that are everyone's."""
    guide: tuple[Tensor, ...]
    """The same of the guide, as far as there are any."""
    groups: tuple[Tensor, ...]
    """Of each of those columns of negatives, ``[N_k]``; empty where they are in none."""
    own: OwnNegatives | None
    shared: tuple[int, ...]
    """Which columns of negatives are everyone's; the first is 0."""

    def named(self, blocks: Sequence[Block]) -> tuple[list[str], list[int]]:
        """Names of the blocks, then of the own negatives, ``an_k`` by the number of their column; and how many pairs
        each compares."""
        names = [b.name for b in blocks]
        for place, block in enumerate(blocks):
            if block.column_operand >= FIRST_NEGATIVES:
                kind, _ = block.name.split("_")
                names[place] = f"{kind}_{self.shared[block.column_operand - FIRST_NEGATIVES] + 1}"
        numbers = self.own.numbers if self.own else ()
        sizes = [] if self.own is None else [x.shape[0] for x in self.own.student]
        names += [f"an_{number + 1}" for number in numbers]
        return names, [*(b.compared for b in blocks), *sizes]


def split_columns(
    student: tuple[Tensor, ...],
    guide: tuple[Tensor, ...],
    negative_groups: tuple[Tensor, ...],
    scopes: Sequence[str],
    rows: Sequence[Tensor | None],
) -> Columns:
    """Take own negatives out of the columns.

    Args:
        student: anchors, positives, columns of negatives.
        guide: the same of the guide, or of anchors and positives alone, or ().
        negative_groups: of each column of negatives, ``[N_k]``; or ().
        scopes: of each column of negatives, ``"all"`` or ``"own"``.
        rows: of each column of negatives, see `OwnNegatives.rows`.

    Raises:
        ValueError: on the CPU, where a row is not finite; it is named.
    """
    numbers = tuple(k for k, scope in enumerate(scopes) if scope == "own")
    shared = tuple(k for k, scope in enumerate(scopes) if scope != "own")

    def of(columns: Sequence[Any], chosen: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(columns[k] for k in chosen) if columns else ()

    if not numbers:
        return Columns(student, guide, negative_groups, None, shared)
    for place, number in enumerate(shared):
        if place != number:  # whoever looks at them next counts them anew
            check_finite(student[2 + number], f"negatives[{number}]")
            for x in guide[2 + number : 3 + number]:
                check_finite(x, f"guide_negatives[{number}]")
    own = OwnNegatives(
        numbers,
        tuple(ordinary(x) for x in of(student[2:], numbers)),
        of(guide[2:], numbers),
        tuple(None if r is None else ordinary(r).to(torch.int64) for r in of(rows, numbers)),
        of(negative_groups, numbers),
    )
    return Columns(
        (*student[:2], *of(student[2:], shared)),
        (*guide[:2], *of(guide[2:], shared)),
        of(negative_groups, shared),
        own,
        shared,
    )


def own_terms(
    own: OwnNegatives, pairs: Pairs, temperature: float | Tensor, config: LossConfig, dims: Sequence[int]
) -> OwnTerms:
    """See `OwnTerms`.

    Args:
        dims: Matryoshka dims, the largest first; empty for the whole width alone.

    Raises:
        ValueError: on the CPU, where a row is not finite; it is named.
    """
    width, dtype = pairs.student[ANCHORS].shape[1], accumulation_dtype(pairs.student[ANCHORS].dtype)
    for number, x in zip(own.numbers, own.student, strict=True):
        check_finite(x, f"negatives[{number}]")
    there = torch.stack([_spread(torch.ones_like(x[:, 0], dtype=torch.bool), r, pairs) for x, r in _with_rows(own)])
    weighs = config.hardness_mode in ("hard_negatives", "all_negatives")
    strength = config.hardness_strength if weighs else 0.0
    log_sums, cosines = [], []
    for level, dim in enumerate(dims or (width,)):
        anchors, positives = (x[:, :dim] for x in pairs.student)
        positive = row_cosines(anchors, positives)
        similar = torch.stack([
            _spread(row_cosines(anchors if r is None else anchors[r], x[:, :dim]), r, pairs) for x, r in _with_rows(own)
        ])  # fmt: skip
        if level == 0:
            masked, easy, bad, of_guide = _decide(own, pairs, config, positive.detach(), similar.detach(), there, dim)
            dropped = masked | easy | ~there
            with torch.no_grad():
                hardest = (similar * (1 + strength * temperature)).masked_fill(dropped, -torch.inf).amax(0)
        # What hardness weighting adds is held constant.
        logits = (similar - positive) / temperature + strength * similar.detach()
        log_sums.append(torch.where(dropped, DROPPED, logits).logsumexp(0) + bad)
        cosines.append(similar)
    return OwnTerms(torch.stack(log_sums), torch.stack(cosines), there, masked, easy, hardest.to(dtype), of_guide)


def _with_rows(own: OwnNegatives) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(own.student, own.rows, strict=True))


def _spread(values: Tensor, rows: Tensor | None, pairs: Pairs) -> Tensor:
    """``[B]`` of ``values [N_k]``, each in its anchor's place; 0, or False, where there is none."""
    if rows is None:
        return values
    return values.new_zeros(len(pairs.student[ANCHORS])).index_copy(0, rows, values)


@torch.no_grad()
def _decide(
    own: OwnNegatives,
    pairs: Pairs,
    config: LossConfig,
    positive: Tensor,
    similar: Tensor,
    there: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``[K, B]`` bools: what a guide or their group masks, and what of the others is easy; NaN where a row of the guide
    is not finite, whose comparisons would be false and mask nothing, unseen; and `OwnTerms.guide`.

    Args:
        positive: ``[B]``, similarities by the student at the largest dim, which is `width`.
        similar: ``[K, B]``, likewise, of the own negatives.
    """

    def thresholds(own_scores: Tensor, width: int) -> Tensor:
        margin = config.margin if pairs.margins is None else pairs.margins.to(own_scores)
        band = tie_band(own_scores.dtype, width)
        return make_thresholds(own_scores, margin, relative=config.relative, mask_ties=config.mask_ties, band=band)

    masked, bad, of_negatives = torch.zeros_like(there), positive.new_zeros(()), None
    if config.self_guided and config.mask_negatives:
        masked |= similar > thresholds(positive, width)
    elif own.guide:
        of_positives, of_negatives, bad = _guide_scores(own, pairs)
        masked |= of_negatives > thresholds(of_positives, own.guide[0].shape[1])
    for k, (groups, rows) in enumerate(zip(own.groups, own.rows, strict=False)):
        assert pairs.groups is not None
        masked[k] |= _spread(groups == (pairs.groups if rows is None else pairs.groups[rows]), rows, pairs)
    masked &= there
    easy = torch.zeros_like(masked)
    if config.hard:
        easy = (similar < positive - tie_band(positive.dtype, width)) & there & ~masked
    return masked, easy, bad, of_negatives


def _guide_scores(own: OwnNegatives, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities by the guide, of the positives ``[B]`` and of the own negatives ``[K, B]``; and 0, 0-d, or NaN."""
    guides = [unit_rows(x, f"guide_{name}") for x, name in zip(pairs.guide, ("anchors", "positives"), strict=True)]
    anchors, positives = (x.whole for x in guides)
    scores = []
    for number, x, rows in zip(own.numbers, own.guide, own.rows, strict=True):
        guides.append(unit_rows(x, f"guide_negatives[{number}]"))
        scores.append(_spread(row_dots(anchors if rows is None else anchors[rows], guides[-1].whole), rows, pairs))
    return row_dots(anchors, positives), torch.stack(scores), nan_where_bad(guides)
