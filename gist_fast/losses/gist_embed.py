"""`GISTEmbedLoss`: the guided loss with every activation of the batch in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor

from gist_fast.losses.base import GuidedLoss
from gist_fast.losses.guide import EMBEDDING, TOKENS, take_guide_input

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

    Raises:
        ValueError: a tokenizer is not of transformers, or a value is out of range.
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
    ) -> None:
        super().__init__(
            model,
            guide,
            temperature,
            margin_strategy,
            margin,
            contrast_anchors,
            contrast_positives,
            gather_across_devices,
            guided,
            backend,
            mask_bits,
        )

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The mean loss of a batch, 0-d. `labels` are not looked at.

        Each column's features keep a frozen guide's embeddings (``guide_embedding``), so that a decorator which calls
        this again with the same features, as ``MatryoshkaLoss`` does, runs the guide once.
        """
        features = list(sentence_features)
        self.check_columns(features)
        guide_inputs = [take_guide_input(f) for f in features]
        # Student before guide, in sentence-transformers' order, so that dropout draws the same numbers.
        student = embed_columns(self.model, features)
        if not self.guided:
            return self.guided_loss(student, ())
        guide = [self._guide_embedding(f, inputs) for f, inputs in zip(features, guide_inputs, strict=True)]
        return self.guided_loss(student, guide)

    def _guide_embedding(self, features: dict[str, Any], inputs: dict[str, Any]) -> Tensor:
        """The guide's embeddings ``[B, G]`` of a column; a frozen guide's stay with the features."""
        if EMBEDDING in features:
            return features[EMBEDDING]
        embedding = self.encode_guide(inputs)
        if self.guide_is_frozen:
            features[EMBEDDING] = embedding
        elif TOKENS in inputs:
            # A guide that changes with the student is asked again, of the same tokens.
            features[TOKENS] = inputs[TOKENS]
        return embedding
