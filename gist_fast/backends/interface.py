"""What a backend is given and what it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from gist_fast.blocks import Block
from gist_fast.operands import Operands

LN2 = math.log(2.0)


class Negatives(NamedTuple):
    """What a backend's forward pass returns: the softmax over each row's unmasked negatives, positive left out."""

    lse2: Tensor
    """``[B]``, accumulation type: ``log2(sum(exp2(logit)))``; -inf for a row that has none."""
    hardest: Tensor
    """``[B]``, accumulation type: the largest logit (base 2); -inf for a row that has none."""
    masked: Tensor
    """``[blocks]``, int64: how many entries each block masked, excluded ones not counted."""
    bits: Tensor
    """uint8, flat: what the backend keeps for its backward pass, in its own order (a bit a pair, or as it
    documents); empty where not kept."""


class StreamingBackend(Protocol):
    """A module that computes negatives and their gradients tile by tile."""

    def mask_bytes(self, blocks: Sequence[Block]) -> int:
        """How many bytes `forward` fills with mask bits."""

    def forward(self, operands: Operands, blocks: Sequence[Block], keep_bits: bool) -> Negatives:
        """The softmax over the negatives of each row."""

    def backward(
        self, operands: Operands, blocks: Sequence[Block], lse2: Tensor, weights: Tensor, bits: Tensor | None
    ) -> list[Tensor]:
        """``sum_ij weights_i * exp2(logit_ij - lse2_i) * d logit_ij`` over unmasked entries, by each student operand.

        Args:
            lse2: ``[B]``, positive included.
            weights: ``[B]``, the upstream gradient of each row, scaled so that the largest is 1 in magnitude: a mean
                over a large batch would otherwise underflow float16.
            bits: from `forward`; None to decide the masks again.

        Returns:
            One tensor an operand, of its shape, accumulation type.
        """


class GuidedRows(NamedTuple):
    """What the forward operator returns, a row an anchor; all but `loss` are without gradient."""

    loss: Tensor
    """``[B]``"""
    lse2: Tensor
    """``[B]``: base-2 logsumexp of the negatives."""
    positive: Tensor
    """``[B]``: cosine similarity of each anchor with its positive."""
    hardest: Tensor
    """``[B]``: cosine similarity with the hardest unmasked negative, -inf where there is none."""
    masked: Tensor
    """``[blocks]``, int64."""
    bits: Tensor
    """Flat uint8."""
