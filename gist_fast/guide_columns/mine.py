"""Hard negatives for each row, out of the positives of all rows, by the guide's embeddings.

A text is mined for an anchor where the guide finds it close to the anchor, but not as close as what is known to be
positive. The rules and their order are those of sentence-transformers' ``mine_hard_negatives`` (6.2):

1. The ``range_max`` texts nearest to the anchor, and as many more as an anchor has positives at most.
2. Without the anchor's own positives; and without the anchor's own text, which sentence-transformers would take.
3. Without what is too close, by *positive-aware* limits (NV-Retriever, arXiv 2407.15831), of which ``relative_margin``
   0.05 was best there (TopK-PercPos): with ``p`` the score of the anchor's least similar positive, those above ``p -
   absolute_margin`` and those above ``p - |p| * relative_margin``; and those above ``max_score`` or below
   ``min_score``.
4. Of the rest the ``range_max`` nearest, less the first ``range_min``; and of these the nearest, or some at random.

Equal texts are one candidate, so that no negative is mined twice for a row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from gist_fast.data.embedded_rows import read_as_stored
from gist_fast.data.names import ANCHOR, GUIDE_SUFFIX, NEGATIVE, NO_TEXT, POSITIVE, is_text_role
from gist_fast.functional.operands import ZERO_NORM
from gist_fast.functional.values import check_choice, check_number
from gist_fast.guide_columns.files import as_vectors
from gist_fast.guide_columns.nearest import nearest
from gist_fast.runtime.errors import InputError, InputTypeError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Sampling = Literal["top", "random"]
ROWS = 16_384
"""Rows that are looked at at a time."""


@dataclass(frozen=True)
class MiningRules:
    """Which of the texts nearest to an anchor become its negatives.

    Raises:
        TypeError: a value is of a wrong type.
        ValueError: a value is out of range, or makes no sense together with another.

    Example:
        >>> MiningRules(negatives=5, relative_margin=None).depth(most_positives=1)
        6
    """

    negatives: int = 3
    """How many for a row, at most."""
    range_min: int = 0
    """How many of the nearest that are left are passed over."""
    range_max: int | None = None
    """How many of the nearest are looked at; None for as many as sentence-transformers looks at: ``range_min`` and 10
    times ``negatives`` where something may be left out (once ``negatives`` elsewhere), and the most positives of an
    anchor."""
    absolute_margin: float | None = None
    """How much less similar than the positive a negative is at least; None for no such rule."""
    relative_margin: float | None = 0.05
    """The same as a share of the positive's similarity."""
    max_score: float | None = None
    """The similarity that a negative has at most."""
    min_score: float | None = None
    """The similarity that a negative has at least."""
    sampling: Sampling = "top"
    """The nearest of those that are left, or some of them at random."""
    seed: int = 0
    """Of what is random."""

    def __post_init__(self) -> None:
        check_number("negatives", self.negatives, at_least=1, whole=True)
        check_number("range_min", self.range_min, at_least=0, whole=True)
        check_number("seed", self.seed, at_least=0, whole=True)
        check_choice("sampling", self.sampling, ("top", "random"))
        for name in ("absolute_margin", "relative_margin", "max_score", "min_score"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value)
        if self.range_max is not None:
            check_number("range_max", self.range_max, at_least=1, whole=True)
            if self.range_max < self.range_min + self.negatives:
                raise InputError(
                    f"range_max: expected at least {self.range_min + self.negatives}, range_min {self.range_min} and "
                    f"the {self.negatives} negatives, got {self.range_max}."
                )
        if self.max_score is not None and self.min_score is not None and self.min_score > self.max_score:
            raise InputError(f"min_score: expected at most max_score {self.max_score}, got {self.min_score}.")

    def depth(self, most_positives: int) -> int:
        """`range_max`, where an anchor has so many positives at most."""
        if self.range_max is not None:
            return self.range_max
        limits = (self.absolute_margin, self.relative_margin, self.max_score)
        spare = 1 if all(limit is None for limit in limits) else 10
        return self.range_min + spare * self.negatives + most_positives


@dataclass
class MiningReport:
    """What was mined.

    Example:
        >>> MiningReport(rows=4, negatives=7, rows_with_fewer=1).as_dict()["negatives"]
        7
    """

    rows: int = 0
    anchors: int = 0
    """Distinct ones."""
    candidates: int = 0
    """Distinct positives, out of which negatives are mined."""
    negatives: int = 0
    """Mined, over all rows."""
    rows_with_fewer: int = 0
    """Rows that got fewer than were asked for."""
    rows_without: int = 0
    """Of these, rows that got none."""
    positive_score: float = math.nan
    """Mean similarity of the anchors with their positives, by the guide."""
    negative_score: float = math.nan
    """Mean similarity with the negatives mined."""
    too_close: int = 0
    """Of the candidates that were near enough, those that a margin or `max_score` left out."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def mine_negatives(
    dataset: Dataset,
    guide: SentenceTransformer | None = None,
    *,
    prompts: dict[str, str] | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    report: MiningReport | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    show_progress_bar: bool = True,
    **rules: Any,
) -> Dataset:
    """Add columns of hard negatives to pairs.

    Args:
        dataset: of the columns ``anchor`` and ``positive``, as `gist_fast.data.load_texts` returns it. Others, such as
            groups, stay.
        guide: embeds the texts (`gist_fast.embed_guide`); None for a dataset that carries the guide's embeddings. These
            then come with the negatives, too.
        prompts, cache_dir: see `gist_fast.embed_guide`.
        device: where the texts are compared; None for the guide's device, or the CPU.
        report: filled in with what was found.
        on_progress: told how many distinct anchors are done, and of how many.
        show_progress_bar: whether to tell on stderr how far the embedding is.
        rules: fields of `MiningRules`.

    Returns:
        The dataset with the columns ``negative_1``, ``negative_2`` and so on, rows in their order. Where a row has
        fewer negatives, an empty text stands in what is left over, as the losses take it.

    Raises:
        ValueError: there are negatives already, or neither a guide nor embeddings; a rule is out of range.
        TypeError: a rule has no such name, or its value is of a wrong type.

    Example:
        >>> mined = mine_negatives(pairs, guide, negatives=2, cache_dir="cache", show_progress_bar=False)
        >>> mined.column_names
        ['anchor', 'positive', 'negative_1', 'negative_2']
    """
    try:
        limits = MiningRules(**rules)
    except TypeError as error:
        if isinstance(error, InputTypeError):
            raise
        raise InputTypeError(f"mine_negatives: {error}.") from error
    report = MiningReport() if report is None else report
    carried = [name + GUIDE_SUFFIX for name in (ANCHOR, POSITIVE)]
    _check(dataset, guide, carried)
    embedded = dataset
    if guide is not None:
        from gist_fast.guide_columns import embed_guide

        device = guide.device if device is None else device
        embedded = embed_guide(
            dataset, guide, [ANCHOR, POSITIVE], prompts=prompts, cache_dir=cache_dir,
            show_progress_bar=show_progress_bar,
        )  # fmt: skip
    anchors, positives = (_Column(embedded, name, torch.device(device or "cpu")) for name in (ANCHOR, POSITIVE))
    chosen, scores = _choose(anchors, positives, limits, report, on_progress)
    found = chosen[anchors.numbers]
    report.rows, report.anchors, report.candidates = len(dataset), len(anchors.texts), len(positives.texts)
    there = found >= 0
    report.negatives = int(there.sum())
    report.rows_with_fewer, report.rows_without = int((~there.all(1)).sum()), int((~there.any(1)).sum())
    report.negative_score = float(scores[anchors.numbers][there].mean()) if report.negatives else math.nan
    return _with_columns(dataset, positives, found, carries=guide is None)


def _check(dataset: Dataset, guide: object, carried: Sequence[str]) -> None:
    names = dataset.column_names
    for name in (ANCHOR, POSITIVE):
        if name not in names:
            raise InputError(f"dataset: no column {name!r}; it has {', '.join(names)}.")
    if taken := [name for name in names if is_text_role(name) and name not in (ANCHOR, POSITIVE)]:
        raise InputError(
            f"dataset: it has negatives already, in column {taken[0]!r}; remove that column, and those like it."
        )
    there = [name for name in carried if name in names]
    if guide is not None and there:
        raise InputError(f"guide: expected None where the dataset carries embeddings of one ({there[0]!r}), got one.")
    if guide is None and len(there) < len(carried):
        missing = next(name for name in carried if name not in names)
        raise InputError(
            f"guide: none was given, and the dataset has no column {missing!r}; name a guide, or embed the texts."
        )


class _Column:
    """The distinct texts of a column, and the guide's unit vectors of them."""

    def __init__(self, dataset: Dataset, name: str, device: torch.device) -> None:
        values = dataset.select_columns([name]).with_format("arrow")[:].column(name)
        # Of any number of bytes.
        encoded = values.cast(pa.large_string()).combine_chunks().dictionary_encode()
        self.texts: pa.Array = encoded.dictionary
        """``[n]``"""
        self.numbers = torch.from_numpy(encoded.indices.to_numpy().astype(np.int64))
        """``[rows]``: which of them each row holds."""
        _, first = np.unique(self.numbers.numpy(), return_index=True)
        self.first: np.ndarray = first
        """``[n]``: the first row that holds each."""
        self.vectors = _unit_vectors(dataset, name + GUIDE_SUFFIX, first, device)
        """``[n, G]``, float32."""


def _unit_vectors(dataset: Dataset, column: str, rows: np.ndarray, device: torch.device) -> Tensor:
    vectors = torch.from_numpy(_stacked(dataset, column, rows).astype(np.float32))
    for part, start in zip(vectors.split(ROWS), range(0, len(vectors), ROWS), strict=True):
        norms = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        bad = (~torch.isfinite(norms[:, 0])).nonzero()
        if len(bad):
            row = int(rows[start + int(bad[0, 0])]) + 1
            raise InputError(f"{column}: row {row} (the first is 1) is not finite; embed it again, or leave it out.")
        part.copy_(torch.where(norms <= ZERO_NORM, 0.0, part / norms))
    return vectors.to(device)


def _choose(
    anchors: _Column,
    positives: _Column,
    rules: MiningRules,
    report: MiningReport,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """For each distinct anchor the places of its negatives among the distinct positives, ``[Q, negatives]``, -1 where
    there is none; and their scores."""
    count = len(positives.texts)
    # Each anchor's own, once.
    own = torch.unique(anchors.numbers * count + positives.numbers)
    of, which = own // count, own % count
    most = int(torch.bincount(of).max())
    own_scores = torch.cat(
        [
            (anchors.vectors[of[k : k + ROWS]] * positives.vectors[which[k : k + ROWS]]).sum(1)
            for k in range(0, len(own), ROWS)
        ]
    ).cpu()
    report.positive_score = float(own_scores.mean())
    least = torch.full((len(anchors.texts),), math.inf).scatter_reduce(0, of, own_scores, "amin")
    depth = rules.depth(most)
    scores, places = nearest(
        anchors.vectors, positives.vectors, depth + most, _own_texts(anchors, positives), on_progress
    )
    among = torch.arange(len(places))[:, None] * count + places
    scores[torch.isin(among, own) & (places >= 0)] = -math.inf
    too_close = torch.zeros_like(scores, dtype=torch.bool)
    if rules.absolute_margin is not None:
        too_close |= scores + rules.absolute_margin > least[:, None]
    if rules.relative_margin is not None:
        too_close |= scores > (least - least.abs() * rules.relative_margin)[:, None]
    if rules.max_score is not None:
        too_close |= scores > rules.max_score
    report.too_close = int(too_close.sum())
    left_out = too_close if rules.min_score is None else too_close | (scores < rules.min_score)
    scores = scores.masked_fill(left_out, -math.inf)
    # Still the nearest first, those that are left out behind all others.
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    window = slice(rules.range_min, depth)
    scores, places = scores[:, window], places.gather(1, order)[:, window]
    if rules.sampling == "random":
        generator = torch.Generator().manual_seed(rules.seed)
        drawn = torch.rand(scores.shape, generator=generator).masked_fill(scores == -math.inf, -1.0)
        drawn = drawn.topk(min(rules.negatives, drawn.shape[1]), dim=1).indices.sort(dim=1).values
        scores, places = scores.gather(1, drawn), places.gather(1, drawn)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        places = places.gather(1, order)
    scores, places = scores[:, : rules.negatives], places[:, : rules.negatives]
    return places.masked_fill(scores == -math.inf, -1), scores


def _own_texts(anchors: _Column, positives: _Column) -> Tensor:
    """``[Q]``: where the anchor's own text stands among the positives, or -1."""
    found = pc.index_in(anchors.texts, value_set=positives.texts)
    return torch.from_numpy(pc.fill_null(found, -1).to_numpy().astype(np.int64))


def _with_columns(dataset: Dataset, positives: _Column, found: Tensor, *, carries: bool) -> Dataset:
    """The dataset with what was `found` for each row, ``[rows, negatives]``, and the guide's embeddings of it."""
    mined = dataset.with_format(None)
    for k, places in enumerate(found.unbind(1), start=1):
        indices = pa.array(places.numpy(), mask=(places < 0).numpy())
        texts = pc.fill_null(positives.texts.take(indices), NO_TEXT)
        mined = mined.add_column(f"{NEGATIVE}_{k}", texts)
    if not carries:
        return read_as_stored(mined)
    name = POSITIVE + GUIDE_SUFFIX
    vectors = _stacked(dataset, name, positives.first)
    vectors = np.concatenate([vectors, np.zeros_like(vectors[:1])])
    for k, places in enumerate(found.unbind(1), start=1):
        # -1 is the last, of zeros: no text is there that they could be of.
        mined = mined.add_column(f"{NEGATIVE}_{k}{GUIDE_SUFFIX}", as_vectors(vectors[places.numpy()]))
    return read_as_stored(mined)


def _stacked(dataset: Dataset, column: str, rows: np.ndarray) -> np.ndarray:
    """``[n, G]`` of these rows, in the type that they are stored in."""
    held = read_as_stored(dataset)
    parts = [np.stack(held.select(rows[k : k + ROWS])[:][column]) for k in range(0, len(rows), ROWS)]
    return np.concatenate(parts)
