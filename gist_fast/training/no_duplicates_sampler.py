"""No text twice in a batch, planned for millions of rows in seconds.

Every text becomes an integer once. An epoch is then planned first-fit: rows in random order, each into the first batch
that is not full and holds none of its texts. That gives the batches of sentence-transformers'
``NoDuplicatesBatchSampler`` in the same order, but reads no row twice. Only texts that occur in several rows matter. Of
each of those one number is kept: the first batch that it may still go to.

First-fit alone can leave rows with frequent texts for batches past the last one, which a trainer never reaches. Those
are swapped in at the end.

With ``drop_last`` only full batches count, and how many there are depends on the order of the rows. But a trainer plans
its steps by the first epoch, and resumes by counting. So one that falls short is completed with rows that it has.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from sentence_transformers.base.sampler import DefaultBatchSampler

from gist_fast.data.names import GUIDE_SUFFIX, MARGIN, NO_TEXT, group_columns, holds_texts
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

READ_ROWS = 65536
MOST_TRIES = 256
"""Rows that are tried in exchange for one that fits nowhere, before that one is left out."""


class NoDuplicatesBatchSampler(DefaultBatchSampler):
    """Batches in which no text stands twice, in whatever columns.

    Every epoch has as many batches as the length says: with ``drop_last`` as many as the first one fills. A warning
    counts the rows that cannot be placed (a text in more rows than there are batches), and those that stand in two
    batches of a later epoch. Labels, guide embeddings and the dataset's name are not compared; a text that occurs twice
    in one row is no hindrance.

    The plan depends on texts, batch size, seed and epoch alone. It is sentence-transformers' own wherever that has as
    many batches in one pass as its length says. There are differences where it has not: its additional batches of few
    rows (``drop_last=False``), which come after the last one that its trainer takes, do not exist here, and rows are
    not drawn again to reach a length that the texts do not allow (``drop_last=True``).

    For ``SentenceTransformerTrainer`` pass the class: ``batch_sampler=NoDuplicatesBatchSampler``. `GISTTrainer` takes
    it for ``batch_sampler="no_duplicates"``.

    Args:
        dataset: a ``datasets.Dataset``; read once, when the first epoch is planned.
        batch_size: rows of a batch.
        drop_last: whether to leave out batches that are not full.
        valid_label_columns: columns that are no texts.
        generator: where ``seed`` is None, draws the order of the rows.
        seed: together with the epoch, decides the order of the rows.

    Raises:
        ValueError: the dataset has no column to compare; while planning: a text is missing (None).

    Example:
        >>> from datasets import Dataset
        >>> data = Dataset.from_dict({"anchor": ["a", "a", "b", "b"], "positive": ["1", "2", "3", "4"]})
        >>> [sorted(data[batch]["anchor"]) for batch in NoDuplicatesBatchSampler(data, 2, drop_last=True)]
        [['a', 'b'], ['a', 'b']]
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)  # type: ignore[arg-type]
        names = dataset.column_names
        beside = {c for c in (*group_columns(names), MARGIN) if c in names and not holds_texts(dataset, c)}
        ignored = {"dataset_name", *beside, *(valid_label_columns or ())}
        self.columns = [c for c in dataset.column_names if c not in ignored and not c.endswith(GUIDE_SUFFIX)]
        if not self.columns:
            raise InputError(
                f"dataset: of its columns ({', '.join(dataset.column_names) or 'none'}) none holds texts to compare."
            )
        self.dataset = dataset
        self._last: tuple[int, list[np.ndarray]] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of each batch's rows."""
        count = len(self)
        batches = self._epoch_batches(self.epoch)[:count]
        self._warn(batches)
        for batch in batches:
            yield batch.tolist()

    def __len__(self) -> int:
        """How many batches an epoch has, each one of them."""
        if self.drop_last:
            return len(self._first)
        # First-fit never leaves one of these batches empty, so they can be counted without planning.
        return -(-len(self.dataset) // self.batch_size)

    @functools.cached_property
    def _texts(self) -> _Texts:
        return _read_texts(self.dataset, self.columns)

    @functools.cached_property
    def _first(self) -> list[np.ndarray]:
        """The batches of the first epoch, which say how many full batches every epoch has."""
        return _first_fit_batches(self._texts, self._order(0), self.batch_size, self.drop_last)

    def _epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """At least as many batches as `len` says."""
        if self.drop_last and epoch == 0 and self.seed is not None:
            return self._first
        if self._last is None or self._last[0] != epoch or self.seed is None:
            order = self._order(epoch)
            batches = _first_fit_batches(self._texts, order, self.batch_size, self.drop_last)
            if len(batches) < len(self):
                batches = _completed(batches, self._texts, order, self.batch_size, self._first)
            self._last = (epoch, batches)
        return self._last[1]

    def _order(self, epoch: int) -> np.ndarray:
        """The rows in random order, drawn as sentence-transformers draws it."""
        generator = self.generator
        if self.seed is not None:
            # One of our own: the trainer's is shared with the samplers of other datasets.
            generator = torch.Generator()
            generator.manual_seed(self.seed + epoch)
        rows = len(self.dataset)
        dtype = torch.int32 if rows <= np.iinfo(np.int32).max else torch.int64
        return torch.randperm(rows, generator=generator, dtype=dtype).numpy()

    def _warn(self, batches: list[np.ndarray]) -> None:
        """Say which rows are left out, or taken twice."""
        rows, in_batches = len(self.dataset), sum(map(len, batches))
        placed = len(np.unique(np.concatenate([np.empty(0, dtype=np.int64), *batches])))
        last = rows % self.batch_size if self.drop_last else 0
        if rows - placed <= last and placed == in_batches:
            return
        dropped = f" ({last} of them since drop_last leaves out the last batch)" if last else ""
        again = ""
        if placed < in_batches:
            repeated = in_batches - placed
            again = f", and rows are taken {repeated} times more than once, to fill as many batches as the first epoch"
        row, times = self._texts.most_frequent
        logger.warning(
            f"Epoch {self.epoch}: {rows - placed} of {rows} rows are left out{dropped}{again}, so that no text stands "
            f"twice in a batch; {len(batches)} batches of at most {self.batch_size} rows were planned, and the most "
            f"frequent text (of row {row}) is in {times} rows. A smaller batch size would place more."
        )


@dataclass(frozen=True)
class _Texts:
    """The texts that occur in several rows, as numbers."""

    codes: np.ndarray
    """``[N, C]``, int32: each row's texts; -1 where a text occurs in no other row (or stands in the row already)."""
    count: int
    """How many different ones there are; the numbers lie below."""
    most_frequent: tuple[int, int]
    """A row (the first is 1) that holds the most frequent text, and in how many rows that is."""


def _read_texts(dataset: Dataset, columns: list[str]) -> _Texts:
    rows = len(dataset)
    hashes = np.empty((len(columns), rows), dtype=np.uint64)
    start = 0
    # As Arrow, which no format or transform of the dataset touches.
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=READ_ROWS):
        for k, column in enumerate(columns):
            hashes[k, start : start + len(table)] = _hashes(table.column(column), column, start)
        start += len(table)
    # 64 bits a text: two that collide by chance are kept apart as if they were one, which does no harm.
    _, codes = np.unique(hashes.ravel(), return_inverse=True)
    codes = codes.reshape(hashes.shape)
    # What is not there stands nowhere else.
    codes = np.sort(np.where(hashes == _NOTHING, -1, codes).T, axis=1)
    codes[:, 1:][codes[:, 1:] == codes[:, :-1]] = -1
    times = np.bincount(codes[codes >= 0])
    repeated = times > 1
    most = int(times.argmax()) if rows else 0
    row = int(np.argmax((codes == most).any(axis=1))) if rows else 0
    numbers = np.where(repeated, np.cumsum(repeated) - 1, -1).astype(np.int32)
    # -1 picks the last number, which the second where() takes back.
    codes = np.where(codes >= 0, numbers[codes], -1).astype(np.int32)
    return _Texts(codes, int(repeated.sum()), (row + 1, int(times[most]) if rows else 0))


_NOTHING = xxhash.xxh3_64_intdigest(NO_TEXT.encode())


def _hashes(column: pa.ChunkedArray, name: str, first_row: int) -> np.ndarray:
    """``[rows]``, uint64."""
    if column.null_count:
        row = first_row + pc.index(column.is_null(), True).as_py() + 1
        raise InputError(f"dataset: row {row}, column {name!r} is None; a text is needed there, or leave out that row.")
    # What is stored: an image is its bytes, not an object made of them.
    values = (str(value).encode("utf-8", "surrogatepass") for value in column.to_pylist())
    return np.fromiter(map(xxhash.xxh3_64_intdigest, values), dtype=np.uint64, count=len(column))


def _first_fit_batches(texts: _Texts, order: np.ndarray, size: int, drop_last: bool) -> list[np.ndarray]:
    """The rows of each batch, out of rows that come in a given order."""
    limit = len(order) // size if drop_last else -(-len(order) // size)
    codes = texts.codes[order]
    batch_of = _first_fit(codes, texts.count, size, limit)
    if (batch_of < 0).any():
        _swap_in(batch_of, codes, texts.count, size, limit)
    # Stable, so that the rows of a batch stay in the order drawn. First come those that have no batch.
    by_batch = np.argsort(batch_of, kind="stable")
    starts = np.searchsorted(batch_of[by_batch], np.arange(limit))
    batches = np.split(order[by_batch], starts)[1:]
    return [batch for batch in batches if len(batch) >= (size if drop_last else 1)]


def _completed(
    short: list[np.ndarray], texts: _Texts, order: np.ndarray, size: int, first: list[np.ndarray]
) -> list[np.ndarray]:
    """Full batches with further ones, until there are as many as in the first epoch.

    Each takes rows that are left out, as far as they fit together, and then rows that stand in other batches. Where
    that does not fill one, the batch of the first epoch is taken: that one can be filled.
    """
    batches = list(short)
    used = np.isin(np.arange(len(order)), np.concatenate([np.empty(0, dtype=np.int64), *batches]))
    for k in range(len(short), len(first)):
        left_out = order[~used[order]]
        # Another place to begin at each time, so that other rows are taken again.
        again = np.roll(order[used[order]], -k * size)
        batch = _filled((left_out, again), texts, size)
        batches.append(first[k] if batch is None else batch)
        used[batches[-1]] = True
    return batches


def _filled(sources: Iterable[np.ndarray], texts: _Texts, size: int) -> np.ndarray | None:
    """The first rows of the sources that fit together; None where they do not fill a batch."""
    chosen: list[int] = []
    held: set[int] = set()
    for rows in sources:
        some = rows[: MOST_TRIES * size]
        for row, codes in zip(some.tolist(), texts.codes[some].tolist(), strict=True):
            if len(chosen) == size:
                break
            shared = [t for t in codes if t >= 0]
            if held.isdisjoint(shared):
                chosen.append(row)
                held.update(shared)
    return np.array(chosen) if len(chosen) == size else None


def _first_fit(codes: np.ndarray, count: int, size: int, limit: int) -> np.ndarray:
    """Each row's batch, in the order of the rows; -1 for those that fit into none below `limit`."""
    if not limit:
        return np.full(len(codes), -1)
    free = [size] * limit + [1]  # the one past the end is never full, and ends every search
    # Each batch below lowest[t] is full or holds t; batches above that hold it stand in `ahead`, as t * wide + batch.
    lowest, ahead, first, wide = [0] * count, set[int](), 0, limit + 1
    tied = np.asarray((codes >= 0).any(axis=1))
    # By column: a million short lists at once would keep the garbage collector busy.
    ties = zip(*codes[tied].T.tolist(), strict=True)
    chosen = []
    for is_tied in tied.tolist():
        batch = first
        if is_tied:
            texts = [t for t in next(ties) if t >= 0]
            for t in texts:
                if lowest[t] > batch:
                    batch = lowest[t]
            while not free[batch] or (ahead and any(t * wide + batch in ahead for t in texts)):
                batch += 1
            for t in texts if batch < limit else ():
                low = max(first, lowest[t])
                if low < batch:
                    ahead.add(t * wide + batch)
                else:
                    low += 1
                while not free[low] or (ahead and t * wide + low in ahead):
                    ahead.discard(t * wide + low)
                    low += 1
                lowest[t] = low
        chosen.append(batch)
        if batch < limit:
            free[batch] -= 1
            while not free[first]:
                first += 1
    return np.where(np.array(chosen) < limit, chosen, -1)


def _swap_in(batch_of: np.ndarray, codes: np.ndarray, count: int, size: int, limit: int) -> None:
    """Place rows that first-fit could not, changing `batch_of`.

    Such a row meets one of its texts in every batch that is not full. But it may fit into a full batch, out of which
    another row can move to one that is not.
    """
    in_order = np.argsort(batch_of, kind="stable")
    ends = np.searchsorted(batch_of[in_order], np.arange(limit + 1))
    members = [in_order[a:b].tolist() for a, b in itertools.pairwise(ends)]
    opened = [b for b in range(limit) if len(members[b]) < size]
    tied, columns = np.nonzero(codes >= 0)
    by_text = np.argsort(codes[tied, columns], kind="stable")
    occurs, starts = tied[by_text], np.searchsorted(codes[tied, columns][by_text], np.arange(count + 1))

    def holders(row: int) -> np.ndarray:
        """The batches that hold one of a row's texts."""
        found = [batch_of[occurs[starts[t] : starts[t + 1]]] for t in codes[row] if t >= 0]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    everywhere: set[tuple[int, ...]] = set()
    for iteration, row in enumerate(np.flatnonzero(batch_of < 0).tolist()):
        while opened and len(members[opened[0]]) == size:
            opened.pop(0)
        if not opened:
            return
        texts = tuple(codes[row].tolist())
        if texts in everywhere:
            continue
        free = np.ones(limit + 1, dtype=bool)
        free[holders(row)] = False  # -1, for rows that have no batch, is the one past the end
        fitting = np.flatnonzero(free[:limit])
        if not len(fitting):
            everywhere.add(texts)
            continue
        target = opened[0]
        if free[target]:
            batch_of[row] = target
            members[target].append(row)
            continue
        # Another place to begin at each time, so that no batch loses all its rows to others.
        tries = ((int(b), k) for b in np.roll(fitting, -iteration) for k in range(len(members[b])))
        for batch, k in itertools.islice(tries, MOST_TRIES):
            other = members[batch][k]
            if target not in holders(other):
                batch_of[row], batch_of[other] = batch, target
                members[batch][k] = row
                members[target].append(other)
                break
