"""The loss that a trainer's arguments describe, checked as a whole before models are loaded and texts embedded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gist_fast.losses.temperature import check_start
from gist_fast.temperature_schedule import check_schedule

if TYPE_CHECKING:
    from gist_fast.training_args import GISTTrainingArguments


def check_loss_settings(arguments: GISTTrainingArguments, *, guided: bool, guide: bool, width: int | None) -> None:
    """Raise what the loss itself would, but now.

    Args:
        guided: whether there is a guide of any kind.
        guide: whether it is a model of its own.
        width: of the student's embeddings; None where it is not known yet.

    Raises:
        ValueError: an argument is out of range, or makes no sense together with another; or TypeError, of a wrong type.
    """
    variants = arguments.variants()
    variants.check_with(guided=guided, guide=guide, margin=arguments.margin, mask_bits=arguments.mask_bits, width=width)
    check_schedule(arguments)
    if variants.learn_temperature:
        check_start(arguments.temperature, variants.temperature_min, variants.temperature_max)
