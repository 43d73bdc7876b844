"""`GISTEmbedLoss`: the guided loss with every activation of the batch in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Unpack

from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor

from gist_fast.losses.base import GuidedLoss
from gist_fast.losses.guide import take_guide_inputs
from gist_fast.losses.micro_batches import EXTENTS
from gist_fast.losses.variants import VariantArguments
from gist_fast.runtime.profiler_regions import STUDENT_FORWARD, follow_backward, within

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class GISTEmbedLoss(GuidedLoss):
    """Guided in-sample selection of training negatives (GISTEmbed, arXiv 2402.16829).

    Takes the place of ``sentence_transformers.losses.GISTEmbedLoss``: the same arguments, defaults and results. It
    differs where that one cannot follow its own rule: a row's pair with itself never counts (there it is dropped only
    if the guide's self-similarity exceeds the threshold), and any number of negative columns is taken.

    Inputs: (anchor, positive) or (anchor, positive, negative, ...) texts, no labels.

    Args:
        model: the student.
        guide: decides which texts of the batch are false negatives. None where the dataset carries its embeddings
            (`gist_fast.embed_guide`), or with ``guided=False``.
        temperature: divides the cosine similarities; above 0.
        margin_strategy: ``"absolute"`` or ``"relative"``, how the margin lowers the threshold.
        margin: the larger, the more is masked.
        contrast_anchors: whether anchors repel each other.
        contrast_positives: whether positives repel each other.
        gather_across_devices: let every rank's candidates be negatives on all ranks.
        guided: False trains without a guide, on all in-batch negatives.
        backend: see `gist_fast.guided_contrastive_loss`.
        mask_bits: see `gist_fast.guided_contrastive_loss`.
        guide_cache: remember the guide's embedding of each text over steps and epochs, in main memory; for texts that
            `gist_fast.training.collator` tokenised for the guide. (Within a batch each distinct one is encoded once
            anyway.)
        gather_guide_dtype: with `gather_across_devices`, the type that the guide's embeddings are rounded to before
            they are gathered; None for the type they have, which is float16 where they come with the dataset.
        variants: see `gist_fast.losses.variants.Variants`.

    Raises:
        ValueError: a tokenizer is not of transformers, or a value is out of range.

    Example:
        >>> loss = GISTEmbedLoss(student, guide, temperature=0.05)
        >>> texts = ["what falls", "what flows"], ["rain", "rivers"]
        >>> loss([student.preprocess(column) for column in texts]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer | None,
        temperature: float = 0.01,
        margin_strategy: Literal["absolute", "relative"] = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        *,
        guided: bool = True,
        backend: Literal["auto", "triton", "tiled", "reference"] = "auto",
        mask_bits: Literal["auto", "keep", "recompute"] = "auto",
        guide_cache: bool = False,
        gather_guide_dtype: Literal["float16", "bfloat16"] | None = None,
        **variants: Unpack[VariantArguments],
    ) -> None:
        super().__init__(
            model,
            guide,
            temperature=temperature,
            margin_strategy=margin_strategy,
            margin=margin,
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            gather_across_devices=gather_across_devices,
            guided=guided,
            backend=backend,
            mask_bits=mask_bits,
            guide_cache=guide_cache,
            gather_guide_dtype=gather_guide_dtype,
            **variants,
        )

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The mean loss of a batch, 0-d. `labels` are not looked at."""
        features = list(sentence_features)
        self.check_columns(features)
        guide_inputs, rows = take_guide_inputs(features), self.take_rows(features)
        for f in features:
            f.pop(EXTENTS, None)
        # Student before guide, in sentence-transformers' order, so that dropout draws the same numbers.
        with within(STUDENT_FORWARD):
            student = embed_columns(self.model, features)
        loss = self.guided_loss(student, self.guide_embeddings(features, guide_inputs), rows)
        self.give_rows_back(features, rows)
        follow_backward(loss, student)
        return loss
