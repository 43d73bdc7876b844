"""The way of the guide's view of a text through a batch.

The trainer hands a loss features and never texts, so what the guide needs is added where the texts still are. A key
``{column}_{name}`` of the collated batch arrives in the loss as ``features[name]`` of that column: `EMBEDDING` holds
the guide's embeddings that the dataset carries, `TOKENS`, `ROWS` and `SOURCE` the guide's own tokens (see
`gist_fast.losses.guide`), `EXTENTS` where each text begins and ends, so that mini-batches can be cut without asking
the device. (No name may end in ``_input_ids`` or ``_sentence_embedding``, which the trainer would take for a column of
its own.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor

from gist_fast.data.column_checks import Column, as_number
from gist_fast.data.names import GROUP, GUIDE_SUFFIX, MARGIN, NEGATIVE_ROWS, NO_TEXT, group_columns, groups_of
from gist_fast.data.per_column import guide_prompt, value_for
from gist_fast.functional.choices import Groups
from gist_fast.losses.guide import KEYS, ROWS, SOURCE, TOKENS, check_one_route, check_tokens, tokenized
from gist_fast.losses.mini_batches import EXTENTS, extents
from gist_fast.runtime.errors import InputError, shown
from gist_fast.runtime.profiler_regions import TOKENISE, named

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_OF_EXTENTS = ("attention_mask", "cu_seq_lens_q")
"""Static embeddings have neither, and cannot be cut either."""


@dataclass
class GuideTokenizer:
    """Tokenises raw texts as the guide wants them: its tokenizer, its prompt, its maximum length.

    Example:
        >>> tokenize = GuideTokenizer(guide, prompts={"anchor": "query: "}, max_length=8)
        >>> tokenize.settings("anchor", position=0)
        ('query: ', 8)
    """

    guide: SentenceTransformer
    prompts: Mapping[str, str | dict[str, str]] | str | None = None
    max_length: int | Mapping[str, int | dict[str, int]] | None = None
    with_keys: bool = False
    """Whether to say which text each one is, for a loss that remembers them (``guide_cache``)."""

    def __post_init__(self) -> None:
        check_one_route(self.guide)

    def settings(self, column: str, position: int, dataset: str | None = None) -> tuple[str, int | None]:
        """Prompt and maximum length for a column: what makes one text the same to the guide as another's copy."""
        prompt = guide_prompt(self.guide, column, position, self.prompts, dataset)
        return prompt, value_for(self.max_length, column, dataset)

    def __call__(self, texts: list[str], prompt: str, max_length: int | None) -> dict[str, Any]:
        """Features of the guide: tensors of ``len(texts)`` rows, and host arrays `EXTENTS` and perhaps `KEYS`."""
        features = tokenized(self.guide, texts, prompt, max_length)
        if any(name in features for name in _OF_EXTENTS):
            features[EXTENTS] = extents(features)
        if self.with_keys:
            features[KEYS] = np.array([_digest(t, prompt, max_length) for t in texts], dtype="V16")
        return features


@dataclass
class GISTDataCollator(SentenceTransformerDataCollator):
    """sentence-transformers' collator, which also carries guide embeddings, or else the guide's own tokens.

    Of the texts that the guide is to read, each distinct one of a batch is tokenised, and encoded by the loss, once.

    Example:
        >>> collate = GISTDataCollator(student.preprocess, tokenize_for_guide=GuideTokenizer(guide))
        >>> batch = collate([{"anchor": "rain", "positive": "a shower"}, {"anchor": "a shower", "positive": "rain"}])
        >>> batch["anchor_guide_rows"].tolist(), batch["positive_guide_rows"].tolist()  # two distinct texts
        ([0, 1], [1, 0])
    """

    tokenize_for_guide: GuideTokenizer | None = field(default=None, repr=False)
    groups: Groups | None = None
    """Where the rows' groups come from; see `gist_fast.functional.loss_settings`."""
    row_margins: bool = False
    """Whether the rows bring margins."""
    mask_negatives: bool = True
    """Whether the guide reads the columns of negatives, which are those after the second."""
    unequal: bool | frozenset[str] = False
    """Whether an empty text in a column of negatives says that the row has none, as the losses of gist_fast know it; or
    in which of several datasets it does."""

    _dataset: str | None = field(default=None, init=False, repr=False)
    _column: str = field(default="", init=False, repr=False)
    _having: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False)
    """Of each column of negatives that some rows of the batch have nothing in, those that have a text."""

    @named(TOKENISE)
    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch out of rows.

        Raises:
            ValueError: a row's guide embedding is missing, or has another width than the first row's; groups or
                margins came that no loss asks for, or are no numbers.
        """
        if not features:
            return super().__call__(features)
        self._dataset = features[0].get("dataset_name")
        embeddings = [c for c in features[0] if c.endswith(GUIDE_SUFFIX)]
        beside = self._beside_texts(features[0])
        columns = self._text_columns(features[0], {*embeddings, *beside})
        for column in columns:
            _check_texts(features, column)
        unequal = self.unequal if isinstance(self.unequal, bool) else self._dataset in self.unequal
        self._having = _rows_having(features, columns[2:] if unequal else [])
        nowhere = [column for column, having in self._having.items() if not having]
        columns = [column for column in columns if column not in nowhere]
        left_out = {*embeddings, *beside, *nowhere}
        batch = self._tokenized([{c: v for c, v in row.items() if c not in left_out} for row in features])

        def rows_of(column: str) -> list[dict[str, Any]]:
            return [features[k] for k in self._having[column]] if column in self._having else features

        for column in columns:
            if column + GUIDE_SUFFIX in embeddings:
                batch[column + GUIDE_SUFFIX] = _stacked(rows_of(column), column + GUIDE_SUFFIX)
            if column in self._having:
                batch[f"{column}_{NEGATIVE_ROWS}"] = torch.tensor(self._having[column])
        if MARGIN in beside:
            batch[f"{columns[0]}_{MARGIN}"] = _numbers(features, MARGIN, torch.float32)
        of_columns = {f"{column}_{GROUP}": column for column in columns}
        for name in (each for each in beside if each in (GROUP, *of_columns)):
            key = f"{columns[0]}_{GROUP}" if name == GROUP else name
            batch[key] = _numbers(rows_of(of_columns.get(name, columns[0])), name, torch.int64)
        if self.groups in ("anchor", "anchor_or_positive"):
            batch[f"{columns[0]}_{GROUP}"] = _text_numbers(features, columns[0])
        if self.groups in ("positive", "anchor_or_positive"):
            batch |= {f"{column}_{GROUP}": _text_numbers(rows_of(column), column) for column in columns[1:]}
        for column in columns:
            names = ("input_ids", "attention_mask")
            texts = [row[column] for row in rows_of(column)]
            check_tokens({k: batch.get(f"{column}_{k}") for k in names}, texts, f"{column}: student")
            own = {k: batch[f"{column}_{k}"] for k in _OF_EXTENTS if f"{column}_{k}" in batch}
            if own:
                batch[f"{column}_{EXTENTS}"] = extents(own)
        if self.tokenize_for_guide is not None:
            judged = columns if self.mask_negatives else columns[:2]
            by_column = {column: [row[column] for row in rows_of(column)] for column in judged}
            batch.update(_distinct_for_guide(self.tokenize_for_guide, by_column, embeddings, self._dataset))
        return batch

    def _text_columns(self, row: dict[str, Any], beside: set[str]) -> list[str]:
        return [c for c in row if c != "dataset_name" and c not in (*beside, *self.valid_label_columns)]

    def _tokenized(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The parent's batch, of those texts alone that there are."""
        whole = self.preprocess_fn
        if self._having:

            def of_those_there(texts: list[str], **options: Any) -> Any:
                # The parent has just asked for the column's task.
                there = self._having.get(self._column)
                return whole(texts if there is None else [texts[k] for k in there], **options)

            self.preprocess_fn = of_those_there
        try:
            return super().__call__(rows)
        finally:
            self.preprocess_fn = whole

    def _beside_texts(self, row: dict[str, Any]) -> list[str]:
        """Columns that hold groups or margins."""
        groups = group_columns(row)
        if self.groups == "column" and groups:
            others = {*groups, MARGIN, *(c for c in row if c.endswith(GUIDE_SUFFIX))}
            of_rows, of_negatives = groups_of(self._text_columns(row, others), row, "the dataset")
            groups = [*of_rows, *of_negatives]
        columns = [(name, self.groups == "column", "groups='column'") for name in groups or [GROUP]]
        for name, wanted, remedy in (*columns, (MARGIN, self.row_margins, "row_margins=True")):
            if wanted and name not in row:
                raise InputError(f"{name}: the loss has {remedy}, and the dataset no column {name!r}.")
            # A text may be called so too.
            if not wanted and isinstance(row.get(name), int | float):
                raise InputError(
                    f"{name}: the dataset has a column of numbers of that name, and the loss does not ask for it. Set "
                    f"{remedy}, or leave out the column."
                )
        return [*(groups if self.groups == "column" else []), *([MARGIN] if self.row_margins else [])]

    def _get_task_for_column(
        self, column_name: str, column_position: int, router_mapping: dict[str, str]
    ) -> str | None:
        # The parent asks this first of each column, and then for the maximum length by the task alone.
        self._column = column_name
        return super()._get_task_for_column(column_name, column_position, router_mapping)

    def _get_max_length_for_task(self, task: str | None) -> int | None:
        length = value_for(self.max_length, self._column, self._dataset)
        return super()._get_max_length_for_task(task) if length is None else length


def _distinct_for_guide(
    tokenize: GuideTokenizer, texts: dict[str, list[str]], skip: list[str], dataset: str | None
) -> dict[str, Any]:
    """The guide's tokens of the distinct texts of some columns, and which of them each row is.

    Columns with the same settings share them; they lie with the first one. See `gist_fast.losses.guide`.
    """
    places: dict[tuple[str, int | None], dict[str, int]] = {}
    source: dict[tuple[str, int | None], int] = {}
    batch: dict[str, Any] = {}
    for position, (column, rows) in enumerate(texts.items()):
        if column + GUIDE_SUFFIX in skip:
            continue
        settings = tokenize.settings(column, position, dataset)
        place = places.setdefault(settings, {})
        batch[f"{column}_{SOURCE}"] = source.setdefault(settings, position)
        batch[f"{column}_{ROWS}"] = torch.tensor([place.setdefault(text, len(place)) for text in rows])
    for settings, place in places.items():
        batch[f"{list(texts)[source[settings]]}_{TOKENS}"] = tokenize(list(place), *settings)
    return batch


def _digest(text: str, *settings: object) -> bytes:
    return hashlib.blake2b(repr((text, *settings)).encode(), digest_size=16).digest()


def _text_numbers(rows: list[dict[str, Any]], column: str) -> Tensor:
    """``[B]``, int64: the same for the same text, and for no other that anyone will ever meet."""
    digests = b"".join(_digest(row[column])[:8] for row in rows)
    return torch.from_numpy(np.frombuffer(digests, np.int64).copy())


def _rows_having(rows: list[dict[str, Any]], columns: list[str]) -> dict[str, list[int]]:
    """Of each column that `NO_TEXT` stands in, the rows that have a text."""
    having = {column: [k for k, row in enumerate(rows) if row[column] != NO_TEXT] for column in columns}
    return {column: found for column, found in having.items() if len(found) < len(rows)}


def _check_texts(rows: list[dict[str, Any]], column: str) -> None:
    """Refuse what no tokenizer reads; models may read more than texts."""
    for i, row in enumerate(rows):
        if column not in row or (value := row[column]) is None or isinstance(value, int | float):
            got = repr(value) if column in row else "no such column"
            raise InputError(f"{column}: expected a text in each row, got {got} in row {i} of the batch.")


def _numbers(features: list[dict[str, Any]], column: str, dtype: torch.dtype) -> Tensor:
    """``[B]``, of a column that is no text."""
    values = [x.item() if isinstance(x := row[column], np.generic | Tensor) else x for row in features]
    for i, value in enumerate(values):
        if dtype is torch.float32:
            values[i] = as_number(value, Column(column, column, "number"), f"row {i} of the batch")
        elif not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
            raise InputError(
                f"{column}: expected a whole number in each row, got {shown(value)} in row {i} of the batch."
            )
    return torch.tensor(values, dtype=dtype)


def _stacked(features: list[dict[str, Any]], column: str) -> Tensor:
    """``[B, G]`` in the type the dataset holds."""
    rows = [row[column] for row in features]
    for i, row in enumerate(rows):
        # Numbers cannot say how many they are: NaN is how some formats show a missing list.
        if not hasattr(row, "__len__"):
            text = features[i].get(column.removesuffix(GUIDE_SUFFIX))
            raise InputError(
                f"{column}: row {i} of the batch, of the text {shown(text)}, is {row}; every row needs the guide's "
                "embedding (gist_fast.embed_guide), so embed it again, or leave out that row."
            )
        if len(row) != len(rows[0]):
            raise InputError(
                f"{column}: row {i} of the batch has {len(row)} numbers and row 0 has {len(rows[0])}; all guide "
                "embeddings have one width."
            )
    if isinstance(rows[0], Tensor):
        return torch.stack(rows)
    array = np.asarray(rows)
    # Python lists of floats come as float64; the dataset held at most float32.
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
