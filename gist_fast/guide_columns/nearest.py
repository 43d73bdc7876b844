"""The documents nearest to each query, by the guide's embeddings, in tiles: never a whole matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gist_fast.functional.backends.cpu_products import product

QUERIES, DOCUMENTS = 2048, 8192
"""Of a tile, whose scores take 64 MiB."""


def nearest(
    queries: Tensor,
    documents: Tensor,
    count: int,
    never: Tensor | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and places of the documents of the highest scores, the highest first.

    Args:
        queries: unit vectors ``[Q, G]``, float32.
        documents: unit vectors ``[N, G]``, float32, on the same device.
        count: how many, at least 1.
        never: ``[Q]``, int64: the place of a document that is none of a query's, or -1.
        on_progress: told how many queries are done, and of how many.

    Returns:
        ``[Q, count]``, float32 and int64, on the CPU; -inf and -1 where there are no more documents.
    """
    scores = torch.full((len(queries), count), -math.inf)
    places = torch.full((len(queries), count), -1)
    for start in range(0, len(queries), QUERIES):
        rows = slice(start, min(start + QUERIES, len(queries)))
        excluded = None if never is None else never[rows].to(documents.device)
        found = _nearest(queries[rows], documents, count, excluded)
        scores[rows, : found[0].shape[1]], places[rows, : found[1].shape[1]] = (x.cpu() for x in found)
        if on_progress is not None:
            on_progress(rows.stop, len(queries))
    places[scores == -math.inf] = -1
    return scores, places


def _nearest(queries: Tensor, documents: Tensor, count: int, never: Tensor | None) -> tuple[Tensor, Tensor]:
    best: tuple[Tensor, Tensor] | None = None
    buffer = queries.new_empty(len(queries) * min(DOCUMENTS, len(documents)))
    for start in range(0, len(documents), DOCUMENTS):
        tile = documents[start : start + DOCUMENTS]
        scores = product(queries, tile.T, buffer[: len(queries) * len(tile)].view(len(queries), len(tile)))
        if never is not None:
            rows = ((never >= start) & (never < start + len(tile))).nonzero()[:, 0]
            scores[rows, never[rows] - start] = -math.inf
        # First the best of the tile, so that what is put together is small.
        values, places = scores.topk(min(count, len(tile)), dim=1)
        places = places + start
        if best is not None:
            values, places = torch.cat([best[0], values], dim=1), torch.cat([best[1], places], dim=1)
            values, order = values.topk(min(count, values.shape[1]), dim=1)
            places = places.gather(1, order)
        best = values, places
    assert best is not None, "no documents"
    return best
