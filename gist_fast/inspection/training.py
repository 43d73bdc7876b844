"""What the guide drops in a batch of the data that a trainer trains on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gist_fast.data.named import by_name
from gist_fast.data.names import guide_columns
from gist_fast.data.per_column import guide_prompt, value_for
from gist_fast.inspection.batch import Inspection, inspect_rows
from gist_fast.inspection.embeddings import Encode
from gist_fast.losses import GuidedLoss

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from gist_fast.training.trainer import GISTTrainer

ROWS = 256
DATASETS = 4


def inspect_training(
    trainer: GISTTrainer, *, rows: int = ROWS, datasets: int = DATASETS, most: int = 20
) -> dict[str, Inspection]:
    """What the guide drops in rows taken at random, by the dataset's name (empty where there is one), with the student
    as it is now.

    Texts are read as in training: prompts, maximum lengths and precision are the trainer's. Margin, blocks and variants
    are those of its loss, whether it made that or was given it. A student that guides itself is shown as its own guide.

    Args:
        rows: at most that many, and no more than a batch of the run holds.
        datasets: of several, the first ones.
        most: pairs and duplicates to list.

    Returns:
        Nothing of streams, nothing without a guide, and nothing where the loss is no guided one itself, as where each
        dataset has its own.
    """
    from datasets import Dataset

    args, loss = trainer.args, trainer.loss
    found: dict[str, Inspection] = {}
    # A loss of the user's own has settings of its own; those of the arguments describe the one that is built of them.
    if not isinstance(loss, GuidedLoss) or not loss.config.guided:
        return found
    config = loss.config
    for name, dataset in list(by_name(trainer.train_dataset).items())[:datasets]:
        has_guide = config.self_guided or loss.guide is not None or guide_columns(dataset)
        if not isinstance(dataset, Dataset) or not has_guide:
            continue
        batch = args.train_batch_size * (args.world_size if config.gather_across_devices else 1)
        count = min(rows, batch, len(dataset))
        if count < 2:
            continue
        chosen = sorted(random.Random(args.seed).sample(range(len(dataset)), count))
        student = _encoder(trainer, trainer.model, name, as_guide=False)
        # As in the loss, embeddings that the dataset carries come before a guide's own.
        guide = None
        if config.self_guided:
            guide = student
        elif loss.guide is not None and not guide_columns(dataset):
            guide = _encoder(trainer, loss.guide, name, as_guide=True)
        # Without the transform that adds a dataset's name to its rows.
        plain = dataset.with_format(None)
        found[name] = inspect_rows(plain, chosen, guide, student, most=most, **vars(config))
    return found


def _encoder(trainer: GISTTrainer, model: SentenceTransformer, dataset: str, *, as_guide: bool) -> Encode:
    """Reads texts of a dataset as in training: by the arguments for the guide, or by those for the student."""
    args = trainer.args
    lengths = args.guide_max_length if as_guide else args.max_length

    def encode(texts: list[str], column: str, position: int) -> Tensor:
        if as_guide:
            prompt = guide_prompt(model, column, position, args.guide_prompts, dataset or None)
        else:
            prompt = value_for(args.prompts, column, dataset or None) or ""
        max_length = value_for(lengths, column, dataset or None)
        more: dict[str, Any] = {} if max_length is None else {"processing_kwargs": {"text": {"max_length": max_length}}}
        if not as_guide and (task := value_for(args.router_mapping, column, dataset or None)):
            more["task"] = task
        half = args.half_precision
        with torch.autocast(model.device.type, dtype=half, enabled=half is not None):
            return model.encode(texts, prompt=prompt, convert_to_tensor=True, show_progress_bar=False, **more)

    return encode
