"""What `benchmarks.loss_cpu` compares the loss with: competitors of `gist_fast.bench.peers`, on the same embeddings."""

from __future__ import annotations

import torch

from gist_fast.bench import peers
from gist_fast.bench.cases import TEMPERATURE, Embeddings, LossCase

__all__ = ["TEMPERATURE", "Embeddings", "make_embeddings", "plain_matmul", "sentence_transformers_gist"]

# Neither depends on sizes, which the embeddings tell; a guide model and all blocks are a case's defaults.
plain_matmul = peers.plain_matmul(LossCase(rows=1))


def sentence_transformers_gist() -> peers.Loss:
    """sentence-transformers' own ``GISTEmbedLoss``, given embeddings."""
    return peers.sentence_transformers_gist(LossCase(rows=1))


def make_embeddings(rows: int, width: int, guide_width: int, dtype: torch.dtype = torch.float32) -> Embeddings:
    """Random embeddings in which positives resemble their anchors."""
    return LossCase(rows, width, guide_width, str(dtype).removeprefix("torch.")).embeddings()
