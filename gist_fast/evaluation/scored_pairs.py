"""Pairs of texts with a number each: a score of likeness (STS), or a label that is 0 or 1 (pair classification)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gist_fast.config.schema import SourceConfig
from gist_fast.data.column_checks import Column, check_once, no_column
from gist_fast.data.load import ColumnNames, load_chosen
from gist_fast.data.names import ANCHOR, POSITIVE
from gist_fast.runtime.errors import InputError, nearest

FIRST, SECOND, SCORE, LABEL = "sentence1", "sentence2", "score", "label"
TEXTS = ((FIRST, ANCHOR), (SECOND, POSITIVE))
"""The two texts, each under the names that its column may have."""


@dataclass(frozen=True)
class ScoredPairs:
    """Pairs and their scores (or labels), in the order of the file.

    Example:
        >>> ScoredPairs(["rain", "rain"], ["a shower", "a desert"], [0.9, 0.1]).scores
        [0.9, 0.1]
    """

    first: list[str]
    second: list[str]
    scores: list[float]


def load_sts(source: SourceConfig) -> ScoredPairs:
    """Pairs with a score of how alike they are, on whatever scale: only the order and the distances count.

    Raises:
        InputError: a column is missing, a score is no finite number, there are fewer than two rows, or all scores are
            the same.
    """
    pairs = _load(source, SCORE)
    if len(pairs.scores) < 2:
        raise InputError(f"{source.path}: holds one row; a correlation needs at least two.")
    if len(set(pairs.scores)) == 1:
        raise InputError(f"{source.path}: every score is {pairs.scores[0]:g}; a correlation needs scores that differ.")
    return pairs


def load_labelled_pairs(source: SourceConfig) -> ScoredPairs:
    """Pairs with a label: 1 where the two texts belong together, otherwise 0.

    Raises:
        InputError: a column is missing, a label is neither 0 nor 1, or all labels are the same.
    """
    pairs = _load(source, LABEL)
    for row, label in enumerate(pairs.scores, 1):
        if label not in (0, 1):
            raise InputError(
                f"{source.path}: row {row}, column {_mapped(source.columns, LABEL)!r}: is {label:g}; a label is 1 "
                "(the texts belong together) or 0; scores of likeness go to sts."
            )
    if len(set(pairs.scores)) == 1:
        raise InputError(f"{source.path}: every label is {pairs.scores[0]:g}; both 0 and 1 must occur.")
    return pairs


def _load(source: SourceConfig, number: str) -> ScoredPairs:
    choose = functools.partial(_choose, columns=source.columns, number=number)
    dataset = load_chosen(source.path, choose, **source.reading)
    return ScoredPairs(list(dataset[FIRST]), list(dataset[SECOND]), list(dataset[number]))


def _choose(names: Sequence[str], where: str, columns: ColumnNames | None, number: str) -> list[Column]:
    """Which columns are the two texts and the number."""
    asked = _asked(columns, where, number)
    chosen = []
    for role, known in ((FIRST, TEXTS[0]), (SECOND, TEXTS[1]), (number, (number,))):
        given = [asked[name] for name in known if name in asked]
        column = next((name for name in given or known if name in names), None)
        if column is None:
            hint = "" if given else f" Rename one, or map it: columns: {{{role}: <name>}}."
            raise no_column(where, " or ".join(map(repr, given or known)), (given or [role])[0], names, hint)
        chosen.append(Column(column, role, "number" if role == number else "text"))
    check_once(where, [column.source for column in chosen])
    return chosen


def _asked(columns: ColumnNames | None, where: str, number: str) -> dict[str, str]:
    """The columns that were named, by role."""
    known = (FIRST, SECOND, number)
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        if isinstance(columns, str) or len(columns) != len(known):
            raise InputError(f"{where}: columns: expected three names ({', '.join(known)}), got {columns!r}.")
        return dict(zip(known, columns, strict=True))
    roles = [name for names in TEXTS for name in names] + [number]
    for role in columns:
        if role not in roles:
            raise InputError(
                f"{where}: columns: {role!r} is no role{nearest(role, roles)}; the roles are {', '.join(known)} (or "
                f"{ANCHOR} and {POSITIVE} for the texts)."
            )
    for names in TEXTS:
        if all(name in columns for name in names):
            raise InputError(f"{where}: columns: {' and '.join(names)} are two names of one role; keep one.")
    return dict(columns)


def _mapped(columns: ColumnNames | None, number: str) -> str:
    """The file's own name of the column of numbers."""
    if isinstance(columns, Mapping):
        return columns.get(number, number)
    return columns[2] if columns else number
