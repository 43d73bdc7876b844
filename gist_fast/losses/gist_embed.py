"""`GISTEmbedLoss`: the guided loss with every activation of the batch in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor

from gist_fast.losses.base import GuidedLoss
from gist_fast.losses.guide import take_guide_inputs
from gist_fast.losses.mini_batches import EXTENTS
from gist_fast.runtime.profiler_regions import STUDENT_FORWARD, follow_backward, within


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
        All others: the fields of `gist_fast.functional.loss_config.LossConfig`, where each is described. All but the
            first six by name only; the temperature may be a 0-d tensor.

    Raises:
        ValueError: a tokenizer is not of transformers, or a value is out of range.

    Example:
        >>> loss = GISTEmbedLoss(student, guide, temperature=0.05)
        >>> texts = ["what falls", "what flows"], ["rain", "rivers"]
        >>> loss([student.preprocess(column) for column in texts]).backward()
    """

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
        self.give_back_rows(features, rows)
        follow_backward(loss, student)
        return loss
