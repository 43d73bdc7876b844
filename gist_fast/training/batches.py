"""How many batches and steps a run has, and the refusal of one that would have none."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from transformers.trainer_utils import has_length

from gist_fast.data.named import by_name
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def steps_of(args: TrainingArguments, batches: int | None) -> int:
    """The steps of a whole run, as transformers counts them.

    Args:
        batches: of an epoch, in each process; None where that is not known, and ``max_steps`` says it.
    """
    if args.max_steps > 0 or batches is None:
        return args.max_steps
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def check_steps(args: Any) -> None:
    """Raise where the arguments ask for no step.

    Raises:
        InputError: naming the argument.
    """
    if args.max_steps == 0:
        raise InputError("max_steps: expected at least 1, or -1 to train for num_train_epochs, got 0.")
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise InputError(f"num_train_epochs: expected a number above 0, got {args.num_train_epochs}.")


def check_sampler(trainer: Any, dataset: Any, sampler: Sized | None, size: int) -> None:
    """Raise where one of a trainer's datasets has no batch.

    Args:
        sampler: of its batches; None for a stream.
        size: rows of a batch.

    Raises:
        InputError: with the numbers.
    """
    if sampler is None or (len(sampler) > 0 and not _promises_too_much(sampler)):
        return
    kind, name = _place(trainer, dataset)
    of = f"the {kind} dataset{f' {name!r}' if name else ''}"
    rows = len(dataset)
    if not rows:
        raise InputError(f"{of}: expected at least one row, got none.")
    argument = f"per_device_{'eval' if kind == 'evaluation' else 'train'}_batch_size"
    if rows < size:
        expected = f"expected at most {rows}, the rows of {of}, with dataloader_drop_last"
    else:
        chosen = getattr(trainer.args.batch_sampler, "value", "batch_sampler")
        expected = f"expected a size to which {chosen} fills one batch at least of {rows} rows, those of {of}"
    raise InputError(
        f"{argument}: {expected}, got {size}, so that there is no batch. Lower it, or set "
        "dataloader_drop_last to false."
    )


def check_loader(trainer: Any, loader: Any) -> None:
    """Raise where the training dataset has fewer batches than there are processes, and each is to have whole ones.

    Raises:
        InputError: with the numbers.
    """
    if not has_length(loader) or len(loader) > 0:
        return
    world, size = trainer.args.world_size, trainer.args.train_batch_size
    rows = sum(len(dataset) for dataset in by_name(trainer.train_dataset).values())
    raise InputError(
        f"per_device_train_batch_size: expected at most {rows // world}, so that {rows} rows make a batch for each of "
        f"{world} processes with dataloader_drop_last, got {size}. Lower it, or start fewer processes."
    )


def _promises_too_much(sampler: Any) -> bool:
    """Whether a sampler of sentence-transformers, whose length is a guess, fills no batch."""
    return isinstance(sampler, NoDuplicatesBatchSampler) and sampler.drop_last and next(iter(sampler), None) is None


def _place(trainer: Any, dataset: Any) -> tuple[str, str]:
    """Whether a dataset is of those that are trained on, and its name."""
    for kind, held in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        for name, each in by_name(held).items():
            if each is dataset:
                return kind, name
    return "evaluation", ""
