"""Files, saved directories and hub names to a `datasets.Dataset` of texts with known columns.

The columns are ``anchor``, ``positive``, then any of ``negative``, ``negative_1``, ``negative_2`` and so on, in that
order, which is the order in which the losses take them. A guide's embeddings, as `gist_fast.embed_guide` writes them,
stand in ``{column}_guide_embedding`` and come along with their column.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.data.column_checks import Column, check_once, check_table, late_column, no_column
from gist_fast.data.embedded_rows import read_as_stored
from gist_fast.data.lists import is_list, spread_lists
from gist_fast.data.names import (
    ANCHOR,
    GROUP_SUFFIX,
    GUIDE_SUFFIX,
    LISTED,
    NEGATIVE,
    POSITIVE,
    group_columns,
    is_group_role,
    is_text_role,
    kind_of,
    role_order,
)
from gist_fast.data.text_files import SUFFIXES, Choose, quoting_elsewhere, read_chunks, read_file, suffix_of
from gist_fast.runtime.errors import InputError, first_line, nearest, nearest_file, shown
from gist_fast.runtime.files import expanded

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

STREAM_ROWS = 256
"""Rows of a streamed hub dataset that are checked at a time."""
ColumnNames = Mapping[str, str] | Sequence[str]


def load_texts(
    source: str | Path,
    *,
    split: str | None = None,
    columns: ColumnNames | None = None,
    name: str | None = None,
    quoting: bool | None = None,
) -> Dataset:
    """Load texts to train or to look at; every text is checked.

    Args:
        source: a ``.jsonl``, ``.csv``, ``.tsv`` (each also with ``.gz``) or ``.parquet`` file, a directory written by
            ``save_to_disk``, or the name of a dataset on the Hugging Face hub.
        split: which split of a saved directory or hub dataset; not needed where there is only one.
        columns: the column of each role, as ``{"anchor": "question", "positive": "answer"}``, or the columns' names in
            the order anchor, positive, negatives. Roles not named are looked for under their own names. More roles
            are taken only where they are named: ``group``, texts or whole numbers that tell which rows are
            no negatives of each other (read as numbers, the same for the same value), ``positive_group``, a second one,
            ``negative_group`` or ``negative_1_group`` and so on, of each negative, and ``margin``, a number a row (also
            one that is stored as text). The columns of ``positive`` and ``negative`` may hold lists of texts, see
            `gist_fast.data.lists.spread_lists`; FlagEmbedding's ``query``, ``pos`` and ``neg`` need not be named.
        name: which configuration of a hub dataset.
        quoting: whether a cell of a ``.csv`` or ``.tsv`` file may stand in double quotes; by default it may in CSV, and
            in TSV a double quote is part of the text.

    Returns:
        A dataset of ``anchor``, ``positive`` and any negatives, and the guide's embeddings of those where they exist
        (numpy rows, see `read_as_stored`). Other columns are left out, which is logged.

    Raises:
        InputError: naming file, row, column, what was expected and what came.

    Example:
        >>> size = Path("pairs.csv").write_text("question,answer\\nwhat falls,rain\\n")
        >>> load_texts("pairs.csv", columns={"anchor": "question", "positive": "answer"})[0]
        {'anchor': 'what falls', 'positive': 'rain'}
    """
    # What was mined, and saved, may have fewer negatives in some rows; in a file an empty cell is a mistake.
    choose = functools.partial(choose_columns, columns=columns, may_miss=_path_of(str(source)).is_dir())
    dataset = load_chosen(source, choose, split=split, name=name, quoting=quoting)
    return _with_numbered_groups(spread_lists(dataset, str(source)), str(source))


def load_chosen(
    source: str | Path,
    choose: Callable[..., Sequence[Column]],
    *,
    split: str | None = None,
    name: str | None = None,
    quoting: bool | None = None,
) -> Dataset:
    """The same of any columns: `choose` says which to take, from the names there are and ``where``, their source."""
    source = str(source)
    path = _path_of(source)
    if _is_file(path, source, split, name, quoting):
        table = read_file(path, functools.partial(choose, where=str(path)), quoting)
        from datasets import Dataset

        return read_as_stored(Dataset(table))
    dataset = _from_directory(path, split, name) if path.exists() else _from_hub(source, split, name)
    return _checked(dataset, choose, f"{source}[{split}]" if split else source)


def stream_texts(
    source: str | Path,
    *,
    split: str | None = None,
    columns: ColumnNames | None = None,
    name: str | None = None,
    quoting: bool | None = None,
) -> IterableDataset:
    """Texts that are read and checked as they are needed, in their order, for what is too large to be read first.

    Args:
        source: a file, or the name of a dataset on the hub.
        split, columns, name, quoting: as in `load_texts`.

    Returns:
        An iterable dataset with known features and the columns that `load_texts` gives. A wrong row is an error when it
        is met.

    Raises:
        InputError: as in `load_texts`, as far as the first rows show it; while iterating, naming file, row and column.

    Example:
        >>> size = Path("pairs.jsonl").write_text('{"anchor": "what falls", "positive": "rain"}')
        >>> next(iter(stream_texts("pairs.jsonl")))
        {'anchor': 'what falls', 'positive': 'rain'}
    """
    source = str(source)
    path = _path_of(source)
    if numbered := sorted(filter(is_group_role, _as_mapping(columns, source))):
        raise InputError(f"{source}: columns: {numbered[0]} is read as a whole, to number it; leave out streaming.")
    if _is_file(path, source, split, name, quoting):
        return _stream_file(path, columns, quoting)
    if path.is_dir():
        raise InputError(f"{path}: a saved directory is mapped into memory, not read into it; leave out streaming.")
    return checked_stream(_from_hub(source, split, name, streaming=True), columns, f"{source}[{split}]")


def checked_stream(dataset: IterableDataset, columns: ColumnNames | None, where: str) -> IterableDataset:
    """The chosen columns of an iterable dataset under their new names, each row checked when it is met.

    Args:
        where: what to call the dataset in an error.
    """
    from datasets import Features, Value

    if dataset.features is None:
        # The first rows tell.
        features = dataset._resolve_features().features
        late = {"known": list(features), "columns": columns, "where": where}
        dataset = dataset.map(_refuse_late, with_indices=True, features=features, fn_kwargs=late)
    chosen = choose_columns(list(dataset.features), columns, where)
    # Of no rows: only the types are looked at, before the first row is read.
    _refuse_lists(dataset.features.arrow_schema, where)
    check_table(dataset.features.arrow_schema.empty_table(), chosen, where)
    number = Value("float64")
    features = {c.target: number if c.kind == "number" else dataset.features[c.source] for c in chosen}
    checked = (
        dataset.select_columns([c.source for c in chosen])
        .with_format("arrow")
        .map(
            functools.partial(_checked_rows, columns=chosen, where=where, widths={}),
            batched=True,
            batch_size=STREAM_ROWS,
            with_indices=True,
            features=Features(features),
        )
    )
    return checked.with_format(None)


def _refuse_late(
    row: dict[str, Any], index: int, known: list[str], columns: ColumnNames | None, where: str
) -> dict[str, Any]:
    """Refuse a row with a column that the first rows do not have, and that would have been taken."""
    names = [*known, *(name for name in row if name not in known)]
    if len(names) > len(known):
        targets = {column.target for column in choose_columns(known, columns, where)}
        for column in choose_columns(names, columns, where):
            if column.target not in targets:
                raise late_column(where, "row 1", column.source, f"row {index + 1}")
    return row


def _checked_rows(
    table: pa.Table, indices: Sequence[int], columns: Sequence[Column], where: str, widths: dict[str, int]
) -> pa.Table:
    return check_table(table, columns, where, int(indices[0]) + 1, widths)


def choose_columns(
    available: Sequence[str], columns: ColumnNames | None, where: str, *, may_miss: bool = False
) -> list[Column]:
    """Which of the available columns to take, and for what; see `load_texts`.

    Args:
        may_miss: whether a row may have no negative, for which `NO_TEXT` stands there.
    """
    roles = _as_mapping(columns, where)
    if not any(map(is_text_role, roles)) and not {ANCHOR, POSITIVE}.intersection(available):
        listed = {role: column for role, column in LISTED.items() if column in available}
        roles |= listed if {ANCHOR, POSITIVE} <= listed.keys() else {}
    taken = set(roles.values())
    for column in available:
        if is_text_role(column) and column not in roles and column not in taken:
            roles[column] = column
    for role in (ANCHOR, POSITIVE):
        roles.setdefault(role, role)
    for role, column in roles.items():
        if column not in available:
            named, hint = "", f" Rename one, or map it: columns: {{{role}: <name>}}."
            if role != column:
                named, hint = f", named for {role}", ""
            raise no_column(where, f"{column!r}{named}", column, available, hint)
    in_order = [(role, roles[role]) for role in sorted(roles, key=role_order)]
    least, negatives = {POSITIVE: 1, NEGATIVE: 0}, [r for r in roles if is_text_role(r) and r not in (ANCHOR, POSITIVE)]
    chosen = [
        Column(column, role, kind_of(role), least.get(role), may_miss and role in negatives)
        for role, column in in_order
    ]
    chosen += [
        Column(column + GUIDE_SUFFIX, role + GUIDE_SUFFIX, "vector")
        for role, column in in_order
        if column + GUIDE_SUFFIX in available
    ]
    left = [column for column in available if column not in {c.source for c in chosen}]
    if left:
        logger.info("%s: columns left out: %s", where, ", ".join(left))
    return chosen


def _with_numbered_groups(dataset: Dataset, where: str) -> Dataset:
    """The groups as numbers from 0, in the order in which they are met; the same in all columns of them."""
    import pyarrow as pa

    names = [name for name in dataset.column_names if is_group_role(name)]
    if not names:
        return dataset
    for name in names:
        if name not in group_columns(dataset.column_names):
            of = name.removesuffix(GROUP_SUFFIX)
            raise InputError(f"{where}: columns: {name} is for the texts of {of}, and there are none of that name.")
    table = dataset.select_columns(names).with_format("arrow")[:]
    # A saved dataset may have them of several types; in a file all are texts.
    values = pa.chunked_array([chunk for name in names for chunk in table.column(name).cast(pa.string()).chunks])
    codes = values.combine_chunks().dictionary_encode().indices.to_numpy().astype("int64").reshape(len(names), -1)
    dataset = dataset.remove_columns(names)
    for name, of_column in zip(names, codes, strict=True):
        dataset = dataset.add_column(name, of_column)
    return read_as_stored(dataset)


def _path_of(source: str) -> Path:
    """A source as a path, whether or not there is one.

    Raises:
        InputError: it can be neither a path nor a name.
    """
    if not source.strip():
        raise InputError(f"data: expected a file, a folder or the name of a dataset, got {source!r}.")
    path = expanded(source)
    try:
        path.exists()
    except OSError as error:
        raise InputError(f"{shown(source)}: cannot be read ({error.strerror or first_line(error)}).") from error
    return path


def _is_file(path: Path, source: str, split: str | None, name: str | None, quoting: bool | None) -> bool:
    """Whether a source is to be read as a file; refuses what a file does not have, and what only a file has."""
    if not path.is_file() and (not suffix_of(path) or (_could_be_hub_name(source) and not path.exists())):
        if quoting is not None:
            raise quoting_elsewhere(source, quoting)
        return False
    if split or name:
        option = "split" if split else "name"
        raise InputError(f"{path}: a file has no {option}; leave out {option}={split or name!r}.")
    return True


def _as_mapping(columns: ColumnNames | None, where: str) -> dict[str, str]:
    if columns is None:
        return {}
    if isinstance(columns, str):
        raise InputError(f"{where}: columns: {columns!r} names one column; name at least the anchor and the positive.")
    if not isinstance(columns, Mapping):
        negatives = ("negative", *(f"negative_{k}" for k in range(1, len(columns))))
        columns = dict(zip((ANCHOR, POSITIVE, *negatives), columns, strict=False))
    for role, column in columns.items():
        if not is_text_role(role) and kind_of(role) == "text":
            raise InputError(
                f"{where}: columns: {role!r} is no role{nearest(role, (ANCHOR, POSITIVE, 'negative', 'negative_1'))}; "
                "the roles are anchor, positive, negative, negative_1, negative_2 and so on, group, positive_group, "
                "negative_group and so on, and margin."
            )
        if not isinstance(column, str):
            raise InputError(f"{where}: columns: expected the name of a column for {role}, got {column!r}.")
    check_once(where, list(columns.values()))
    return dict(columns)


def _stream_file(path: Path, columns: ColumnNames | None, quoting: bool | None) -> IterableDataset:
    from datasets import Features, IterableDataset

    choose = functools.partial(choose_columns, columns=columns, where=str(path))
    read: dict[str, Any] = {"path": path, "choose": choose, "quoting": quoting}
    # The first rows tell the columns and their types, and most that can be wrong with a file.
    schema = next(read_chunks(**read)).schema
    _refuse_lists(schema, str(path))
    features = Features.from_arrow_schema(schema)
    return IterableDataset.from_generator(_rows, features=features, gen_kwargs=read)


def _refuse_lists(schema: pa.Schema, where: str) -> None:
    if lists := [field.name for field in schema if is_list(field.type)]:
        raise InputError(
            f"{where}: column {lists[0]!r} holds lists of texts, which are read as a whole, to make columns "
            "of them; leave out streaming."
        )


def _rows(path: Path, choose: Choose, quoting: bool | None) -> Iterator[dict[str, Any]]:
    for table in read_chunks(path, choose, quoting):
        yield from table.to_pylist()


def _from_directory(path: Path, split: str | None, name: str | None) -> Dataset:
    if name:
        raise InputError(f"{path}: name={name!r} chooses a configuration on the hub; a saved directory has none.")
    if not any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        raise InputError(
            f"{path}: a folder that `save_to_disk` did not write; name a file in it "
            f"({', '.join(SUFFIXES)}), or a folder so written."
        )
    from datasets import load_from_disk

    folder = path
    try:
        if (path / "dataset_dict.json").is_file():
            # The one split alone: others may be empty, which `load_from_disk` cannot read.
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            folder, split = path / _split_name(splits, split, str(path)), None
        loaded = load_from_disk(str(folder))
    except InputError:
        raise
    except IndexError as error:
        # `save_to_disk` writes no shard for an empty dataset, and `load_from_disk` wants a first one.
        raise InputError(f"{path}: holds no rows; at least one is needed.") from error
    except Exception as error:
        raise InputError(f"{path}: not a readable saved dataset ({first_line(error)}).") from error
    return _one_split(loaded, split, str(path))


def _from_hub(source: str, split: str | None, name: str | None, streaming: bool = False) -> Any:
    if not _could_be_hub_name(source):
        raise InputError(f"{source}: no such file or folder{nearest_file(_path_of(source))}.")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        loaded = load_dataset(source, name=name, split=split, streaming=streaming)
    except Exception as error:
        # Whatever the hub's client raises (absent, private, offline, unknown split), the user's next step is the same.
        # Of a file that it cannot read, it says what was wrong one error further down.
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise InputError(
            f"{source}: no such file or folder here{nearest_file(Path(source))}, and as a dataset of the hub it cannot "
            f"be loaded ({first_line(reason)})."
        ) from error
    return _one_split(loaded, None, source)


def _one_split(loaded: object, split: str | None, where: str) -> Any:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    if isinstance(loaded, (DatasetDict, IterableDatasetDict)):
        return loaded[_split_name(list(loaded), split, where)]
    if not isinstance(loaded, (Dataset, IterableDataset)):
        raise InputError(f"{where}: expected a dataset of one split, got a {type(loaded).__name__}.")
    if split is not None and str(loaded.split) != split:
        raise InputError(f"{where}: is a single dataset, without a split {split!r}; leave split out.")
    return loaded


def _split_name(splits: Sequence[str], split: str | None, where: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    there = ", ".join(map(repr, splits))
    if split is None:
        raise InputError(f"{where}: has the splits {there}; choose one with split.")
    if split not in splits:
        raise InputError(f"{where}: no split {split!r}{nearest(split, splits)}; it has {there}.")
    return split


def _checked(dataset: Dataset, choose: Callable[..., Sequence[Column]], where: str) -> Dataset:
    """Chosen columns of a dataset under their new names, still memory-mapped; numbers in float64, as a file's are."""
    import pyarrow as pa

    chosen = choose(dataset.column_names, where=where)
    if not len(dataset):
        raise InputError(f"{where}: holds no rows; at least one is needed.")
    first_row, widths = 1, dict[str, int]()
    dataset = dataset.with_format(None).select_columns([c.source for c in chosen])
    numbers: dict[str, list[pa.ChunkedArray]] = {c.source: [] for c in chosen if c.kind == "number"}
    for table in dataset.with_format("arrow").iter(batch_size=16384):
        checked = check_table(table, chosen, where, first_row, widths)
        for column in chosen:
            if column.kind == "number":
                numbers[column.source].append(checked.column(column.target))
        first_row += table.num_rows
    for source, parts in numbers.items():
        # Perhaps stored as texts, which the check took for numbers.
        values = pa.chunked_array([chunk for part in parts for chunk in part.chunks]).to_numpy()
        dataset = dataset.remove_columns([source]).add_column(source, values)
    return read_as_stored(_renamed(dataset.select_columns([c.source for c in chosen]), chosen))


def _renamed(dataset: Any, chosen: Sequence[Column]) -> Any:
    # In two steps, since a name may be taken by a column that is itself renamed.
    dataset = dataset.rename_columns({c.source: f"__{k}" for k, c in enumerate(chosen)})
    return dataset.rename_columns({f"__{k}": c.target for k, c in enumerate(chosen)})


def _could_be_hub_name(source: str) -> bool:
    """``name`` or ``owner/name``, and not what only a path looks like."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None and suffix_of(source) is None
