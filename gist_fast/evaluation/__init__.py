"""How well a model embeds: sentence-transformers' evaluators on a user's own files, and tasks of mteb."""

from gist_fast.evaluation.evaluators import (
    METRICS,
    Retrieval,
    Tasks,
    combined,
    configured_evaluator,
    evaluate,
    load_retrieval,
    load_tasks,
    make_evaluator,
    make_evaluators,
    retrieval_from_pairs,
)
from gist_fast.evaluation.scored_pairs import ScoredPairs, load_labelled_pairs, load_sts

__all__ = [
    "METRICS",
    "Retrieval",
    "ScoredPairs",
    "Tasks",
    "combined",
    "configured_evaluator",
    "evaluate",
    "load_labelled_pairs",
    "load_retrieval",
    "load_sts",
    "load_tasks",
    "make_evaluator",
    "make_evaluators",
    "retrieval_from_pairs",
]
