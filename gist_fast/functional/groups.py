"""Groups of rows that are no negatives of each other, as the backends get them: of all rows that they compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def groups_of_rows(
    groups: Sequence[Tensor], negative_groups: Sequence[Tensor], anchors: int, rows: int, offset: int
) -> tuple[Tensor, ...]:
    """Groups of the anchors, the positives and, in the last tensor, the negatives, one behind the other; int64.

    Args:
        groups: of the positives, ``[M]`` each.
        negative_groups: of each column of negatives, ``[N_k]``; or ().
        anchors: how many there are: `rows`, or all M, those of the other positives behind the batch's own.
        rows: of the batch; anchor i is in the group of positive ``offset + i``.
        offset: see `rows`.
    """
    found = []
    for index, each in enumerate(groups):
        own = each[offset : offset + rows]
        others = (each[:offset], each[offset + rows :]) if anchors > rows else ()
        negatives = negative_groups if index == len(groups) - 1 else ()
        found.append(torch.cat([x.to(torch.int64) for x in (own, *others, each, *negatives)]))
    return tuple(found)
