"""The arguments of a guided training run: sentence-transformers' own, and those of the loss and the guide."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.loss_settings import LossSettings, setting

OF_TEXTS = ("max_length", "guide_prompts", "guide_max_length")
"""Fields that say how texts are read."""


@dataclass
class GISTTrainingArguments(LossSettings, SentenceTransformerTrainingArguments):
    """Arguments of `gist_fast.GISTTrainer`.

    All of ``SentenceTransformerTrainingArguments`` stay on offer. Those added describe the loss that the trainer builds
    when none is passed to it (`LossSettings`, and what follows here), and how the guide reads the texts.

    Raises:
        ValueError: a value is out of range (when the loss is built).

    Example:
        >>> arguments = GISTTrainingArguments("run", temperature=0.05, margin=0.1, learning_rate=1e-5)
        >>> arguments.margin, arguments.mask_ties
        (0.1, False)
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - transformers' own name and form
        *SentenceTransformerTrainingArguments._VALID_DICT_FIELDS,
        *OF_TEXTS,
    ]

    logging_steps: float = setting(
        10, "Steps between logs of the loss and of what the guide did; below 1 a share of all steps."
    )
    temperature_schedule: Literal["linear", "cosine", "exponential"] | None = setting(
        None,
        "How the temperature changes over the run: 'linear' or 'cosine' from 'temperature' to 'temperature_end', or "
        "'exponential', min(max(temperature_end, temperature_decay ** step), temperature). None: not at all.",
        source="exponential: GISTEmbed's training code",
    )
    temperature_end: float = setting(0.01, "The temperature that a schedule ends at.", above=0)
    temperature_decay: float = setting(
        0.9999, "The factor a step of the exponential schedule; between 0 and 1.", above=0, below=1
    )
    mini_batch_size: int | None = setting(
        None, "Rows that the student embeds at a time. None: by tokens instead.", at_least=1, whole=True
    )
    mini_batch_num_tokens: int | None = setting(
        None,
        "Tokens, padding included, that the student embeds at a time. None, and no mini_batch_size either: 2,048 on a "
        "CPU, 16,384 elsewhere.",
        at_least=1,
        whole=True,
    )
    activation_memory: float | str = setting(
        "auto",
        "GiB of activations to keep for the backward pass; mini-batches beyond are embedded twice. 'auto': what half "
        "of the free main memory holds, or four fifths of a GPU's free memory.",
    )
    max_length: int | dict[str, int | dict[str, int]] | None = setting(
        None,
        "Tokens of a text that the student reads in training: one number, or by column, by dataset, or by dataset and "
        "column. None: the student's own maximum.",
    )
    guide_prompts: dict[str, str | dict[str, str]] | str | None = setting(
        None,
        "Prompts that the guide reads before the texts: one string, or by column, by dataset, or by dataset and "
        "column. None: the guide's own 'query' prompt for the first column and 'document' prompt for the others, where "
        "it has them, else its default prompt.",
    )
    guide_max_length: int | dict[str, int | dict[str, int]] | None = setting(
        None,
        "Tokens of a text that the guide reads: one number, or by column, by dataset, or by dataset and column. None: "
        "the guide's own maximum.",
    )
    resume_with_changes: bool = setting(
        False,
        "Whether a run may be resumed with other data, batches, seed, loss or guide than it was started with, which is "
        "neither the one run nor the other.",
    )

    def loss_config(self, *, guided: bool = True) -> LossConfig:
        """The settings of the loss, checked.

        Raises:
            ValueError: a value is out of range, or makes no sense together with another; or TypeError, of a wrong type.
        """
        return LossConfig(**self.loss_settings(), guided=guided)

    def changed_loss_settings(self) -> list[str]:
        """Settings of the loss that a trainer builds, by name, which are not at their defaults."""
        others = {f.name for f in fields(SentenceTransformerTrainingArguments)} | {*OF_TEXTS, "resume_with_changes"}
        return [f.name for f in fields(self) if f.name not in others and getattr(self, f.name) != f.default]

    @property
    def half_precision(self) -> torch.dtype | None:
        """The type that the models compute in under mixed precision; None without."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None
