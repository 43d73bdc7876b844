"""Whether stored embeddings are still what the guide makes: a few texts, embedded anew at every use.

A fingerprint holds what is known to change an embedding. This catches the rest, such as a hook, or code that reads a
setting of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from gist_fast.guide_columns.encode import Encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PROBED = 4
"""Texts of each column and store."""
_LEAST = 0.01
"""Of an embedding's length, by which two computations of it may differ: float16 in the store, TF32 on a GPU."""
_ROUNDINGS = 8.0
"""Of the guide's type, which other batches and another device may add up to."""
_QUANTISED = 0.1
"""A guide of whole numbers scales its activations by the texts that are read together."""


def probed(count: int) -> np.ndarray:
    """Which of `count` texts are embedded anew: the first, the last, and some in between."""
    return np.unique(np.linspace(0, count - 1, min(count, PROBED)).astype(np.int64)) if count else np.zeros(0, np.int64)


def distance(encoder: Encoder, prompt: str, texts: Sequence[str], stored: np.ndarray) -> float:
    """How far the guide's embeddings are from those stored ``[n, width]``, at most, in lengths of the embedding."""
    worst = 0.0
    for _, encoded in encoder([list(texts)], prompt):
        now = encoded.vectors.detach().float().cpu().numpy()
        then = stored[encoded.rows].astype(np.float32)
        if then.shape != now.shape:
            return float("inf")
        lengths = np.maximum(np.linalg.norm(now, axis=1), np.finfo(np.float32).tiny)
        apart = np.linalg.norm(now - then, axis=1) / lengths
        worst = max(worst, float(np.nan_to_num(apart, nan=np.inf).max()))
    return worst


def allowed(guide: SentenceTransformer) -> float:
    """The largest `distance` that rounding explains."""
    types = {parameter.dtype for parameter in guide.parameters()}
    if torch.is_autocast_enabled(guide.device.type):
        types.add(torch.get_autocast_dtype(guide.device.type))
    if not types or not all(dtype.is_floating_point for dtype in types):
        return _QUANTISED
    return max(_LEAST, _ROUNDINGS * max(torch.finfo(dtype).eps for dtype in types))
