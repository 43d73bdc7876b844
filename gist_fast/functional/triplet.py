"""The soft triplet term of the guided loss: anchors closer to what the guide calls positive than to what it does not.

GISTEmbed's training code calls it ``guided-triplet-soft``. For row i, over the entries of the blocks ap, aa and an_k
(all whose row is the anchor), with P_i the positive and what the guide or the group masked, and N_i all others that
count:

    term_i = max(0, mean of sim over N_i - mean of sim over P_i + triplet_margin)

and 0 where N_i is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gist_fast.functional.blocks import ANCHORS, Block
from gist_fast.functional.mask_products import MaskProduct, sum_similarities


def triplet_rows(
    student: Sequence[Tensor],
    positive: Tensor,
    margin: float,
    blocks: Sequence[Block],
    product: MaskProduct,
    own_negatives: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The term of each row, ``[B]``, accumulation type, differentiable by the embeddings.

    Args:
        student: embeddings of one Matryoshka dim: anchors ``[A, D]``, positives ``[M, D]``, negatives.
        positive: ``[B]``: cosine similarities of the anchors with their positives, differentiable.
        margin: in units of cosine similarity.
        product: by the masks of the same batch.
        own_negatives: of negatives that are one anchor's alone; see `gist_fast.functional.mask_products.Sums.add`.
    """
    sums = sum_similarities(student, [(k, b) for k, b in enumerate(blocks) if b.row_operand == ANCHORS], product)
    if own_negatives is not None:
        sums = sums.add(*own_negatives)
    negative, count = sums.negatives
    gap = negative / count.clamp_min(1) - (positive + sums.masked) / (1 + sums.masked_number)
    return torch.where(count > 0, (gap + margin).clamp_min(0), 0.0)
