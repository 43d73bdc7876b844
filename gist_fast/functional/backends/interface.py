"""What a backend is given and what it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from torch import Tensor

from gist_fast.functional.blocks import Block
from gist_fast.functional.operands import Operands

LN2 = math.log(2.0)
LARGEST_WEIGHT = 2.0**14
"""What a row's weight is at most in a backward pass. Gradients by the logits, in the operands' type, are at most twice
that, within float16; and those as small as 1 / 2^14 of a row's are still normal numbers there. At weights of 1 the
typical softmax entry of a batch above 16,384 would be subnormal, and lose digits."""


class Negatives(NamedTuple):
    """What a backend's forward pass returns: the softmax over each row's unmasked negatives, positive left out."""

    lse2: Tensor
    """``[L, B]``, accumulation type: ``log2(sum(exp2(logit)))`` at each Matryoshka dim; -inf for a row without any."""
    hardest: Tensor
    """``[B]``, accumulation type: the largest logit (base 2) at the largest dim; -inf for a row that has none."""
    masked: Tensor
    """``[blocks]``, int64: how many entries of each block a guide or their group masked, excluded ones not counted."""
    easy_negatives: Tensor
    """``[blocks]``, int64: how many of the others the student ranks below the positive, where only hard ones count."""
    mask_bits: Tensor
    """uint8, flat: what the backend keeps for its backward pass, in its own order (a bit a pair, or as it
    documents); empty where not kept."""


class StreamingBackend(Protocol):
    """A module that computes negatives and their gradients tile by tile."""

    def mask_bytes(self, blocks: Sequence[Block], dims: int) -> int:
        """How many bytes `forward` fills with mask bits, for so many Matryoshka dims."""

    def forward(self, operands: Operands, blocks: Sequence[Block], keep_mask_bits: bool) -> Negatives:
        """The softmax over the negatives of each row."""

    def backward(
        self,
        operands: Operands,
        blocks: Sequence[Block],
        lse2: Tensor,
        weights: Tensor | None,
        mask_bits: Tensor | None,
    ) -> list[list[Tensor]]:
        """``sum_ij weights_i * exp2(logit_ij - lse2_i) * d logit_ij`` over unmasked entries, by each student operand.

        Args:
            lse2: ``[L, B]``, positive included.
            weights: ``[L, B]``, the upstream gradient of each row, scaled so that the largest is `LARGEST_WEIGHT` in
                magnitude: a mean over a large batch would otherwise underflow float16. None where no two are of
                different sign: ``lse2`` is then less ``log2(weight)``, which saves a factor a pair.
            mask_bits: from `forward`; None to decide the masks again.

        Returns:
            For each dim one tensor an operand, of its shape, accumulation type.
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


class GuidedRows(NamedTuple):
    """What the forward operator returns, a row an anchor; all but `loss` are without gradient."""

    loss: Tensor
    """``[L, B]``: at each Matryoshka dim, the largest first."""
    lse2: Tensor
    """``[L, B]``: base-2 logsumexp of the negatives."""
    positive: Tensor
    """``[B]``: cosine similarity of each anchor with its positive, at the largest dim."""
    hardest: Tensor
    """``[B]``: cosine similarity with the hardest unmasked negative, at the largest dim, with what hardness weighting
    adds to it; -inf where there is none."""
    masked: Tensor
    """``[blocks]``, int64."""
    easy_negatives: Tensor
    """``[blocks]``, int64."""
    mask_bits: Tensor
    """Flat uint8."""


def refuse_double_backward(*_: Any) -> NoReturn:
    """Say that there are no second derivatives, and who has them."""
    raise RuntimeError(
        "guided_contrastive_loss: the streaming backends are differentiable once; second derivatives need "
        "backend='reference', which is made of ordinary torch operations."
    )
