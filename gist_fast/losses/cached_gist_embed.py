"""`CachedGISTEmbedLoss`: the guided loss of batches whose activations do not fit, by gradient caching.

Gradient caching (arXiv 2101.06983) embeds the batch in mini-batches without a graph, computes the loss and its
gradient by the embeddings, then embeds each mini-batch again with a graph and the same random state and carries the
gradient on. Random states, slicing and the second pass are sentence-transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers.base.losses.gradcache import (
    RandContext,
    _backward_hook,
    _create_minibatch,
    _minibatch_ranges,
    _validate_mini_batch_num_tokens,
    has_static_embedding_input,
)
from torch import Tensor
from tqdm import tqdm

from gist_fast.errors import InputError
from gist_fast.losses.base import GuidedLoss
from gist_fast.losses.guide import EMBEDDING, TOKENS, take_guide_input

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Ranges = list[tuple[int, int]]


class CachedGISTEmbedLoss(GuidedLoss):
    """`GISTEmbedLoss` for any batch size, with the memory of one mini-batch's activations.

    Takes the place of ``sentence_transformers.losses.CachedGISTEmbedLoss``: the same arguments, defaults and results.

    Args:
        model: the student; not one based on ``StaticEmbedding``, whose inputs cannot be cut into mini-batches.
        guide: see `GISTEmbedLoss`.
        temperature: see `GISTEmbedLoss`.
        mini_batch_size: rows embedded at a time; above 0.
        mini_batch_num_tokens: if given, mini-batches hold as many rows as stay within that many tokens instead.
        show_progress_bar: whether to show one over the mini-batches.
        margin_strategy: see `GISTEmbedLoss`, as all that follow.
    """

    uses_gradient_cache = True
    """Tells ``MatryoshkaLoss`` to decorate `calculate_loss`, not the model's forward."""

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer | None,
        temperature: float = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
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
        if has_static_embedding_input(model):
            raise InputError(
                "model: it is based on StaticEmbedding, whose inputs cannot be cut into mini-batches; GISTEmbedLoss "
                "would do."
            )
        if not isinstance(mini_batch_size, int) or isinstance(mini_batch_size, bool) or mini_batch_size < 1:
            raise InputError(f"mini_batch_size: got {mini_batch_size!r}; an int of at least 1 would do.")
        if isinstance(temperature, Tensor) and temperature.requires_grad:
            raise InputError(
                "temperature: got a tensor that requires a gradient, which gradient caching computes before the loss "
                "is scaled; a float would do, or GISTEmbedLoss."
            )
        _validate_mini_batch_num_tokens(mini_batch_num_tokens)
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
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The mean loss of a batch, 0-d. Its backward pass embeds the mini-batches again. `labels` are not used."""
        features = list(sentence_features)
        self.check_columns(features)
        guide = self._guide_embeddings(features)
        # Cut before the student runs: a module may change the attention mask it is given, and the second pass must
        # meet the same mini-batches as the first.
        ranges = [self._ranges(f) for f in features]
        with_grad = torch.is_grad_enabled()
        student, random_states = [], []
        for f, cuts in zip(features, ranges, strict=True):
            parts = list(self.embed_minibatch_iter(f, with_grad=False, copy_random_state=with_grad, ranges=cuts))
            student.append([embedding.detach().requires_grad_(with_grad) for embedding, _ in parts])
            random_states.append([state for _, state in parts])
        if not with_grad:
            return self.calculate_loss(student, guide)

        loss = self.calculate_loss(student, guide, with_backward=True).detach().requires_grad_()
        loss.register_hook(
            partial(
                _backward_hook,
                sentence_features=features,
                loss_obj=self,
                cache=[[part.grad for part in column] for column in student],  # type: ignore[misc]
                random_states=random_states,  # type: ignore[arg-type]
                ranges=ranges,  # type: ignore[arg-type]
            )
        )
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss, 0-d, from embeddings in parts.

        Args:
            reps: for each column, its student embeddings ``[b, D]``; leaves, where `with_backward`.
            reps_guided: for each column, the guide's ``[b, G]``; empty without a guide.
            with_backward: fill the leaves' ``grad`` and return the loss without a graph.
        """
        loss = self.guided_loss([torch.cat(parts) for parts in reps], [torch.cat(parts) for parts in reps_guided])
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def embed_minibatch_iter(
        self,
        sentence_feature: dict[str, Any],
        with_grad: bool,
        copy_random_state: bool,
        random_states: list[RandContext] | None = None,
        ranges: Ranges | None = None,
    ) -> Iterator[tuple[Tensor, RandContext | None]]:
        """The student's embeddings of a column, mini-batch by mini-batch, with the random state before each."""
        if ranges is None:
            ranges = self._ranges(sentence_feature)
        for k, (begin, end) in enumerate(tqdm(ranges, desc="Embed mini-batches", disable=not self.show_progress_bar)):
            part = _create_minibatch(sentence_feature, begin, end)
            replay = nullcontext() if random_states is None else random_states[k]
            with replay, nullcontext() if with_grad else torch.no_grad():
                state = RandContext(*part.values()) if copy_random_state else None
                yield self.model(part)["sentence_embedding"], state

    def _ranges(self, features: dict[str, Any]) -> Ranges:
        """Where the rows of a column are cut into mini-batches."""
        return _minibatch_ranges(features, self.mini_batch_size, self.mini_batch_num_tokens)

    def _guide_embeddings(self, features: list[dict[str, Any]]) -> list[list[Tensor]]:
        if not self.guided:
            return []
        return [[f[EMBEDDING]] if EMBEDDING in f else self._encode(take_guide_input(f)) for f in features]

    def _encode(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The guide's embeddings in mini-batches, cut out of its own tokens or the student's."""
        own = inputs.get(TOKENS)
        tokens = inputs if own is None else own
        parts = (_create_minibatch(tokens, begin, end) for begin, end in self._ranges(tokens))
        return [self.encode_guide(part if own is None else {TOKENS: part}) for part in parts]

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments that the model card lists."""
        config = super().get_config_dict()
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return {"guide": config.pop("guide"), "temperature": config.pop("temperature"), **sizes, **config}
