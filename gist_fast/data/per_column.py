"""Settings that may be given for all texts, by column, by dataset, or by dataset and column.

Prompts and maximum lengths all take the four forms that sentence-transformers has for prompts: one value;
``{column: value}``; ``{dataset: value}``; ``{dataset: {column: value}}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gist_fast.runtime.errors import InputError, nearest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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


def check_lengths(
    name: str, setting: Any, most: int | None = None, limit: str = "the max_seq_length of the student"
) -> None:
    """Refuse a maximum length below 1, or above what the model can read.

    Args:
        limit: what `most` is, for the message.

    Raises:
        InputError: naming the setting and the length.
    """
    if isinstance(setting, Mapping):
        for key, value in setting.items():
            check_lengths(f"{name}.{key}", value, most, limit)
    elif setting is not None and setting < 1:
        raise InputError(f"{name}: expected at least 1, got {setting}.")
    elif setting is not None and most is not None and setting > most:
        raise InputError(f"{name}: expected at most {most}, {limit}, got {setting}.")


def check_positions(name: str, setting: Any, guide: SentenceTransformer) -> None:
    """`check_lengths` by the position embeddings that a guide has."""
    positions = getattr(getattr(guide[0], "config", None), "max_position_embeddings", None)
    check_lengths(name, setting, positions, "the positions that the guide has")


def guide_prompt(
    guide: SentenceTransformer,
    column: str,
    position: int,
    prompts: Mapping[str, str | dict[str, str]] | str | None,
    dataset: str | None = None,
) -> str:
    """The prompt that the guide reads before the texts of a column, perhaps empty.

    Args:
        position: the column's place in the dataset; the first holds the queries.
        prompts: one for all columns, by column, or by dataset; None for the guide's own.
        dataset: the name of the column's dataset, where there are several.
    """
    if prompts is not None:
        return value_for(prompts, column, dataset) or ""
    own = guide.prompts or {}
    return own.get("query" if position == 0 else "document") or own.get(guide.default_prompt_name or "") or ""


def _refuse(name: str, key: str, known: list[str], kind: str) -> None:
    there = ", ".join(known) or "only one, without a name"
    raise InputError(f"{name}: {key!r} is no {kind} of the data{nearest(key, known)}; there is {there}.")
