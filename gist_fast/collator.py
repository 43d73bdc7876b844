"""The way of the guide's view of a text through a batch.

The trainer hands a loss features and never texts, so what the guide needs is added where the texts still are. A key
``{column}_{name}`` of the collated batch arrives in the loss as ``features[name]`` of that column: `TOKENS` holds a
dictionary of the guide's own tokens, `EMBEDDING` the guide's embeddings that the dataset carries. (Neither name may end
in ``_input_ids`` or ``_sentence_embedding``, which the trainer would take for a column of its own.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor

from gist_fast.errors import InputError
from gist_fast.losses.guide import EMBEDDING, TOKENS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SUFFIX = f"_{EMBEDDING}"
"""Columns of a dataset with this ending hold the guide's embeddings of the column before it."""


def guide_prompt(guide: SentenceTransformer, column: str, position: int, prompts: dict[str, str] | str | None) -> str:
    """The prompt that the guide reads before the texts of a column, perhaps empty.

    Args:
        position: the column's place in the dataset; the first holds the queries.
        prompts: one for all columns, or by column; None for the guide's own.
    """
    if isinstance(prompts, str):
        return prompts
    if prompts is not None:
        return prompts.get(column, "")
    own = guide.prompts or {}
    return own.get("query" if position == 0 else "document") or own.get(guide.default_prompt_name or "") or ""


@dataclass
class GuideTokenizer:
    """Tokenises raw texts as the guide wants them: its tokenizer, its prompt, its maximum length."""

    guide: SentenceTransformer
    prompts: dict[str, str] | str | None = None
    max_length: int | None = None

    def __call__(self, texts: list[str], column: str, position: int) -> dict[str, Any]:
        """Features of the guide, tensors of ``len(texts)`` rows."""
        # Without max_length the tokenizer truncates at the guide's own.
        kwargs = {} if self.max_length is None else {"text": {"max_length": self.max_length}}
        return self.guide.preprocess(
            texts,
            prompt=guide_prompt(self.guide, column, position, self.prompts) or None,
            **({"processing_kwargs": kwargs} if kwargs else {}),
        )


@dataclass
class GISTDataCollator(SentenceTransformerDataCollator):
    """sentence-transformers' collator, which also carries guide embeddings, or else the guide's own tokens."""

    tokenize_for_guide: Callable[[list[str], str, int], dict[str, Any]] | None = field(default=None, repr=False)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch out of rows.

        Raises:
            ValueError: a row's guide embedding has another width than the first row's.
        """
        if not features:
            return super().__call__(features)
        embeddings = [c for c in features[0] if c.endswith(SUFFIX)]
        texts = [{c: v for c, v in row.items() if c not in embeddings} for row in features]
        batch = super().__call__(texts)
        for column in embeddings:
            batch[column] = _stack([row[column] for row in features], column)
        if self.tokenize_for_guide is not None:
            columns = [c for c in texts[0] if c != "dataset_name" and c not in self.valid_label_columns]
            for position, column in enumerate(columns):
                if column + SUFFIX not in batch:
                    rows = [row[column] for row in texts]
                    batch[f"{column}_{TOKENS}"] = self.tokenize_for_guide(rows, column, position)
        return batch


def _stack(rows: list[Any], column: str) -> Tensor:
    """``[B, G]`` in the type the dataset holds."""
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        bad = next(i for i, row in enumerate(rows) if len(row) != len(rows[0]))
        raise InputError(
            f"{column}: row {bad} of the batch has {len(rows[bad])} numbers and row 0 has {len(rows[0])}; all guide "
            "embeddings have one width."
        )
    if isinstance(rows[0], Tensor):
        return torch.stack(rows)
    array = np.asarray(rows)
    # Python lists of floats come as float64; the dataset held at most float32.
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
