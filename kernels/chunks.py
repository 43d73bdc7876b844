"""What a launch works on: rectangles of scores, the chunks that they are cut into, and the table that a kernel finds
its tile by.

All operands of a model stand below each other in one matrix, the *stack*: anchors, positives, then each column of
negatives. So a rectangle is told by numbers alone, and one launch covers chunks of several blocks: a program looks up
in a table which chunk it works on, and where that one's operands, mask bits and results are. The table of a pass is
made once for a problem's shape and copied to the device anew in each call: what a CUDA graph captures, or what another
stream reads, is its own. Nothing of it depends on values.

In a symmetric rectangle scores serve rows and columns. Where these are the same rows of the stack, some chunks are on
the diagonal (`Chunk.triangle`), of which the tiles below are not computed; each tile of all others serves its rows and
its columns (`Chunk.mirrored`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from gist_fast.kernels.layout import TILE, tiles
from torch import Tensor

NOWHERE = -(2**30)
"""In the place of a column that is in no row; so far out that no sum with a row's number overflows or comes near."""


@dataclass(frozen=True)
class Rectangle:
    """``R`` rows against ``C`` columns of the stack. Row i belongs to anchor i."""

    block: int
    """Whose counts are those of its rows."""
    x: int
    """The first of its rows in the stack."""
    y: int
    """The first of its columns."""
    rows: int
    columns: int
    excluded: int = NOWHERE
    """Column ``excluded + i`` never counts in row i; may lie outside."""
    symmetric: bool = False
    """A square whose scores serve its rows and its columns; the excluded entries are the diagonal."""
    mirror_block: int = 0
    """Of a symmetric one, whose counts are those of its columns."""
    softmax: int = 0
    """In which of each row's softmaxes its logits are."""
    mirror_softmax: int = 0
    """The same of its columns."""
    softmax_rows: int = 0
    """Rows of one softmax; those of the next one follow."""
    own_negative: int = NOWHERE
    """Column ``own_negative + i`` is the negative that came with row i."""
    scales_own: bool = False
    """Whether hardness weighting scales the logits of own negatives."""
    scales_others: bool = False
    """Whether it scales all others."""
    guided: bool = True
    """Whether a guide may mask pairs; of a symmetric one it may."""

    @property
    def scaled(self) -> bool:
        return self.scales_own or self.scales_others

    @property
    def triangular(self) -> bool:
        """Whether rows and columns are the same, so that the half above the diagonal is enough."""
        return self.symmetric and self.x == self.y


@dataclass(frozen=True)
class Chunk:
    """Some tiles of a rectangle, ``[row_tiles, column_tiles]`` from a first one on."""

    rectangle: Rectangle
    row: int
    """Of its first tile in the rectangle."""
    column: int
    row_tiles: int
    column_tiles: int
    mask: int
    """The first tile of its mask bits."""

    @property
    def rows(self) -> int:
        """Rows of it that are in the rectangle."""
        return min(self.row_tiles * TILE, self.rectangle.rows - self.row * TILE)

    @property
    def columns(self) -> int:
        return min(self.column_tiles * TILE, self.rectangle.columns - self.column * TILE)

    @property
    def x(self) -> slice:
        """Its rows in the stack."""
        first = self.rectangle.x + self.row * TILE
        return slice(first, first + self.rows)

    @property
    def y(self) -> slice:
        """Its columns in the stack."""
        first = self.rectangle.y + self.column * TILE
        return slice(first, first + self.columns)

    @property
    def tiles(self) -> int:
        return self.row_tiles * self.column_tiles

    @property
    def symmetric(self) -> bool:
        return self.rectangle.symmetric

    @property
    def triangle(self) -> bool:
        """Whether it is on the diagonal of a triangular rectangle."""
        return self.rectangle.triangular and self.row == self.column

    @property
    def mirrored(self) -> bool:
        """Whether each of its tiles serves rows and columns."""
        return self.symmetric and not self.triangle

    @property
    def mask_tiles(self) -> int:
        """Tiles of its mask bits."""
        return self.tiles + (self.row_tiles if self.triangle else self.tiles if self.mirrored else 0)

    def at(self, mask: int) -> Chunk:
        """The same chunk with its mask bits in another place."""
        return Chunk(self.rectangle, self.row, self.column, self.row_tiles, self.column_tiles, mask)


def cut(rectangles: Iterable[Rectangle], size: int) -> Iterator[Chunk]:
    """The chunks of rectangles, of at most `size` tiles a side, their mask bits one behind the other; of triangular
    ones those that reach above the diagonal."""
    mask = 0
    for rectangle in rectangles:
        down, across = tiles(rectangle.rows), tiles(rectangle.columns)
        for r in range(0, down, size):
            for c in range(r if rectangle.triangular else 0, across, size):
                yield (chunk := Chunk(rectangle, r, c, min(size, down - r), min(size, across - c), mask))
                mask += chunk.mask_tiles


FIELDS = (
    "first", "x", "y", "guide_x", "guide_y", "rows", "columns", "excluded", "row_tiles", "column_tiles", "row_owner",
    "column_owner", "triangle", "mask", "block", "mirror_block", "row_partials", "column_partials", "dlogits",
    "own_negative", "scales_own", "scales_others",
)  # fmt: skip
"""Of a chunk in the table of a launch, see `gist_fast.kernels.tile.Location`. ``first`` is the first tile of the launch
that is its own; places of partial results are counted in tiles' rows, those of dlogits in tiles."""
PARTIAL_FIELDS = ("owner", "row_tiles", "place", "first_step", "last", "last_step")
"""Of partial softmaxes in the table of a reduction, see `gist_fast.kernels.reduce`."""


class ChunkSet(NamedTuple):
    """The chunks of one kind that one launch covers."""

    chunks: tuple[Chunk, ...]
    start: int
    """Where its rows ``[chunks, FIELDS]`` begin in the table."""
    symmetric: bool
    scaled: bool
    """Whether hardness weighting scales logits of any of them."""
    guided: bool
    """Whether a guide may mask pairs of theirs."""

    @property
    def tiles(self) -> int:
        """How many the launch covers, those that it returns from at once included."""
        return sum(chunk.tiles for chunk in self.chunks)


class Batch(NamedTuple):
    """Chunks whose results are in memory at one time: a set for each kind there is, plain (those that a guide may mask,
    and others) and symmetric."""

    sets: tuple[ChunkSet, ...]
    reductions: tuple[tuple[int, int], ...]
    """For each softmax, where the rows ``[entries, PARTIAL_FIELDS]`` of its partial results begin in the table, and how
    many entries there are."""
    partial_tiles: int
    """Rows that partial softmaxes fill, in tiles."""
    mask_tiles: int
    dlogits_tiles: int
    """Of the set that has most."""

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return tuple(chunk for each in self.sets for chunk in each.chunks)


class Plan(NamedTuple):
    """A pass over a problem."""

    batches: tuple[Batch, ...]
    table: Tensor
    """Of all batches, flat, int32, on the host; in memory that a GPU reads while the host goes on."""

    def table_on(self, device: torch.device) -> Tensor:
        """The table on a device; the host does not wait."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Each replay of the graph reads it again.
            _captured.add(self)
        return self.table.to(device, non_blocking=True)


_captured: set[Plan] = set()
"""Those that a CUDA graph may read, for ever."""


@functools.lru_cache(maxsize=1024)
def make_plan(
    rectangles: tuple[Rectangle, ...],
    chunk_tiles: int,
    size: int,
    *,
    pinned: bool = False,
    shares: tuple[int, int] = (1, 1),
    own_masks: bool = False,
    alone: bool = False,
) -> Plan:
    """All chunks of a problem, in batches.

    Args:
        chunk_tiles: rows and columns of a chunk, in tiles.
        size: tiles of a batch, which has one chunk at least.
        pinned: the table is for a GPU.
        shares: programs that share a tile's columns in a forward pass, in plain and in symmetric chunks.
        own_masks: mask bits are those of a batch, for as long as it is worked on, and not of the whole problem.
        alone: a chunk a batch, whose operands of a guide stand in a stack of their own, rows before columns.
    """
    groups: list[list[Chunk]] = []
    for chunk in cut(rectangles, chunk_tiles):
        if not groups or alone or sum(c.tiles for c in groups[-1]) + chunk.tiles > size:
            groups.append([])
        groups[-1].append(chunk)
    numbers: list[int] = []
    softmaxes = 1 + max(max(r.softmax, r.mirror_softmax) for r in rectangles)
    found = tuple(_batch(group, softmaxes, shares, own_masks, alone, numbers) for group in groups)
    # Not of whatever mode of torch the first call of a shape happens to be in.
    with torch.inference_mode(False):
        table = torch.tensor(numbers, dtype=torch.int32, device="cpu")
        return Plan(found, table.pin_memory() if pinned else table)


def _batch(
    group: Sequence[Chunk],
    softmaxes: int,
    shares: tuple[int, int],
    own_masks: bool,
    alone: bool,
    numbers: list[int],
) -> Batch:
    """Some chunks as a batch, whose rows of the table are added to `numbers`."""
    sets: list[ChunkSet] = []
    partials: list[list[tuple[int, ...]]] = [[] for _ in range(softmaxes)]
    partial_tiles, dlogits_tiles = 0, 0
    if own_masks:
        places = _places(chunk.mask_tiles for chunk in group)
        group = [chunk.at(place) for chunk, place in zip(group, places, strict=True)]
    for symmetric, guided in ((False, True), (False, False), (True, True)):
        chunks = tuple(c for c in group if (c.symmetric, c.rectangle.guided) == (symmetric, guided))
        if not chunks:
            continue
        start, first = len(numbers), 0
        for chunk in chunks:
            layers = chunk.column_tiles * shares[symmetric]
            by_rows, by_columns = partial_tiles, partial_tiles + layers * chunk.row_tiles
            triangle = int(chunk.triangle)
            of_rows = partials[chunk.rectangle.softmax]
            of_rows.append((chunk.row * TILE, chunk.row_tiles, by_rows, shares[symmetric] * triangle, layers, 0))
            partial_tiles = by_columns
            if symmetric:
                last = (0, 1) if triangle else (chunk.row_tiles, 0)
                of_columns = partials[chunk.rectangle.mirror_softmax]
                of_columns.append((chunk.column * TILE, chunk.column_tiles, by_columns, 0, *last))
                partial_tiles += chunk.tiles
            numbers += _fields(chunk, first, by_rows, by_columns, alone)
            first += chunk.tiles
        scaled = any(chunk.rectangle.scaled for chunk in chunks)
        sets.append(ChunkSet(chunks, start, symmetric, scaled, guided))
        dlogits_tiles = max(dlogits_tiles, first)
    reductions = []
    for rows in partials:
        reductions.append((len(numbers), len(rows)))
        for row in rows:
            numbers += row
    mask_tiles = sum(chunk.mask_tiles for chunk in group)
    return Batch(tuple(sets), tuple(reductions), partial_tiles, mask_tiles, dlogits_tiles)


def guide_columns(chunk: Chunk) -> int:
    """The first of a chunk's columns in a guide's stack that holds nothing but a chunk's rows and columns."""
    return 0 if chunk.triangle else chunk.rows


def _fields(chunk: Chunk, first: int, by_rows: int, by_columns: int, alone: bool) -> tuple[int, ...]:
    rectangle = chunk.rectangle
    # From the rectangle's rows and columns to the chunk's.
    shift = (chunk.row - chunk.column) * TILE
    found = {
        "first": first,
        "x": chunk.x.start,
        "y": chunk.y.start,
        "guide_x": 0 if alone else chunk.x.start,
        "guide_y": guide_columns(chunk) if alone else chunk.y.start,
        "rows": chunk.rows,
        "columns": chunk.columns,
        "excluded": rectangle.excluded + shift,
        "row_tiles": chunk.row_tiles,
        "column_tiles": chunk.column_tiles,
        "row_owner": rectangle.softmax * rectangle.softmax_rows + chunk.row * TILE,
        "column_owner": rectangle.mirror_softmax * rectangle.softmax_rows + chunk.column * TILE,
        "triangle": int(chunk.triangle),
        "mask": chunk.mask,
        "block": rectangle.block,
        "mirror_block": rectangle.mirror_block,
        "row_partials": by_rows,
        "column_partials": by_columns,
        "dlogits": first,
        "own_negative": rectangle.own_negative + shift,
        "scales_own": int(rectangle.scales_own),
        "scales_others": int(rectangle.scales_others),
    }
    return tuple(found[name] for name in FIELDS)


def _places(sizes: Iterable[int]) -> Iterator[int]:
    place = 0
    for size in sizes:
        yield place
        place += size
