"""One run of `embed_guide`: what is there already, what is missing, who embeds it, and the columns made of it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from gist_fast.data.names import GUIDE_EMBEDDING
from gist_fast.guide_columns.column_files import find_column, write_column
from gist_fast.guide_columns.encode import Encoded, Encoder, Unstorable, to_stored
from gist_fast.guide_columns.files import try_cache, written_whole
from gist_fast.guide_columns.probe import allowed, distance, probed
from gist_fast.guide_columns.progress import Progress
from gist_fast.guide_columns.share import Team
from gist_fast.guide_columns.store import Store
from gist_fast.guide_columns.texts import DistinctTexts, TextColumn
from gist_fast.losses.fingerprint import model_fingerprint
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import put, remove_leftovers

logger = logging.getLogger(__name__)

LAYOUT = "1"
"""Of the files; another one does not look at these."""
WINDOW_TEXTS = (1024, 16384)
"""Fewest and most texts that are sorted by length together: enough that hardly anything is padded, and few enough that
several processes have about the same to do."""
WINDOWS = 64
SHARD_SECONDS = 30.0
SHARD_BYTES = 64 << 20
_BYTES_COUNTED = 8
"""For each token that is read: what is cut off a long text is no work."""


@dataclass
class Report:
    """What a run has done so far, in this process.

    Example:
        >>> from gist_fast import embed_guide
        >>> report = Report()
        >>> embedded = embed_guide(pairs, guide, cache_dir="cache", show_progress_bar=False, report=report)
        >>> report.columns, report.distinct == report.embedded
        (2, True)
    """

    folders: list[Path] = field(default_factory=list)
    """Where the embeddings are kept, a folder a prompt."""
    columns: int = 0
    """Columns that had to be put together; the others were there."""
    distinct: int = 0
    """Distinct texts in those."""
    missing: int = 0
    """Those of them that were not in the store when the run began, all processes together."""
    embedded: int = 0
    """Texts that this process embedded and wrote."""
    tokens: int = 0
    """Tokens that its guide read for that, padding included."""
    seconds: float = 0.0
    """Time that its guide took for that, tokenising and writing included."""


@dataclass
class Job:
    """A guide and how it reads, a place for its embeddings, and the processes that share the work."""

    encoder: Encoder
    folder: Path
    dtype: str
    team: Team
    shown: bool
    report: Report

    def run(self, dataset: Dataset, prompts: dict[str, str]) -> dict[str, Path]:
        """The file of each column of `prompts`, in that order."""
        columns = {name: TextColumn(dataset, name) for name in prompts}
        digests = {name: column.digest() for name, column in columns.items()}
        weights = model_fingerprint(self.encoder.guide)
        self.team.agree("guide", weights)
        self.team.agree("dataset", (digests, prompts, self.encoder.max_length, self.dtype))
        files: dict[str, Path | None] = {}
        for prompt in dict.fromkeys(prompts.values()):
            named = {name: column for name, column in columns.items() if prompts[name] == prompt}
            for variant in itertools.count():
                folder = self._folder(weights, prompt, variant)
                try:
                    files |= self._find_or_make(folder, prompt, named, digests)
                    break
                except _OtherEmbeddingsError as other:
                    # All processes are here: they were told the same.
                    if self.team.rank == 0:
                        logger.warning("%s: %s", folder, other)
        for path in files.values():
            if path is None or not path.exists():
                raise InputError(f"cache_dir: expected a folder that all processes share, and {path} is not here.")
        return {name: path for name in prompts if (path := files[name]) is not None}

    def _folder(self, weights: str, prompt: str, variant: int) -> Path:
        """Where the embeddings under a prompt are kept; named after all that they depend on besides the text.

        Args:
            variant: how many guides with the same fingerprint make other embeddings.
        """
        told = {
            "layout": LAYOUT,
            "guide": weights,
            "prompt": prompt,
            "max_length": str(self._max_length),
            "dtype": self.dtype,
            **({"variant": str(variant)} if variant else {}),
        }
        written = json.dumps(told, sort_keys=True, indent=2)
        folder = self.folder / hashlib.blake2b(written.encode(), digest_size=16).hexdigest()

        def describe() -> None:
            if not folder.exists():
                try_cache(folder)
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            about = folder / "about.json"
            if not about.exists():
                with written_whole(folder) as partial:
                    partial.write_text(written + "\n", encoding="utf-8")
                    put(partial, about)

        self.team.first(describe)
        return folder

    @property
    def _max_length(self) -> int | None:
        return self.encoder.max_length or self.encoder.guide.max_seq_length

    def _find_or_make(
        self, folder: Path, prompt: str, columns: dict[str, TextColumn], digests: dict[str, str]
    ) -> dict[str, Path | None]:
        """The files of these columns; those that are not there are made, and what is missing for them embedded."""
        stored = np.dtype(self.dtype)
        found = self.team.first(
            lambda: {name: find_column(folder, digests[name], len(c), stored) for name, c in columns.items()}
        )
        self._probe(prompt, lambda: _in_files(found, columns))
        columns = {name: columns[name] for name, path in found.items() if path is None}
        if not columns:
            self.report.folders.append(folder)
            return found
        self.team.first(lambda: try_cache(folder))
        texts = DistinctTexts(list(columns.values()))
        store = Store(folder, stored)
        missing = self._missing(store, texts)
        self._probe(prompt, lambda: _in_store(store, texts, missing))
        self.report.folders.append(folder)
        self.report.columns += len(columns)
        self.report.distinct += len(texts)
        self.report.missing += len(missing)
        if len(missing):
            self.team.together(lambda: self._embed(store, prompt, texts, missing))
            left = self._missing(store, texts)
            if len(left):
                raise InputError(
                    f"cache_dir: {len(left)} of {len(missing)} embeddings that were written to {folder} are not there. "
                    "Name a folder that all processes share, and that nothing else deletes from."
                )

        def write() -> dict[str, Path]:
            return {
                name: write_column(folder, digests[name], store, store.locate(texts.keys, check=False)[rows])
                for name, rows in zip(columns, texts.rows, strict=True)
            }

        return found | self.team.first(write)

    def _probe(self, prompt: str, take: Callable[[], Iterator[tuple[list[str], np.ndarray]]]) -> None:
        """Compare some stored embeddings with what the guide makes of their texts now.

        Args:
            take: texts and what is stored of them.

        Raises:
            _OtherEmbeddingsError: they are further apart than rounding explains.
        """
        found = self.team.first(lambda: max((distance(self.encoder, prompt, *some) for some in take()), default=0.0))
        if not found <= allowed(self.encoder.guide):
            raise _OtherEmbeddingsError(
                f"holds other embeddings than this guide makes of the same texts now ({found:.2g} of their length "
                "apart), though its weights and settings are the same. They are left alone; the texts are embedded "
                "anew, into another folder."
            )

    def _missing(self, store: Store, texts: DistinctTexts) -> np.ndarray:
        """The numbers of the texts that the store lacks; the same in every process, whatever others add meanwhile."""

        def look() -> list[str]:
            store.open()
            store.locate(texts.keys)
            return store.opened()

        names = self.team.first(look)
        if self.team.rank > 0:
            store.open(names)
        return np.flatnonzero(store.locate(texts.keys, check=False) < 0)

    def _embed(self, store: Store, prompt: str, texts: DistinctTexts, missing: np.ndarray) -> None:
        """Embed this process's share of the missing texts, and write them."""
        fewest, most = WINDOW_TEXTS
        size = min(most, max(fewest, -(-len(missing) // WINDOWS)))
        starts = range(self.team.rank * size, len(missing), self.team.size * size)
        mine = [missing[start : start + size] for start in starts]
        shard = _Shard(store, texts, self.report)
        # A tokenizer that knows no maximum says 1e30, which is no whole number of numpy's.
        most_tokens = float(self._max_length or math.inf)
        work = np.minimum(texts.lengths, _BYTES_COUNTED * most_tokens) + _BYTES_COUNTED
        count, whole = sum(map(len, mine)), int(sum(work[numbers].sum() for numbers in mine))
        title = "Guide" if self.team.size == 1 else f"Guide (process 1 of {self.team.size})"
        with Progress(title, count, whole, shown=self.shown and self.team.rank == 0) as progress, shard:
            for number, encoded in self.encoder(map(texts.take, mine), prompt):
                numbers = mine[number][encoded.rows]
                shard.add(numbers, encoded)
                progress.advance(len(numbers), encoded.tokens, int(work[numbers].sum()))


class _OtherEmbeddingsError(Exception):
    """A folder's embeddings are not those of the guide."""


def _in_files(found: dict[str, Path | None], columns: dict[str, TextColumn]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Some texts of the columns that have a file, and what it holds of them."""
    for name, path in found.items():
        rows = probed(len(columns[name]))
        if path is not None and len(rows):
            held = Dataset.from_file(str(path)).with_format("numpy")[rows][GUIDE_EMBEDDING]
            yield columns[name].take(rows.tolist()), np.stack(list(held))


def _in_store(store: Store, texts: DistinctTexts, missing: np.ndarray) -> Iterator[tuple[list[str], np.ndarray]]:
    """Some of the texts that the store has, and what it holds of them."""
    held = np.setdiff1d(np.arange(len(texts)), missing, assume_unique=True)
    numbers = held[probed(len(held))]
    if len(numbers):
        places = store.locate(texts.keys.take(pa.array(numbers)), check=False)
        yield texts.take(numbers), store.gather(places)


class _Shard:
    """Embeddings not written yet. Leaving the context writes the rest, after an error or Ctrl-C too."""

    def __init__(self, store: Store, texts: DistinctTexts, report: Report) -> None:
        self._store, self._texts, self._report = store, texts, report
        self._waiting: list[tuple[np.ndarray, Encoded]] = []
        self._bytes = 0
        self._since = time.monotonic()

    def add(self, numbers: np.ndarray, encoded: Encoded) -> None:
        self._waiting.append((numbers, encoded))
        self._bytes += encoded.vectors.numel() * self._store.dtype.itemsize
        if self._bytes > SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what is waiting.

        Raises:
            ValueError: an embedding cannot be stored; those before it are written.
        """
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if waiting:
            numbers = np.concatenate([n for n, _ in waiting])
            vectors = torch.cat([encoded.vectors for _, encoded in waiting])
            try:
                stored = to_stored(vectors, self._store.dtype)
            except Unstorable as error:
                if error.row:
                    self._put(numbers[: error.row], to_stored(vectors[: error.row], self._store.dtype), 0)
                raise InputError(f"{self._texts.where(int(numbers[error.row]))}: {error}") from error
            self._put(numbers, stored, sum(encoded.tokens for _, encoded in waiting))
        self._since = time.monotonic()

    def _put(self, numbers: np.ndarray, stored: np.ndarray, tokens: int) -> None:
        self._store.add(self._texts.keys.take(pa.array(numbers)), stored)
        self._report.embedded += len(numbers)
        self._report.tokens += tokens

    def __enter__(self) -> _Shard:
        self._began = self._since = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.write()
            else:
                # What is told is why the run ended, not that the rest could not be kept.
                with contextlib.suppress(Exception):
                    self.write()
        finally:
            self._report.seconds += time.monotonic() - self._began
