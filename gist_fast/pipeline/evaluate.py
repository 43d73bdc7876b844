"""Scores of several models on the same tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gist_fast.evaluation.evaluators import Tasks, combined, evaluate, make_evaluators
from gist_fast.evaluation.mteb_tasks import measure
from gist_fast.pipeline.models import load_model

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask


def evaluate_models(
    names: Mapping[str, str],
    tasks: Tasks | None,
    mteb_tasks: Sequence[AbsTask] = (),
    *,
    batch_size: int = 64,
    device: str | None = None,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    before_forward: Callable[..., None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Load one model after the other, and measure it.

    Args:
        names: a folder or hub name by the model's role, such as ``model`` and ``baseline``.
        query_prompt, corpus_prompt: see `gist_fast.evaluation.make_evaluators`.
        before_forward: called before each forward pass, with whatever it gets.

    Returns:
        By role: the ``name``, the ``metrics``, and under ``mteb`` all that mteb found.
    """
    from gist_fast.losses.guide import refuse_without_tokens

    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": True}
    results: dict[str, dict[str, Any]] = {}
    for role, name in names.items():
        model = load_model(name, role, device=device)
        model.register_forward_pre_hook(refuse_without_tokens)
        if before_forward is not None:
            model.register_forward_pre_hook(before_forward)
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
