"""A temperature that changes over a run by a formula of the step alone, so that a resumed run goes on where it was."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from gist_fast.functional.values import check_choice, check_number
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from gist_fast.training.arguments import GISTTrainingArguments

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
    schedule, start, end = args.temperature_schedule, args.temperature, args.temperature_end
    if schedule is not None:
        check_choice("temperature_schedule", schedule, SCHEDULES)
    for name, schedules in (("temperature_end", SCHEDULES), ("temperature_decay", ("exponential",))):
        if schedule not in schedules and getattr(args, name) != getattr(type(args), name):
            raise InputError(
                f"{name}: got {getattr(args, name)}, which only the schedule {' or '.join(schedules)} reads. Set "
                "temperature_schedule to one that does, or leave it out."
            )
    if schedule is None:
        return
    for f in fields(args):
        if f.name in ("temperature", "temperature_end", "temperature_decay"):
            check_number(f.name, getattr(args, f.name), **f.metadata["bounds"])
    if schedule == "exponential" and end > start:
        raise InputError(
            f"temperature_end: expected at most the temperature {start}, to which an exponential schedule falls from "
            f"1, got {end}."
        )
    if end == start:
        raise InputError(
            f"temperature_end: got {end}, which is the temperature itself, so that a schedule changes nothing. Give "
            "another one, or no temperature_schedule."
        )
    if args.learn_temperature:
        raise InputError("temperature_schedule: expected None with learn_temperature, which changes it too.")


class TemperatureCallback(TrainerCallback):
    """Sets the temperature of the trainer's loss before each step.

    Args:
        trainer: asked for its loss before each step, because a hyperparameter search replaces it.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first batch of a step."""
        self._trainer.loss.temperature = scheduled(args, state.global_step, state.max_steps)
