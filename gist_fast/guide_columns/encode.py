"""The guide over texts of mixed length: tokenised once, sorted by length, packed under a budget of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gist_fast.losses.guide import embedded, tokenized
from gist_fast.losses.mini_batches import MiniBatches, extents
from gist_fast.losses.packing import by_length, pack
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

T = TypeVar("T")
PIECE_BYTES = 8 << 20
"""Padded bytes of the texts that are tokenised together: some hundred megabytes of tokens at the very most."""
_BYTES_PER_TOKEN = 8
_SMALLEST_NORM = 1e-3
"""Of what float16 holds as well as it holds others: below, its numbers lose digits (they are spaced 6e-8 apart)."""


@dataclass
class Encoded:
    """Some texts' embeddings."""

    rows: np.ndarray
    """Their places among the texts given, ``[n]``."""
    vectors: Tensor
    """``[n, width]``, where the guide computed them."""
    tokens: int
    """Padded tokens that the guide read."""


class Unstorable(ValueError):  # noqa: N818 - always told on as an InputError
    """An embedding that cannot be stored as it is."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row = row


@dataclass
class Encoder:
    """The guide's way from texts to embeddings."""

    guide: SentenceTransformer
    max_length: int | None
    """Tokens of a text that are read; None for the guide's own maximum."""
    max_tokens: int
    """Padded tokens of a batch."""
    max_rows: int | None
    """Texts of a batch."""

    def __call__(self, windows: Iterable[list[str]], prompt: str) -> Iterator[tuple[int, Encoded]]:
        """The embeddings of windows of texts, batch by batch, each with the number of its window.

        While the guide reads a piece, the next is tokenised. What is computed does not depend on how many windows
        there are.

        Raises:
            ValueError: the guide's memory does not suffice for a batch, or it cannot be kept to `max_length`.
        """
        pieces = (
            (number, rows, texts) for number, window in enumerate(windows) for rows, texts in self._pieces(window)
        )
        with _evaluating(self.guide):
            for (number, rows, texts), features in _one_ahead(lambda piece: self._tokens(piece[2], prompt), pieces):
                if features is None:
                    for begin, end in pack([len(t.encode()) for t in texts], **self._limits(_BYTES_PER_TOKEN)):
                        tokens = tokenized(self.guide, texts[begin:end], prompt, self.max_length)
                        vectors = self._forward(tokens, end - begin)
                        yield number, Encoded(rows[begin:end], vectors, 0)
                    continue
                batches = MiniBatches(features, **self._limits(1), trim_left=True)
                # Read by name: `restore` would wait for the whole piece.
                order = torch.cat(batches.split(torch.arange(len(texts)))).numpy()
                for (begin, end), batch, tokens_read in zip(batches.groups, batches, batches.tokens, strict=True):
                    yield number, Encoded(rows[order[begin:end]], self._forward(batch, end - begin), tokens_read)

    def _limits(self, factor: int) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens * factor, "max_rows": self.max_rows}

    def _pieces(self, texts: list[str]) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Texts of like length in bytes, which is near to like length in tokens, and their places."""
        lengths = [len(text.encode()) for text in texts]
        order = np.array(by_length(lengths))
        for begin, end in pack([lengths[i] for i in order], max_tokens=PIECE_BYTES):
            yield order[begin:end], [texts[i] for i in order[begin:end]]

    def _tokens(self, texts: list[str], prompt: str) -> dict[str, Any] | None:
        """The guide's features of the texts; None where it makes none that could be cut into batches afterwards."""
        features = tokenized(self.guide, texts, prompt, self.max_length)
        ids = features.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return None
        if self.max_length is not None:
            spans = extents(features)
            longest = int((spans[:, 1] - spans[:, 0]).max())
            if longest > self.max_length:
                raise InputError(
                    f"max_length: got {self.max_length}, but the guide's tokenizer makes up to {longest} tokens of a "
                    "text all the same; leave it out."
                )
        return features

    def _forward(self, features: dict[str, Any], rows: int) -> Tensor:
        """``[rows, width]``."""
        features = {
            name: value.to(self.guide.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }
        try:
            # Not inference_mode: what a module keeps for later (rotary tables) could then not be trained with.
            with torch.no_grad():
                return embedded(self.guide, features)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"batch_tokens: expected fewer than {self.max_tokens}, because the guide's device has too little "
                f"memory for {rows} texts within them."
            ) from error


def to_stored(vectors: Tensor, dtype: np.dtype) -> np.ndarray:
    """``[n, width]`` in the type that is stored.

    Raises:
        Unstorable: an embedding is not finite, or the type does not hold it.
    """
    exact = vectors.detach().float().cpu().numpy()

    def refuse(wrong: np.ndarray, problem: Callable[[int], str]) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise Unstorable(row, f"the guide's embedding {problem(row)}")

    refuse(~np.isfinite(exact).all(1), lambda row: "holds NaN or infinity; look at the guide and at that text.")
    with np.errstate(over="ignore"):
        stored = exact.astype(dtype)
    above = f"above the largest {np.dtype(dtype)}, {np.finfo(dtype).max:.6g}; set dtype='float32'."
    refuse(~np.isfinite(stored).all(1), lambda row: f"holds {np.abs(exact[row]).max():.6g}, {above}")
    if dtype == np.float16:
        norms = np.linalg.norm(exact, axis=1)
        small = "too small for float16 to hold its direction; set dtype='float32'."
        refuse((norms < _SMALLEST_NORM) & (norms > 0), lambda row: f"has a norm of {norms[row]:.3g}, {small}")
    return stored


@contextlib.contextmanager
def _evaluating(guide: SentenceTransformer) -> Iterator[None]:
    """Without dropout, and afterwards each module as it was: a guide may be the student itself."""
    were = [(module, module.training) for module in guide.modules()]
    guide.eval()
    try:
        yield
    finally:
        for module, training in were:
            module.training = training


def _one_ahead(work: Callable[[T], Any], items: Iterable[T]) -> Iterator[tuple[T, Any]]:
    """Each item with what `work` makes of it, in order; the next one is worked on meanwhile, in a thread."""
    with ThreadPoolExecutor(1) as pool:
        started = ((item, pool.submit(work, item)) for item in items)
        # In pairs, so that the next one is started before the result of this one is waited for.
        for (item, result), _ in pairwise(chain(started, [None])):  # type: ignore[misc]
            yield item, result.result()
