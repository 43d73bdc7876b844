"""What `embed_guide` accepts, what it says otherwise, and which prompt each column gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from gist_fast.data.names import GUIDE_SUFFIX
from gist_fast.data.per_column import check_positions, guide_prompt
from gist_fast.losses.guide import check_model, check_one_route
from gist_fast.runtime.errors import InputError, InputTypeError, nearest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DTYPES = {"float16": np.float16, "float32": np.float32}


def check_arguments(
    dataset: Dataset,
    guide: SentenceTransformer,
    batch_size: int | None,
    batch_tokens: int | None,
    max_length: int | None,
    dtype: str,
    cache_dir: str | os.PathLike | None,
) -> None:
    """
    Raises:
        ValueError: as `embed_guide` says.
        TypeError: likewise.
    """
    if not isinstance(dataset, Dataset):
        raise InputTypeError(
            f"dataset: got {type(dataset).__name__}; a datasets.Dataset would do, which is one split, all of it here."
        )
    check_model("guide", guide)
    check_one_route(guide)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype: got {dtype!r}; one of {', '.join(map(repr, DTYPES))} would do.")
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("max_length", max_length)):
        _check_count(name, value)
    check_positions("max_length", max_length, guide)
    if not isinstance(cache_dir, str | os.PathLike | None):
        raise InputTypeError(
            f"cache_dir: got {cache_dir!r} of type {type(cache_dir).__name__}; the path of a folder would do, or None."
        )
    if len(dataset) == 0:
        raise InputError("dataset: it has no rows.")
    if dataset.format["type"] == "custom":
        raise InputError(
            "dataset: it has a transform (set_transform), which makes the texts only as they are read; apply it with "
            "map, or take it off with reset_format."
        )


def _check_count(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputTypeError(
            f"{name}: got {value!r} of type {type(value).__name__}; a whole number of at least 1 would do, or None."
        )
    if value < 1:
        raise InputError(f"{name}: got {value}; at least 1 would do, or None.")


def _check_names(columns: object) -> None:
    """Refuse what is no list of distinct names."""
    if isinstance(columns, str):
        raise InputTypeError(f"columns: got the text {columns!r}; a list of names would do, as [{columns!r}].")
    if not isinstance(columns, Sequence | None):
        raise InputTypeError(
            f"columns: got {columns!r} of type {type(columns).__name__}; a list of names would do, or None."
        )
    for column in columns or ():
        if not isinstance(column, str):
            raise InputTypeError(
                f"columns: got {column!r} of type {type(column).__name__} among them; names of columns would do."
            )
        if list(columns or ()).count(column) > 1:
            raise InputError(f"columns: {column!r} is named more than once; once would do.")


def _check_prompts(prompts: object) -> None:
    """Refuse what is neither a text nor texts by column."""
    wanted = "one text for all columns, {column: text}, or None would do"
    if not isinstance(prompts, str | Mapping | None):
        raise InputTypeError(f"prompts: got {prompts!r} of type {type(prompts).__name__}; {wanted}.")
    for column, prompt in prompts.items() if isinstance(prompts, Mapping) else ():
        if not isinstance(prompt, str):
            raise InputTypeError(
                f"prompts: got {prompt!r} of type {type(prompt).__name__} for {column!r}; a text would do, perhaps "
                "an empty one."
            )


def column_prompts(
    dataset: Dataset,
    guide: SentenceTransformer,
    columns: Sequence[str] | None,
    prompts: Mapping[str, str] | str | None,
) -> dict[str, str]:
    """The columns to embed, and the prompt of each.

    Raises:
        TypeError: `columns` is no list of names, or `prompts` neither a text nor texts by column.
        ValueError: there is no such column, or none to embed; one is named twice, or has embeddings already; a prompt
            is for none of them, or whether it holds queries is unclear.
    """
    texts = [c for c, f in dataset.features.items() if getattr(f, "dtype", None) in ("string", "large_string")]
    _check_names(columns)
    _check_prompts(prompts)
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
