"""The loss that a trainer's arguments describe, checked as a whole before models are loaded and texts embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from gist_fast.data.names import GROUP, GUIDE_SUFFIX, MARGIN, is_text_role
from gist_fast.functional.backends import choose_backend
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
    config = arguments.loss_config(guided=guided)
    config.check_models(guide=guide, width=width)
    check_schedule(arguments)
    if config.backend != "auto":
        choose_backend(config.backend, arguments.device, arguments.half_precision or torch.float32)


def check_data(arguments: GISTTrainingArguments, key: str, columns: Sequence[str]) -> None:
    """Raise unless a dataset brings what the loss reads from it, and nothing that other settings alone read.

    Args:
        key: which dataset, for the message.
        columns: all of its columns.

    Raises:
        InputError: it lacks a column ``group`` or ``margin``, or has one that the loss does not ask for; it has no
            negatives.
    """
    for name, needed, setting in (
        (GROUP, arguments.groups == "column", "groups: 'column'"),
        (MARGIN, arguments.row_margins, "row_margins: True"),
    ):
        if needed and name not in columns:
            raise InputError(
                f"{setting}, and {key} has no column {name!r}; its columns are {', '.join(columns)}. Add it, or name "
                f"the one that is meant under the data's 'columns' ({name}: ...)."
            )
        if not needed and name in columns:
            raise InputError(
                f"{key}: has a column {name!r}, and the loss does not ask for it. Set {setting}, or leave the column "
                "out of the data's 'columns'."
            )
    if arguments.hardness_mode == "hard_negatives" and sum(map(is_text_role, columns)) < 3:
        raise InputError(
            f"hardness_mode: expected 'in_batch_negatives', as {key} has no column of negatives, got 'hard_negatives'."
        )


def check_self_guiding(arguments: GISTTrainingArguments, *, carries_embeddings: bool, without_guide: bool) -> None:
    """Raise where the student is to guide itself and something else is to decide.

    Args:
        carries_embeddings: whether the training data carry a guide's embeddings.
        without_guide: whether training without any guide was asked for.

    Raises:
        ValueError: either is so.
    """
    for found, where in (
        (carries_embeddings, f"the dataset carries embeddings of a guide (columns ending in {GUIDE_SUFFIX})"),
        (without_guide, "training without any guide was asked for (guided=False, or 'guide: null' in a configuration)"),
    ):
        if arguments.self_guided and found:
            raise InputError(f"self_guided: expected False where {where}, got True. Leave out one of the two.")
