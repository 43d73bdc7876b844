"""What a backend is given and what it returns."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn, Protocol

from torch import Tensor

from gist_fast.functional.blocks import Block, make_blocks
from gist_fast.functional.loss_config import LossConfig

LN2 = math.log(2.0)
LARGEST_WEIGHT = 2.0**14
"""What a row's weight is at most in a backward pass. Gradients by the logits, in the operands' type, are at most twice
that, within float16; and those as small as 1 / 2^14 of a row's are still normal numbers there. At weights of 1 the
typical softmax entry of a batch above 16,384 would be subnormal, and lose digits."""


class GuidedRows(NamedTuple):
    """What the forward operator returns, a row an anchor; all but `loss` are without gradient."""

    loss: Tensor
    """``[L, R]``: at each Matryoshka dim, the largest first, of each row in each softmax: R is B, or where there are
    several softmaxes B for each, one after the other."""
    lse2: Tensor
    """``[L, R]``: base-2 logsumexp of the unmasked negatives; -inf for a row without any."""
    positive: Tensor
    """``[B]``: cosine similarity of each anchor with its positive, at the largest dim."""
    hardest: Tensor
    """``[B]``: cosine similarity with the hardest unmasked negative, at the largest dim, with what hardness weighting
    adds to it; -inf where there is none."""
    masked: Tensor
    """``[blocks]``, int64: how many entries of each block a guide or their group masked, excluded ones not counted."""
    easy_negatives: Tensor
    """``[blocks]``, int64: how many of the others the student ranks below the positive, where only hard ones count."""
    mask_bits: Tensor
    """uint8, flat: what the backend keeps for its backward pass, in its own order (a bit a pair, or as it
    documents); empty where not kept."""


class Distilled(NamedTuple):
    """What distillation needs of each row's entries in all blocks, excluded ones left out: logits by the student
    (similarity over temperature, natural) and by the guide. Rows without any entry have a logsumexp of about -1e30, and
    means of 0."""

    lse: Tensor
    """``[L, R]``: logsumexp of the student's logits."""
    mean: Tensor
    """``[L, R]``: their mean under the guide's softmax."""
    guide_lse: Tensor
    """``[R]``: logsumexp of the guide's."""
    guide_mean: Tensor
    """``[R]``: their mean under the guide's softmax."""


@dataclass(frozen=True)
class Problem:
    """A call of the loss, as a streaming backend gets it: tensors as the user gave them, checked."""

    student: tuple[Tensor, ...]
    """Anchors ``[A, D]``, positives ``[M, D]``, and any columns of negatives ``[N_k, D]``."""
    guide: tuple[Tensor, ...]
    """The guide's embeddings of the same texts, or of those alone that it may mask; empty without a guide that has
    embeddings of its own."""
    temperature: Tensor
    """0-d."""
    margins: Tensor | None
    """``[B]``, in the place of the one margin of `config`."""
    groups: tuple[Tensor, ...]
    """Two at most, int64: ``[A + M]``, of the anchors and the positives, or of all negatives behind them too."""
    dims: tuple[int, ...]
    """Matryoshka dims, the largest first; empty for the whole width alone."""
    rows: int
    """B: how many of the anchors, from the first on, the loss is of."""
    offset: int
    """Anchor i's positive is row ``offset + i`` of the positives."""
    one_sign: bool
    """The upstream gradients of no two rows will be of different sign, as those of their mean or sum."""
    config: LossConfig

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return make_blocks(self.rows, [x.shape[0] for x in self.student], self.config, self.offset)

    @property
    def masks(self) -> bool:
        """Whether there is anything to mask but what never counts."""
        config = self.config
        return config.self_guided or len(self.guide) > 0 or len(self.groups) > 0 or config.hard

    def decided(self) -> Problem:
        """The same without what decides masks, for a backward pass that has their mask bits."""
        return replace(self, guide=(), margins=None, groups=(), config=self.config.decided())


class StreamingBackend(Protocol):
    """A module that computes the loss and its gradients tile by tile."""

    def mask_bytes(self, blocks: Sequence[Block], dims: int) -> int:
        """How many bytes `forward` fills with mask bits, for so many Matryoshka dims."""

    def forward(self, problem: Problem, keep_mask_bits: bool) -> GuidedRows:
        """The loss of each row, and what else comes with it."""

    def backward(
        self, problem: Problem, grad_loss: Tensor, lse2: Tensor | None, mask_bits: Tensor | None
    ) -> list[Tensor]:
        """Gradients by each of the student's embeddings, in their types, and last by the temperature.

        Args:
            grad_loss: ``[L, R]``, the upstream gradient by each row's loss in each softmax.
            lse2: ``GuidedRows.lse2``; None, where another backend made the mask, to compute it again.
            mask_bits: from `forward`; None to decide the masks again.
        """

    def mask_product(
        self, blocks: Sequence[Block], dims: int, mask_bits: Tensor, index: int, other: Tensor, transposed: bool
    ) -> Tensor:
        """A block's mask times a matrix, summed in the accumulation type.

        Args:
            dims: how many Matryoshka dims `mask_bits` came from.
            mask_bits: from `forward`, of masks that no student's threshold took part in.
            index: of the block; its excluded entries count as not masked.
            other: ``[columns, E]``, or ``[rows, E]`` where `transposed`.

        Returns:
            ``[rows, E]``, or ``[columns, E]``.
        """


class DistillingBackend(Protocol):
    """A module that computes `Distilled` and its gradients tile by tile. Masks, groups and hardness weighting have no
    part in it: the configuration of its problems says what is compared, and no more."""

    def forward(self, problem: Problem, guide_temperature: float) -> Distilled:
        """The four numbers of each row."""

    def backward(
        self,
        problem: Problem,
        guide_temperature: float,
        by_lse: Tensor,
        by_mean: Tensor,
        lse: Tensor,
        guide_lse: Tensor,
    ) -> list[Tensor]:
        """Gradients by each of the student's embeddings, in their types, and last by the temperature.

        Args:
            by_lse, by_mean: ``[L, R]``, the upstream gradients.
            lse, guide_lse: from `forward`.
        """


def refuse_double_backward(*_: Any) -> NoReturn:
    """Say that there are no second derivatives, and who has them."""
    raise RuntimeError(
        "guided_contrastive_loss: the streaming backends are differentiable once; second derivatives need "
        "backend='reference', which is made of ordinary torch operations."
    )
