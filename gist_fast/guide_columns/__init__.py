"""Precomputed guide embeddings: columns of a dataset, so that training needs no guide in memory.

A frozen guide gives a text the same embedding in every step and epoch, so each distinct text is encoded once. Two
things are kept under ``cache_dir``, in one folder for each guide (weights, modules, tokenizer), prompt, maximum length
and type of number:

- a *store* of embeddings by the text's digest (`store`). A killed run loses half a minute's work; a dataset that grew,
  was shuffled, cut, or had its columns renamed finds its texts there;
- a *column file* for each column (`column_files`), named after the column's texts in their order, so that for an
  unchanged column neither the store nor the guide is asked.

Both carry checksums that are compared before use: what is damaged is named, set aside, and computed again.

Processes of one job (``torchrun``, ``accelerate launch``) share the texts window by window. The windows do not depend
on how many processes there are, so the batches, and with them the numbers, are those of one process. The processes must
share ``cache_dir``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from datasets import Dataset, concatenate_datasets

from gist_fast.data.embedded_rows import read_as_stored
from gist_fast.data.names import GUIDE_EMBEDDING, GUIDE_SUFFIX
from gist_fast.guide_columns.checks import DTYPES, check_arguments, column_prompts, wrong_type
from gist_fast.guide_columns.encode import Encoder
from gist_fast.guide_columns.files import cache_folder
from gist_fast.guide_columns.job import Job, Report
from gist_fast.guide_columns.share import Team
from gist_fast.losses.mini_batches import default_tokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["DTYPES", "Report", "embed_guide"]


def embed_guide(
    dataset: Dataset,
    guide: SentenceTransformer,
    columns: Sequence[str] | None = None,
    *,
    prompts: Mapping[str, str] | str | None = None,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    dtype: str = "float16",
    cache_dir: str | os.PathLike | None = None,
    show_progress_bar: bool = True,
    report: Report | None = None,
) -> Dataset:
    """Add the guide's embeddings of the text columns to a dataset.

    Args:
        dataset: with columns of texts.
        guide: reads the raw texts with its own tokenizer, on the device that it is on.
        columns: the columns to embed, queries first; None for all columns of strings.
        prompts: one prompt for all columns, or by column; None for the guide's own (see
            `gist_fast.data.per_column.guide_prompt`).
        batch_size: texts that the guide reads at a time; None for any number within `batch_tokens`.
        batch_tokens: tokens that it reads at a time, padding included; None for what suits its device.
        max_length: tokens of a text that are read; None for the guide's own maximum.
        dtype: what is stored, ``"float16"`` or ``"float32"``.
        cache_dir: where the embeddings are kept (see `gist_fast.guide_columns`); None for a folder in the cache of
            ``datasets``. Those of the same text, guide, prompt, maximum length and type are used again.
        show_progress_bar: whether to tell on stderr how far it is.
        report: filled in with what was done, while it is done.

    Returns:
        The dataset with a column ``{column}_guide_embedding`` (numpy rows ``[G]``) for each column, rows in order; the
        same in every process of a job.

    Raises:
        ValueError: the dataset is empty, has a transform, lacks a column, holds a value that is no text, or already has
            embeddings of a column; the guide has a ``Router`` for queries and documents; an argument is out of range;
            an embedding is not finite, or `dtype` does not hold it; the processes of a job differ in dataset or guide.
        TypeError: it is no dataset of one split, or another argument is of a type that it does not take.
        OSError: nothing can be written, as on a full disk. What was written before stays.

    Example:
        >>> embed_guide(pairs, guide, cache_dir="cache", show_progress_bar=False).column_names
        ['anchor', 'positive', 'anchor_guide_embedding', 'positive_guide_embedding']
    """
    counts = {"batch_size": batch_size, "batch_tokens": batch_tokens, "max_length": max_length}
    check_arguments(dataset, guide, dtype, cache_dir, counts)
    if not isinstance(report, Report | None):
        raise wrong_type("report", "a gist_fast.guide_columns.Report", report)
    prompt_of = column_prompts(dataset, guide, columns, prompts)
    job = Job(
        Encoder(guide, max_length, batch_tokens or default_tokens(guide.device), batch_size),
        cache_folder(cache_dir),
        dtype,
        Team(),
        shown=show_progress_bar,
        report=Report() if report is None else report,
    )
    parts = [dataset]
    for column, path in job.run(dataset, prompt_of).items():
        parts.append(Dataset.from_file(str(path)).rename_column(GUIDE_EMBEDDING, column + GUIDE_SUFFIX))
    return read_as_stored(concatenate_datasets(parts, axis=1))
