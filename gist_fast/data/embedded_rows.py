"""Datasets that carry a guide's embeddings: how these are read, and how they are left out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from gist_fast.data.names import GUIDE_SUFFIX
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def read_as_stored(data: Any) -> Any:
    """A dataset, or a dictionary of them, whose guide embeddings are read as numpy rows of the type they are stored in.

    Without such a format they come as Python lists of float32, which take a hundred times as long to make a batch of.
    One type serves all columns: the widest, so that none is read as less than it holds; numbers in float64, which no
    guide gave, are read as float32. All other columns are read as Python objects, as they are without a format.

    Args:
        data: returned as it is where it holds no embeddings, or is read so already; a stream, or a dataset with a
            transform, keeps its own way of reading.

    Raises:
        InputError: an embedding is missing, naming row and column.
    """
    from datasets import Dataset

    if isinstance(data, dict):
        read = {name: read_as_stored(dataset) for name, dataset in data.items()}
        return data if all(read[name] is dataset for name, dataset in data.items()) else type(data)(read)
    if not isinstance(data, Dataset) or data.format["type"] == "custom":
        return data
    ours = [c for c in data.column_names if c.endswith(GUIDE_SUFFIX)]
    if not ours:
        return data
    for column in ours:
        _refuse_missing(data, column)
    types = {getattr(getattr(data.features[c], "feature", None), "dtype", "float32") for c in ours}
    # The type by its name, because a saved dataset writes its format down as JSON.
    kwargs = {"dtype": "float16" if types == {"float16"} else "float32"}
    wanted = {"type": "numpy", "format_kwargs": kwargs, "columns": ours, "output_all_columns": True}
    if {**data.format, "columns": sorted(data.format["columns"])} == {**wanted, "columns": sorted(ours)}:
        return data
    return data.with_format("numpy", columns=ours, output_all_columns=True, **kwargs)


def with_name(dataset: Dataset, name: str) -> Dataset:
    """A dataset with a column ``dataset_name``, its embeddings read as they were."""
    whole = copy.copy(dataset)
    # Which rows are left, and in what order, stays apart from them: all embeddings would be written anew otherwise.
    whole._indices = None
    named = whole.add_column("dataset_name", [name] * len(whole))
    named._indices = dataset._indices
    return read_as_stored(named)


def without_embeddings(data: Any) -> Any:
    """A dataset, a stream, or a dictionary of them, without the columns of guide embeddings."""
    if isinstance(data, dict):
        return type(data)({name: without_embeddings(dataset) for name, dataset in data.items()})
    ours = [c for c in getattr(data, "column_names", None) or [] if c.endswith(GUIDE_SUFFIX)]
    return data.remove_columns(ours) if ours else data


def first_missing(dataset: Dataset, column: str) -> int | None:
    """The first row (the first is 1) that holds nothing in a column."""
    # Arrow keeps count; rows are looked at only where something is missing, perhaps in rows that were not selected.
    if not dataset.data.column(column).null_count:
        return None
    first_row = 1
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=16384):
        missing = table.column(column).is_null().to_pylist()
        if any(missing):
            return first_row + missing.index(True)
        first_row += table.num_rows
    return None


def _refuse_missing(dataset: Dataset, column: str) -> None:
    if (row := first_missing(dataset, column)) is not None:
        raise InputError(
            f"dataset: row {row} (the first is 1), column {column!r} is None; "
            "every row needs the guide's embedding (gist_fast.embed_guide), so embed it again, or leave it out."
        )
