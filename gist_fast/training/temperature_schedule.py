"""A temperature that changes over a run by a formula of the step alone, so that a resumed run goes on where it was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from transformers import TrainerCallback

from gist_fast.functional.checks import check_choice, check_margin, check_temperature
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from gist_fast.losses import GuidedLoss
    from gist_fast.training.arguments import GISTTrainingArguments
    from gist_fast.training.trainer import GISTTrainer

SCHEDULES = ("linear", "cosine", "exponential")


def scheduled(args: GISTTrainingArguments, step: int, steps: int) -> float:
    """The temperature of a step.

    ``linear`` and ``cosine`` go from ``temperature`` at step 0 to ``temperature_end`` at the last; ``exponential`` is
    GISTEmbed's: ``min(max(temperature_end, temperature_decay ** step), temperature)``.
    """
    start, end = args.temperature, args.temperature_end
    if args.temperature_schedule == "exponential":
        return min(max(end, args.temperature_decay**step), start)
    done = min(1.0, step / max(1, steps - 1))
    share = done if args.temperature_schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return start + (end - start) * share


def check_schedule(args: GISTTrainingArguments) -> None:
    """Raise unless the arguments of the schedule are right, and go with the others.

    Raises:
        ValueError: naming the argument.
    """
    if args.temperature_schedule is not None:
        check_choice("temperature_schedule", args.temperature_schedule, SCHEDULES)
    for name, schedules in (("temperature_end", SCHEDULES), ("temperature_decay", ("exponential",))):
        if args.temperature_schedule not in schedules and getattr(args, name) != getattr(type(args), name):
            raise InputError(
                f"{name}: got {getattr(args, name)}, which no schedule reads but {' or '.join(schedules)}; a "
                "temperature_schedule that reads it would do, or leave it out."
            )
    if args.temperature_schedule is None:
        return
    check_temperature(args.temperature)
    check_margin(args.temperature_end, "absolute", name="temperature_end")
    check_margin(args.temperature_decay, "absolute", name="temperature_decay")
    if args.temperature_end <= 0:
        raise InputError(f"temperature_end: got {args.temperature_end}; a float above 0 would do.")
    if not 0 < args.temperature_decay < 1:
        raise InputError(f"temperature_decay: got {args.temperature_decay}; between 0 and 1 would do.")
    if args.temperature_schedule == "exponential" and args.temperature_end > args.temperature:
        raise InputError(
            f"temperature_end: got {args.temperature_end}, above the temperature {args.temperature}, to which an "
            "exponential schedule falls from 1; a smaller one would do."
        )
    if args.temperature_end == args.temperature:
        raise InputError(
            f"temperature_end: got {args.temperature_end}, which is the temperature itself, so that a schedule changes "
            "nothing; another one would do, or no temperature_schedule."
        )
    if args.learn_temperature:
        raise InputError("temperature_schedule: with learn_temperature, which changes it too; one of the two would do.")


class TemperatureCallback(TrainerCallback):
    """Sets the temperature of the trainer's loss before each step."""

    def __init__(self, trainer: GISTTrainer) -> None:
        self._trainer = trainer

    @property
    def _loss(self) -> GuidedLoss:
        """The trainer's at this moment; a hyperparameter search replaces it."""
        return cast("GuidedLoss", self._trainer.loss)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first batch of a step."""
        self._loss.temperature = scheduled(args, state.global_step, state.max_steps)
