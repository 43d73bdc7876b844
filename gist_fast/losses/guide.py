"""How a batch's guide embeddings are had, from what reaches a loss.

A loss sees features, never texts. In order of preference, a column's features hold

1. ``guide_embedding``, ``[B, G]``: a column of the dataset (`gist_fast.embed_guide`), or what an earlier call on the
   same features computed, as `MatryoshkaLoss` makes one for each of its dimensions;
2. ``guide``, a dictionary: the guide's own tokens of the raw text, put there by `gist_fast.collator`;
3. only the student's tokens: the guide reads them too if its vocabulary is the same, else they are decoded and
   tokenised again, which is what sentence-transformers' own loss does.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gist_fast.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

TOKENS = "guide"
EMBEDDING = "guide_embedding"


def take_guide_input(features: dict[str, Any]) -> dict[str, Any]:
    """What the guide reads of a column: its own tokens, which the student must not see and which leave `features`
    hereby, or a copy of the student's tokens, made before the student writes its outputs among them."""
    return {TOKENS: features.pop(TOKENS)} if TOKENS in features else dict(features)


class GuideEncoder:
    """The guide and its ways to read a batch.

    Not an ``nn.Module``, on purpose: what is no child of the loss cannot be replaced by the student (the trainer of
    sentence-transformers replaces nested children called ``model``) nor reach the optimizer with its parameters.
    """

    def __init__(self, student: SentenceTransformer, guide: SentenceTransformer) -> None:
        for name, model in (("model", student), ("guide", guide)):
            if not isinstance(getattr(model, "tokenizer", None), PreTrainedTokenizerBase):
                found = type(getattr(model, "tokenizer", None)).__name__
                raise InputError(
                    f"{name}: its tokenizer is {found}; both models need a tokenizer of transformers "
                    "(PreTrainedTokenizerBase)."
                )
        self.model = guide
        self.is_student = guide is student
        self._tokenizer = student.tokenizer
        self.must_retokenize = student.tokenizer.get_vocab() != guide.tokenizer.get_vocab() or _limit(guide) < _limit(
            student
        )
        students = {id(p) for p in student.parameters()}
        self.shares_weights = any(id(p) in students for p in guide.parameters())

    def to(self, fn: Any, recurse: bool = True) -> None:
        """Apply what ``nn.Module.to`` and its like apply, unless the student's own move has done it."""
        if not self.is_student:
            self.model._apply(fn, recurse)

    @torch.no_grad()
    def encode(self, features: dict[str, Any]) -> Tensor:
        """The guide's embeddings of a column's rows, ``[B, G]``.

        Args:
            features: what `take_guide_input` took from a column, or a part of its rows; left as they are.
        """
        self._settle()
        if TOKENS in features:
            tokens = features[TOKENS]
        else:
            tokens = self._retokenized(features) if self.must_retokenize else features
        # A copy: a model writes its outputs into the features it is given.
        return self.model(dict(tokens))["sentence_embedding"]

    def _settle(self) -> None:
        """A guide's dropout would make the masks random. A guide that shares weights with the student is left alone:
        its mode is the student's."""
        if self.shares_weights or not any(_active_dropout(self.model)):
            return
        logger.warning("The guide was in training mode, so its dropout made the masks random: now it is in eval mode.")
        self.model.eval()

    def _retokenized(self, features: dict[str, Any]) -> dict[str, Any]:
        texts = self._tokenizer.batch_decode(_token_rows(features), skip_special_tokens=True)
        tokens = self.model.preprocess(texts)
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in tokens.items()}


def _limit(model: SentenceTransformer) -> float:
    """Tokens that a model reads of a text."""
    return math.inf if model.max_seq_length is None else model.max_seq_length


def _token_rows(features: dict[str, Any]) -> Any:
    """Token ids a row: the padded matrix, or a flattened batch cut at its sequence boundaries."""
    ids = features["input_ids"]
    if "cu_seq_lens_q" not in features:
        return ids
    flat, cuts = ids[0].tolist(), features["cu_seq_lens_q"].tolist()
    return [flat[begin:end] for begin, end in itertools.pairwise(cuts)]


def _active_dropout(model: nn.Module) -> Iterator[bool]:
    """Of each module that drops something out, whether it does so now."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module.training and module.p > 0
        elif isinstance(share := getattr(module, "attention_dropout", None), float):
            yield module.training and share > 0
