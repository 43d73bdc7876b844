"""Whether a student can be trained."""

from __future__ import annotations

import logging

import torch
from torch import nn

from gist_fast.runtime.errors import InputError, shown

logger = logging.getLogger(__name__)


def warn_of_half(student: nn.Module) -> None:
    """Say where steps would be lost: a weight in half precision does not move by less than its own spacing."""
    trained = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    for dtype in trained & {torch.float16, torch.bfloat16}:
        logger.warning(
            "model: its weights are trained in %s, in which steps below about %.0e of a weight are lost. Load it in "
            "float32 (student.model_kwargs: {dtype: float32}), and set bf16 or fp16 to compute in half precision.",
            str(dtype).removeprefix("torch."), torch.finfo(dtype).eps / 2,
        )  # fmt: skip


def check_trainable(student: nn.Module) -> None:
    """Refuse a student of which nothing would be trained: steps would be counted, and a loss shown, all the same.

    A temperature that the loss learns is none of the student's.

    Raises:
        InputError: naming what is frozen, and how to let it train.
    """
    parameters = dict(student.named_parameters())
    if any(parameter.requires_grad for parameter in parameters.values()):
        return
    if not parameters:
        raise InputError(f"model: expected a student with parameters to train, got {type(student).__name__} with none.")
    adapters: dict[str, None] = {}
    for module in student.modules():
        held = getattr(module, "peft_config", None)
        adapters |= dict.fromkeys(held if isinstance(held, dict) else ())
    remedy = "requires_grad_(True) of what is to be trained"
    if adapters:
        # Loading leaves an adapter frozen, as its base is.
        remedy = f"model.set_adapter({next(iter(adapters))!r}) to train its adapter"
    names = ", ".join(list(parameters)[:2])
    raise InputError(
        f"model: expected a student with a parameter to train, but all {len(parameters)} are frozen ({shown(names)}); "
        f"call {remedy}."
    )
