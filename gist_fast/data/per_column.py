"""Settings that may be given for all texts, by column, by dataset, or by dataset and column.

Prompts and maximum lengths all take the four forms that sentence-transformers has for prompts: one value;
``{column: value}``; ``{dataset: value}``; ``{dataset: {column: value}}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gist_fast.runtime.errors import InputError, nearest


def value_for(setting: Any, column: str, dataset: str | None = None) -> Any:
    """What a setting says of a column of a dataset; None where it says nothing.

    Args:
        dataset: its name, where there are several.
    """
    if not isinstance(setting, Mapping):
        return setting
    if dataset is not None and dataset in setting:
        setting = setting[dataset]
        return setting.get(column) if isinstance(setting, Mapping) else setting
    found = setting.get(column)
    # The name of another dataset may be that of a column here.
    return None if isinstance(found, Mapping) else found


def check_names(name: str, setting: Any, datasets: Mapping[str, Iterable[str]]) -> None:
    """Refuse what would silently have no effect.

    Args:
        name: the setting's, for the message.
        datasets: the columns of each; the name of one alone is empty.

    Raises:
        InputError: a key is neither a dataset nor a column, or a column that its dataset has not.
    """
    if not isinstance(setting, Mapping):
        return
    columns = list(dict.fromkeys(column for names in datasets.values() for column in names))
    named = [dataset for dataset in datasets if dataset]
    for key, value in setting.items():
        if key in named:
            for column in value if isinstance(value, Mapping) else ():
                if column not in datasets[key]:
                    _refuse(f"{name}.{key}", column, list(datasets[key]), "column")
        elif isinstance(value, Mapping):
            _refuse(name, key, named, "dataset")
        elif key not in columns:
            _refuse(name, key, [*columns, *named], "column or dataset" if named else "column")


def check_lengths(name: str, setting: Any, most: int | None = None) -> None:
    """Refuse a maximum length below 1, or above what the model can read.

    Raises:
        InputError: naming the setting and the length.
    """
    if isinstance(setting, Mapping):
        for key, value in setting.items():
            check_lengths(f"{name}.{key}", value, most)
    elif setting is not None and setting < 1:
        raise InputError(f"{name}: got {setting}; 1 or more would do.")
    elif setting is not None and most is not None and setting > most:
        raise InputError(
            f"{name}: got {setting}, but the student reads at most {most} tokens; a larger max_seq_length comes first."
        )


def columns_by_dataset(*data: Any) -> dict[str, list[str]]:
    """The columns of each of some datasets (or dictionaries of them, or None) by its name, empty for one alone."""
    columns: dict[str, list[str]] = {}
    for loaded in data:
        for name, dataset in (loaded if isinstance(loaded, Mapping) else {"": loaded}).items():
            if dataset is not None:
                columns.setdefault(name, []).extend(dataset.column_names or [])
    return columns


def _refuse(name: str, key: str, known: list[str], kind: str) -> None:
    there = ", ".join(known) or "only one, without a name"
    raise InputError(f"{name}: {key!r} is no {kind} of the data{nearest(key, known)}; there is {there}.")
