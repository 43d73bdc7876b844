"""Texts of different rows that are the same, or that the guide finds nearly the same.

Each distinct text of a column is one item, compared with all others in tiles, so that what is held beside the
embeddings is one tile, whatever the number of rows. Copies are found by the text itself, and need no guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gist_fast.data.names import NO_TEXT, text_columns
from gist_fast.functional.values import check_number
from gist_fast.inspection.best import Best
from gist_fast.inspection.embeddings import Encode, carried, check_finite, encoded_once
from gist_fast.inspection.guide_scores import unit_rows
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

NEAR = 0.95
TILE = 2048
"""Rows and columns of a tile: 16 MiB of scores."""
MOST_ROWS = 10
"""Rows that are named of a text that stands in many."""


@dataclass(frozen=True)
class Copied:
    """A text that stands in more than one row.

    Example:
        >>> Copied("rain", rows=2, places=((1, "positive"), (7, "positive"))).rows
        2
    """

    text: str
    rows: int
    """In how many."""
    places: tuple[tuple[int, str], ...]
    """The first of them, each with the column; the first row is 1."""


@dataclass(frozen=True)
class NearPair:
    """Two texts of different rows that the guide finds nearly the same.

    Example:
        >>> NearPair(0.97, "rain", 1, "positive", "the rain", 4, "positive").similarity
        0.97
    """

    similarity: float
    text: str
    row: int
    """The first row that it stands in; of the data, the first is 1."""
    column: str
    other_text: str
    other_row: int
    other_column: str


@dataclass(frozen=True)
class Duplicates:
    """What was found among some rows.

    Example:
        >>> encode = lambda texts, column, place: guide.encode(texts, convert_to_tensor=True)
        >>> find_duplicates(pairs, encode, near=0.999).copied_texts
        0
    """

    rows: int
    """How many were looked at."""
    near: float
    """The cosine similarity above which texts count as nearly the same."""
    copied_texts: int
    """Texts that stand in more than one row."""
    rows_with_copies: int
    """Rows that share a text with another one."""
    copies: list[Copied]
    """Those that stand in most rows first; all of them, or as many as were asked for."""
    near_pairs: int
    """Pairs of distinct texts, of different rows, that the guide finds nearly the same."""
    rows_with_near: int
    """Rows that hold one of such a pair."""
    pairs: list[NearPair]
    """The most similar first; all of them, or as many as were asked for."""


@dataclass(frozen=True)
class Texts:
    """The distinct texts of each column, in their order, and where they stand."""

    columns: tuple[str, ...]
    distinct: tuple[list[str], ...]
    places: tuple[list[list[int]], ...]
    """The positions of each text among the rows."""
    numbers: Sequence[int]
    """Of each position, the row of the data; the first is 1."""

    @classmethod
    def of(cls, texts: Mapping[str, Sequence[str]], numbers: Sequence[int]) -> Texts:
        """The texts by column, a row each."""
        distinct, places = [], []
        for values in texts.values():
            where: dict[str, list[int]] = {}
            for position, text in enumerate(values):
                if text != NO_TEXT:
                    where.setdefault(text, []).append(position)
            distinct.append(list(where))
            places.append(list(where.values()))
        return cls(tuple(texts), tuple(distinct), tuple(places), numbers)

    @property
    def first(self) -> list[list[int]]:
        """By column, the first position of each distinct text."""
        return [[where[0] for where in column] for column in self.places]


def find_duplicates(
    dataset: Dataset,
    guide: Encode | None,
    *,
    near: float = NEAR,
    rows: int | None = None,
    most: int | None = 20,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Duplicates:
    """Find the texts that stand in several rows of a dataset, and those that the guide finds nearly the same.

    Every text is compared with every other one, of whichever columns: the time grows with the square of the rows, the
    memory with the rows (their embeddings, in float32).

    Args:
        dataset: as `gist_fast.data.load_texts` returns it.
        guide: embeds texts; None to take the guide's embeddings that the dataset carries.
        near: texts of a higher cosine similarity are nearly the same.
        rows: how many to look at, from the first one on; None for all.
        most: how many copies and pairs to list; None for all. All are counted.
        device: where the texts are compared.
        on_progress: called with the tiles done and those in all.

    Raises:
        InputError: an argument is out of its range, or there is neither a guide nor embeddings of one.
    """
    check_number("near", near, above=0, below=1)
    if rows is not None and rows < 2:
        raise InputError(f"rows: expected at least 2, got {rows}.")
    looked_at = dataset if rows is None or rows >= len(dataset) else dataset.select(range(rows))
    columns = text_columns(looked_at)
    numbers = range(1, len(looked_at) + 1)
    by_column = {column: list(looked_at[column]) for column in columns}
    # Of rows that have fewer negatives than others a column may hold nothing.
    columns = [column for column in columns if any(text != NO_TEXT for text in by_column[column])]
    texts = Texts.of({column: by_column[column] for column in columns}, numbers)
    units = []
    for k, (column, first) in enumerate(zip(columns, texts.first, strict=True)):
        if guide is None:
            (embeddings,) = carried(looked_at.select(first), [column])
        else:
            embeddings = encoded_once(texts.distinct[k], column, k, guide)
        check_finite([embeddings], [column], [numbers[position] for position in first], "guide")
        units.append(unit_rows(embeddings))
    return duplicates_among(texts, units, near, most, device=device, on_progress=on_progress)


def duplicates_among(
    texts: Texts,
    units: Sequence[Tensor],
    near: float,
    most: int | None,
    *,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Duplicates:
    """`find_duplicates` of texts whose unit vectors are at hand, ``[n, G]`` a column, a row a distinct text."""
    copies, rows_with_copies, number_of_text = _copies(texts)
    items = [(k, place) for k, column in enumerate(texts.distinct) for place in range(len(column))]
    near_pairs, flagged, best = _near(texts, units, number_of_text, near, most, device, on_progress)
    rows_with_near = {row for k, place in (items[item] for item in flagged) for row in texts.places[k][place]}
    pairs = []
    for similarity, one, other in zip(*(column.tolist() for column in best.taken()), strict=True):
        pairs.append(_pair(texts, items[one], items[other], similarity))
    return Duplicates(
        rows=len(texts.numbers),
        near=near,
        copied_texts=len(copies),
        rows_with_copies=rows_with_copies,
        copies=copies[:most],
        near_pairs=near_pairs,
        rows_with_near=len(rows_with_near),
        pairs=sorted(pairs, key=lambda pair: (-pair.similarity, pair.row, pair.other_row)),
    )


def _copies(texts: Texts) -> tuple[list[Copied], int, dict[str, int]]:
    """The texts that stand in several rows, how many rows those are, and a number for each distinct text."""
    where: dict[str, list[tuple[int, int]]] = {}
    for k, (distinct, column) in enumerate(zip(texts.distinct, texts.places, strict=True)):
        for text, positions in zip(distinct, column, strict=True):
            where.setdefault(text, []).extend((position, k) for position in positions)
    copies, concerned = [], set()
    for text, found in where.items():
        rows = {position for position, _ in found}
        if len(rows) > 1:
            concerned |= rows
            first = sorted(found)[:MOST_ROWS]
            places = tuple((texts.numbers[position], texts.columns[k]) for position, k in first)
            copies.append(Copied(text, len(rows), places))
    copies.sort(key=lambda copy: (-copy.rows, copy.places))
    return copies, len(concerned), {text: number for number, text in enumerate(where)}


def _near(
    texts: Texts,
    units: Sequence[Tensor],
    number_of_text: Mapping[str, int],
    near: float,
    most: int | None,
    device: str | torch.device,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[int, list[int], Best]:
    """How many pairs are nearly the same, the items among them, and the most similar ones by item."""
    unit = torch.cat(list(units)).to(device)
    same_text = torch.tensor([number_of_text[text] for column in texts.distinct for text in column], device=device)
    # The row of a text that stands in one only, else -1: two texts of one row are no duplicates.
    lone = [where[0] if len(where) == 1 else -1 for column in texts.places for where in column]
    only_row = torch.tensor(lone, device=device)
    flagged = torch.zeros(len(unit), dtype=torch.bool, device=device)
    count, best = 0, Best(most)
    starts = range(0, len(unit), TILE)
    tiles = [(one, other) for one in starts for other in starts if one <= other]
    for done, (one, other) in enumerate(tiles, 1):
        found = unit[one : one + TILE] @ unit[other : other + TILE].T
        above = found > near
        if one == other:
            above = above.triu(1)
        i, j = above.nonzero(as_tuple=True)
        similar, i, j = found[i, j], i + one, j + other
        apart = (same_text[i] != same_text[j]) & ((only_row[i] < 0) | (only_row[i] != only_row[j]))
        similar, i, j = similar[apart], i[apart], j[apart]
        count += len(i)
        flagged[i] = True
        flagged[j] = True
        best.add(similar, i, j)
        if on_progress is not None:
            on_progress(done, len(tiles))
    return count, flagged.nonzero()[:, 0].tolist(), best


def _pair(texts: Texts, one: tuple[int, int], other: tuple[int, int], similarity: float) -> NearPair:
    """A pair with the first two different rows that its texts stand in, the earlier one first."""
    (k, place), (m, other_place) = one, other
    mine, theirs = texts.places[k][place][:2], texts.places[m][other_place][:2]
    row, other_row = min((a, b) for a in mine for b in theirs if a != b)
    sides = [
        (row, texts.distinct[k][place], texts.columns[k]),
        (other_row, texts.distinct[m][other_place], texts.columns[m]),
    ]
    (row, text, column), (other_row, other_text, other_column) = sorted(sides, key=lambda side: side[0])
    return NearPair(similarity, text, texts.numbers[row], column, other_text, texts.numbers[other_row], other_column)
