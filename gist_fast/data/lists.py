"""Lists of texts in a row, as FlagEmbedding's files have them, to columns of one text each."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gist_fast.data.names import GROUP_SUFFIX, GUIDE_SUFFIX, NEGATIVE, NO_TEXT, POSITIVE
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is that of a list of texts, or of a list that says nothing yet of what it holds."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    return pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)


def spread_lists(dataset: Dataset, where: str) -> Dataset:
    """A dataset in which each row has one positive, and its negatives stand in ``negative_1``, ``negative_2`` and so
    on.

    A row with several positives becomes one row for each, with the same anchor and negatives. Where a row has fewer
    negatives than another, `NO_TEXT` stands in the columns that are left over.

    Args:
        where: what to call the dataset in an error.

    Raises:
        InputError: other columns go with the negatives that would have to be lists, too.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset

    fields = dataset.features.arrow_schema
    lists = [name for name in (POSITIVE, NEGATIVE) if name in fields.names and is_list(fields.field(name).type)]
    if not lists:
        return dataset
    others = [name + suffix for name in lists for suffix in (GROUP_SUFFIX, GUIDE_SUFFIX) if name in lists]
    if found := [name for name in others if name in fields.names]:
        raise InputError(f"{where}: column {found[0]!r} goes with a column of lists; write one text a column instead.")
    table = dataset.with_format("arrow")[:]
    if POSITIVE in lists:
        column = table.column(POSITIVE).combine_chunks()
        table = table.set_column(table.column_names.index(POSITIVE), POSITIVE, column)
        rows = table.num_rows
        several = pc.list_flatten(column)
        table = table.take(pc.list_parent_indices(column))
        table = table.set_column(table.column_names.index(POSITIVE), POSITIVE, several)
        if table.num_rows > rows:
            logger.warning(
                "%s: %d rows with lists of positives became %d rows of one. Rows of one anchor are negatives of each "
                "other unless the loss has groups: anchor (or anchor_or_positive).",
                where,
                rows,
                table.num_rows,
            )
    if NEGATIVE in lists:
        column = table.column(NEGATIVE).combine_chunks()
        place = table.column_names.index(NEGATIVE)
        table = table.remove_column(place)
        lengths = pc.list_value_length(column)
        if taken := [name for name in table.column_names if name.startswith(f"{NEGATIVE}_")]:
            raise InputError(f"{where}: column {taken[0]!r} stands beside lists of negatives; name one of the two.")
        for k in range(pc.max(lengths).as_py() or 0):
            # Filled up with nulls where a list ends before.
            each = pc.list_slice(column, k, k + 1, return_fixed_size_list=True).flatten()
            texts = pc.fill_null(each.cast(pa.string()), NO_TEXT)
            table = table.add_column(place + k, f"{NEGATIVE}_{k + 1}", texts)
        logger.info("%s: %d to %d negatives a row", where, pc.min(lengths).as_py(), pc.max(lengths).as_py())
    return Dataset(table)
