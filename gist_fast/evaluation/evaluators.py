"""What to measure a model by, from files, and its scores by sentence-transformers' own evaluators."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gist_fast.config.schema import EvaluationConfig, SourceConfig
from gist_fast.data.load import load_texts
from gist_fast.data.names import ANCHOR, NO_TEXT, POSITIVE, text_columns
from gist_fast.evaluation.metric_names import METRICS, short_name
from gist_fast.evaluation.retrieval import Retrieval, load_retrieval, retrieval_from_pairs
from gist_fast.evaluation.scored_pairs import ScoredPairs, load_labelled_pairs, load_sts
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.evaluation import BaseEvaluator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tasks:
    """All that a model is to be measured by, at most one of a kind, in the order in which it is measured.

    Example:
        >>> tasks = Tasks(sts=ScoredPairs(["rain", "rain", "ice"], ["a shower", "a desert", "snow"], [0.9, 0.1, 0.7]))
        >>> tasks.sizes, list(evaluate(student, combined(make_evaluators(tasks))))
        ({'sts_pairs': 3}, ['sts_spearman', 'sts_pearson'])
    """

    retrieval: Retrieval | None = None
    triplet: Dataset | None = None
    sts: ScoredPairs | None = None
    pair_classification: ScoredPairs | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """How many texts and rows there are, by what they are."""
        counted = {
            "queries": getattr(self.retrieval, "asked", None),
            "documents": getattr(self.retrieval, "corpus", None),
            "triplets": self.triplet,
            "sts_pairs": getattr(self.sts, "scores", None),
            "labelled_pairs": getattr(self.pair_classification, "scores", None),
        }
        return {name: len(rows) for name, rows in counted.items() if rows is not None}


def load_tasks(config: EvaluationConfig) -> Tasks:
    """The tasks that the section ``evaluation`` of a configuration names.

    Raises:
        InputError: a file is missing or wrong.
    """
    retrieval = None
    if config.pairs is not None:
        retrieval = retrieval_from_pairs(_load(config.pairs))
    elif config.queries is not None:
        # That all three are given was checked where the configuration was read.
        retrieval = load_retrieval(config.queries, config.corpus or "", config.relevant or "")
    labelled = config.pair_classification
    return Tasks(
        retrieval=retrieval,
        triplet=None if config.triplet is None else _load_triplets(config.triplet),
        sts=None if config.sts is None else load_sts(config.sts),
        pair_classification=None if labelled is None else load_labelled_pairs(labelled),
    )


def make_evaluator(
    task: Retrieval,
    *,
    batch_size: int = 64,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    show_progress_bar: bool = False,
    **options: Any,
) -> BaseEvaluator:
    """The evaluator of a task, with `RETRIEVAL_METRICS`; `options` are those of sentence-transformers' own."""
    from gist_fast.evaluation.ranking import InformationRetrievalEvaluator

    return InformationRetrievalEvaluator(
        task,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        map_at_k=[100],
        batch_size=batch_size,
        query_prompt=query_prompt,
        corpus_prompt=corpus_prompt,
        show_progress_bar=show_progress_bar,
        **options,
    )


def make_evaluators(
    tasks: Tasks,
    *,
    batch_size: int = 64,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    show_progress_bar: bool = False,
) -> dict[str, BaseEvaluator]:
    """sentence-transformers' evaluators of the tasks, by the names of `Tasks`' fields.

    An evaluator settles on the similarity of the first model that it measures: make new ones for another model.
    """
    from gist_fast.evaluation.finite import (
        BinaryClassificationEvaluator,
        EmbeddingSimilarityEvaluator,
        TripletEvaluator,
    )

    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    evaluators: dict[str, BaseEvaluator] = {}
    if tasks.retrieval is not None:
        evaluators["retrieval"] = make_evaluator(
            tasks.retrieval, query_prompt=query_prompt, corpus_prompt=corpus_prompt, **options
        )
    if tasks.triplet is not None:
        anchors, positives, negatives = (list(tasks.triplet[column]) for column in tasks.triplet.column_names)
        evaluators["triplet"] = TripletEvaluator(anchors, positives, negatives, **options)
    if (sts := tasks.sts) is not None:
        evaluators["sts"] = EmbeddingSimilarityEvaluator(sts.first, sts.second, sts.scores, name="sts", **options)
    if (labelled := tasks.pair_classification) is not None:
        labels = [int(label) for label in labelled.scores]
        # Named, because its accuracy would otherwise be called as the triplets' is.
        evaluators["pair_classification"] = BinaryClassificationEvaluator(
            labelled.first, labelled.second, labels, name="pair", **options
        )
    return evaluators


def combined(evaluators: dict[str, BaseEvaluator], primary: str | None = None) -> BaseEvaluator:
    """One evaluator that runs them all; where there are several, ``sequential_score`` is that of `primary`.

    Args:
        primary: one of the names; None: the first one.
    """
    from sentence_transformers.base.evaluation import SequentialEvaluator

    if len(evaluators) == 1:
        return next(iter(evaluators.values()))
    place = list(evaluators).index(primary) if primary else 0
    return SequentialEvaluator(list(evaluators.values()), main_score_function=lambda scores: scores[place])


def configured_evaluator(config: EvaluationConfig) -> BaseEvaluator:
    """The evaluator that the section ``evaluation`` of a configuration asks for."""
    return combined(make_evaluators(load_tasks(config), batch_size=config.batch_size), config.primary)


def evaluator_names(evaluator: BaseEvaluator) -> str:
    """The classes of an evaluator, or of those it runs."""
    return ", ".join(type(one).__name__ for one in getattr(evaluator, "evaluators", [evaluator]))


def evaluate(model: SentenceTransformer, evaluator: BaseEvaluator, folder: str | None = None) -> dict[str, float]:
    """The model's scores, under their short names, those of `METRICS`; `folder` gets the files of the evaluator."""
    results = evaluator(model, folder)
    assert isinstance(results, dict)
    return short_metrics(results)


def short_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Scores under their short names, without the name of the similarity function; the best one's, were there two."""
    scores: dict[str, float] = {}
    for name, value in results.items():
        short = short_name(name)
        if short in METRICS:
            scores[short] = max(float(value), scores.get(short, float("-inf")))
    return {name: scores[name] for name in METRICS if name in scores}


def _load(source: SourceConfig) -> Dataset:
    return load_texts(source.path, columns=source.columns, **source.reading)


def _load_triplets(source: SourceConfig) -> Dataset:
    """A dataset of three columns: anchor, positive, and the first of the negatives."""
    dataset = _load(source)
    negative = next((c for c in text_columns(dataset) if c not in (ANCHOR, POSITIVE)), None)
    if negative is None:
        raise InputError(f"{source.path}: no column 'negative'; triplets need anchor, positive and negative.")
    if others := [c for c in text_columns(dataset) if c not in (ANCHOR, POSITIVE, negative)]:
        logger.warning("%s: triplets have one negative, %r; left out: %s", source.path, negative, ", ".join(others))
    if (row := next((k for k, text in enumerate(dataset[negative], 1) if text == NO_TEXT), None)) is not None:
        raise InputError(f"{source.path}: row {row} has no negative; triplets need one in each row, so leave it out.")
    return dataset.select_columns([ANCHOR, POSITIVE, negative])
