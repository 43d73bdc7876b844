"""The page about a run that `gist_fast.pipeline.train_and_save` has finished."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.inspection.training import inspect_training
from gist_fast.report.facts import changed_settings, machine_facts
from gist_fast.report.page import write_page
from gist_fast.report.training import FinishedTraining, training_page
from gist_fast.runtime.errors import InputError, first_line

if TYPE_CHECKING:
    from gist_fast.inspection import Inspection
    from gist_fast.pipeline.plan import RunPlan
    from gist_fast.training.trainer import GISTTrainer

logger = logging.getLogger(__name__)


def write_training_report(
    path: Path, plan: RunPlan, trainer: GISTTrainer, summary: dict[str, Any], *, overwrite: bool
) -> str | None:
    """Where the page is; None where it could not be written, which takes nothing from the run itself.

    Args:
        summary: what `gist_fast.pipeline.train_and_save` returned.
    """
    scores = summary["evaluation"] or {}
    shown = {name: name.replace("_", " ") for name in ("rows", "steps", "epochs", "best_checkpoint", "model")}
    shown |= {"seconds": "seconds, evaluation and saving included"}
    if plan.checkpoint is None:
        shown |= {"rows_per_second": "rows a second of that time", "loss": "loss, mean of all steps"}
    else:
        # The trainer's rate and mean are of the last part alone; the curves show the whole.
        shown |= {"seconds": "seconds since resumed", "resumed_from": "resumed from"}
    facts = {name: str(value) for name, value in plan.describe().items() if value and name != "output_dir"}
    run = FinishedTraining(
        log_history=trainer.state.log_history,
        outcome={title: summary[name] for name, title in shown.items()},
        before=scores.get("before"),
        after=scores.get("after"),
        settings=changed_settings(plan.config, eval_strategy=plan.arguments.eval_strategy),
        facts={**facts, **machine_facts(plan.arguments.device.type)},
        batches=_inspected(trainer),
    )
    try:
        write_page(path, training_page(run, f"Training of {Path(plan.config.student.path).name}"), overwrite=overwrite)
    except InputError as error:
        logger.info("gist-fast: %s The model is in %s.", error, summary["model"])
        return None
    return str(path)


def _inspected(trainer: GISTTrainer) -> dict[str, Inspection]:
    """What the guide drops in a batch of the data; nothing where that fails, which takes nothing from the report."""
    try:
        return inspect_training(trainer)
    except Exception as error:
        # A model that trains and cannot encode, or memory that is gone: the run is over, and its curves are at hand.
        logger.info("The report shows no batch of the data: %s", first_line(error))
        return {}
