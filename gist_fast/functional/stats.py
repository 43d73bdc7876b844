"""What the guide did to a batch: counts and means that cost nothing to keep and are read only when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GuidedContrastiveStats:
    """Statistics of one call of `gist_fast.guided_contrastive_loss`, without gradient, on the device of the loss.

    Every tensor comes out of the loss's own pass. On an accelerator nothing waits until a value is read, which
    `as_dict` and `masked_share` do.

    Example:
        >>> from gist_fast import guided_contrastive_loss
        >>> loss, stats = guided_contrastive_loss(torch.eye(2), torch.eye(2), return_stats=True)
        >>> stats.masked_share
        {'ap': 0.0, 'aa': 0.0, 'pp': 0.0}
    """

    blocks: tuple[str, ...]
    """Names of the K blocks, in the order ``ap``, ``aa``, ``pp``, ``pa``, ``an_1``, ``pn_1``, ``an_2`` and so on."""
    compared: tuple[int, ...]
    """``[K]``: pairs compared in each block; a row's positive, and its pair with itself, are none of them."""
    masked: Tensor
    """``[K]``, int64: pairs that the guide dropped in each block, or that are of one group."""
    easy: Tensor | None
    """``[K]``, int64: pairs of each block that were dropped because the student ranks them below the positive already;
    None where all count."""
    positive_similarity: Tensor
    """0-d: mean cosine similarity of the anchors with their positives, by the student."""
    hardest_negative_similarity: Tensor
    """0-d: mean cosine similarity with each row's most similar unmasked negative, over the rows that have one; NaN
    where no row has one. What hardness weighting adds to it is included."""
    distillation: Tensor | None = None
    """0-d: mean KL divergence from the guide's distribution, at the largest dim, not weighted; None where nothing is
    distilled."""

    def in_order(self) -> GuidedContrastiveStats:
        """The same in the order of `blocks`, wherever columns of own negatives stood."""
        order = sorted(range(len(self.blocks)), key=lambda k: _place(self.blocks[k]))
        if order == list(range(len(order))):
            return self

        def put(counts: Tensor) -> Tensor:
            # One by one: a tensor of the order would have to be copied to the device.
            return torch.stack([counts[k] for k in order])

        blocks, compared = tuple(self.blocks[k] for k in order), tuple(self.compared[k] for k in order)
        easy = None if self.easy is None else put(self.easy)
        return replace(self, blocks=blocks, compared=compared, masked=put(self.masked), easy=easy)

    @property
    def masked_share(self) -> dict[str, float]:
        """Share of the compared pairs that were masked, by block; 0.0 for a block that compares none. Waits."""
        return self._shares(self.masked)

    @property
    def easy_share(self) -> dict[str, float]:
        """Share of the compared pairs that were dropped as easy, by block; empty where all count. Waits."""
        return {} if self.easy is None else self._shares(self.easy)

    def _shares(self, counts: Tensor) -> dict[str, float]:
        shares = zip(self.blocks, counts.tolist(), self.compared, strict=True)
        return {name: count / compared if compared else 0.0 for name, count, compared in shares}

    def as_dict(self) -> dict[str, float]:
        """``masked_{block}`` (and ``easy_{block}``) for every block, ``positive_similarity`` and
        ``hardest_negative_similarity``, and ``distillation`` where there is any. Waits."""
        return {
            **{f"masked_{name}": share for name, share in self.masked_share.items()},
            **{f"easy_{name}": share for name, share in self.easy_share.items()},
            "positive_similarity": self.positive_similarity.item(),
            "hardest_negative_similarity": self.hardest_negative_similarity.item(),
            **({} if self.distillation is None else {"distillation": self.distillation.item()}),
        }


def _place(block: str) -> int:
    """Columns of negatives by their number, behind all others."""
    _, _, number = block.partition("_")
    return int(number or 0)


def make_stats(
    names: Sequence[str],
    compared: Sequence[int],
    masked: Tensor,
    easy: Tensor | None,
    positive: Tensor,
    hardest: Tensor,
    divergence: Tensor | None = None,
) -> GuidedContrastiveStats:
    """Statistics of counts ``[K]``, of each row's similarities ``[B]``, the hardest -inf where a row has none, and of
    its KL divergence from the guide ``[B]``."""
    counts = masked.detach(), None if easy is None else easy.detach()
    hardest = hardest.detach()
    has_one = hardest != -torch.inf
    mean_hardest = torch.where(has_one, hardest, 0.0).sum() / has_one.sum()
    distillation = None if divergence is None else divergence.detach().mean()
    return GuidedContrastiveStats(
        tuple(names), tuple(compared), *counts, positive.detach().mean(), mean_hardest, distillation
    )


class StatsAverage:
    """Averages of `GuidedContrastiveStats` over batches, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        # One a name: batches of several datasets need not have the same blocks.
        self._batches: Counter[str] = Counter()

    def add(self, stats: GuidedContrastiveStats) -> None:
        """Add a batch. Nothing waits."""
        values = {}
        for kind, counts in (("masked", stats.masked), ("easy", stats.easy)):
            if counts is not None:
                # Divided one by one: a tensor of the divisors would have to be copied to the device, which waits.
                for name, count, compared in zip(stats.blocks, counts.float().unbind(), stats.compared, strict=True):
                    values[f"{kind}_{name}"] = count / max(compared, 1)
        values["positive_similarity"] = stats.positive_similarity.float()
        # A batch without any negative left has no hardest one; count it as -1, the least similarity there is.
        values["hardest_negative_similarity"] = torch.nan_to_num(stats.hardest_negative_similarity.float(), nan=-1.0)
        if stats.distillation is not None:
            values["distillation"] = stats.distillation.float()
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._batches.update(values.keys())

    def pop(self) -> dict[str, float]:
        """The averages since the last call, and start again; empty where there was no batch. Waits."""
        averages = {name: value.item() / self._batches[name] for name, value in self._sums.items()}
        self._sums, self._batches = {}, Counter()
        return averages

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, on the CPU. Waits."""
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "batches": dict(self._batches)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` returned."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._batches = Counter(state["batches"])
