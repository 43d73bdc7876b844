"""What the tiled backend keeps of its forward pass for the backward pass: masked scores, or packed masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gist_fast.functional.blocks import Block, strips

MASKED = 1e30
"""Subtracted from a masked logit: far below any real one (at most 1.5e3 at temperature 0.001), and 0 after exp2."""
SCORES_PAIRS = 2**26
"""Batches of up to so many pairs (256 MiB in float32; 4,700 rows without negatives) keep their masked scores of every
Matryoshka dim for the backward pass instead of packed masks, which spares it a fifth of all products."""


def mask_bytes(blocks: Sequence[Block], dims: int) -> int:
    """Bytes kept for the backward pass: of float32 scores, or of packed masks, which are never more.

    Those of packed masks are an upper bound, each row of a tile being padded to whole bytes. A tile that serves its
    columns too packs both its masks along them, so a symmetric square costs the square of its side in bytes, rounded
    up.
    """
    if _keeps_scores(blocks):
        return 4 * dims * sum(block.rows * block.columns for block in blocks)
    total = 0
    for strip in strips(blocks):
        rows, width = strip.block.rows, (strip.columns + 7) // 8
        total += 8 * width * width if strip.symmetric else rows * width * (1 if strip.mirror is None else 2)
    return total


def make_kept(blocks: Sequence[Block], like: Tensor, buffer: Tensor | int) -> Kept:
    """What is kept in a buffer, or in a new one of so many bytes; nothing, in an empty one."""
    scores = _keeps_scores(blocks) and like.dtype == torch.float32
    if isinstance(buffer, int):
        # Scores fill their buffer. The bound on masks is not always reached, and what is left over must not vary.
        make = torch.empty if scores else torch.zeros
        buffer = make(buffer, dtype=torch.uint8, device=like.device)
    if len(buffer) == 0:
        return Kept(buffer)
    return KeptScores(buffer) if scores else PackedMasks(buffer, like)


def _keeps_scores(blocks: Sequence[Block]) -> bool:
    return sum(block.rows * block.columns for block in blocks) <= SCORES_PAIRS


class Kept:
    """Tiles appended one by one, and read back in the same order. This one keeps nothing."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._cursor = 0

    def append_mask(self, mask: Tensor | None) -> None:
        """Keep a tile's mask of 0.0 and 1.0, if masks are kept."""

    def next_scores(self, r: int, c: int) -> Tensor | None:
        """Where a tile's masked logits ``[r, c]`` are to be written, if these are kept."""
        return None

    def next(self, r: int, c: int) -> Tensor:
        """The next tile, ``[r, c]``."""
        raise NotImplementedError

    def next_mask(self, r: int, c: int) -> Tensor:
        """The mask of the next tile, ``[r, c]``: 1.0 where an entry does not count."""
        return self.next(r, c)

    def _take(self, n_bytes: int) -> Tensor:
        taken = self.buffer[self._cursor : self._cursor + n_bytes]
        self._cursor += n_bytes
        return taken


class KeptScores(Kept):
    """Masked logits, float32."""

    def next_scores(self, r: int, c: int) -> Tensor:
        return self.next(r, c)

    def next(self, r: int, c: int) -> Tensor:
        return self._take(4 * r * c).view(torch.float32).view(r, c)

    def next_mask(self, r: int, c: int) -> Tensor:
        return (self.next(r, c) < -MASKED / 2).to(torch.float32)


class PackedMasks(Kept):
    """Masks, one bit a pair."""

    def __init__(self, buffer: Tensor, like: Tensor) -> None:
        super().__init__(buffer)
        places = torch.arange(8, device=like.device)
        self._powers = (2**places).to(like.dtype)
        bytes_ = torch.arange(256, dtype=torch.int64, device=like.device)
        self._unpacked = ((bytes_[:, None] >> places) & 1).to(like.dtype)

    def append_mask(self, mask: Tensor | None) -> None:
        """Eight neighbours in a row make a byte, the first its lowest bit."""
        assert mask is not None, "packed masks are kept where something masks"
        padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)) if mask.shape[1] % 8 else mask
        # Sums of distinct powers of two up to 255 are exact in every float type used here.
        self._take(padded.numel() // 8).copy_(torch.mv(padded.view(-1, 8), self._powers))

    def next(self, r: int, c: int) -> Tensor:
        width = (c + 7) // 8
        packed = self._take(r * width)
        return self._unpacked.index_select(0, packed.to(torch.int32)).view(r, 8 * width)[:, :c]
