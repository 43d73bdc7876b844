"""What the loss is compared with: the same mathematics as others compute it, on the same embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

TEMPERATURE = 0.05


class Embeddings(NamedTuple):
    """A batch: students ``[B, D]`` that take a gradient, the guide's ``[B, G]``."""

    anchors: Tensor
    positives: Tensor
    guide_anchors: Tensor
    guide_positives: Tensor


def make_embeddings(rows: int, width: int, guide_width: int, dtype: torch.dtype = torch.float32) -> Embeddings:
    """Random embeddings in which positives resemble their anchors."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for d in (width, guide_width):
        anchors = torch.randn(rows, d, generator=generator)
        pairs += [anchors, 0.5 * anchors + torch.randn(rows, d, generator=generator)]
    a, p, ga, gp = (x.to(dtype) for x in pairs)
    return Embeddings(a.requires_grad_(), p.requires_grad_(), ga, gp)


def plain_matmul(e: Embeddings) -> Tensor:
    """What a good engineer writes in ten lines: normalise, multiply, mask, ``cross_entropy``."""
    a, p, ga, gp = (nn.functional.normalize(x, dim=1) for x in e)
    guide = [ga @ gp.T, ga @ ga.T, gp @ gp.T]
    threshold = guide[0].diagonal()[:, None]
    masks = [scores > threshold for scores in guide]
    masks[0].fill_diagonal_(False)
    for mask in masks[1:]:
        mask.fill_diagonal_(True)
    scores = [s.masked_fill(m, -torch.inf) for s, m in zip((a @ p.T, a @ a.T, p @ p.T), masks, strict=True)]
    logits = torch.cat(scores, dim=1) / TEMPERATURE
    return nn.functional.cross_entropy(logits, torch.arange(len(a), device=a.device))


def sentence_transformers_gist(tokenizer_of: object) -> Callable[[Embeddings], Tensor]:
    """sentence-transformers' own ``GISTEmbedLoss``, its models replaced by ones that hand the embeddings through.

    Args:
        tokenizer_of: any SentenceTransformer; the constructor wants models with tokenizers.
    """
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss

    loss = GISTEmbedLoss(tokenizer_of, tokenizer_of, temperature=TEMPERATURE)

    def run(e: Embeddings) -> Tensor:
        loss.model = _HandThrough((e.anchors, e.positives))
        loss.guide = _HandThrough((e.guide_anchors, e.guide_positives))
        return loss([{}, {}], None)

    return run


class _HandThrough(nn.Module):
    """Gives out embeddings column by column, whatever the features."""

    def __init__(self, columns: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._left = list(columns)

    def forward(self, features: dict) -> dict[str, Tensor]:
        return {"sentence_embedding": self._left.pop(0)}
