"""What a run trains on: one dataset, several by name, or a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from gist_fast.data.names import guide_columns

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

    Loaded: TypeAlias = Dataset | DatasetDict | IterableDataset


def by_name(data: Loaded | None) -> dict[str, Dataset | IterableDataset]:
    """Each dataset, or the loss of each, by its name; one alone has an empty name."""
    if data is None:
        return {}
    return dict(data) if isinstance(data, dict) else {"": data}


def count_rows(data: Loaded) -> int | None:
    """The rows of all datasets together; None for a stream."""
    counts = [len(dataset) if hasattr(dataset, "__len__") else None for dataset in by_name(data).values()]
    return None if None in counts else sum(n for n in counts if n is not None)


def carries_guide(data: Loaded) -> bool:
    """Whether all datasets carry embeddings of a guide."""
    return all(guide_columns(dataset) for dataset in by_name(data).values())


def columns_by_dataset(*data: Any) -> dict[str, list[str]]:
    """The columns of each of some datasets (or dictionaries of them, or None) by its name, empty for one alone."""
    columns: dict[str, list[str]] = {}
    for loaded in data:
        for name, dataset in by_name(loaded).items():
            columns.setdefault(name, []).extend(dataset.column_names or [])
    return columns
