"""The loss that a trainer's arguments describe, checked as a whole before models are loaded and texts embedded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gist_fast.data.names import GUIDE_SUFFIX
from gist_fast.functional.backends import choose_backend
from gist_fast.losses.temperature import check_start
from gist_fast.runtime.errors import InputError
from gist_fast.training.temperature_schedule import check_schedule

if TYPE_CHECKING:
    from gist_fast.training.arguments import GISTTrainingArguments


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
    variants.check_with(
        guided=guided,
        guide=guide,
        margin=arguments.margin,
        margin_strategy=arguments.margin_strategy,
        mask_bits=arguments.mask_bits,
        width=width,
    )
    check_schedule(arguments)
    if arguments.backend != "auto":
        choose_backend(arguments.backend, arguments.device.type, arguments.half_precision or torch.float32)
    if variants.learn_temperature:
        check_start(arguments.temperature, variants.temperature_min, variants.temperature_max)


def check_self_guiding(arguments: GISTTrainingArguments, *, carries_embeddings: bool, without_guide: bool) -> None:
    """Raise where the student is to guide itself and something else is to decide.

    Args:
        carries_embeddings: whether the training data carry a guide's embeddings.
        without_guide: whether training without any guide was asked for.

    Raises:
        ValueError: either is so.
    """
    if not arguments.self_guided:
        return
    if carries_embeddings:
        raise InputError(
            f"self_guided: True, though the dataset carries embeddings of a guide (columns ending in {GUIDE_SUFFIX}); "
            "leave out one of the two."
        )
    if without_guide:
        raise InputError(
            "self_guided: True, though training without any guide was asked for (guided=False, or 'guide: null' in a "
            "configuration); leave out one of the two, and the student guides itself, or nothing does."
        )
