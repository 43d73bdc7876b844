"""Which pairs of one batch the guide drops, by the very rule that the loss follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gist_fast.data.column_checks import Column, as_number
from gist_fast.data.names import MARGIN, NO_TEXT, groups_of, text_columns
from gist_fast.functional.backends.reference import easy_for_student, masked_by_guide
from gist_fast.functional.blocks import FIRST_NEGATIVES, POSITIVES, Block, make_blocks
from gist_fast.functional.checks import check_scopes
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import lowered, make_thresholds
from gist_fast.functional.values import check_number
from gist_fast.inspection.best import Best
from gist_fast.inspection.duplicates import NEAR, Duplicates, Texts, duplicates_among
from gist_fast.inspection.embeddings import Encode, carried, check_finite, encoded
from gist_fast.inspection.guide_scores import NotCompared, own_scores, scores, tie, tiles, unit_rows, unscored
from gist_fast.inspection.margins import MARGINS, MarginCounter, MarginOutcome, check_margins
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DroppedPair:
    """One entry of a block that the guide took out.

    Example:
        >>> pair = DroppedPair("ap", 1, 2, "what falls", "a shower", guide=0.75, threshold=0.5, student=None)
        >>> pair.excess
        0.25
    """

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
    student_positive: float | None = None
    """The student's similarity of the row's anchor and positive, likewise."""
    student_ranks: str | None = None
    """Where the student would have ranked the pair: ``above`` the row's positive, ``below`` it or ``level``."""

    @property
    def excess(self) -> float:
        return self.guide - self.threshold


@dataclass(frozen=True)
class Inspection:
    """What the guide did to one batch.

    Example:
        >>> found = inspect_batch(pairs, lambda texts, column, place: guide.encode(texts, convert_to_tensor=True))
        >>> found.compared["ap"], sum(found.counts.values()) == len(found.dropped)
        (4032, True)
    """

    rows: tuple[int, ...]
    """The rows of the data that it is made of; the first is 1."""
    compared: dict[str, int]
    """By block, how many pairs were compared."""
    counts: dict[str, int]
    """By block, how many of them the guide dropped."""
    ties: dict[str, int]
    """By block, how many stayed though they score as high as the threshold, as another copy of the positive does."""
    rows_emptied: int
    """Rows that were left without any negative; with `hard`, by the guide and the student together."""
    dropped: list[DroppedPair]
    """Farthest above their threshold first; all of them, or as many as were asked for."""
    student_above: int | None
    """Of all that was dropped, how many the student ranks above the row's positive; None without a student."""
    margins: list[MarginOutcome]
    """What other margins would have dropped."""
    duplicates: Duplicates
    """Texts of the batch that are the same, or that the guide finds nearly the same."""
    easy: dict[str, int] | None = None
    """By block, how many of the pairs that the guide left the student already ranks below the row's positive, so that
    `hard` drops them; None without `hard`."""

    @property
    def first_row(self) -> int:
        return self.rows[0]

    @property
    def last_row(self) -> int:
        return self.rows[-1]

    @property
    def total_dropped(self) -> int:
        return sum(self.counts.values())

    def dropped_in(self, block: str) -> int:
        return self.counts[block]

    def share_dropped(self, block: str | None = None) -> float:
        """The share of pairs dropped, in a block or altogether."""
        if block is None:
            return self.total_dropped / max(1, sum(self.compared.values()))
        return self.counts[block] / max(1, self.compared[block])


def inspect_batch(
    dataset: Dataset,
    guide: Encode | None,
    student: Encode | None = None,
    *,
    batch: int = 1,
    batch_size: int = 64,
    **options: Any,
) -> Inspection:
    """`inspect_rows` of one batch of a dataset, taken in its order.

    Args:
        batch: which batch; the first is 1.
        options: see `inspect_rows`.

    Raises:
        InputError: there is no such batch, and as `inspect_rows`.
    """
    if batch_size < 2:
        raise InputError(f"batch_size: expected at least 2 rows, got {batch_size}.")
    batches = -(-len(dataset) // batch_size)
    if not 1 <= batch <= batches:
        raise InputError(
            f"batch: expected 1 to {batches}, the batches that {len(dataset)} rows make at a batch size of "
            f"{batch_size}, got {batch}."
        )
    first = (batch - 1) * batch_size
    return inspect_rows(dataset, range(first, min(first + batch_size, len(dataset))), guide, student, **options)


def inspect_rows(
    dataset: Dataset,
    rows: Sequence[int],
    guide: Encode | None,
    student: Encode | None = None,
    *,
    margins: Sequence[float] = MARGINS,
    near: float = NEAR,
    most: int | None = None,
    **settings: Any,
) -> Inspection:
    """Find the pairs that the guide drops among some rows of a dataset, as if they were a batch.

    Args:
        dataset: as `gist_fast.data.load_texts` returns it.
        rows: their indices in the dataset; the first is 0 here, and 1 in what is found.
        guide: embeds texts; None to take the guide's embeddings that the dataset carries.
        student: embeds texts, for the student's similarities beside the guide's.
        margins: what else to try; see `Inspection.margins`.
        near: texts of a higher cosine similarity are nearly the same; see `Inspection.duplicates`.
        most: how many dropped pairs and duplicates to list; None for all. All are counted.
        settings: those of the loss that say what is dropped, as `gist_fast.GISTTrainingArguments` has them; others are
            not looked at. Rows of one group are not compared, so that none of their pairs counts as dropped, nor is a
            negative with other anchors than its own where ``negatives_scope`` says so. With ``mask_negatives`` False
            the guide reads no negatives, and duplicates are looked for among the other texts. What ``hard`` drops is
            counted apart from what the guide drops, see `Inspection.easy`.

    Raises:
        InputError: neither a guide nor embeddings of one; `hard` without a student; an argument is out of its range.
    """
    config = LossConfig.of(settings)
    margins = check_margins(margins)
    check_number("near", near, above=0, below=1)
    if config.hard and student is None:
        raise InputError("hard: expected False without a student, whose ranking it goes by, got True.")
    batch = dataset.select(rows)
    numbers = tuple(row + 1 for row in rows)
    columns = text_columns(batch)
    texts = {column: list(batch[column]) for column in columns}

    def units(encode: Encode | None, role: str, of: Sequence[str]) -> list[Tensor]:
        found = carried(batch, of) if encode is None else encoded({column: texts[column] for column in of}, encode)
        check_finite(found, of, numbers, role)
        return [unit_rows(values) for values in found]

    # Of negatives that the guide has nothing to say about it reads none.
    judged = columns if config.mask_negatives else columns[:FIRST_NEGATIVES]
    unit = units(guide, "guide", judged)
    student_unit = None if student is None else units(student, "student", columns)
    scopes = check_scopes(config.negatives_scope, len(columns) - FIRST_NEGATIVES)
    own = [FIRST_NEGATIVES + k for k, scope in enumerate(scopes) if scope == "own"]
    # A row's positive is compared with no negative of its own.
    blocks = [
        block
        for block in make_blocks(len(rows), [len(rows)] * len(columns), config)
        if block.row_operand != POSITIVES or block.column_operand not in own
    ]
    missing = {k: torch.tensor([text == NO_TEXT for text in texts[c]]) for k, c in enumerate(columns) if k > POSITIVES}
    never = NotCompared([] if config.groups is None else _groups(batch, config.groups, texts), own, missing)
    row_margins: Tensor | float = 0.0
    if config.row_margins:
        row_margins = _margins(batch, numbers)
    pass_over = _Pass(unit, student_unit, config, never, row_margins, margins, most)
    for number, block in enumerate(blocks):
        pass_over.take(number, block)
    among = Texts.of({column: texts[column] for column in judged}, numbers)
    return Inspection(
        rows=numbers,
        compared=dict(pass_over.compared),
        counts=dict(pass_over.counts),
        ties=dict(pass_over.ties),
        rows_emptied=int((pass_over.kept == 0).sum()),
        dropped=pass_over.pairs(blocks, texts, numbers),
        student_above=pass_over.student_above if student_unit else None,
        margins=pass_over.counter.outcomes(dict(pass_over.compared)),
        duplicates=duplicates_among(among, [unit[k][first] for k, first in enumerate(among.first)], near, most),
        easy=dict(pass_over.easy) if config.hard else None,
    )


class _Pass:
    """One pass over the guide's scores, in tiles: what is dropped now, and what other margins would drop."""

    def __init__(
        self,
        guide: Sequence[Tensor],
        student: Sequence[Tensor] | None,
        config: LossConfig,
        never: NotCompared,
        row_margins: Tensor | float,
        margins: Sequence[float],
        most: int | None,
    ) -> None:
        own, relative, mask_ties = own_scores(guide), config.relative, config.mask_ties
        self.guide, self.student, self.never = guide, student, never
        self.guide_tie = tie(guide)
        self.student_tie = 0.0 if student is None else tie(student)
        self.student_own = None if student is None else own_scores(student)
        self.student_thresholds = None
        if config.hard and self.student_own is not None:
            self.student_thresholds = self.student_own - self.student_tie
        margin = row_margins + config.margin
        self.lowered = lowered(own, margin, relative=relative)
        self.thresholds = make_thresholds(own, margin, relative=relative, mask_ties=mask_ties, band=self.guide_tie)
        self.counter = MarginCounter(own, self.guide_tie, margins, mask_ties, row_margins)
        self.best = Best(most)
        # By block.
        self.compared, self.counts, self.ties, self.easy = (Counter[str]() for _ in range(4))
        self.kept = torch.zeros(len(own), dtype=torch.int64)
        """``[B]``: the negatives that stay of each row."""
        self.student_above = 0

    def take(self, number: int, block: Block) -> None:
        """Go over the scores of a block, which is `number` in the order of blocks."""
        for rows in tiles(block):
            found = scores(self.guide, block, rows, self.never) if block.guided else unscored(block, rows, self.never)
            counts = torch.isfinite(found)
            self.compared[block.name] += int(counts.sum())
            studied = None if self.student is None else scores(self.student, block, rows)
            below = None  # what the student ranks below the row's positive, where that matters
            if studied is not None and self.student_thresholds is not None:
                below = easy_for_student(studied, self.student_thresholds[rows])
            self.counter.add(block, rows, found, None if below is None else below & counts)
            masked = masked_by_guide(found, self.thresholds[rows]) & block.guided
            self.counts[block.name] += int(masked.sum())
            ties = (found >= self.lowered[rows, None] - self.guide_tie) & ~masked & block.guided
            self.ties[block.name] += int(ties.sum())
            kept = counts & ~masked
            self.easy[block.name] += 0 if below is None else int((kept & below).sum())
            kept = kept if below is None else kept & ~below
            self.kept[rows] += kept.sum(dim=1)
            i, j = masked.nonzero(as_tuple=True)
            guided, threshold = found[i, j].double(), self.lowered[rows][i].double()
            own = similar = torch.full_like(guided, torch.nan)
            if studied is not None and self.student_own is not None:
                similar = studied[i, j].double()
                own = self.student_own[rows][i].double()
                self.student_above += int((similar > own + self.student_tie).sum())
            of_block = torch.full_like(i, number)
            self.best.add(guided - threshold, of_block, i + rows.start, j, guided, threshold, similar, own)

    def pairs(
        self, blocks: Sequence[Block], texts: Mapping[str, list[str]], numbers: Sequence[int]
    ) -> list[DroppedPair]:
        """The pairs dropped, farthest above their threshold first."""
        columns = list(texts.values())
        found = []
        entries = zip(*(values.tolist() for values in self.best.taken()[1:]), strict=True)
        for number, i, j, guided, threshold, similar, own in entries:
            block = blocks[number]
            found.append(
                DroppedPair(
                    block=block.name,
                    row=numbers[i],
                    other_row=numbers[j],
                    text=columns[block.row_operand][i],
                    other_text=columns[block.column_operand][j],
                    guide=guided,
                    threshold=threshold,
                    student=None if self.student is None else similar,
                    student_positive=None if self.student is None else own,
                    student_ranks=None if self.student is None else _rank(similar - own, self.student_tie),
                )
            )
        return sorted(found, key=lambda pair: (-pair.excess, pair.row, pair.other_row))


def _rank(ahead: float, tie: float) -> str:
    if abs(ahead) <= tie:
        return "level"
    return "above" if ahead > 0 else "below"


def _groups(batch: Dataset, groups: str, texts: Mapping[str, Sequence[str]]) -> list[list[Tensor | None]]:
    """As `NotCompared` has them."""
    anchor, positive, *negatives = texts
    of_rows: list[Sequence[Any]] = []
    of_negatives: list[Sequence[Any]] = []
    if groups == "column":
        names, theirs = groups_of(list(texts), batch.column_names, "the dataset")
        of_rows += [list(batch[name]) for name in names]
        of_negatives += [list(batch[name]) for name in theirs]
    if groups in ("anchor", "anchor_or_positive"):
        of_rows.append(texts[anchor])
    if groups in ("positive", "anchor_or_positive"):
        of_rows.append(texts[positive])
        of_negatives = [texts[name] for name in negatives]
    number: dict[Any, int] = {}

    def numbers(values: Sequence[Any]) -> Tensor:
        return torch.tensor([number.setdefault(value, len(number)) for value in values])

    none: list[Tensor | None] = [None] * len(negatives)
    found = [[of_row := numbers(values), of_row, *none] for values in of_rows]
    # What a negative's group is compared with is the last of the row's.
    found[-1][FIRST_NEGATIVES:] = [numbers(values) for values in of_negatives] or none
    return found


def _margins(batch: Dataset, numbers: Sequence[int]) -> Tensor:
    """``[B]``: of the rows of these numbers."""
    if MARGIN not in batch.column_names:
        raise InputError(f"row_margins: True, and the data have no column {MARGIN!r}; add it, or leave that out.")
    column, values = Column(MARGIN, MARGIN, "number"), zip(numbers, batch[MARGIN], strict=True)
    return torch.tensor([as_number(value, column, f"dataset: row {row}") for row, value in values])
