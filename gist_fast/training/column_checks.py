"""What a user's own dataset may hold for the trainer, checked before anything reads it.

Files that `gist_fast.data` has read are checked already; what a program makes comes here as it is, and
sentence-transformers takes each of its columns for an input of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gist_fast.data.embedded_rows import first_missing
from gist_fast.data.named import by_name
from gist_fast.data.names import GUIDE_SUFFIX, MARGIN, TEXT_TYPES, group_columns
from gist_fast.runtime.errors import InputError

LABELS = ("label", "labels", "score", "scores")
"""The columns that sentence-transformers takes for no inputs."""


def check_columns(argument: str, source: Any, labels: Iterable[str]) -> None:
    """Refuse columns that no model reads, and texts that are missing. A stream, or a transform, is not looked into.

    Args:
        argument: what the datasets came as, for the message.
        source: a dataset, several by name, or None.
        labels: columns that are no inputs.

    Raises:
        InputError: naming the column, and the row of a missing text.
    """
    from datasets import Dataset, List, Value

    for name, dataset in by_name(source).items():
        if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
            continue
        where = f"{argument}[{name!r}]" if name else argument
        beside = {"dataset_name", MARGIN, *group_columns(dataset.column_names), *labels}
        for column, feature in dataset.features.items():
            if column in beside or column.endswith(GUIDE_SUFFIX):
                continue
            wrong = None
            if isinstance(feature, Value) and feature.dtype not in TEXT_TYPES:
                wrong = feature.dtype
            elif isinstance(feature, List) and getattr(feature.feature, "dtype", None) in TEXT_TYPES:
                wrong = "lists of texts"
            if wrong is not None:
                hint = (
                    " (gist_fast.data.lists.spread_lists makes columns of texts of lists.)" if "lists" in wrong else ""
                )
                raise InputError(
                    f"{where}: column {column!r} holds {wrong}, and each column is a text that the model reads; leave "
                    f"it out, with remove_columns({column!r}), or name the columns with select_columns.{hint}"
                )
            if isinstance(feature, Value) and (row := first_missing(dataset, column)) is not None:
                raise InputError(
                    f"{where}: row {row}, column {column!r} is None; a text is needed there. (An empty text in a "
                    "column of negatives says that the row has none.)"
                )
