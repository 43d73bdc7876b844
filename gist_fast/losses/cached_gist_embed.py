"""`CachedGISTEmbedLoss`: the guided loss of batches whose activations do not fit, by gradient caching."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from sentence_transformers.base.losses.gradcache import has_static_embedding_input
from torch import Tensor

from gist_fast.functional.choices import MarginStrategy
from gist_fast.functional.keywords import LossKeywords
from gist_fast.functional.values import check_flags, check_number
from gist_fast.losses.activation_memory import ActivationMemory
from gist_fast.losses.base import GuidedLoss
from gist_fast.losses.gradient_cache import GradientCache
from gist_fast.losses.guide import check_model, students_own, take_guide_inputs
from gist_fast.losses.mini_batches import EXTENTS, MiniBatches, extents, positions_are_relative
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.profiler_regions import LOSS_BACKWARD, within

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class CachedGISTEmbedLoss(GuidedLoss):
    """`GISTEmbedLoss` for any batch size, with the memory of one mini-batch's activations.

    Takes the place of ``sentence_transformers.losses.CachedGISTEmbedLoss``: the same arguments, defaults and results.

    Args:
        model: the student; not one based on ``StaticEmbedding``, whose inputs cannot be cut into mini-batches.
        guide: see `GISTEmbedLoss`.
        temperature: see `GISTEmbedLoss`.
        mini_batch_size: rows embedded at a time; above 0.
        mini_batch_num_tokens: if given, mini-batches hold as many rows as stay within that many tokens, padding
            included, instead.
        show_progress_bar: whether to show one over the mini-batches.
        margin_strategy, margin, contrast_anchors, contrast_positives, gather_across_devices: see `GISTEmbedLoss`.
        sort_by_length: put texts of like length into one mini-batch, so that little is padded. Loss and gradients are
            the same, but dropout draws other numbers than in the order of the data set.
        activation_memory: GiB of activations to keep, which spares the mini-batches they belong to a second forward
            pass; ``"auto"``: what half of the free main memory holds, or four fifths of the free memory of a GPU.
        settings: see `GISTEmbedLoss`.

    Example:
        >>> loss = CachedGISTEmbedLoss(student, guide, mini_batch_size=1)
        >>> texts = ["what falls", "what flows"], ["rain", "rivers"]
        >>> loss([student.preprocess(column) for column in texts]).backward()
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
        margin_strategy: MarginStrategy = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        *,
        sort_by_length: bool = True,
        activation_memory: float | Literal["auto"] = 0.0,
        **settings: Unpack[LossKeywords],
    ) -> None:
        check_model("model", model)
        if has_static_embedding_input(model):
            raise InputError(
                "model: expected one whose inputs can be cut into mini-batches, got one based on StaticEmbedding. Use "
                "GISTEmbedLoss."
            )
        check_number("mini_batch_size", mini_batch_size, at_least=1, whole=True)
        if mini_batch_num_tokens is not None:
            check_number("mini_batch_num_tokens", mini_batch_num_tokens, at_least=1, whole=True)
        if isinstance(temperature, Tensor) and temperature.requires_grad:
            raise InputError(
                "temperature: expected a float, got a tensor that requires a gradient, which gradient caching computes "
                "before the loss is scaled. Use learn_temperature=True, or GISTEmbedLoss."
            )
        check_flags(show_progress_bar=show_progress_bar, sort_by_length=sort_by_length)
        super().__init__(
            model,
            guide,
            temperature=temperature,
            margin_strategy=margin_strategy,
            margin=margin,
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            gather_across_devices=gather_across_devices,
            **settings,
        )
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self.sort_by_length = sort_by_length
        self.activation_memory = ActivationMemory(activation_memory)
        self._trim_left = positions_are_relative(model)
        self._rows: list[dict[str, Tensor]] = [{}]
        """Of the batch at hand; `calculate_loss` has the signature that ``MatryoshkaLoss`` knows."""

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The mean loss of a batch, 0-d. Its backward pass may embed mini-batches again. `labels` are not used."""
        features = list(sentence_features)
        self.check_columns(features)
        guide = self.guide_embeddings(features, take_guide_inputs(features))
        self._rows = self.take_rows(features)
        columns = [self._cut(f) for f in features]
        cache = GradientCache(self.model, columns, self.activation_memory, self.show_progress_bar)
        student = cache.embed()
        with_backward = torch.is_grad_enabled()
        learnt = self.log_temperature if with_backward else None
        if learnt is not None and "calculate_loss" in vars(self):
            raise InputError(
                "learn_temperature: a decorator, as MatryoshkaLoss, stands around CachedGISTEmbedLoss, and its weights "
                "do not reach the temperature's gradient. Use matryoshka_dims in its place, or GISTEmbedLoss."
            )
        before = None if learnt is None else learnt.grad
        by_temperature = None
        if learnt is not None:
            learnt.grad = None
        try:
            loss = self.calculate_loss(_in_one_part(student), _in_one_part(guide), with_backward=with_backward)
        finally:
            if learnt is not None:
                # It comes with the loss, before anyone knows by what the loss is scaled. What earlier batches added
                # stays, also where this one fails.
                by_temperature, learnt.grad = learnt.grad, before
        self.give_back_rows(features, self._rows)
        if not with_backward:
            return loss
        loss = loss.detach().requires_grad_()
        gradients = [x.grad for x in student]
        assert all(g is not None for g in gradients), "every column is a part of the loss"
        own_scale = self._own_scale(student[0])

        def backward(scale: Tensor) -> None:
            scale = scale / own_scale
            cache.backward(gradients, scale)  # type: ignore[arg-type]
            if learnt is not None and by_temperature is not None:
                share = by_temperature * scale
                learnt.grad = share if learnt.grad is None else learnt.grad + share

        loss.register_hook(backward)
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss, 0-d, from embeddings in parts.

        Args:
            reps: for each column, its student embeddings ``[b, D]``; leaves, where `with_backward`.
            reps_guided: for each column, the guide's ``[b, G]``; empty without a guide.
            with_backward: fill the leaves' ``grad`` and return the loss without a graph. (In float16 those gradients
                are larger by a factor that `forward` takes out again.)
        """
        student, guide = ([torch.cat(parts) for parts in columns] for columns in (reps, reps_guided))
        loss = self.guided_loss(student, guide, self._rows)
        if with_backward:
            with within(LOSS_BACKWARD):
                (loss * self._own_scale(student[0])).backward()
            loss = loss.detach()
        return loss

    def _own_scale(self, anchors: Tensor) -> float:
        """A power of two, the same on all ranks. The mean over many rows has gradients so small that float16 would lose
        them, and here they are computed before a gradient scaler can have scaled the loss: so compute those of about
        the sum."""
        half = torch.float16 in (self.compute_dtype, anchors.dtype)
        return 2.0 ** self.largest_batch.bit_length() if half else 1.0

    def _cut(self, features: dict[str, Any]) -> MiniBatches:
        own = {**students_own(features), EXTENTS: extents(features)}
        by_tokens = self.mini_batch_num_tokens is not None
        return MiniBatches(
            own,
            max_rows=None if by_tokens else self.mini_batch_size,
            max_tokens=self.mini_batch_num_tokens,
            sort=self.sort_by_length,
            trim_left=self._trim_left,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments that the model card lists."""
        config = super().get_config_dict()
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return {"guide": config.pop("guide"), "temperature": config.pop("temperature"), **sizes, **config}


def _in_one_part(columns: Sequence[Tensor]) -> list[list[Tensor]]:
    """As ``MatryoshkaLoss`` expects what it shortens: a list of parts for each column."""
    return [[column] for column in columns]
