"""What `embed_guide` accepts, what it says otherwise, and which prompt each column gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from gist_fast.collator import SUFFIX, guide_prompt
from gist_fast.errors import InputError, InputTypeError, nearest

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
) -> None:
    """
    Raises:
        ValueError: as `embed_guide` says.
        TypeError: `dataset` is no dataset of one split.
    """
    if not isinstance(dataset, Dataset):
        raise InputTypeError(
            f"dataset: got {type(dataset).__name__}; a datasets.Dataset would do, which is one split, all of it here."
        )
    if dtype not in DTYPES:
        raise InputError(f"dtype: got {dtype!r}; one of {', '.join(map(repr, DTYPES))} would do.")
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("max_length", max_length)):
        if value is not None and value < 1:
            raise InputError(f"{name}: got {value}; at least 1 would do, or None.")
    positions = getattr(getattr(guide[0], "config", None), "max_position_embeddings", None)
    if max_length is not None and positions is not None and max_length > positions:
        raise InputError(
            f"max_length: got {max_length}; the guide has {positions} positions, so at most that would do."
        )
    if len(dataset) == 0:
        raise InputError("dataset: it has no rows.")
    if dataset.format["type"] == "custom":
        raise InputError(
            "dataset: it has a transform (set_transform), which makes the texts only as they are read; apply it with "
            "map, or take it off with reset_format."
        )


def column_prompts(
    dataset: Dataset,
    guide: SentenceTransformer,
    columns: Sequence[str] | None,
    prompts: dict[str, str] | str | None,
) -> dict[str, str]:
    """The columns to embed, and the prompt of each.

    Raises:
        ValueError: there is no such column, or none to embed; one has embeddings already; a prompt is for none of them,
            or whether it holds queries is unclear.
    """
    texts = [c for c, f in dataset.features.items() if getattr(f, "dtype", None) in ("string", "large_string")]
    if isinstance(columns, str):
        raise InputTypeError(f"columns: got the text {columns!r}; a list of names would do, as [{columns!r}].")
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
        if column + SUFFIX in dataset.column_names:
            raise InputError(f"columns: {column!r} has guide embeddings already; remove {column + SUFFIX!r} first.")
    for column in prompts if isinstance(prompts, dict) else ():
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
