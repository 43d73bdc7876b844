"""The embeddings that an inspection looks at: of a model's encoding, or carried by the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gist_fast.data.names import GUIDE_SUFFIX, NO_TEXT
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Encode = Callable[[list[str], str, int], Tensor]
"""From n texts, the name of their column and its place to their embeddings, ``[n, width]``."""
CHUNK = 16_384
"""Rows of carried embeddings that are read at a time."""


def encoded(texts: Mapping[str, Sequence[str]], encode: Encode) -> list[Tensor]:
    """A tensor a column, in float32 on the CPU; each distinct text of a column is encoded once. Zeros, where there is
    none."""
    found: list[Tensor] = []
    for position, (column, values) in enumerate(texts.items()):
        distinct = {text: place for place, text in enumerate(dict.fromkeys(v for v in values if v != NO_TEXT))}
        if not distinct:
            found.append(torch.zeros(len(values), found[0].shape[1]))
            continue
        embeddings = encoded_once(list(distinct), column, position, encode)
        embeddings = torch.cat([embeddings, torch.zeros_like(embeddings[:1])])
        found.append(embeddings[[distinct.get(text, len(distinct)) for text in values]])
    return found


def encoded_once(distinct: list[str], column: str, position: int, encode: Encode) -> Tensor:
    """The embeddings of texts of one column, which are distinct already."""
    return encode(distinct, column, position).detach().float().cpu()


def carried(rows: Dataset, columns: Sequence[str]) -> list[Tensor]:
    """The guide's embeddings that the rows carry, a tensor a column, in float32.

    Raises:
        InputError: a column has none.
    """
    found = []
    for name in (column + GUIDE_SUFFIX for column in columns):
        if name not in rows.column_names:
            raise InputError(
                f"guide: none was given, and the data carry no column {name!r}; name a guide, or embed it into the "
                "data."
            )
        parts = rows.select_columns([name]).with_format("numpy").iter(batch_size=CHUNK)
        found.append(torch.from_numpy(np.concatenate([np.stack(part[name]).astype(np.float32) for part in parts])))
    return found


def check_finite(embeddings: Sequence[Tensor], columns: Sequence[str], rows: Sequence[int], role: str) -> None:
    """Raise `InputError` naming the row and the column of an embedding that is not finite.

    Args:
        rows: of each embedding, its row in the data; the first is 1.
        role: whose embeddings they are.
    """
    for column, values in zip(columns, embeddings, strict=True):
        bad = (~torch.isfinite(values).all(dim=1)).nonzero()
        if len(bad):
            raise InputError(
                f"{role}: its embedding of row {rows[int(bad[0, 0])]} (the first is 1), column {column!r}, is not "
                "finite; look at the model, or at the text of that row."
            )
