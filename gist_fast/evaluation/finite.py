"""sentence-transformers' evaluators, which say it where a model gives embeddings that are no numbers.

Their own metrics are 0 then, an error of another library, or whatever the order of NaN among numbers makes of it.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer import evaluation as stock

from gist_fast.evaluation.metric_names import metrics_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


class _NotFiniteError(Exception):
    pass


class Finite(BaseEvaluator):
    """To be mixed into an evaluator: where an embedding is not finite, all metrics are NaN, and a warning names it."""

    kind: str
    """Of evaluation, as `metrics_of` takes it."""

    def metric_names(self, similarity: str) -> list[str]:
        """What the evaluator reports; the metric that it is judged by comes first."""
        return metrics_of(self.kind, similarity)

    def embed_inputs(self, model: SentenceTransformer, sentences: Any, *args: Any, **kwargs: Any) -> Any:
        embeddings = super().embed_inputs(model, sentences, *args, **kwargs)  # type: ignore[misc]
        wrong = (~torch.as_tensor(embeddings).isfinite()).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            shown = sentences[wrong[0]]
            raise _NotFiniteError(
                f"the embeddings of {len(wrong)} of {len(sentences)} texts hold NaN or infinite numbers, so that the "
                f"metrics are NaN; the first is that of {shown[:80]!r}"
            )
        return embeddings

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(model, *args, **kwargs)
        except _NotFiniteError as error:
            logger.warning("%s: %s", self.kind, error)
            names = self.metric_names(model.similarity_fn_name)
            self.primary_metric = names[0]
            return dict.fromkeys(names, math.nan)


class TripletEvaluator(Finite, stock.TripletEvaluator):
    kind = "triplet"


class EmbeddingSimilarityEvaluator(Finite, stock.EmbeddingSimilarityEvaluator):
    kind = "sts"


class BinaryClassificationEvaluator(Finite, stock.BinaryClassificationEvaluator):
    kind = "pair_classification"
