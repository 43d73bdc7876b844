"""Settings that may be given for all texts, by column, by dataset, or by dataset and column.

Prompts and maximum lengths all take the four forms that sentence-transformers has for prompts: one value;
``{column: value}``; ``{dataset: value}``; ``{dataset: {column: value}}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from gist_fast.runtime.errors import InputError, nearest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_QUERIES = ("query",)
_DOCUMENTS = ("document", "passage", "corpus")
_POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


class HasPrompts(Protocol):
    """A model, or what a saved one says of itself."""

    @property
    def prompts(self) -> Mapping[str, str | None]: ...

    @property
    def default_prompt_name(self) -> str | None: ...


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


def positions(model: Any) -> int | None:
    """Tokens of a text that a model has position embeddings for; None where it has no table of them, as with rotary or
    relative ones."""
    configs = (getattr(module, "config", None) for module in model.modules())
    said = (getattr(config, "max_position_embeddings", None) for config in configs)
    most = next((number for number in said if isinstance(number, int) and number > 0), math.inf)
    for name, table in model.named_modules():
        weight: Any = getattr(table, "weight", None)
        if name.rpartition(".")[2] in _POSITION_TABLES and getattr(weight, "ndim", 0) == 2:
            padding = getattr(table, "padding_idx", None)
            # RoBERTa and its kin count from behind the padding's place, BART and OPT from an offset.
            unused = getattr(table, "offset", 0) if padding is None else padding + 1
            return int(min(weight.shape[0] - unused, most))
    return None


def check_positions(name: str, setting: Any, model: SentenceTransformer, role: str = "guide") -> None:
    """`check_lengths` by the position embeddings that a model has."""
    # A length of another kind than a whole number means that it knows none.
    if not isinstance(setting, float):
        check_lengths(name, setting, positions(model), f"the positions that the {role} has")


def guide_prompt(
    guide: HasPrompts,
    column: str,
    position: int,
    prompts: Mapping[str, str | dict[str, str]] | str | None,
    dataset: str | None = None,
) -> str:
    """The prompt that the guide reads before the texts of a column, perhaps empty.

    Without one that is given it is the guide's own: for queries ``query``, for documents the first of ``document``,
    ``passage`` and ``corpus`` that is there, as in ``encode_query`` and ``encode_document`` of sentence-transformers;
    where it has none of these, its default.

    Args:
        position: the column's place in the dataset; the first holds the queries.
        prompts: one for all columns, by column, or by dataset; None for the guide's own.
        dataset: the name of the column's dataset, where there are several.
    """
    if prompts is not None:
        return value_for(prompts, column, dataset) or ""
    own = guide.prompts or {}
    names = _QUERIES if position == 0 else _DOCUMENTS
    # Loading a model puts an empty `document` beside its `passage`.
    if found := next(filter(None, map(own.get, names)), None):
        return found
    if any(name in own for name in names) and any(own.get(name) for name in (*_QUERIES, *_DOCUMENTS)):
        return ""  # a prompt for the other side only; the default is often that one
    return own.get(guide.default_prompt_name or "") or ""


def _refuse(name: str, key: str, known: list[str], kind: str) -> None:
    there = ", ".join(known) or "only one, without a name"
    raise InputError(f"{name}: {key!r} is no {kind} of the data{nearest(key, known)}; there is {there}.")
