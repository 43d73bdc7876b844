"""`MultipleNegativesRankingLoss` and its kin: sentence-transformers' losses without a guide, by the same kernels."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from sentence_transformers.sentence_transformer import losses as stock
from sentence_transformers.util import cos_sim
from torch import Tensor

from gist_fast.functional.choices import Backend, Direction, Groups, HardnessMode, MaskBits, PartitionMode, Scope
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.values import check_number
from gist_fast.losses.base import GuidedLoss
from gist_fast.losses.cached_gist_embed import CachedGISTEmbedLoss
from gist_fast.losses.gist_embed import GISTEmbedLoss
from gist_fast.losses.temperature import as_float
from gist_fast.runtime.errors import InputError, InputTypeError, nearest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

SimilarityFunction = Callable[[Tensor, Tensor], Tensor]
QUERY_TO_DOC: tuple[Direction, ...] = ("query_to_doc",)
SYMMETRIC: tuple[Direction, ...] = ("query_to_doc", "doc_to_query")


class RankingKeywords(TypedDict, total=False):
    """The settings of the guided loss that are left without a guide, beside the arguments of sentence-transformers."""

    backend: Backend
    mask_bits: MaskBits
    groups: Groups | None
    negatives_scope: Scope | Sequence[Scope]
    hard: bool
    triplet_margin: float | None
    label_smoothing: float
    positive_prior: float
    spread_out_weight: float
    matryoshka_dims: Sequence[int] | None
    matryoshka_weights: Sequence[float] | None
    learn_temperature: bool
    temperature_min: float
    temperature_max: float


_OWN = ("scale", "similarity_fct", "gather_across_devices", "directions", "partition_mode", "hardness_mode",
        "hardness_strength")  # fmt: skip
"""Arguments of sentence-transformers' losses."""
_LEFT = tuple(RankingKeywords.__annotations__)


def _not_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that are not at their default."""
    defaults = {f.name: f.default for f in fields(LossConfig)}
    return {name: value for name, value in settings.items() if value != defaults[name]}


def _check_unused(settings: Mapping[str, Any]) -> None:
    """Raise where settings are given that another similarity than the cosine does without."""
    for name, value in _not_default(settings).items():
        if name not in ("backend", "mask_bits"):
            raise InputError(
                f"{name}: got {value!r} with a similarity_fct other than cos_sim, which does without it. Leave {name} "
                "out, or set similarity_fct=cos_sim."
            )


class RankingLoss(GuidedLoss):
    """What these losses share beside `GuidedLoss`; not to be used itself."""

    similarity_fct: SimilarityFunction

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show in the signature the settings that are left without a guide."""
        super().__init_subclass__(**kwargs)
        shown = cls.__signature__  # type: ignore[attr-defined]  # which `GuidedLoss` has set
        left = [p for p in shown.parameters.values() if p.kind != p.KEYWORD_ONLY or p.name in _LEFT]
        cls.__signature__ = shown.replace(parameters=left)  # type: ignore[attr-defined]

    def _settings(
        self,
        scale: float,
        similarity_fct: SimilarityFunction,
        directions: Sequence[Direction],
        hardness_mode: HardnessMode | None,
        hardness_strength: float,
        others: RankingKeywords,
    ) -> dict[str, Any]:
        """The settings of a `GuidedLoss` that these arguments come to.

        Raises:
            TypeError: an argument is none of these losses, or of a wrong type.
            ValueError: one is out of range.
        """
        self._check_names(others)
        check_number("scale", scale, above=0)
        if not callable(similarity_fct):
            raise InputTypeError(
                f"similarity_fct: expected a function of two tensors, got {type(similarity_fct).__name__}."
            )
        if directions is None:
            raise InputTypeError("directions: expected a list or tuple with 'query_to_doc' in it, got None.")
        check_number("hardness_strength", hardness_strength, at_least=0)
        if (hardness_mode is None) != (hardness_strength == 0):
            # As in sentence-transformers, which weighs nothing then.
            logger.warning(
                "hardness_mode=%r with hardness_strength=%s does nothing; give both or neither.",
                hardness_mode,
                hardness_strength,
            )
            hardness_mode, hardness_strength = None, 0.0
        if similarity_fct is not cos_sim:
            _check_unused(others)
        return {
            "temperature": 1.0 / scale,
            "directions": directions,
            "hardness_mode": hardness_mode,
            "hardness_strength": hardness_strength,
            "guided": False,
            **others,
        }

    @classmethod
    def _check_names(cls, settings: Iterable[str]) -> None:
        """Raise where an argument is none of this class's."""
        taken = inspect.signature(cls).parameters
        for name in settings:
            if name in taken:
                continue
            known = {f.name for f in fields(LossConfig)}
            hint = nearest(name, taken)
            if name == "temperature":
                hint = "; its inverse is scale"
            elif name in ("contrast_anchors", "contrast_positives"):
                hint = "; directions say what is compared"
            elif name in _OWN:
                hint = "; it is fixed here, and MultipleNegativesRankingLoss takes it"
            elif name in known:
                hint = "; it is about a guide, which GISTEmbedLoss takes"
            raise InputTypeError(f"{name}: no such argument of {cls.__name__}{hint}.")

    @property
    def scale(self) -> float:
        """What multiplies the similarities; may be set."""
        return 1.0 / as_float(self.temperature)

    @scale.setter
    def scale(self, value: float) -> None:
        check_number("scale", value, above=0)
        self.temperature = 1.0 / value

    def guided_loss(
        self, student: Sequence[Tensor], guide: Sequence[Tensor], rows: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        """See `GuidedLoss`. Of another similarity than the cosine, for which there are no kernels, it is
        sentence-transformers' own."""
        if self.similarity_fct is cos_sim:
            return super().guided_loss(student, guide, rows)
        _check_unused({name: getattr(self, name) for name in _LEFT})
        self.largest_batch = len(student[0])
        loss = stock.MultipleNegativesRankingLoss(self.model, **{name: getattr(self, name) for name in _OWN})
        return loss.compute_loss_from_embeddings(list(student), torch.empty(0))

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments that the model card lists."""
        own = {name: getattr(self, name) for name in _OWN}
        own["similarity_fct"] = getattr(self.similarity_fct, "__name__", type(self.similarity_fct).__name__)
        return {**own, **_not_default({name: getattr(self, name) for name in _LEFT})}

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return stock.MultipleNegativesRankingLoss.citation.__get__(self)


class MultipleNegativesRankingLoss(RankingLoss, GISTEmbedLoss):
    """InfoNCE with in-batch negatives, as ``sentence_transformers.losses.MultipleNegativesRankingLoss``.

    Takes its place: the same arguments, defaults and results, by the kernels and backends of `GISTEmbedLoss`. Settings
    of the guided loss that need no guide can be given too, as ``groups`` and ``negatives_scope``.

    Inputs: (anchor, positive) or (anchor, positive, negative, ...) texts, no labels.

    Args:
        model: the student.
        scale: multiplies the similarities, above 0: the inverse of the temperature.
        similarity_fct: ``cos_sim``, or another, which sentence-transformers' own code then computes with.
        gather_across_devices: whether the texts of all ranks are candidates on every rank.
        directions, partition_mode, hardness_mode, hardness_strength: see
            `gist_fast.functional.loss_config.LossConfig`.
        settings: others of `gist_fast.functional.loss_config.LossConfig`, by name.

    Example:
        >>> loss = MultipleNegativesRankingLoss(student, directions=("query_to_doc", "doc_to_query"))
        >>> texts = ["what falls", "what flows"], ["rain", "rivers"]
        >>> loss([student.preprocess(column) for column in texts]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: SimilarityFunction = cos_sim,
        gather_across_devices: bool = False,
        directions: Sequence[Direction] = QUERY_TO_DOC,
        partition_mode: PartitionMode = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        **settings: Unpack[RankingKeywords],
    ) -> None:
        found = self._settings(scale, similarity_fct, directions, hardness_mode, hardness_strength, settings)
        super().__init__(
            model, None, gather_across_devices=gather_across_devices, partition_mode=partition_mode, **found
        )
        self.similarity_fct = similarity_fct


class CachedMultipleNegativesRankingLoss(RankingLoss, CachedGISTEmbedLoss):
    """`MultipleNegativesRankingLoss` for any batch size, with the memory of one mini-batch's activations.

    Takes the place of ``sentence_transformers.losses.CachedMultipleNegativesRankingLoss``: the same arguments, defaults
    and results.

    Args:
        model, scale, similarity_fct, gather_across_devices: see `MultipleNegativesRankingLoss`.
        mini_batch_size, mini_batch_num_tokens, show_progress_bar: see `CachedGISTEmbedLoss`.
        directions, partition_mode, hardness_mode, hardness_strength: see `MultipleNegativesRankingLoss`.
        sort_by_length, activation_memory: see `CachedGISTEmbedLoss`.
        settings: see `MultipleNegativesRankingLoss`.

    Example:
        >>> loss = CachedMultipleNegativesRankingLoss(student, mini_batch_size=1)
        >>> texts = ["what falls", "what flows"], ["rain", "rivers"]
        >>> loss([student.preprocess(column) for column in texts]).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: SimilarityFunction = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[Direction] = QUERY_TO_DOC,
        partition_mode: PartitionMode = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        sort_by_length: bool = True,
        activation_memory: float | Literal["auto"] = 0.0,
        **settings: Unpack[RankingKeywords],
    ) -> None:
        found = self._settings(scale, similarity_fct, directions, hardness_mode, hardness_strength, settings)
        super().__init__(
            model,
            None,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
            gather_across_devices=gather_across_devices,
            sort_by_length=sort_by_length,
            activation_memory=activation_memory,
            partition_mode=partition_mode,
            **found,
        )
        self.similarity_fct = similarity_fct

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments that the model card lists."""
        sizes = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return {**RankingLoss.get_config_dict(self), **sizes}

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return stock.CachedMultipleNegativesRankingLoss.citation.__get__(self)


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` of both directions between queries and documents, a softmax each.

    Takes the place of ``sentence_transformers.losses.MultipleNegativesSymmetricRankingLoss``, the symmetric InfoNCE
    (arXiv 2310.19923).

    Args:
        model, scale, similarity_fct, gather_across_devices, settings: see `MultipleNegativesRankingLoss`.

    Example:
        >>> MultipleNegativesSymmetricRankingLoss(student).directions
        ('query_to_doc', 'doc_to_query')
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: SimilarityFunction = cos_sim,
        gather_across_devices: bool = False,
        **settings: Unpack[RankingKeywords],
    ) -> None:
        self._check_names(settings)
        super().__init__(model, scale, similarity_fct, gather_across_devices, SYMMETRIC, "per_direction", **settings)


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesSymmetricRankingLoss` for any batch size.

    Takes the place of ``sentence_transformers.losses.CachedMultipleNegativesSymmetricRankingLoss``.

    Args:
        model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, show_progress_bar,
        settings: see `CachedMultipleNegativesRankingLoss`.

    Example:
        >>> CachedMultipleNegativesSymmetricRankingLoss(student, mini_batch_size=1).partition_mode
        'per_direction'
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: SimilarityFunction = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        *,
        sort_by_length: bool = True,
        activation_memory: float | Literal["auto"] = 0.0,
        **settings: Unpack[RankingKeywords],
    ) -> None:
        self._check_names(settings)
        super().__init__(
            model,
            scale,
            similarity_fct,
            mini_batch_size,
            mini_batch_num_tokens,
            gather_across_devices,
            SYMMETRIC,
            "per_direction",
            show_progress_bar,
            sort_by_length=sort_by_length,
            activation_memory=activation_memory,
            **settings,
        )
