"""The arguments of a guided training run: sentence-transformers' own, and those of the loss and the guide."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from gist_fast.losses.variants import Variants

_OF_NO_LOSS = ("max_length", "guide_prompts", "guide_max_length", "resume_with_changes")


@dataclass
class GISTTrainingArguments(SentenceTransformerTrainingArguments):
    """Arguments of `gist_fast.GISTTrainer`.

    All of ``SentenceTransformerTrainingArguments`` stay on offer. Those added here describe the loss that the trainer
    builds when none is passed to it, and how the guide reads the texts; each field's ``help`` says which values do.

    Raises:
        ValueError: a value is out of range (when the loss is built).

    Example:
        >>> arguments = GISTTrainingArguments("run", temperature=0.05, margin=0.1, learning_rate=1e-5)
        >>> arguments.margin, arguments.margin_strategy
        (0.1, 'absolute')
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - transformers' own name and form
        *SentenceTransformerTrainingArguments._VALID_DICT_FIELDS,
        "max_length",
        "guide_prompts",
        "guide_max_length",
    ]

    logging_steps: float = field(
        default=10,
        metadata={"help": "Steps between logs of the loss and of what the guide did; below 1 a share of all steps."},
    )
    temperature: float = field(
        default=0.01, metadata={"help": "Divides the cosine similarities in the softmax; above 0."}
    )
    margin_strategy: str = field(
        default="absolute",
        metadata={"help": "How the margin lowers the guide's threshold t: 'absolute' (t - margin) or 'relative' "
                          "(t - |t| * margin)."},
    )  # fmt: skip
    margin: float = field(
        default=0.0, metadata={"help": "The larger, the more pairs are taken for false negatives and dropped."}
    )
    contrast_anchors: bool = field(default=True, metadata={"help": "Whether anchors are negatives of each other."})
    contrast_positives: bool = field(
        default=True, metadata={"help": "Whether positives are negatives of each other; retrieval may prefer False."}
    )
    self_guided: bool = field(
        default=False,
        metadata={"help": "Whether the student's own similarities decide what is a false negative, without a guide; "
                          "mostly with a negative margin, as -0.1."},
    )  # fmt: skip
    mask_ties: bool = field(
        default=False,
        metadata={"help": "Whether what ties with the positive for the guide, as copies of its text do, is dropped."},
    )
    row_margins: bool = field(
        default=False,
        metadata={"help": "Whether each row brings a margin of its own, in the column 'margin', which is added to "
                          "'margin'."},
    )  # fmt: skip
    groups: str | None = field(
        default=None,
        metadata={"help": "Rows that are no negatives of each other: 'anchor', those of the same anchor text; "
                          "'column', those with the same whole number in the column 'group'. None: all are."},
    )  # fmt: skip
    hard: bool = field(
        default=False,
        metadata={"help": "Whether negatives that the student already ranks below the positive are dropped too."},
    )
    hardness_mode: str | None = field(
        default=None,
        metadata={"help": "Which negatives weigh the more the more similar they are: 'in_batch_negatives', "
                          "'hard_negatives' (each row's own) or 'all_negatives'."},
    )  # fmt: skip
    hardness_strength: float = field(
        default=0.0, metadata={"help": "How much more: this times the similarity is added to their logits."}
    )
    triplet_margin: float | None = field(
        default=None,
        metadata={"help": "Margin of an added soft triplet term (guided-triplet-soft). None: no such term."},
    )
    matryoshka_dims: list[int] | None = field(
        default=None,
        metadata={"help": "Widths of nested embeddings to train, which share one run of the guide. None: the whole "
                          "width alone."},
    )  # fmt: skip
    matryoshka_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each of matryoshka_dims. None: 1 each."}
    )
    learn_temperature: bool = field(
        default=False, metadata={"help": "Whether the temperature is trained, from 'temperature' on."}
    )
    temperature_min: float = field(default=0.001, metadata={"help": "The least that a learnt temperature may become."})
    temperature_max: float = field(default=1.0, metadata={"help": "The most that a learnt temperature may become."})
    temperature_schedule: str | None = field(
        default=None,
        metadata={"help": "How the temperature changes over the run: 'linear' or 'cosine' from 'temperature' to "
                          "'temperature_end', or 'exponential', min(max(temperature_end, temperature_decay ** step), "
                          "temperature). None: not at all."},
    )  # fmt: skip
    temperature_end: float = field(default=0.01, metadata={"help": "The temperature that a schedule ends at."})
    temperature_decay: float = field(
        default=0.9999, metadata={"help": "The factor a step of the exponential schedule; between 0 and 1."}
    )
    gather_across_devices: bool = field(
        default=False, metadata={"help": "Whether the candidates of all ranks are negatives on every rank."}
    )
    gather_guide_dtype: str | None = field(
        default=None,
        metadata={"help": "The type that the guide's embeddings are rounded to before they are gathered: 'float16' or "
                          "'bfloat16'. None: the type they have."},
    )  # fmt: skip
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Rows that the student embeds at a time. None: by tokens instead."}
    )
    mini_batch_num_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens, padding included, that the student embeds at a time. None, and no mini_batch_size "
                          "either: 2,048 on a CPU, 16,384 elsewhere."},
    )  # fmt: skip
    activation_memory: float | str = field(
        default="auto",
        metadata={"help": "GiB of activations to keep for the backward pass; mini-batches beyond are embedded twice. "
                          "'auto': what half of the free main memory holds, or four fifths of a GPU's free memory."},
    )  # fmt: skip
    guide_cache: bool = field(
        default=False,
        metadata={"help": "Whether to remember the guide's embedding of each text over steps and epochs, in main "
                          "memory."},
    )  # fmt: skip
    backend: str = field(
        default="auto", metadata={"help": "How the loss is computed: 'auto', 'triton', 'tiled' or 'reference'."}
    )
    mask_bits: str = field(
        default="auto",
        metadata={"help": "Whether masks are kept for the backward pass ('keep'), decided again ('recompute'), or by "
                          "size ('auto')."},
    )  # fmt: skip
    max_length: int | dict[str, int | dict[str, int]] | None = field(
        default=None,
        metadata={"help": "Tokens of a text that the student reads in training: one number, or by column, by dataset, "
                          "or by dataset and column. None: the student's own maximum."},
    )  # fmt: skip
    guide_prompts: dict[str, str | dict[str, str]] | str | None = field(
        default=None,
        metadata={"help": "Prompts that the guide reads before the texts: one string, or by column, by dataset, or by "
                          "dataset and column. None: the guide's own 'query' prompt for the first column and "
                          "'document' prompt for the others, where it has them, else its default prompt."},
    )  # fmt: skip
    guide_max_length: int | dict[str, int | dict[str, int]] | None = field(
        default=None,
        metadata={"help": "Tokens of a text that the guide reads: one number, or by column, by dataset, or by dataset "
                          "and column. None: the guide's own maximum."},
    )  # fmt: skip
    resume_with_changes: bool = field(
        default=False,
        metadata={"help": "Whether a run may be resumed with other data, batches, seed, loss or guide than it was "
                          "started with, which is neither the one run nor the other."},
    )  # fmt: skip

    def variants(self) -> Variants:
        """The loss's variants, each checked by itself.

        Raises:
            ValueError: a value is out of range; or TypeError, of a wrong type.
        """
        return Variants.of({f.name: getattr(self, f.name) for f in fields(Variants)})

    def changed_loss_settings(self) -> list[str]:
        """Settings of the loss that a trainer builds, by name, which are not at their defaults."""
        others = {f.name for f in fields(SentenceTransformerTrainingArguments)} | set(_OF_NO_LOSS)
        return [f.name for f in fields(self) if f.name not in others and getattr(self, f.name) != f.default]

    @property
    def half_precision(self) -> torch.dtype | None:
        """The type that the models compute in under mixed precision; None without."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None
