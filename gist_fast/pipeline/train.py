"""A trainer that is ready to a trained model in its folder, and a summary of the run."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from gist_fast.data.named import count_rows
from gist_fast.evaluation.evaluators import evaluate
from gist_fast.pipeline.run_folder import FINAL, PART, kept_in, replacing, settle
from gist_fast.runtime.errors import InputError
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
        overwrite: what an earlier run wrote to ``output_dir`` is deleted, once this one has saved something; see
            `gist_fast.pipeline.run_folder`.

    Returns:
        Where the model is, steps, seconds, loss, scores and so on; empty in all processes but the first.

    Raises:
        TrainingStoppedError: at a signal.
    """
    checkpoint = str(plan.checkpoint) if plan.checkpoint else None
    first = trainer.is_world_process_zero()
    final, part = plan.output_dir / FINAL, plan.output_dir / f"{FINAL}{PART}"
    done = plan.checkpoint if plan.checkpoint is not None and trainer.has_finished(plan.checkpoint) else None
    if done is not None and first:
        logger.info("%s: the run is finished (%s); nothing is trained.", plan.output_dir, done.name)
    if done is not None and _is_of(final, done):
        trainer.take_state(done)
        return _summary(plan, trainer, checkpoint, {"train_loss": trainer.mean_loss()}) if first else {}
    before = _scores_before(plan, trainer)
    if checkpoint and first and done is None:
        logger.info("Continuing from %s.", checkpoint)
    if done is not None:
        for callback in get_reporting_integration_callbacks(trainer.args.report_to):
            trainer.remove_callback(callback)
    stop = StopOnSignal(trainer.args.world_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(added(trainer, stop))
        stack.enter_context(stop)
        if overwrite:
            with trainer.args.main_process_first(desc="putting the older run aside"):
                if first:
                    stack.enter_context(replacing(plan.output_dir))
            stack.enter_context(added(trainer, _Settle(plan.output_dir)))
            stack.callback(_close_events, trainer)
        stack.enter_context(added(trainer, _FiniteCheckpoints(trainer)))
        try:
            outcome = trainer.train(resume_from_checkpoint=checkpoint)
        except InputError:
            _check_finite(trainer)  # which tells why an embedding is not
            raise
        state = trainer.state
        if stop.requested and state.global_step < state.max_steps:
            raise TrainingStoppedError(
                f"stopped after step {state.global_step} of {state.max_steps}; {kept_in(plan.output_dir)}", stop.signal
            )
        _check_finite(trainer)
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
    summary = _summary(plan, trainer, checkpoint, outcome.metrics)
    if plan.evaluator is not None:
        summary["evaluation"] = {"before": before, "after": evaluate(trainer.model, plan.evaluator)}
    return summary


class _FiniteCheckpoints(TrainerCallback):
    """Ends a run before it saves weights that are not finite, for which an older run would go."""

    def __init__(self, trainer: GISTTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            _check_finite(self.trainer)


class _Settle(TrainerCallback):
    """Lets the older run go once a checkpoint of the new one stands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            settle(self.folder)


def _close_events(trainer: GISTTrainer) -> None:
    """End what TensorBoard's callback still writes after a failure, into files that may go next."""
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "tb_writer", None) is not None:
            callback.tb_writer.close()
            callback.tb_writer = None


def _check_finite(trainer: GISTTrainer) -> None:
    """Raise where training has left weights of which no embedding can be made.

    Raises:
        RuntimeError: naming the first of them.
    """
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise RuntimeError(
                f"after step {trainer.state.global_step} the weights of {name} are not finite, so the model is not "
                "saved. A lower learning_rate, a max_grad_norm, or bf16 in the place of fp16 may help."
            )


def _is_of(final: Path, checkpoint: Path) -> bool:
    """Whether the model was saved after the checkpoint, and is no older stage of the run."""
    return final.is_dir() and final.stat().st_mtime >= checkpoint.stat().st_mtime


def _summary(plan: RunPlan, trainer: GISTTrainer, checkpoint: str | None, metrics: dict[str, Any]) -> dict[str, Any]:
    """What there is to say of a run, its evaluation excepted."""
    state = trainer.state
    return {
        "model": str(plan.output_dir / FINAL),
        "output_dir": str(plan.output_dir),
        "rows": count_rows(plan.train),
        "steps": state.global_step,
        "epochs": state.epoch,
        "seconds": metrics.get("train_runtime"),
        "rows_per_second": metrics.get("train_samples_per_second"),
        "loss": metrics.get("train_loss"),
        "best_checkpoint": state.best_model_checkpoint,
        "resumed_from": checkpoint,
        "masked": _last_masked(trainer),
        "evaluation": None,
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
