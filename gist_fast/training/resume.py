"""What `gist_fast.GISTTrainer` adds to a trainer so that a run may be cut off anywhere and ends as if it had not been.

transformers' checkpoints hold weights, optimizer, scheduler, gradient scaler, the random state of every process, and
the step, from which the place in the epoch follows. What they lack is added here:

- the loss's own parameters (a learnt temperature), which are none of the model's;
- sums that the next log and the end of the run need: the loss, its parts and the guide's statistics since the last
  log, and the loss until then;
- the epoch of samplers behind several wrappers, which would draw the first epoch's order when a run of several
  processes goes on in a later one;
- an evaluation that was due after the very step of the checkpoint;
- and an evaluation draws no random numbers from training, so that neither its presence nor its repetition shows.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, has_length

from gist_fast.functional.stats import StatsAverage
from gist_fast.runtime.errors import InputError, first_line
from gist_fast.training.batches import check_steps, steps_of
from gist_fast.training.checkpoints import (
    UNFINISHED,
    delete_old,
    explained,
    fault,
    holds_model_alone,
    last_whole,
    publish,
    tidy,
)
from gist_fast.training.own_code import save_own_code
from gist_fast.training.resume_checks import check_settings, run_settings, write_settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainer

    _Trainer = SentenceTransformerTrainer
else:
    _Trainer = object


class LongRunMixin(_Trainer):
    """Goes before a ``SentenceTransformerTrainer`` among the bases."""

    _writing_to: Path | None = None
    _resumed_from: Path | None = None
    _settings: dict[str, Any] | None = None
    _not_loaded: Exception | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_RestoreState(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint (its path, or True for the last whole one).

        Raises:
            InputError: the checkpoint is not whole, or was made with settings that would change the results.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole(Path(self._get_output_dir(None))))
        check_steps(self.args)
        self._settings = run_settings(self)
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed_from is not None:
            self.check_checkpoint(self._resumed_from, self._settings)
        outcome = super().train(resume_from_checkpoint or None, *args, **kwargs)
        if not outcome.global_step:
            raise InputError(
                "train_dataset: expected at least one batch, got none, so that no step was made. A smaller "
                "per_device_train_batch_size, or dataloader_drop_last set to false, may give one."
            )
        return outcome

    # --- saving ---

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing_to is None else str(self._writing_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        saves = self.args.should_save
        if saves:
            tidy(run)
        self.accelerator.wait_for_everyone()
        self._writing_to = run / UNFINISHED
        try:
            with explained(run, name, self._bytes_of_a_checkpoint()):
                super()._save_checkpoint(model, trial)
                self._name_the_best(run)
                self._save_own_state(run / UNFINISHED / name)
                # The checkpoint is whole when every process has written its part.
                self.accelerator.wait_for_everyone()
                if saves:
                    publish(run / UNFINISHED / name, run / name)
        finally:
            self._writing_to = None
        if saves:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)
            delete_old(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # sentence-transformers' takes it that only one process comes here; with transformers 5.23 all do.
        if self.args.should_save:
            super()._save(output_dir, state_dict)
            save_own_code(self.model, Path(output_dir or str(self.args.output_dir)))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Pushed in the background, so only once the folder keeps its name.
        if self._writing_to is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_the_best(self, run: Path) -> None:
        """Undo that the parent looked for the best checkpoint where this one is written."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run / f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")

    def _save_own_state(self, folder: Path) -> None:
        torch.save(_own_state(self), folder / _state_file(self.args.process_index))
        if self.args.should_save:
            write_settings(folder, self._settings or run_settings(self))
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _bytes_of_a_checkpoint(self) -> int:
        tensors: list[Any] = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer is not None:
            tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    # --- going on ---

    def check_checkpoint(self, checkpoint: Path, settings: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint with which, or with these settings, the run would be another one."""
        broken = fault(checkpoint)
        if broken:
            raise InputError(f"{checkpoint}: is no whole checkpoint ({broken}); name another one.")
        accept = getattr(self.args, "resume_with_changes", False)
        if holds_model_alone(checkpoint) and not accept:
            raise InputError(
                f"{checkpoint}: holds the model alone (save_only_model), so the optimizer and its schedule would begin "
                "anew. Start a run with it as the student, or set resume_with_changes to go on all the same."
            )
        check_settings(checkpoint, settings, accept)

    def has_finished(self, checkpoint: Path) -> bool:
        """Whether a run that goes on from a checkpoint has nothing left to train.

        Raises:
            InputError: as `train` would from there.
        """
        loader = self.get_train_dataloader()
        steps = steps_of(self.args, len(loader) if has_length(loader) else None)
        if TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step < steps:
            return False
        self.check_checkpoint(checkpoint, run_settings(self))
        return True

    def take_state(self, checkpoint: Path) -> None:
        """Know of a run what its checkpoint knows of it, but for weights and optimizer, without training."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        saved = _saved_state(checkpoint, self.args.process_index)
        self._total_loss_scalar = _loss_until_log(self.state, saved)
        self._tr_loss = torch.tensor(0.0) if saved is None else saved["loss_since_log"]

    def mean_loss(self) -> float:
        """The mean training loss over all steps of the run, those before it was resumed too."""
        return (self._total_loss_scalar + self._tr_loss.item()) / max(self.state.global_step, 1)

    def get_train_dataloader(self) -> Any:
        """The parent's; with workers that outlive an epoch, not drawing from the training's random numbers."""
        loader = super().get_train_dataloader()
        if self.args.dataloader_persistent_workers:
            # They draw a seed when they start, which is once, unless the run is cut off and goes on.
            base = getattr(loader, "base_dataloader", loader)
            base.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # The parent looks at the end of each step only, and would train one more.
            self.control.should_training_stop = True
            return
        epoch = kwargs.get("epoch")
        if epoch is not None:
            _set_epoch(kwargs.get("train_dataloader"), epoch)
            if kwargs.get("resume_from_checkpoint") and epoch == kwargs.get("epochs_trained"):
                self._evaluate_what_was_due(kwargs)
        super()._run_epoch(*args, **kwargs)

    def _evaluate_what_was_due(self, now: dict[str, Any]) -> None:
        """Evaluate after the step of the checkpoint, where that ended an epoch and the run did not get there."""
        step = self.state.global_step
        at_end = step > 0 and now.get("steps_trained_in_current_epoch") == 0
        due = self.args.eval_strategy == IntervalStrategy.EPOCH and self.args.eval_delay <= (self.state.epoch or 0)
        logged = [key for entry in self.state.log_history if entry.get("step") == step for key in entry]
        if not (at_end and due) or any(key.startswith("eval_") for key in logged):
            return
        trial = now.get("trial")
        metrics = self._evaluate(trial, now.get("ignore_keys_for_eval"))
        if self._determine_best_metric(metrics=metrics, trial=trial):
            self.state.best_model_checkpoint = str(self._resumed_from)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The parent's evaluation, which leaves the random state as it was, and none of its dataloaders behind."""
        prepared = self.accelerator._dataloaders
        before = len(prepared)
        try:
            with random_state_kept():
                return super().evaluate(*args, **kwargs)
        finally:
            # accelerate would hold each one for the rest of the run, with its sampler and what that knows of every row.
            del prepared[before:]

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._load_from_checkpoint(*args, **kwargs)
        except Exception as error:
            self._not_loaded = error
            raise

    def _load_best_model(self) -> None:
        # The parent only logs that it could not, and the last model would pass for the best.
        self._not_loaded = None
        super()._load_best_model()
        if self._not_loaded is not None:
            best = self.state.best_model_checkpoint
            raise RuntimeError(
                f"{best}: the best model cannot be loaded from there ({first_line(self._not_loaded)}). The last model "
                "is in the last checkpoint."
            ) from self._not_loaded

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # The parent divides what was added up by the steps since the run was resumed, in transformers 5.17 by all.
        since = max(self.state.global_step - getattr(self, "_initial_global_step", 0), 0.001)
        self._total_loss_scalar = self.mean_loss() * since - self._tr_loss.item()
        # With a limit of 1 the parent leaves the best checkpoint only; a run that is to go on needs the last one.
        limit = self.args.save_total_limit
        if self.state.global_step < self.state.max_steps:
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit


class _RestoreState(TrainerCallback):
    """Puts back what `_own_state` saved, once the trainer has set all of it to zero."""

    def __init__(self, trainer: LongRunMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        for average in dict(_averages(trainer.loss)).values():
            average.pop()  # what an earlier training left
        if trainer._resumed_from is None:
            return
        # The parent forgets the best checkpoint where the run's folder was moved.
        trainer._name_the_best(trainer._resumed_from.parent)
        saved = _saved_state(trainer._resumed_from, args.process_index)
        trainer._total_loss_scalar = _loss_until_log(state, saved)
        if saved is None:
            return
        device = trainer.args.device
        trainer._tr_loss = saved["loss_since_log"].to(device)
        trainer._globalstep_last_logged = saved["last_logged_step"]
        trainer.accum_loss_components = send_to_device(saved["loss_components"], device)
        for name, average in _averages(trainer.loss):
            if name in saved["statistics"]:
                average.load_state_dict(saved["statistics"][name], device)
        for name, tensor in _own_tensors(trainer.loss, trainer.model):
            if name not in saved["loss_tensors"]:
                raise InputError(
                    f"{trainer._resumed_from}: lacks {name} of the loss; the run was started with another one."
                )
            with torch.no_grad():
                tensor.copy_(saved["loss_tensors"][name])


def _state_file(rank: int) -> str:
    return f"gist_fast_state_{rank}.pt"


def _saved_state(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """What `_own_state` was in a process; None in a checkpoint of another trainer."""
    file = checkpoint / _state_file(rank)
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None


def _loss_until_log(state: TrainerState, saved: dict[str, Any] | None) -> float:
    """The sum of the training loss over all steps until the last log."""
    if saved is not None and "loss_until_log" in saved:
        return saved["loss_until_log"]
    # An older checkpoint: each log tells the mean over the steps since the one before.
    logs = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    before = [0, *(step for step, _ in logs)]
    return sum(loss * (step - last) for last, (step, loss) in zip(before, logs, strict=False))


def _own_state(trainer: LongRunMixin) -> dict[str, Any]:
    return {
        "loss_since_log": trainer._tr_loss.detach().cpu(),
        "loss_until_log": float(trainer._total_loss_scalar),
        "last_logged_step": int(trainer._globalstep_last_logged),
        "loss_components": {
            kind: {name: value.detach().cpu() for name, value in parts.items()}
            for kind, parts in trainer.accum_loss_components.items()
        },
        "statistics": {name: average.state_dict() for name, average in _averages(trainer.loss)},
        "loss_tensors": {name: t.detach().cpu() for name, t in _own_tensors(trainer.loss, trainer.model)},
    }


def _modules(loss: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a loss, or of the losses of a dictionary, with a name of its own."""
    for key, module in loss.items() if isinstance(loss, dict) else [("", loss)]:
        if isinstance(module, nn.Module):
            yield from ((f"{key}/{name}", part) for name, part in module.named_modules())


def _averages(loss: Any) -> Iterator[tuple[str, StatsAverage]]:
    for name, module in _modules(loss):
        average = getattr(module, "statistics", None)
        if isinstance(average, StatsAverage):
            yield name, average


def _own_tensors(loss: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are trained, and buffers that are saved, which a loss has beside the model's."""
    of_model = {id(t) for t in (*model.parameters(), *model.buffers())}
    for name, module in _modules(loss):
        if "model" in name.partition("/")[2].split("."):
            # The student by its place in a loss: a wrapper that shards it may hold tensors of its own.
            continue
        parameters = [(n, p) for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        passing = module._non_persistent_buffers_set
        buffers = [(n, b) for n, b in module.named_buffers(recurse=False) if n not in passing]
        yield from ((f"{name}.{n}", t) for n, t in (*parameters, *buffers) if id(t) not in of_model)


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tell every sampler that a dataloader wraps which epoch it is."""
    waiting, seen = [loader], set()
    while waiting:
        sampler = waiting.pop()
        if sampler is None or id(sampler) in seen:
            continue
        seen.add(id(sampler))
        if sampler is not loader and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        waiting += [getattr(sampler, name, None) for name in ("batch_sampler", "sampler")]


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's, numpy's and torch's random numbers go on after the block where they were before it."""
    import random

    import numpy as np

    python, numbers = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
