"""What the guided losses share: their arguments, the guide, the call of the function, and statistics."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from gist_fast.data.names import GROUP, MARGIN, NEGATIVE_ROWS
from gist_fast.functional.checks import check_scopes, check_temperature
from gist_fast.functional.choices import MarginStrategy, Scope
from gist_fast.functional.combinations import check_dims
from gist_fast.functional.function import guided_contrastive_loss
from gist_fast.functional.keywords import LossKeywords
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.stats import StatsAverage
from gist_fast.losses.gather import check_batches_agree, gather_candidates
from gist_fast.losses.guide import EMBEDDING, GuideEncoder, check_model, give_back
from gist_fast.losses.temperature import as_float, bounded, make_parameter
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.profiler_regions import GUIDE, LOSS_FORWARD, named

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


SETTINGS = tuple(f.name for f in fields(LossConfig))
_OF_THE_FUNCTION = [
    name
    for name in inspect.signature(guided_contrastive_loss).parameters
    if name in SETTINGS and name not in ("temperature", "margin", "groups", "negatives_scope")
]
"""The settings that the function takes as they are."""
_BUILT_IN = ("learn_temperature", "guide_cache")
"""The settings for which a loss is made with a parameter or a memory of its own, or without."""


class GuidedLoss(nn.Module):
    """Base of the guided losses for sentence-transformers' trainers; not to be used itself.

    The student is a child module (``model``), as those trainers expect. The guide is not: it moves with the loss to
    another device, but the trainer cannot mistake it for the student, and its parameters are none of the loss's.

    Args:
        model: the student.
        guide: the guide, or None.
        All others: the fields of `LossConfig`; the temperature may be a 0-d tensor. Each can be read as an attribute
            of the loss, and set, but for `learn_temperature` and `guide_cache`. Two that only go together are set by
            ``loss.config = dataclasses.replace(loss.config, ..)``.

    Example:
        >>> from gist_fast.losses import GISTEmbedLoss
        >>> isinstance(GISTEmbedLoss(student, guide), GuidedLoss)
        True
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show each setting that ``__init__`` takes as ``**settings`` in the signature, for help and completion."""
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        own = [p for p in signature.parameters.values() if p.name not in ("self", "settings")]
        named = {p.name for p in own}
        hints = typing.get_type_hints(LossConfig)
        own += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(LossConfig)
            if "settings" in signature.parameters and f.name not in named
        ]
        cls.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer | None,
        temperature: float = 0.01,
        margin_strategy: MarginStrategy = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        **settings: Unpack[LossKeywords],
    ) -> None:
        super().__init__()
        check_model("model", model)
        if guide is not None:
            check_model("guide", guide)
        check_temperature(temperature)
        self.config = LossConfig.of(
            {
                "temperature": as_float(temperature),
                "margin_strategy": margin_strategy,
                "margin": margin,
                "contrast_anchors": contrast_anchors,
                "contrast_positives": contrast_positives,
                "gather_across_devices": gather_across_devices,
                **settings,
            }
        )
        """Its temperature is that of the start."""
        self.config.check_models(guide=guide is not None, width=model.get_embedding_dimension())
        if guide is model and self.config.hard:
            raise InputError(
                "hard: expected False where the guide is the student itself, got True: it decides by the same scores, "
                "so that hardly a negative is left. Set hard=False, or give a guide of its own."
            )
        if guide is model and self.config.distill_weight:
            raise InputError(
                "distill_weight: expected 0 where the guide is the student itself, which would learn from itself, got "
                f"{self.config.distill_weight}. Leave it out, or give a guide of its own."
            )
        self.model = model
        self._temperature: float | Tensor = temperature
        self.log_temperature = None
        if self.config.learn_temperature:
            if isinstance(temperature, Tensor):
                raise InputError("temperature: expected a float to start from with learn_temperature, got a tensor.")
            self.log_temperature = make_parameter(self.config.temperature)
        self.statistics = StatsAverage()
        """Running averages over the training batches since it was last emptied; see `gist_fast.functional.stats`."""
        self._encoder = None if guide is None else GuideEncoder(model, guide, remember=self.config.guide_cache)
        self.compute_dtype: torch.dtype | None = None
        """The type in which float32 embeddings enter the loss (whose value is float32 all the same) and in which the
        guide runs; None for the types they have. `gist_fast.GISTTrainer` sets it when it trains in mixed precision,
        where models compute in half precision but hand out float32."""
        self.largest_batch = 0
        """Rows of the last batch; of batches gathered from several ranks, those of the largest."""

    def __getattr__(self, name: str) -> Any:
        if name in SETTINGS and "config" in self.__dict__:
            return getattr(self.config, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS and name != "temperature":
            changed = replace(self.config, **{name: value})
            if name in _BUILT_IN and value != getattr(self.config, name):
                raise InputError(
                    f"{name}: expected {not value}, with which the loss was made, got {value}. Make a new one."
                )
            check_dims(changed.matryoshka_dims, changed.matryoshka_weights, self.model.get_embedding_dimension())
            self.config = changed
        else:
            super().__setattr__(name, value)

    @property
    def temperature(self) -> float | Tensor:
        """What divides the similarities; a tensor with a graph where it is learnt. May be set, as by a schedule."""
        if self.log_temperature is None:
            return self._temperature
        return bounded(self.log_temperature, self.config.temperature_min, self.config.temperature_max)

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        check_temperature(value)
        if self.log_temperature is not None:
            raise InputError("temperature: it is learnt (learn_temperature), so it cannot be set.")
        self._temperature = value

    @property
    def guide(self) -> SentenceTransformer | None:
        """The guide, or None where its embeddings come with the dataset or there is no guiding."""
        return None if self._encoder is None else self._encoder.model

    def _apply(self, fn: Any, recurse: bool = True) -> GuidedLoss:
        super()._apply(fn, recurse)
        if self._encoder is not None and not self._encoder.is_student:
            self._encoder.model._apply(fn, recurse)
        return self

    @named(LOSS_FORWARD)
    def guided_loss(
        self, student: Sequence[Tensor], guide: Sequence[Tensor], rows: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        """The loss, 0-d, of student columns (anchors, positives, negatives, ..), ``[B, D]`` each, and the guide's.

        Args:
            rows: what `take_rows` took from the batch.
        """
        config, dtype = self.config, self.compute_dtype
        if dtype is not None:
            student = [x.to(dtype) if x.dtype is torch.float32 else x for x in student]
            # Unit vectors, where float16 is the finer of the half types: what the guide drops hangs on small
            # differences.
            guide = [nn.functional.normalize(x, dim=-1).half() if x.dtype is torch.float32 else x for x in guide]
        margin = rows[0][MARGIN] + config.margin if MARGIN in rows[0] else config.margin
        groups: Sequence[Tensor | None] = [column.get(GROUP) for column in rows]
        own = self._own_columns(len(student))
        owners = [column.get(NEGATIVE_ROWS) if k in own else None for k, column in enumerate(rows)]
        offset, weight, count = 0, 1.0, len(student[0])
        self.largest_batch = count
        if config.gather_across_devices:
            gathered = gather_candidates(
                student, guide, config.gather_guide_dtype, groups, own, anchors=config.gathers_anchors
            )
            student, guide, offset, weight = gathered.student, gathered.guide, gathered.offset, gathered.weight
            groups = gathered.groups
            self.largest_batch = gathered.largest
        if config.self_guided:
            guide = student
        anchors, *candidates = student
        guide_anchors, guide_candidates = (guide[0], list(guide[1:])) if guide else (None, [])
        loss, stats = guided_contrastive_loss(
            anchors,
            candidates[0],
            guide_anchors,
            guide_candidates[0] if guide_candidates else None,
            negatives=candidates[1:],
            guide_negatives=guide_candidates[1:],
            temperature=self.temperature,
            margin=margin,
            rows=count,
            offset=offset,
            groups=[each for each in groups[:2] if each is not None] or None,
            # Of all columns, or of none.
            negative_groups=[each for each in groups[2:] if each is not None] or None,
            negative_rows=owners[2:] if any(each is not None for each in owners) else None,
            return_stats=True,
            negatives_scope=self._scopes(len(student)),
            **self._of_the_function(len(student)),
        )
        if torch.is_grad_enabled():
            self.statistics.add(stats)
        return loss if weight == 1.0 else loss * weight

    def check_columns(self, features: Sequence[dict[str, Any]]) -> None:
        """Raise unless there are anchors, positives, and the means to guide them.

        Raises:
            ValueError: fewer than two columns, a column without rows, or one without guide embeddings where no guide
                is at hand; with `gather_across_devices`, on every rank, where one of them has no rows or other columns.
        """
        own = self._own_columns(len(features)) if len(features) > 2 else []
        if self.config.gather_across_devices:
            check_batches_agree([f for k, f in enumerate(features) if k not in own])
        if len(features) < 2:
            raise InputError(f"the dataset gives {len(features)} text column(s); anchor and positive are needed.")
        for place, column in enumerate(features):
            if not any(len(value) for value in column.values() if not isinstance(value, Tensor) or value.ndim):
                raise InputError(f"the batch holds no row in column {place} ({', '.join(column) or 'nothing'} in it).")
        if not self.config.guided or self._encoder is not None or self.config.self_guided:
            return
        missing = [str(k) for k, f in enumerate(features[self._judged]) if EMBEDDING not in f]
        if missing:
            raise InputError(
                f"guide: none was given, and column(s) {', '.join(missing)} of the dataset carry no guide embeddings. "
                "Give a guide, add the embeddings with gist_fast.embed_guide, or say guided=False to train without."
            )

    @property
    def _judged(self) -> slice:
        """The columns whose texts the guide reads."""
        return slice(None if self.config.mask_negatives else 2)

    def _of_the_function(self, columns: int) -> dict[str, Any]:
        """The settings that the function takes as they are, for a batch of so many columns."""
        settings = {name: getattr(self.config, name) for name in _OF_THE_FUNCTION}
        if columns == 2 and self.config.hardness_mode == "hard_negatives":
            settings |= {"hardness_mode": None, "hardness_strength": 0.0}  # which are about mined negatives alone
        return settings

    def _own_columns(self, columns: int) -> list[int]:
        """Of so many columns those of negatives that are each anchor's own; the anchors' is 0."""
        scopes = check_scopes(self._scopes(columns), columns - 2)
        return [k + 2 for k, scope in enumerate(scopes) if scope == "own"]

    def _scopes(self, columns: int) -> Scope | Sequence[Scope]:
        """``negatives_scope`` for a batch of so many columns. One of two has no negatives, as may happen where rows
        have different numbers of them; then there is nothing to say."""
        return "all" if columns == 2 else self.config.scopes_of(columns - 2)

    def take_rows(self, features: Sequence[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """What each column brings beside its texts, as far as the loss asks for it: groups, and margins with the first.

        It leaves the features; `give_back_rows` puts it back.

        Raises:
            ValueError: the batch brings no such thing.
        """
        names = GROUP, MARGIN, NEGATIVE_ROWS
        taken = [{name: f.pop(name) for name in names if name in f} for f in features]
        grouped = self._grouped_columns([GROUP in column for column in taken])
        for name, columns, remedy in (
            (GROUP, grouped, f"groups={self.config.groups!r}"),
            (MARGIN, [0] if self.config.row_margins else [], "row_margins=True"),
        ):
            for k, column in enumerate(taken):
                if k not in columns:
                    column.pop(name, None)
                elif name not in column:
                    raise InputError(
                        f"{name}: the batch brings none{f' for column {k}' if k else ''}, and the loss has {remedy}; "
                        "gist_fast.training.collator.GISTDataCollator puts it there, which GISTTrainer sets up by the "
                        "loss."
                    )
        return taken

    def _grouped_columns(self, having: Sequence[bool]) -> list[int]:
        """The columns whose groups the loss asks for.

        Args:
            having: whether each column brings groups, which is what ``groups="column"`` goes by.
        """
        every = list(range(len(having)))
        known = {None: [], "anchor": every[:1], "positive": every[1:], "anchor_or_positive": every}
        if self.config.groups in known:
            return known[self.config.groups]
        return ([k for k in every[:2] if having[k]] or every[:1]) + (every[2:] if any(having[2:]) else [])

    @staticmethod
    def give_back_rows(features: Sequence[dict[str, Any]], rows: Sequence[dict[str, Tensor]]) -> None:
        """Put back what `take_rows` took, for a decorator that calls a loss twice."""
        for f, taken in zip(features, rows, strict=True):
            f.update(taken)

    @property
    def guide_is_frozen(self) -> bool:
        """Whether training leaves the guide as it is: it shares no weights with the student."""
        return self._encoder is not None and not self._encoder.shares_weights

    @named(GUIDE)
    def guide_embeddings(self, features: Sequence[dict[str, Any]], inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The guide's embeddings of each column that it judges, ``[B, G]``; none without a guide.

        A frozen guide's stay with the features, so that a decorator which calls a loss again with the same ones, as
        ``MatryoshkaLoss`` does, runs the guide once.

        Args:
            features: of each column.
            inputs: what `take_guide_inputs` took from them.
        """
        if not self.config.guided or self.config.self_guided:
            return []
        if self._encoder is None:
            return [f[EMBEDDING] for f in features[self._judged]]
        embeddings = self._encoder.encode_batch(inputs[self._judged], self.compute_dtype)
        if self.guide_is_frozen:
            for f, embedding in zip(features, embeddings, strict=False):
                f[EMBEDDING] = embedding
        else:
            give_back(features, inputs)
        return embeddings

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments that the model card lists."""
        # A guide's embeddings in the data are not seen by any other name.
        guided = {} if self.guide is not None else {"guided": self.config.guided}
        return {"guide": self.guide, **self.config.recorded(), **guided}

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return """
@misc{solatorio2024gistembed,
    title={GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author={Aivin V. Solatorio},
    year={2024},
    eprint={2402.16829},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""
