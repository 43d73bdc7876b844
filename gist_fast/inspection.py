"""Which pairs of one batch the guide drops, by the very rule that the loss follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gist_fast.blocks import Block, make_blocks
from gist_fast.checks import check_margin
from gist_fast.data import GUIDE_SUFFIX, text_columns
from gist_fast.errors import InputError
from gist_fast.operands import TIE_ULPS, prepare

if TYPE_CHECKING:
    from datasets import Dataset

Encode = Callable[[list[str], str, int], Tensor]
"""From n texts, the name of their column and its place to their embeddings, ``[n, width]``."""


@dataclass(frozen=True)
class DroppedPair:
    """One entry of a block that the guide took out."""

    block: str
    row: int
    """The row of the data (the first is 1) whose loss the pair is left out of."""
    other_row: int
    """The row that the other text is from."""
    text: str
    """The row's text: its anchor, or in ``pp`` its positive."""
    other_text: str
    guide: float
    """The guide's similarity of the two."""
    threshold: float
    """The guide's similarity of the row's anchor and positive, less the margin."""
    student: float | None
    """The student's similarity of the two, where a student was given."""

    @property
    def excess(self) -> float:
        return self.guide - self.threshold


@dataclass(frozen=True)
class Inspection:
    """What the guide did to one batch."""

    first_row: int
    last_row: int
    compared: dict[str, int]
    """By block, how many pairs were compared."""
    dropped: list[DroppedPair]
    """Farthest above their threshold first."""

    def dropped_in(self, block: str) -> int:
        return sum(pair.block == block for pair in self.dropped)

    def share_dropped(self, block: str | None = None) -> float:
        """The share of pairs dropped, in a block or altogether."""
        if block is None:
            return len(self.dropped) / max(1, sum(self.compared.values()))
        return self.dropped_in(block) / max(1, self.compared[block])


def inspect_batch(
    dataset: Dataset,
    guide: Encode | None,
    student: Encode | None = None,
    *,
    batch: int = 1,
    batch_size: int = 64,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
) -> Inspection:
    """Find the pairs that the guide drops in one batch of a dataset, taken in its order.

    Args:
        dataset: as `gist_fast.data.load_texts` returns it.
        guide: embeds texts; None to take the guide's embeddings that the dataset carries.
        student: embeds texts, for the student's similarities beside the guide's.
        batch: which batch; the first is 1.

    Raises:
        InputError: there is no such batch, or neither a guide nor embeddings of one.
    """
    check_margin(margin, margin_strategy)
    if batch_size < 2:
        raise InputError(f"batch_size: got {batch_size}; pairs need at least 2 rows.")
    batches = -(-len(dataset) // batch_size)
    if not 1 <= batch <= batches:
        raise InputError(
            f"batch: got {batch}; the {len(dataset)} rows make batches 1 to {batches} at a batch size of {batch_size}."
        )
    first = (batch - 1) * batch_size
    rows = dataset.select(range(first, min(first + batch_size, len(dataset))))
    columns = text_columns(rows)
    texts = {column: list(rows[column]) for column in columns}
    guided = _carried(rows, columns) if guide is None else _encoded(texts, guide)
    studied = None if student is None else _encoded(texts, student)
    operands = prepare(
        # The limits do not depend on the student; without one, the guide stands in.
        studied or guided,
        guided,
        torch.tensor(1.0),
        margin=margin,
        relative=margin_strategy == "relative",
        self_guided=False,
        offset=0,
    )
    assert operands.guide is not None
    assert operands.limits is not None
    blocks = make_blocks(
        len(rows),
        [len(rows)] * (len(columns) - 1),
        offset=0,
        contrast_anchors=contrast_anchors,
        contrast_positives=contrast_positives,
    )
    dropped = []
    for block in blocks:
        masked, scores = _masked(operands.guide, operands.limits, block)
        thresholds = operands.limits - TIE_ULPS * torch.finfo(operands.limits.dtype).eps
        similar = None if studied is None else _cosines(studied, block)
        for i, j in masked.nonzero().tolist():
            dropped.append(
                DroppedPair(
                    block=block.name,
                    row=first + i + 1,
                    other_row=first + j + 1,
                    text=texts[columns[block.row_operand]][i],
                    other_text=texts[columns[block.column_operand]][j],
                    guide=float(scores[i, j]),
                    threshold=float(thresholds[i]),
                    student=None if similar is None else float(similar[i, j]),
                )
            )
    dropped.sort(key=lambda pair: (-pair.excess, pair.row, pair.other_row))
    return Inspection(first + 1, first + len(rows), {block.name: block.compared for block in blocks}, dropped)


def _masked(guide: Sequence[Tensor], limits: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Which entries of a block the guide drops, and its scores; both ``[rows, columns]``."""
    scores = _scores(guide, block)
    masked = scores > limits[:, None]
    if block.excluded is not None:
        masked.diagonal(block.excluded).fill_(False)
    return masked, scores


def _scores(operands: Sequence[Tensor], block: Block) -> Tensor:
    rows = operands[block.row_operand][block.row_start : block.row_start + block.rows]
    return rows @ operands[block.column_operand].T


def _cosines(embeddings: Sequence[Tensor], block: Block) -> Tensor:
    return _scores([torch.nn.functional.normalize(x, dim=1) for x in embeddings], block)


def _encoded(texts: Mapping[str, list[str]], encode: Encode) -> list[Tensor]:
    """A tensor a column, in float32 on the CPU; each distinct text of a column is encoded once."""
    found = []
    for position, (column, values) in enumerate(texts.items()):
        distinct = {text: place for place, text in enumerate(dict.fromkeys(values))}
        embeddings = encode(list(distinct), column, position).detach().float().cpu()
        found.append(embeddings[[distinct[text] for text in values]])
    return found


def _carried(rows: Dataset, columns: Sequence[str]) -> list[Tensor]:
    names = [column + GUIDE_SUFFIX for column in columns]
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        raise InputError(
            f"guide: none was given, and the data carry no column {missing[0]!r}; name a guide, or embed "
            "it into the data."
        )
    return [torch.tensor(rows[name][:], dtype=torch.float32) for name in names]
