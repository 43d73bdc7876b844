"""A trainer that is ready to a trained model in its folder, and a summary of the run."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING, Any

import torch

from gist_fast.data.named import count_rows
from gist_fast.evaluation.evaluators import evaluate
from gist_fast.pipeline.run_folder import FINAL, PART, clear_folder, kept_in
from gist_fast.runtime.files import replace_folder
from gist_fast.training.callbacks import added
from gist_fast.training.stop_on_signal import StopOnSignal, TrainingStoppedError

if TYPE_CHECKING:
    from gist_fast.pipeline.plan import RunPlan
    from gist_fast.training.trainer import GISTTrainer

logger = logging.getLogger(__name__)


def train_and_save(plan: RunPlan, trainer: GISTTrainer, *, overwrite: bool = False) -> dict[str, Any]:
    """Train, save the model in ``output_dir/final``, and evaluate it.

    Ctrl-C and SIGTERM finish the step, save a checkpoint and stop; see `gist_fast.training.stop_on_signal`.

    Args:
        trainer: of `gist_fast.pipeline.make_trainer`.
        overwrite: delete what an earlier run wrote to ``output_dir`` first.

    Returns:
        Where the model is, steps, seconds, loss, scores and so on; empty in all processes but the first.

    Raises:
        TrainingStoppedError: at a signal.
    """
    before = _scores_before(plan, trainer)
    first = trainer.is_world_process_zero()
    if overwrite:
        with trainer.args.main_process_first(desc="clearing output_dir"):
            gone = clear_folder(plan.output_dir) if first else []
        if gone:
            logger.info("Deleted from %s: %s.", plan.output_dir, ", ".join(gone))
    checkpoint = str(plan.checkpoint) if plan.checkpoint else None
    if checkpoint and first:
        logger.info("Continuing from %s.", checkpoint)
    stop = StopOnSignal(trainer.args.world_size)
    with added(trainer, stop), stop:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.state
        if stop.requested and state.global_step < state.max_steps:
            raise TrainingStoppedError(
                f"stopped after step {state.global_step} of {state.max_steps}; {kept_in(plan.output_dir)}", stop.signal
            )
        final, part = plan.output_dir / FINAL, plan.output_dir / f"{FINAL}{PART}"
        with trainer.args.main_process_first(desc="clearing the model's folder"):
            if first:
                # What a process that died left.
                shutil.rmtree(part, ignore_errors=True)
        # Every process: a sharded model is gathered here. Only the first one writes.
        trainer.save_model(str(part))
        if not first:
            return {}
        replace_folder(part, final)
        if stop.requested:
            raise TrainingStoppedError(f"stopped after the last step; {kept_in(plan.output_dir)}", stop.signal)
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is None:
        logger.warning(
            "training.load_best_model_at_end: no checkpoint has a score of %s, so that %s is the model of the last "
            "step; evaluate and save at least once within %d steps.",
            trainer.args.metric_for_best_model,
            FINAL,
            state.max_steps,
        )
    after = None if plan.evaluator is None else evaluate(trainer.model, plan.evaluator)
    return {
        "model": str(final),
        "output_dir": str(plan.output_dir),
        "rows": count_rows(plan.train),
        "steps": state.global_step,
        "epochs": state.epoch,
        "seconds": outcome.metrics.get("train_runtime"),
        "rows_per_second": outcome.metrics.get("train_samples_per_second"),
        "loss": outcome.training_loss,
        "best_checkpoint": state.best_model_checkpoint,
        "resumed_from": checkpoint,
        "masked": _last_masked(trainer),
        "evaluation": None if after is None else {"before": before, "after": after},
        "report": None,
    }


def _scores_before(plan: RunPlan, trainer: GISTTrainer) -> dict[str, float] | None:
    """The student's scores before training; None where they are not wanted, or training goes on."""
    evaluation = plan.config.evaluation
    if plan.evaluator is None or plan.checkpoint is not None or evaluation is None or not evaluation.before:
        return None
    logger.info("Measuring the student before training.")
    half = plan.arguments.half_precision
    # As the trainer will evaluate it: flash-attn knows no other type.
    with torch.autocast(plan.arguments.device.type, dtype=half, enabled=half is not None):
        return evaluate(trainer.model, plan.evaluator)


def _last_masked(trainer: GISTTrainer) -> dict[str, float]:
    """The shares of pairs masked, by block, as logged last."""
    masked = [{k: v for k, v in logged.items() if k.startswith("masked")} for logged in trainer.state.log_history]
    return next(filter(None, reversed(masked)), {})
