"""Lists of texts in a row, as FlagEmbedding's files have them, to columns of one text each."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from gist_fast.data.names import ANCHOR, GROUP_SUFFIX, GUIDE_SUFFIX, LISTED, NEGATIVE, NO_TEXT, POSITIVE
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

logger = logging.getLogger(__name__)


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is that of a list of texts, or of a list that says nothing yet of what it holds."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    return pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)


def spread_lists(dataset: Dataset, where: str = "dataset") -> Dataset:
    """A dataset in which each row has one positive, and its negatives stand in ``negative_1``, ``negative_2`` and so
    on.

    A row with several positives becomes one row for each, with the same anchor and negatives. Where a row has fewer
    negatives than another, `NO_TEXT` stands in the columns that are left over.

    Args:
        dataset: with the columns ``anchor`` and ``positive``, or those of FlagEmbedding: ``query``, ``pos``, ``neg``.
        where: what to call the dataset in an error.

    Raises:
        InputError: a row has no positive; other columns go with the negatives that would have to be lists, too.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset

    names = dataset.column_names
    if not {ANCHOR, POSITIVE}.intersection(names) and {LISTED[ANCHOR], LISTED[POSITIVE]} <= set(names):
        dataset = dataset.rename_columns({column: role for role, column in LISTED.items() if column in names})
    fields = dataset.features.arrow_schema
    lists = [name for name in (POSITIVE, NEGATIVE) if name in fields.names and is_list(fields.field(name).type)]
    if not lists:
        return dataset
    others = [name + suffix for name in lists for suffix in (GROUP_SUFFIX, GUIDE_SUFFIX)]
    if found := [name for name in others if name in fields.names]:
        raise InputError(f"{where}: column {found[0]!r} goes with a column of lists; write one text a column instead.")
    table = dataset.with_format("arrow")[:]
    for place, field in enumerate(table.schema):
        # Several rows of one text may be more than 2 GiB.
        if pa.types.is_string(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(pa.large_string()))
    if POSITIVE in lists:
        several = _large(table, POSITIVE)
        lengths = pc.fill_null(pc.list_value_length(several), 0)
        if (row := pc.index(lengths, 0).as_py()) >= 0:
            raise InputError(f"{where}: row {row + 1}, column {POSITIVE!r}: no text; one at least is needed.")
        place, rows = table.column_names.index(POSITIVE), table.num_rows
        table = table.remove_column(place).take(pc.list_parent_indices(several))
        table = table.add_column(place, POSITIVE, pc.list_flatten(several))
        if table.num_rows > rows:
            logger.warning(
                "%s: %d rows with lists of positives became %d rows of one. Rows of one anchor are negatives of each "
                "other unless the loss has groups: anchor (or anchor_or_positive).",
                where,
                rows,
                table.num_rows,
            )
    if NEGATIVE in lists:
        several = _large(table, NEGATIVE)
        place = table.column_names.index(NEGATIVE)
        table = table.remove_column(place)
        if taken := [name for name in table.column_names if name.startswith(f"{NEGATIVE}_")]:
            raise InputError(f"{where}: column {taken[0]!r} stands beside lists of negatives; name one of the two.")
        texts, owners = pc.list_flatten(several), pc.list_parent_indices(several).to_numpy()
        lengths = pc.fill_null(pc.list_value_length(several), 0).to_numpy()
        starts = np.cumsum(lengths) - lengths
        ranks = np.arange(len(owners)) - starts[owners]
        for k in range(int(lengths.max(initial=0))):
            found_at = np.full(len(lengths), -1)
            found_at[owners[ranks == k]] = np.flatnonzero(ranks == k)
            column = pc.fill_null(texts.take(pa.array(found_at, mask=found_at < 0)), NO_TEXT)
            table = table.add_column(place + k, f"{NEGATIVE}_{k + 1}", column)
        logger.info("%s: %d to %d negatives a row", where, lengths.min(initial=0), lengths.max(initial=0))
    return Dataset(table)


def _large(table: pa.Table, column: str) -> pa.Array:
    """A column of lists of texts, of any number of bytes."""
    import pyarrow as pa

    return table.column(column).cast(pa.large_list(pa.large_string())).combine_chunks()
