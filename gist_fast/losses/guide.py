"""How a batch's guide embeddings are had, from what reaches a loss.

A loss sees features, never texts. In order of preference, a column's features hold

1. ``guide_embedding``, ``[B, G]``: a column of the dataset (`gist_fast.embed_guide`), or what an earlier call on the
   same features computed, as `MatryoshkaLoss` makes one for each of its dimensions;
2. ``guide``, a dictionary: the guide's own tokens, put there by `gist_fast.training.collator`, of the raw texts of the
   column; or of the distinct texts of several columns, and then ``guide_rows``, ``[B]``, says which of them each row
   is, and ``guide_source`` which column's features hold them;
3. only the student's tokens: the guide reads them too if its vocabulary is the same, else they are decoded and
   tokenised again, which is what sentence-transformers' own loss does.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.modules import Router
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gist_fast.data.names import GROUP, MARGIN, NEGATIVE_ROWS
from gist_fast.data.names import GUIDE_EMBEDDING as EMBEDDING
from gist_fast.losses.fingerprint import state_now, tokenizer_rules
from gist_fast.losses.guide_memory import GuideMemory
from gist_fast.losses.mini_batches import EXTENTS, MiniBatches, default_tokens, positions_are_relative, reorderable
from gist_fast.runtime.errors import InputError, InputTypeError, shown

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

TOKENS = "guide"
ROWS = "guide_rows"
SOURCE = "guide_source"
KEYS = "keys"
"""Key of `TOKENS`: a host array ``[n]`` of digests, the same for the same text under the same settings."""

OURS = (TOKENS, EMBEDDING, ROWS, SOURCE, EXTENTS, GROUP, MARGIN, NEGATIVE_ROWS)
"""Keys of a column's features that are none of the student's."""


def take_guide_inputs(features: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the guide reads of each column: its own tokens, which the student must not see and which leave `features`
    hereby, or a copy of the student's tokens, made before the student writes its outputs among them."""
    taken = []
    for f in features:
        inputs = {k: f.pop(k) for k in (TOKENS, ROWS, SOURCE) if k in f}
        taken.append({**inputs, **({EMBEDDING: f[EMBEDDING]} if EMBEDDING in f else {})} if inputs else dict(f))
    return taken


def students_own(features: dict[str, Any]) -> dict[str, Any]:
    """The features of a column without what is there for the guide and for cutting mini-batches."""
    return {k: v for k, v in features.items() if k not in OURS}


def give_back(features: Sequence[dict[str, Any]], inputs: Sequence[dict[str, Any]]) -> None:
    """Put the guide's own tokens back, for another call with the same features."""
    for f, taken in zip(features, inputs, strict=True):
        f.update({k: v for k, v in taken.items() if k in (TOKENS, ROWS, SOURCE)})


def check_model(name: str, model: object) -> None:
    """Refuse what is no sentence-transformers model.

    Raises:
        TypeError: naming the argument and the type that came.
    """
    if not (isinstance(model, nn.Module) and hasattr(model, "preprocess")):
        hint = f", as SentenceTransformer({model!r})" if isinstance(model, str | Path) else ""
        raise InputTypeError(f"{name}: expected a SentenceTransformer{hint}, got {type(model).__name__}.")


def check_one_route(guide: SentenceTransformer) -> None:
    """Refuse a guide that reads queries by other modules than documents: which is which is not passed on to it.

    Raises:
        ValueError: it has a ``Router`` with a route for queries or for documents.
    """
    for module in guide.modules():
        if isinstance(module, Router):
            refuse_routes({*module.sub_modules, *(task for task, _ in module.route_mappings)})


def refuse_routes(routes: Iterable[str | None]) -> None:
    """As `check_one_route`, by the names of a Router's routes."""
    if tasks := {"query", "document"}.intersection(routes):
        raise InputError(
            f"guide: its Router has a route of its own for {' and '.join(sorted(tasks))}, and all texts would be read "
            "by one and the same. Use a guide without a Router, as "
            "SentenceTransformer(modules=[*router.sub_modules['document'], ...])."
        )


def tokenized(
    guide: SentenceTransformer, texts: list[str], prompt: str = "", max_length: int | None = None
) -> dict[str, Any]:
    """The guide's features of some texts, by its own tokenizer.

    Args:
        prompt: put before each text, perhaps empty.
        max_length: tokens of a text that are read; None for the guide's own maximum.

    Raises:
        InputError: no text has a token.
    """
    kwargs = {} if max_length is None else {"processing_kwargs": {"text": {"max_length": max_length}}}
    # None, not an empty prompt, which some modules would still count as one.
    features = guide.preprocess(texts, prompt=prompt or None, **kwargs)
    check_tokens(features, texts, "guide")
    return features


def check_tokens(features: Mapping[str, Any], texts: Sequence[str], where: str) -> None:
    """Refuse texts of which none has a token: each model fails on them in its own way, or makes zeros of them.

    Args:
        features: what a tokenizer made of the texts.
        where: whose tokenizer that is, for the message.

    Raises:
        InputError: naming the first text.
    """
    if without_tokens(features):
        raise InputError(
            f"{where}: its tokenizer finds no token in any of the {len(texts)} texts that are read together, the first "
            f"of which is {shown(texts[0])}; leave out rows of such texts."
        )


def without_tokens(features: Mapping[str, Any]) -> bool:
    """Whether a tokenizer found nothing at all in some texts."""
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    return isinstance(ids, Tensor) and (not ids.numel() or (isinstance(mask, Tensor) and not mask.any()))


def refuse_without_tokens(_: nn.Module, inputs: tuple[Any, ...]) -> None:
    """`check_tokens` as a hook before a model's forward pass, for texts that sentence-transformers reads by itself."""
    if inputs and isinstance(inputs[0], Mapping) and without_tokens(inputs[0]):
        raise InputError(
            "a text without any token: the model's tokenizer finds nothing in the texts that are read together (of "
            "control or zero-width characters, say); leave out rows of such texts."
        )


def embedded(guide: SentenceTransformer, features: dict[str, Any]) -> Tensor:
    """``[n, G]`` as the guide's ``encode`` hands them out: cut to its ``truncate_dim``, if it has one."""
    return guide(features)["sentence_embedding"][:, : guide.truncate_dim]


class GuideEncoder:
    """The guide and its ways to read a batch.

    Not an ``nn.Module``, on purpose: what is no child of the loss cannot be replaced by the student (the trainer of
    sentence-transformers replaces nested children called ``model``) nor reach the optimizer with its parameters.
    """

    def __init__(self, student: SentenceTransformer, guide: SentenceTransformer, remember: bool = False) -> None:
        self.model = guide
        self._memories: dict[torch.dtype, GuideMemory] | None = {} if remember else None
        self._remembered_state: tuple[Any, ...] | None = None
        self.is_student = guide is student
        self._tokenizers = {"model": getattr(student, "tokenizer", None), "guide": getattr(guide, "tokenizer", None)}
        # More than the vocabulary: the same one is read with and without lower-casing.
        rules = [tokenizer_rules(t) for t in self._tokenizers.values() if isinstance(t, PreTrainedTokenizerBase)]
        same_tokens = len(rules) == 2 and rules[0] == rules[1]
        self.must_retokenize = not same_tokens or _limit(guide) < _limit(student)
        if self.must_retokenize:
            check_one_route(guide)
        students = {id(p) for p in student.parameters()}
        self.shares_weights = any(id(p) in students for p in guide.parameters())
        if remember and self.shares_weights:
            raise InputError(
                "guide_cache: True, but the guide shares weights with the student, so its embeddings change with every "
                "step. Set it to False."
            )

    @torch.no_grad()
    def encode_batch(self, inputs: Sequence[dict[str, Any]], dtype: torch.dtype | None = None) -> list[Tensor]:
        """The guide's embeddings of each column, ``[B, G]``.

        Args:
            inputs: what `take_guide_inputs` took from the columns; left as they are.
            dtype: if given, a guide in float32 runs under autocast in that type, as the student does.
        """
        self._settle()
        of_tokens: dict[int, Tensor] = {}
        embeddings = []
        kind = self.model.device.type
        with nullcontext() if dtype is None or torch.is_autocast_enabled(kind) else torch.autocast(kind, dtype=dtype):
            for k, column in enumerate(inputs):
                if EMBEDDING in column:
                    embeddings.append(column[EMBEDDING])
                    continue
                source = column.get(SOURCE, k)
                if source not in of_tokens:
                    of_tokens[source] = self._encode_tokens(inputs[source])
                rows = column.get(ROWS)
                embeddings.append(of_tokens[source] if rows is None else of_tokens[source].index_select(0, rows))
        # A guide that is the student would leave its weights there, cast without a graph.
        torch.clear_autocast_cache()
        return embeddings

    def _encode_tokens(self, inputs: dict[str, Any]) -> Tensor:
        """``[n, G]``: of the guide's own tokens, or of the student's."""
        if TOKENS in inputs:
            tokens = {k: v for k, v in inputs[TOKENS].items() if k != KEYS}
            keys = inputs[TOKENS].get(KEYS)
            if self._memories is None or keys is None:
                return self._encode(tokens)
            if (state := state_now(self.model)) != self._remembered_state:
                # Other weights or another adapter since: what is remembered is another guide's.
                self._memories.clear()
                self._remembered_state = state
            # Evaluation may run in another type than training.
            kind, dtype = self.model.device.type, next(self.model.parameters()).dtype
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
            memory = self._memories.setdefault(dtype, GuideMemory())
            return memory.recall(keys, lambda missing: self._encode(tokens, missing), self.model.device)
        return self._encode(self._retokenized(inputs) if self.must_retokenize else inputs)

    def _encode(self, features: dict[str, Any], rows: Sequence[int] | None = None) -> Tensor:
        """``[n, G]`` of features of the guide, or of those of their `rows`, in mini-batches of like length."""
        ids = features.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 1:
            # Static embeddings: texts end to end, which cannot be cut, and take next to no memory.
            found = embedded(self.model, dict(features))
            return found if rows is None else found[list(rows)]
        batches = MiniBatches(
            features,
            max_tokens=default_tokens(self.model.device),
            # A guide that trains has dropout, and draws it in the order of the rows.
            sort=not self.shares_weights,
            trim_left=positions_are_relative(self.model),
            rows=rows if reorderable(features) else None,
        )
        embeddings = batches.restore([embedded(self.model, part) for part in batches])
        if rows is None or len(embeddings) == len(rows):
            return embeddings
        return embeddings[list(rows)]

    def _settle(self) -> None:
        """A guide's dropout would make the masks random. A guide that shares weights with the student is left alone:
        its mode is the student's."""
        if self.shares_weights or not any(_active_dropout(self.model)):
            return
        logger.warning("The guide was in training mode, so its dropout made the masks random: now it is in eval mode.")
        self.model.eval()

    def _retokenized(self, features: dict[str, Any]) -> dict[str, Any]:
        for name, known in self._tokenizers.items():
            if not isinstance(known, PreTrainedTokenizerBase):
                raise InputError(
                    f"{name}: its tokenizer is {type(known).__name__}; both models need a tokenizer of transformers "
                    "(PreTrainedTokenizerBase) where the guide reads the student's tokens, decoded. With GISTTrainer "
                    "it reads the raw texts."
                )
        decode: Any = self._tokenizers["model"]
        texts = decode.batch_decode(_token_rows(features), skip_special_tokens=True)
        tokens = tokenized(self.model, texts)
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
