"""The columns of a dataset by name: what each is for, and in which order the losses take them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from gist_fast.runtime.errors import InputError

ANCHOR, POSITIVE, NEGATIVE = "anchor", "positive", "negative"
LISTED = {ANCHOR: "query", POSITIVE: "pos", NEGATIVE: "neg"}
"""The columns of FlagEmbedding's files, of which two hold lists of texts."""
NO_TEXT = ""
"""Stands in a column of negatives where a row has none."""
_NEGATIVE = re.compile(r"negative(?:_(\d+))?")

GROUP, MARGIN = "group", "margin"
"""Columns that are no texts: each row's group and its margin."""
GROUP_SUFFIX = f"_{GROUP}"
"""A column of this ending holds the group of each positive or negative in the column before it."""

NEGATIVE_ROWS = "negative_rows"
"""A column's features hold under this key which row of the batch each of its texts is from, where not all have one."""

GUIDE_EMBEDDING = "guide_embedding"
"""A column's features hold the guide's embeddings under this key."""
GUIDE_SUFFIX = f"_{GUIDE_EMBEDDING}"
"""A column of this ending holds the guide's embeddings of the column before it."""


TEXT_TYPES = ("string", "large_string", "string_view")
"""The types that a column of texts has in a dataset."""


def is_group_role(name: str) -> bool:
    """Whether it is ``group``, or one of these before ``_group``: ``positive``, ``negative``, ``negative_<k>``."""
    of = name.removesuffix(GROUP_SUFFIX)
    return name == GROUP or (of not in (name, ANCHOR) and is_text_role(of))


def kind_of(role: str) -> Literal["text", "id", "number"]:
    """What the column of a role holds."""
    return "number" if role == MARGIN else "id" if is_group_role(role) else "text"


def group_columns(columns: Iterable[str]) -> list[str]:
    """Those of a dataset's columns, of any names, that hold groups: ``group``, and ``{column}_group`` of another."""
    names = list(columns)
    return [c for c in names if c == GROUP or (c.endswith(GROUP_SUFFIX) and c.removesuffix(GROUP_SUFFIX) in names)]


def groups_of(texts: Sequence[str], names: Iterable[str], where: str) -> tuple[list[str], list[str]]:
    """Of a dataset's columns, those that hold the rows' groups, one or two, and those of the negatives' groups.

    Args:
        texts: its columns of texts: anchor, positive, negatives.
        names: all of them.
        where: what to call the dataset in an error.

    Raises:
        InputError: rows have no group, or some columns of negatives and not all.
    """
    names = list(names)
    anchor, positive, *negatives = texts
    if (wrong := anchor + GROUP_SUFFIX) in names:
        raise InputError(f"{where}: column {wrong!r}: the group of a row is in the column {GROUP!r}; rename it.")
    rows = [name for name in (GROUP, positive + GROUP_SUFFIX) if name in names]
    of_negatives = [name + GROUP_SUFFIX for name in negatives]
    some = any(name in names for name in of_negatives)
    for name in [*(rows or [GROUP]), *(of_negatives if some else [])]:
        if name not in names:
            raise InputError(
                f"groups: 'column', and {where} has no column {name!r}; its columns are {', '.join(names)}. Add it, or "
                f"name the one that is meant under the data's 'columns' ({name}: ...)."
            )
    return rows, of_negatives if some else []


def is_text_role(name: str) -> bool:
    """Whether it is ``anchor``, ``positive``, ``negative`` or ``negative_<k>``."""
    return name in (ANCHOR, POSITIVE) or _NEGATIVE.fullmatch(name) is not None


def role_order(role: str) -> tuple[int, int]:
    """A key to sort roles by: anchor, positive, the negatives by their number, then the rest."""
    if kind_of(role) != "text":
        return 3, 0
    match = _NEGATIVE.fullmatch(role)
    if match is None:
        return (0 if role == ANCHOR else 1), 0
    return 2, int(match[1]) if match[1] else -1


def text_columns(dataset: Any) -> list[str]:
    """The columns of a loaded dataset that hold texts: anchor, positive, then the negatives."""
    return sorted(filter(is_text_role, dataset.column_names), key=role_order)


def holds_texts(dataset: Any, column: str) -> bool:
    """Whether a column of a dataset, loaded here or not, is of a type of texts."""
    return getattr((dataset.features or {}).get(column), "dtype", None) in TEXT_TYPES


def guide_columns(dataset: Any) -> list[str]:
    """The columns of a loaded dataset that hold the guide's embeddings, in the order of their texts."""
    return [c + GUIDE_SUFFIX for c in text_columns(dataset) if c + GUIDE_SUFFIX in dataset.column_names]
