"""What `embed_guide` accepts, what it says otherwise, and which prompt each column gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from gist_fast.data.names import GUIDE_SUFFIX, holds_texts
from gist_fast.data.per_column import check_positions, guide_prompt
from gist_fast.losses.guide import check_model, check_one_route
from gist_fast.runtime.errors import InputError, InputTypeError, nearest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DTYPES = {"float16": np.float16, "float32": np.float32}


def check_arguments(
    dataset: Dataset,
    guide: SentenceTransformer,
    dtype: str,
    cache_dir: str | os.PathLike | None,
    counts: dict[str, Any],
) -> None:
    """Raise as `embed_guide` says; `counts` are its whole numbers by name."""
    if not isinstance(dataset, Dataset):
        raise InputTypeError(
            f"dataset: expected a datasets.Dataset, which is one split, all of it here, got {type(dataset).__name__}."
        )
    check_model("guide", guide)
    check_one_route(guide)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(map(repr, DTYPES))}, got {dtype!r}.")
    for name, value in counts.items():
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise wrong_type(name, "a whole number of at least 1, or None", value)
        if value is not None and value < 1:
            raise InputError(f"{name}: expected at least 1, or None, got {value}.")
    check_positions("max_length", counts["max_length"], guide)
    if not isinstance(cache_dir, str | os.PathLike | None):
        raise wrong_type("cache_dir", "the path of a folder, or None", cache_dir)
    if len(dataset) == 0:
        raise InputError("dataset: it has no rows.")
    if dataset.format["type"] == "custom":
        raise InputError(
            "dataset: it has a transform (set_transform), which makes the texts only as they are read; apply it with "
            "map, or take it off with reset_format."
        )


def wrong_type(name: str, expected: str, value: object) -> InputTypeError:
    return InputTypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}.")


def _check_types(columns: object, prompts: object) -> None:
    """Refuse columns that are no list of distinct names, and prompts that are neither a text nor texts by column."""
    if isinstance(columns, str):
        raise InputTypeError(f"columns: expected a list of names, as [{columns!r}], got the text {columns!r}.")
    if not isinstance(columns, Sequence | None):
        raise wrong_type("columns", "a list of names, or None", columns)
    for column in columns or ():
        if not isinstance(column, str):
            raise wrong_type("columns", "names of columns", column)
        if list(columns or ()).count(column) > 1:
            raise InputError(f"columns: expected each name once, got {column!r} more than once.")
    if not isinstance(prompts, str | Mapping | None):
        raise wrong_type("prompts", "one text for all columns, {column: text}, or None", prompts)
    for column, prompt in prompts.items() if isinstance(prompts, Mapping) else ():
        if not isinstance(prompt, str):
            raise wrong_type("prompts", f"a text, perhaps an empty one, for {column!r}", prompt)


def column_prompts(
    dataset: Dataset,
    guide: SentenceTransformer,
    columns: Sequence[str] | None,
    prompts: Mapping[str, str] | str | None,
) -> dict[str, str]:
    """The columns to embed, and the prompt of each.

    Raises:
        TypeError: `columns` is no list of names, or `prompts` neither a text nor texts by column.
        ValueError: as `embed_guide` says; a prompt is for none of the columns, or whether one holds queries is unclear.
    """
    texts = [c for c in dataset.column_names if holds_texts(dataset, c)]
    _check_types(columns, prompts)
    if columns is None:
        columns = texts
    if not columns:
        raise InputError(f"columns: none to embed; the dataset has {', '.join(dataset.column_names)}.")
    for column in columns:
        if column not in dataset.column_names:
            raise InputError(
                f"columns: the dataset has no {column!r}, only {', '.join(dataset.column_names)}"
                f"{nearest(column, dataset.column_names)}."
            )
        if column + GUIDE_SUFFIX in dataset.column_names:
            raise InputError(
                f"columns: {column!r} has guide embeddings already; remove {column + GUIDE_SUFFIX!r} first."
            )
    for column in prompts if isinstance(prompts, Mapping) else ():
        if column not in dataset.column_names:
            raise InputError(
                f"prompts: one is for {column!r}, which the dataset has not{nearest(column, dataset.column_names)}; it "
                f"has {', '.join(dataset.column_names)}."
            )
    found = {}
    for place, column in enumerate(columns):
        found[column] = guide_prompt(guide, column, place, prompts)
        # The trainer goes by the dataset's order, and the first column there holds the queries.
        in_dataset = guide_prompt(guide, column, texts.index(column) if column in texts else place, prompts)
        if in_dataset != found[column]:
            raise InputError(
                f"columns: whether {column!r} holds queries is unclear (it is at place {place + 1} here and at place "
                f"{texts.index(column) + 1} among the dataset's texts), and the guide has a prompt for queries; give "
                f"prompts={{{column!r}: {found[column]!r}}} or whichever it is, or select_columns first."
            )
    return found
