"""sentence-transformers' evaluator of retrieval, with the rankings and metrics of trec_eval (and so BEIR and mteb)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.sentence_transformer import evaluation as stock

from gist_fast.evaluation.finite import Finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from gist_fast.evaluation.retrieval import Retrieval


class InformationRetrievalEvaluator(Finite, stock.InformationRetrievalEvaluator):
    """Ranks a task's documents for each of its queries, as sentence-transformers does but for these rules:

    - nDCG counts grades, with a linear gain; for every other metric a document of a grade above 0 is relevant.
    - Documents of the same score stand in descending order of their ids.
    - A document that is the query itself is left out (`Retrieval.identical`).
    - MAP is divided by the number of all relevant documents, even where that exceeds its k.
    - A query that was judged, but has no relevant document, counts as 0.
    - Similarities are computed in float32, whatever the model computes in.

    Args:
        task: queries, documents and grades.
        options: what sentence-transformers' evaluator takes besides.
    """

    kind = "retrieval"

    def __init__(self, task: Retrieval, **options: Any) -> None:
        # The parent passes over queries without a relevant document, and would not count those that were judged.
        all_asked = {query: {""} for query in task.asked}
        corpus: dict[str, Any] = {_Descending(document): text for document, text in task.corpus.items()}
        super().__init__(dict(task.queries), corpus, all_asked, **options)
        self.relevant_docs = task.relevant
        self._grades = task.grades
        self._identical = task.identical
        places = {document: place for place, document in enumerate(task.corpus)}
        self._left_out = {
            row: places[document]
            for row, query in enumerate(self.queries_ids)
            if (document := task.identical.get(query))
        }

    def metric_names(self, similarity: str) -> list[str]:
        prefix = f"{self.name}_{similarity}" if self.name else similarity
        return [f"{prefix}_{metric[:-1]}{k}" for metric, ks in self._depths().items() for k in ks]

    def _depths(self) -> dict[str, list[int]]:
        """The k of each metric; that of the metric it is judged by comes first, its largest k ahead."""
        return {
            "ndcg@k": sorted(self.ndcg_at_k, reverse=True),
            "accuracy@k": self.accuracy_at_k,
            "precision@k": self.precision_recall_at_k,
            "recall@k": self.precision_recall_at_k,
            "mrr@k": self.mrr_at_k,
            "map@k": self.map_at_k,
        }

    def compute_all_metrics(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = self.score_functions or {}
        # New ones, because each counts the documents that it has seen.
        self.score_functions = {name: _Without(self._left_out, function) for name, function in given.items()}
        try:
            return super().compute_all_metrics(model, *args, **kwargs)
        finally:
            self.score_functions = given

    def compute_metrics(self, queries_result_list: list[Any]) -> dict[str, dict[int, float]]:
        """The mean of each metric over the queries, from their hits."""
        depths = self._depths()
        sums = {(metric, k): 0.0 for metric, ks in depths.items() for k in ks}
        for query, hits in zip(self.queries_ids, queries_result_list, strict=True):
            left_out = self._identical.get(query)
            ranked = [hit for hit in hits if hit["corpus_id"] != left_out]
            ranked.sort(key=lambda hit: (-hit["score"], hit["corpus_id"]))
            grades = self._grades.get(query, {})
            graded = {document: grades.get(document, 1.0) for document in self.relevant_docs.get(query, ())}
            gains = [graded.get(hit["corpus_id"], 0.0) for hit in ranked]
            for metric, k in sums:
                sums[metric, k] += _METRICS[metric](gains, sorted(graded.values(), reverse=True), k)
        return {metric: {k: sums[metric, k] / len(self.queries) for k in ks} for metric, ks in depths.items()}


class _Descending(str):
    """A text that sorts in reverse, as trec_eval orders documents of the same score."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        return str.__gt__(self, other)

    def __gt__(self, other: str) -> bool:
        return str.__lt__(self, other)


class _Without:
    """A similarity function to be called with one part of the corpus after the other; what is left out ranks last.

    Args:
        left_out: by the row of a query, the place of a document in the corpus.
    """

    def __init__(
        self, left_out: dict[int, int], similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        self.left_out = left_out
        self.similarity = similarity
        self.seen = 0

    def __call__(self, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        # In half precision, many scores that differ would be the same, and their order that of the ids.
        with torch.autocast(queries.device.type, enabled=False):
            scores = self.similarity(queries.float(), documents.float())
        here = [(row, place - self.seen) for row, place in self.left_out.items()]
        here = [(row, place) for row, place in here if 0 <= place < scores.shape[1]]
        self.seen += scores.shape[1]
        if here:
            rows, places = zip(*here, strict=True)
            scores[list(rows), list(places)] = torch.finfo(scores.dtype).min
        return scores


# Each of the grades in the order of the ranking (0: not relevant), those of all relevant documents, and k.
_Metric = Callable[[Sequence[float], Sequence[float], int], float]


def _dcg(grades: Sequence[float], k: int) -> float:
    return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades[:k], 1))


def _share(found: float, of: float) -> float:
    return found / of if of else 0.0


def _precisions(gains: Sequence[float], k: int) -> float:
    """The sum of the precisions at each relevant document."""
    ranks = [rank for rank, gain in enumerate(gains[:k], 1) if gain]
    return sum(found / rank for found, rank in enumerate(ranks, 1))


def _hits(gains: Sequence[float], k: int) -> int:
    return sum(gain > 0 for gain in gains[:k])


_METRICS: dict[str, _Metric] = {
    "accuracy@k": lambda gains, ideal, k: float(_hits(gains, k) > 0),
    "precision@k": lambda gains, ideal, k: _hits(gains, k) / k,
    "recall@k": lambda gains, ideal, k: _share(_hits(gains, k), len(ideal)),
    "ndcg@k": lambda gains, ideal, k: _share(_dcg(gains, k), _dcg(ideal, k)),
    "mrr@k": lambda gains, ideal, k: next((1 / rank for rank, gain in enumerate(gains[:k], 1) if gain), 0.0),
    "map@k": lambda gains, ideal, k: _share(_precisions(gains, k), len(ideal)),
}
