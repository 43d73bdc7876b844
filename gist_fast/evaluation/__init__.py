"""How well a model embeds: sentence-transformers' evaluators on a user's own files, and tasks of mteb."""

from gist_fast.evaluation.evaluators import (
    combined,
    evaluate,
    load_retrieval,
    load_tasks,
    make_evaluator,
    make_evaluators,
    retrieval_from_pairs,
)
from gist_fast.moved import names_in

__all__ = [
    "combined",
    "evaluate",
    "load_retrieval",
    "load_tasks",
    "make_evaluator",
    "make_evaluators",
    "retrieval_from_pairs",
]

__getattr__ = names_in("gist_fast.evaluation", "evaluators", "scored_pairs")
