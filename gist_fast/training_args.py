"""The arguments of a guided training run: sentence-transformers' own, and those of the loss and the guide."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from sentence_transformers import SentenceTransformerTrainingArguments


@dataclass
class GISTTrainingArguments(SentenceTransformerTrainingArguments):
    """Arguments of `gist_fast.GISTTrainer`.

    All of ``SentenceTransformerTrainingArguments`` stay on offer. Those added here describe the loss that the trainer
    builds when none is passed to it, and how the guide reads the texts; each field's ``help`` says which values do.

    Raises:
        ValueError: a value is out of range (when the loss is built).
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

    @property
    def half_precision(self) -> torch.dtype | None:
        """The type that the models compute in under mixed precision; None without."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None
