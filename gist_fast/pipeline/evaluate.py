"""Scores of several models on the same tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gist_fast.evaluation.evaluators import Tasks, combined, evaluate, make_evaluators
from gist_fast.evaluation.mteb_tasks import measure
from gist_fast.pipeline.models import fit_positions, load_to_encode

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


def evaluate_models(
    names: Mapping[str, str],
    tasks: Tasks | None,
    mteb_tasks: Sequence[AbsTask] = (),
    *,
    batch_size: int = 64,
    device: str | None = None,
    trust_remote_code: bool = False,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    before_forward: Callable[..., None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Load one model after the other, and measure it.

    Args:
        names: a folder or hub name by the model's role, such as ``model`` and ``baseline``.
        query_prompt, corpus_prompt: see `gist_fast.evaluation.make_evaluators`.
        trust_remote_code: whether code that comes with a model may run.
        before_forward: called before each forward pass, with whatever it gets.

    Returns:
        By role: the ``name``, the ``metrics``, and under ``mteb`` all that mteb found.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": True}
    results: dict[str, dict[str, Any]] = {}
    for role, name in names.items():
        model = load_to_encode(name, role, before_forward, device=device, trust_remote_code=trust_remote_code)
        fit_positions(model, role)
        metrics: dict[str, float] = {}
        if tasks is not None:
            evaluators = make_evaluators(tasks, query_prompt=query_prompt, corpus_prompt=corpus_prompt, **options)
            metrics |= evaluate(model, combined(evaluators))
        results[role] = {"name": name, "metrics": metrics}
        if mteb_tasks:
            found = measure(model, mteb_tasks, **options)
            metrics |= {task: result["main_score"] for task, result in found.items()}
            results[role]["mteb"] = found
    return results
