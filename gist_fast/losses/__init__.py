"""The losses of sentence-transformers, by changing the import.

``from gist_fast.losses import GISTEmbedLoss, CachedGISTEmbedLoss``, or ``MultipleNegativesRankingLoss`` and its kin,
which need no guide: same arguments, defaults and results as sentence-transformers 6.2, computed by
`gist_fast.guided_contrastive_loss`.
"""

from gist_fast.losses.base import GuidedLoss
from gist_fast.losses.cached_gist_embed import CachedGISTEmbedLoss
from gist_fast.losses.gist_embed import GISTEmbedLoss
from gist_fast.losses.multiple_negatives_ranking import (
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
)

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
    "GuidedLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]
