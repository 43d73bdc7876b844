"""`GISTTrainer`: sentence-transformers' trainer, with a guide."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from torch import nn

from gist_fast.collator import SUFFIX, GISTDataCollator, GuideTokenizer
from gist_fast.errors import InputError
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss, GuidedLoss
from gist_fast.training_args import GISTTrainingArguments

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

logger = logging.getLogger(__name__)

LOG_DIGITS = 6


class GISTTrainer(SentenceTransformerTrainer):
    """Trains a student under a guide.

    All that ``SentenceTransformerTrainer`` takes and does stays: datasets, samplers, evaluators, callbacks, resuming,
    the best model, the model card. On top of it,

    - without a `loss`, it builds the guided one from its arguments (`GISTTrainingArguments`): gradient-cached where
      ``mini_batch_size`` or ``mini_batch_num_tokens`` is given;
    - the guide reads the *raw* texts with its own tokenizer, prompt and maximum length, or is not run at all where the
      dataset carries its embeddings (`gist_fast.embed_guide`);
    - every log of the training loss carries the share of pairs masked in each block (``masked_ap`` and so on), the
      mean similarity of the positives and that of the hardest negatives.

    Args:
        guide: the guide of the loss built here. None with a dataset that carries guide embeddings, or to train without
            a guide. A `loss` that is passed brings its own.
        All others: those of ``SentenceTransformerTrainer``.

    Raises:
        ValueError: both a `loss` and a `guide` were given, or only part of the text columns has guide embeddings.
    """

    args: GISTTrainingArguments
    data_collator_class = GISTDataCollator
    training_args_class = GISTTrainingArguments

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: GISTTrainingArguments | None = None,
        train_dataset: Dataset | DatasetDict | IterableDataset | dict[str, Dataset] | None = None,
        eval_dataset: Dataset | DatasetDict | IterableDataset | dict[str, Dataset] | None = None,
        loss: nn.Module | dict[str, nn.Module] | Callable | dict[str, Callable] | None = None,
        *other: Any,
        guide: SentenceTransformer | None = None,
        **kwargs: Any,
    ) -> None:
        if loss is not None and guide is not None:
            raise InputError("guide: a loss was given too, and it brings its own guide; give one of the two.")
        self._guide = guide
        self._carries_embeddings = _all_carry_embeddings(train_dataset, eval_dataset)
        # The collator is made in the parent's constructor, before `self.loss` exists.
        self._tokenizing_guide = None if self._carries_embeddings else guide or _only_guide(loss)
        super().__init__(model, args, train_dataset, eval_dataset, loss, *other, **kwargs)
        if self._tokenizing_guide is None and not self._carries_embeddings:
            # A loss that was given as a function of the model exists only now.
            self._tokenizing_guide = _only_guide(self.loss)
            if isinstance(self.data_collator, GISTDataCollator):
                self._tokenize_for_guide(self.data_collator, self.args)

    def get_default_loss(self, model: SentenceTransformer) -> nn.Module:  # type: ignore[override]
        """The guided loss that the arguments describe."""
        args = self.args
        guided = self._guide is not None or self._carries_embeddings
        if not guided:
            logger.warning("No guide, and no guide embeddings in the dataset: training on all in-batch negatives.")
        shared: dict[str, Any] = {
            "temperature": args.temperature,
            "margin_strategy": args.margin_strategy,
            "margin": args.margin,
            "contrast_anchors": args.contrast_anchors,
            "contrast_positives": args.contrast_positives,
            "gather_across_devices": args.gather_across_devices,
            "guided": guided,
            "backend": args.backend,
            "mask_bits": args.mask_bits,
        }
        # With embeddings in the dataset, a guide that was given all the same has nothing to do.
        guide = None if self._carries_embeddings else self._guide
        if args.mini_batch_size is None and args.mini_batch_num_tokens is None:
            return GISTEmbedLoss(model, guide, **shared)
        rows, tokens = args.mini_batch_size or 32, args.mini_batch_num_tokens
        return CachedGISTEmbedLoss(model, guide, mini_batch_size=rows, mini_batch_num_tokens=tokens, **shared)

    def get_data_collator(  # type: ignore[override]
        self, model: SentenceTransformer, args: GISTTrainingArguments, processing_class: Any = None
    ) -> GISTDataCollator:
        """sentence-transformers' collator, and with a guide its tokens of the raw texts."""
        collator = cast(GISTDataCollator, super().get_data_collator(model, args, processing_class))
        self._tokenize_for_guide(collator, args)
        return collator

    def _tokenize_for_guide(self, collator: GISTDataCollator, args: GISTTrainingArguments) -> None:
        guide = self._tokenizing_guide
        if guide is not None:
            collator.tokenize_for_guide = GuideTokenizer(guide, args.guide_prompts, args.guide_max_length)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the guide did since the last log of the training loss."""
        if "loss" in logs:
            for prefix, loss in _named_guided_losses(self.loss):
                logs.update({prefix + k: round(v, LOG_DIGITS) for k, v in loss.statistics.pop().items()})
        super().log(logs, start_time)


def _guided_losses(loss: nn.Module) -> Iterator[GuidedLoss]:
    """The guided losses in a loss, which a decorator such as ``MatryoshkaLoss`` may wrap."""
    return (module for module in loss.modules() if isinstance(module, GuidedLoss))


def _named_guided_losses(loss: nn.Module | dict[str, nn.Module]) -> Iterator[tuple[str, GuidedLoss]]:
    """The guided losses and what tells their logs apart: the dataset's name, where each has a loss of its own."""
    named = loss.items() if isinstance(loss, dict) else [("", loss)]
    for name, module in named:
        for guided in _guided_losses(module):
            yield f"{name}_" if name else "", guided


def _only_guide(loss: object) -> SentenceTransformer | None:
    """The guide of a loss (or of all losses of a dictionary) that is already built, where there is exactly one."""
    losses = loss.values() if isinstance(loss, dict) else [loss]
    guides = {
        id(guided.guide): guided.guide
        for module in losses
        if isinstance(module, nn.Module)
        for guided in _guided_losses(module)
        if guided.guide is not None
    }
    if len(guides) > 1:
        logger.warning(
            "The losses have %d guides; each reads the student's tokens, decoded where its vocabulary differs, instead "
            "of the raw texts.",
            len(guides),
        )
    return next(iter(guides.values())) if len(guides) == 1 else None


def _all_carry_embeddings(*sources: Any) -> bool:
    """Whether the datasets carry the guide's embeddings of every text column.

    Raises:
        ValueError: some text columns have them and some do not.
    """
    datasets = [d for s in sources if s is not None for d in (s.values() if isinstance(s, dict) else [s])]
    having, lacking = [], []
    for dataset in datasets:
        columns = dataset.column_names or []
        embeddings = [c for c in columns if c.endswith(SUFFIX)]
        texts = [c for c in columns if c not in embeddings and _is_text(dataset, c)]
        having += [c for c in texts if c + SUFFIX in embeddings]
        lacking += [c for c in texts if c + SUFFIX not in embeddings]
    if having and lacking:
        raise InputError(
            f"dataset: columns {', '.join(having)} have guide embeddings, but {', '.join(lacking)} do not; every text "
            "column of the training and evaluation datasets needs them (gist_fast.embed_guide), or none."
        )
    return bool(having)


def _is_text(dataset: Any, column: str) -> bool:
    return getattr((dataset.features or {}).get(column), "dtype", None) in ("string", "large_string")
