"""What the guided losses share: their arguments, the guide, the call of the function, and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn

from gist_fast.data.names import GROUP, MARGIN
from gist_fast.functional.backends import BACKENDS
from gist_fast.functional.checks import MASK_BITS, check_choice, check_flags, check_margin, check_temperature
from gist_fast.functional.function import guided_contrastive_loss
from gist_fast.functional.stats import StatsAverage
from gist_fast.losses.gather import HALF_TYPES, check_batches_agree, gather_candidates
from gist_fast.losses.guide import EMBEDDING, GuideEncoder, check_model, give_back
from gist_fast.losses.temperature import as_float, bounded, make_parameter
from gist_fast.losses.variants import VariantArguments, Variants
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.profiler_regions import GUIDE, LOSS_FORWARD, named

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class GuidedLoss(nn.Module):
    """Base of the guided losses for sentence-transformers' trainers; not to be used itself.

    The student is a child module (``model``), as those trainers expect. The guide is not: it moves with the loss to
    another device, but the trainer cannot mistake it for the student, and its parameters are none of the loss's.

    Example:
        >>> from gist_fast.losses import GISTEmbedLoss
        >>> isinstance(GISTEmbedLoss(student, guide), GuidedLoss)
        True
    """

    def __init__(
        self,
        model: SentenceTransformer,
        guide: SentenceTransformer | None,
        *,
        temperature: float,
        margin_strategy: Literal["absolute", "relative"],
        margin: float,
        contrast_anchors: bool,
        contrast_positives: bool,
        gather_across_devices: bool,
        guided: bool,
        backend: Literal["auto", "triton", "tiled", "reference"],
        mask_bits: Literal["auto", "keep", "recompute"],
        guide_cache: bool,
        gather_guide_dtype: Literal["float16", "bfloat16"] | None,
        **variants: Unpack[VariantArguments],
    ) -> None:
        super().__init__()
        check_model("model", model)
        if guide is not None:
            check_model("guide", guide)
        check_flags(
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            gather_across_devices=gather_across_devices,
            guided=guided,
            guide_cache=guide_cache,
        )
        if gather_guide_dtype is not None:
            check_choice("gather_guide_dtype", gather_guide_dtype, tuple(HALF_TYPES))
        check_temperature(temperature)
        check_margin(margin, margin_strategy)
        check_choice("backend", backend, BACKENDS)
        check_choice("mask_bits", mask_bits, MASK_BITS)
        if guide is not None and not guided:
            raise InputError("guided: False, though a guide came; leave out one of the two.")
        self.variants = Variants.of(dict(variants))
        if self.variants.self_guided and not guided:
            raise InputError("self_guided: True, and guided False; leave out one of the two.")
        if guide is model and self.variants.hard:
            raise InputError(
                "hard: the guide is the student itself, which decides by the same scores, so that hardly a negative is "
                "left; a guide of its own would do, or hard=False."
            )
        self.variants.check_with(
            guided=guided,
            guide=guide is not None,
            margin=margin,
            margin_strategy=margin_strategy,
            mask_bits=mask_bits,
            width=model.get_embedding_dimension(),
        )
        self.model = model
        self._start = as_float(temperature)
        self._temperature: float | Tensor = temperature
        self.log_temperature = None
        if self.variants.learn_temperature:
            if isinstance(temperature, Tensor):
                raise InputError("temperature: got a tensor, and learn_temperature; a float to start from would do.")
            bounds = self.variants.temperature_min, self.variants.temperature_max
            self.log_temperature = make_parameter(float(temperature), *bounds)
        self.margin_strategy = margin_strategy
        self.margin = margin
        self.contrast_anchors = contrast_anchors
        self.contrast_positives = contrast_positives
        self.gather_across_devices = gather_across_devices
        self.gather_guide_dtype = gather_guide_dtype
        self.guided = guided
        self.backend = backend
        self.mask_bits = mask_bits
        self.statistics = StatsAverage()
        """Running averages over the training batches since it was last emptied; see `gist_fast.functional.stats`."""
        self.guide_cache = guide_cache
        self._encoder = None if guide is None else GuideEncoder(model, guide, remember=guide_cache)
        self._compute_dtype: torch.dtype | None = None
        self.largest_batch = 0
        """Rows of the last batch; of batches gathered from several ranks, those of the largest."""

    @property
    def temperature(self) -> float | Tensor:
        """What divides the similarities; a tensor with a graph where it is learnt. May be set, as by a schedule."""
        if self.log_temperature is None:
            return self._temperature
        return bounded(self.log_temperature, self.variants.temperature_min, self.variants.temperature_max)

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

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The type in which float32 embeddings enter the loss (whose value is float32 all the same) and in which the
        guide runs; None for the types they have. `gist_fast.GISTTrainer` sets it when it trains in mixed precision,
        where models compute in half precision but hand out float32."""
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self._compute_dtype = dtype
        if self._encoder is not None:
            self._encoder.compute_dtype = dtype

    def _apply(self, fn: Any, recurse: bool = True) -> GuidedLoss:
        super()._apply(fn, recurse)
        if self._encoder is not None:
            self._encoder.to(fn, recurse)
        return self

    @named(LOSS_FORWARD)
    def guided_loss(self, student: Sequence[Tensor], guide: Sequence[Tensor], rows: dict[str, Tensor]) -> Tensor:
        """The loss, 0-d, of student columns (anchors, positives, negatives, ..), ``[B, D]`` each, and the guide's.

        Args:
            rows: what `take_rows` took from the batch.
        """
        student, guide = self._in_compute_dtype(student, guide)
        groups, margin = rows.get(GROUP), rows[MARGIN] + self.margin if MARGIN in rows else self.margin
        offset, weight = 0, 1.0
        self.largest_batch = len(student[0])
        if self.gather_across_devices:
            gathered = gather_candidates(student, guide, self.gather_guide_dtype, groups)
            student, guide, offset, weight = gathered.student, gathered.guide, gathered.offset, gathered.weight
            groups = gathered.groups
            self.largest_batch = gathered.largest
        if self.variants.self_guided:
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
            margin_strategy=self.margin_strategy,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            offset=offset,
            groups=groups,
            **self.variants.arguments(),
            backend=self.backend,
            mask_bits=self.mask_bits,
            return_stats=True,
        )
        if torch.is_grad_enabled():
            self.statistics.add(stats)
        return loss if weight == 1.0 else loss * weight

    def _in_compute_dtype(
        self, student: Sequence[Tensor], guide: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        dtype = self._compute_dtype
        if dtype is None:
            return student, guide
        # Unit vectors, where float16 is the finer of the half types: what the guide drops hangs on small differences.
        return (
            [x.to(dtype) if x.dtype is torch.float32 else x for x in student],
            [nn.functional.normalize(x, dim=-1).half() if x.dtype is torch.float32 else x for x in guide],
        )

    def check_columns(self, features: Sequence[dict[str, Any]]) -> None:
        """Raise unless there are anchors, positives, and the means to guide them.

        Raises:
            ValueError: fewer than two columns, a column without rows, or one without guide embeddings where no guide
                is at hand; with `gather_across_devices`, on every rank, where one of them has no rows or other columns.
        """
        if self.gather_across_devices:
            check_batches_agree(features)
        if len(features) < 2:
            raise InputError(f"the dataset gives {len(features)} text column(s); anchor and positive are needed.")
        for place, column in enumerate(features):
            if not any(len(value) for value in column.values() if not isinstance(value, Tensor) or value.ndim):
                raise InputError(f"the batch holds no row in column {place} ({', '.join(column) or 'nothing'} in it).")
        if not self.guided or self._encoder is not None or self.variants.self_guided:
            return
        missing = [str(k) for k, f in enumerate(features) if EMBEDDING not in f]
        if missing:
            raise InputError(
                f"guide: none was given, and column(s) {', '.join(missing)} of the dataset carry no guide embeddings. "
                "Give a guide, add the embeddings with gist_fast.embed_guide, or say guided=False to train without."
            )

    def take_rows(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What each row brings beside its texts: its group and its margin, as far as the loss asks for them.

        They leave the features, and `give_rows_back` puts them there again, for a decorator that calls a loss twice.

        Raises:
            ValueError: the batch brings no such thing.
        """
        taken = {name: features[0].pop(name) for name in (GROUP, MARGIN) if name in features[0]}
        for name, needed, remedy in (
            (GROUP, self.variants.groups is not None, f"groups={self.variants.groups!r}"),
            (MARGIN, self.variants.row_margins, "row_margins=True"),
        ):
            if needed and name not in taken:
                raise InputError(
                    f"{name}: the batch brings none, and the loss has {remedy}; "
                    "gist_fast.training.collator.GISTDataCollator puts it there, which GISTTrainer sets up by the loss."
                )
            if not needed:
                taken.pop(name, None)
        return taken

    @staticmethod
    def give_rows_back(features: Sequence[dict[str, Any]], rows: dict[str, Tensor]) -> None:
        """The inverse of `take_rows`."""
        features[0].update(rows)

    @property
    def guide_is_frozen(self) -> bool:
        """Whether training leaves the guide as it is: it shares no weights with the student."""
        return self._encoder is not None and not self._encoder.shares_weights

    @named(GUIDE)
    def guide_embeddings(self, features: Sequence[dict[str, Any]], inputs: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The guide's embeddings of each column, ``[B, G]``; none without a guide.

        A frozen guide's stay with the features, so that a decorator which calls a loss again with the same ones, as
        ``MatryoshkaLoss`` does, runs the guide once.

        Args:
            features: of each column.
            inputs: what `take_guide_inputs` took from them.
        """
        if not self.guided or self.variants.self_guided:
            return []
        if self._encoder is None:
            return [f[EMBEDDING] for f in features]
        embeddings = self._encoder.encode_batch(inputs)
        if self.guide_is_frozen:
            for f, embedding in zip(features, embeddings, strict=True):
                f[EMBEDDING] = embedding
        else:
            give_back(features, inputs)
        return embeddings

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments that the model card lists."""
        return {
            "guide": self.guide,
            "temperature": self._start,
            "margin_strategy": self.margin_strategy,
            "margin": self.margin,
            "contrast_anchors": self.contrast_anchors,
            "contrast_positives": self.contrast_positives,
            "gather_across_devices": self.gather_across_devices,
            # A guide's embeddings in the data are not seen by any other name.
            **({} if self.guide is not None else {"guided": self.guided}),
            **self.variants.changed(),
        }

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
