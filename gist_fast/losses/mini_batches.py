"""A column of a batch in mini-batches of like length, and their embeddings put back in the batch's order.

A mini-batch is padded to its longest text. Cut in the order of the data set, one long text pads all its neighbours;
cut after sorting by length, next to nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.losses.gradcache import _create_minibatch
from torch import Tensor, nn

from gist_fast.losses.packing import by_length, group_tokens, pack

EXTENTS = "extents"
"""Key of a column's features: a host array ``[B, 2]``, where each text's first token stands and where its last ends.

Put there by `gist_fast.training.collator`, so that no one has to ask the device. (A tensor would be moved to it.)
"""


def extents(features: dict[str, Any]) -> np.ndarray:
    """Where each text of a column begins and ends in its padded row, ``[B, 2]``; asks the device if need be, once."""
    if EXTENTS in features:
        return features[EXTENTS]
    if "cu_seq_lens_q" in features:
        cuts = features["cu_seq_lens_q"].cpu().numpy()
        return np.stack([np.zeros_like(cuts[1:]), np.diff(cuts)], axis=1)
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        rows, width = _rows(features), features["input_ids"].shape[1] if "input_ids" in features else 1
        return np.tile(np.array([0, width]), (rows, 1))
    active = mask.bool().cpu().numpy()
    width = mask.shape[1]
    begins, ends = active.argmax(1), width - np.flip(active, 1).argmax(1)
    # A row without a token keeps its whole width: nothing can be trimmed by it, and nothing needs to be.
    return np.where(np.asarray(active.any(1))[:, None], np.stack([begins, ends], axis=1), [0, width])


def default_tokens(device: torch.device) -> int:
    """Padded tokens of a mini-batch where none were asked for.

    On a CPU the least at which matrix products reach their full rate, since what fits in the caches is fastest; on an
    accelerator enough to fill it.
    """
    return 2048 if device.type == "cpu" else 16384


def positions_are_relative(model: nn.Module) -> bool:
    """Whether a text means the same to a model wherever it stands in its row, as with rotary position embeddings."""
    configs = [config for m in model.modules() if (config := getattr(m, "config", None)) is not None]
    rotary = ("rope_parameters", "rope_theta", "rope_scaling")
    return any(getattr(config, name, None) is not None for config in configs for name in rotary)


class MiniBatches:
    """The rows of a column in groups.

    Args:
        features: of the column, as its model takes them; padded, or flattened for variable-length attention.
        max_rows: rows of a group, or None.
        max_tokens: tokens of a group, padding included, or None.
        sort: whether rows of like length come together. Features that cannot be reordered (flattened texts, which need
            no padding, and images) are cut in their order.
        trim_left: whether padding before the texts is cut off too, not only behind them: changes the place of each
            token, which is nothing to a model with relative positions.
        rows: those of the column to take, in this order, where it can be reordered; None for all.
    """

    def __init__(
        self,
        features: dict[str, Any],
        *,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        sort: bool = True,
        trim_left: bool = False,
        rows: Sequence[int] | None = None,
    ) -> None:
        self._features = {k: v for k, v in features.items() if k != EXTENTS}
        self._reorderable = reorderable(self._features)
        spans = extents(features)
        if not trim_left:
            spans = np.stack([np.zeros_like(spans[:, 1]), spans[:, 1]], axis=1)
        self._rows = len(spans)
        if rows is not None:
            assert self._reorderable, "part of the rows of a column that cannot be cut"
            spans = spans[list(rows)]
        lengths: list[int] = (spans[:, 1] - spans[:, 0]).tolist()
        order = by_length(lengths) if sort and self._reorderable else list(range(len(lengths)))
        self._spans = spans[order]
        ordered, self._flat = [lengths[i] for i in order], "cu_seq_lens_q" in features
        self.groups = pack(ordered, max_tokens=max_tokens, max_rows=max_rows, padded=not self._flat)
        """``(begin, end)`` of each group in the order by length."""
        self.tokens = [group_tokens(ordered[begin:end], padded=not self._flat) for begin, end in self.groups]
        """Tokens of each group, padding included."""
        device = next(value.device for value in self._features.values() if isinstance(value, Tensor))
        self._sorted = order != list(range(len(order)))
        self._order = torch.as_tensor(order, device=device)
        self._places = torch.as_tensor(np.argsort(order), device=device)
        self._taken = self._order if rows is None else torch.as_tensor([rows[i] for i in order], device=device)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> dict[str, Any]:
        """The features of group `k`; copies, since some modules write into the attention mask they are given."""
        begin, end = self.groups[k]
        if self._flat:
            return _flat_part(self._features, self._spans[:, 1], begin, end)
        if not self._reorderable:
            part = _create_minibatch(self._features, begin, end)
            return {name: v.clone() if name == "attention_mask" else v for name, v in part.items()}
        rows = self._taken[begin:end]
        first, last = int(self._spans[begin:end, 0].min()), int(self._spans[begin:end, 1].max())
        width = self._features["input_ids"].shape[1]
        part = {}
        for name, value in self._features.items():
            # A prompt's length may be one for all rows.
            per_row = isinstance(value, Tensor) and value.ndim > 0
            if per_row and (name != "prompt_length" or len(value) == self._rows):
                along_text = value.ndim >= 2 and value.shape[1] == width
                value = (value[:, first:last] if along_text else value).index_select(0, rows)
            part[name] = value
        return part

    def restore(self, parts: Sequence[Tensor]) -> Tensor:
        """``[B, D]``, rows in the batch's order, from one tensor a group."""
        joined = torch.cat(list(parts))
        return joined.index_select(0, self._places) if self._sorted else joined

    def split(self, rows: Tensor) -> list[Tensor]:
        """One tensor a group, from ``[B, D]`` in the batch's order."""
        ordered = rows.index_select(0, self._order) if self._sorted else rows
        return [ordered[begin:end] for begin, end in self.groups]


def _flat_part(features: dict[str, Any], lengths: np.ndarray, begin: int, end: int) -> dict[str, Any]:
    """Texts `begin` to `end` of a flattened column, cut by the lengths that the host knows: ``[1, total]`` tensors, and
    the places where each text begins."""
    cuts = np.concatenate([[0], np.cumsum(lengths)])
    first, last, total = int(cuts[begin]), int(cuts[end]), int(cuts[-1])
    part: dict[str, Any] = {}
    for name, value in features.items():
        if name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            value = value[begin : end + 1] - value[begin]
        elif name in ("max_length_q", "max_length_k"):
            value = int(lengths[begin:end].max())
        elif isinstance(value, Tensor) and value.ndim >= 1 and value.shape[-1] == total:
            value = value[..., first:last] - (begin if name == "seq_idx" else 0)
        part[name] = value
    return part


def reorderable(features: dict[str, Any]) -> bool:
    """Whether the column is plain padded text: every tensor of it has a row for each text."""
    ids = features.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or "cu_seq_lens_q" in features:
        return False
    return all(
        not isinstance(v, Tensor) or v.ndim == 0 or k == "prompt_length" or len(v) == len(ids)
        for k, v in features.items()
    )


def _rows(features: dict[str, Any]) -> int:
    named = [features[k] for k in ("input_ids", "attention_mask") if isinstance(features.get(k), Tensor)]
    return len((named or [v for v in features.values() if isinstance(v, Tensor) and v.ndim])[0])
