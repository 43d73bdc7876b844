"""How little the host does in a step of the kernels: launches and operations of torch, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from gist_fast.kernels import library
from gist_fast.kernels.chunks import FIELDS, NOWHERE, PARTIAL_FIELDS, Rectangle, cut, make_plan
from gist_fast.kernels.launch import record_launches
from gist_fast.kernels.layout import CHUNK_TILES, TILE, TILE_WORDS, mask_words

from gist_fast.functional.backends import triton
from gist_fast.functional.backends.interface import Problem
from gist_fast.functional.backends.kernel_blocks import rectangles
from gist_fast.functional.loss_config import LossConfig

BOTH_WAYS = ["query_to_doc", "doc_to_query"]


class Count(TorchDispatchMode):
    """Counts operations, and those of them that start something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), kwargs: dict | None = None) -> Any:
        self.operations += 1
        self.launches += not (function.is_view or "empty" in str(function))
        return function(*arguments, **(kwargs or {}))


def problem(rows: int, negatives: int, device: str = "meta", **settings: Any) -> Problem:
    def embeddings(width: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty(rows, width, dtype=torch.bfloat16, device=device) for _ in range(2 + negatives))

    temperature = torch.empty((), device=device)
    return Problem(embeddings(384), embeddings(1024), temperature, None, (), (), rows, 0, True, LossConfig(**settings))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The library's products, which count as one operation and one launch each, as on a GPU, and are not made."""
    made: list[Tensor] = []
    monkeypatch.setattr(library, "_add_product", lambda total, *_: made.append(total))
    return made


def counted(call: Problem, keep: bool, products: list[Tensor]) -> dict[str, tuple[int, int]]:
    """Launches and operations of the host, each way."""
    found = {}
    for _ in range(2):  # tables are made in the first call of a shape
        products.clear()
        with record_launches() as launches, Count() as count:
            kept = triton.forward(call, keep)
        found["forward"] = len(launches) + count.launches, len(launches) + count.operations
        with record_launches() as launches, Count() as count:
            triton.backward(call, kept.loss, kept.lse2, kept.mask_bits if keep else None)
        more = len(launches) + len(products)
        found["backward"] = more + count.launches, more + count.operations
    return found


@pytest.mark.parametrize("rows", [1, 100, 2048, TILE * CHUNK_TILES])
def test_pairs_take_few_launches_whatever_their_number(rows: int, products: list[Tensor]) -> None:
    found = counted(problem(rows, 0), True, products)
    print(rows, found)
    for launches, operations in found.values():
        assert launches <= 13
        assert operations <= 27


@pytest.mark.parametrize(
    ("negatives", "keep", "backward"),
    [(0, True, (12, 26)), (1, True, (14, 32)), (2, True, (16, 38)), (0, False, (16, 34))],
)
def test_what_more_there_is_takes_a_few_more(
    negatives: int, keep: bool, backward: tuple[int, int], products: list[Tensor]
) -> None:
    """A column of negatives: two products, and room for what they make; masks decided again: the guide's part."""
    found = counted(problem(2048, negatives), keep, products)
    assert found["forward"] == ((12, 23) if keep else (12, 24))
    assert found["backward"] == backward


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [100, 2048, TILE * CHUNK_TILES])
def test_both_ways_of_one_softmax_cost_no_more_than_one(rows: int, keep: bool, products: list[Tensor]) -> None:
    """The scores of positives with anchors are those of anchors with positives: nothing is multiplied twice."""
    found, shapes = [], []
    for directions in (["query_to_doc"], BOTH_WAYS):
        found.append(counted(problem(rows, 0, directions=directions), keep, products))
        shapes.append([total.shape for total in products])
    assert found[0] == found[1]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 2


def test_beside_negatives_they_are_in_launches_of_their_own(products: list[Tensor]) -> None:
    """A launch is of plain rectangles or of symmetric ones. What it multiplies is the same."""
    found, shapes, tiles = [], [], []
    for directions in (["query_to_doc"], BOTH_WAYS):
        call = problem(2048, 1, directions=directions)
        found.append(counted(call, True, products))
        shapes.append(sorted(total.shape for total in products))
        plan = make_plan(rectangles(tuple(call.blocks)), CHUNK_TILES, CHUNK_TILES**2)
        tiles.append(sum(chunk.tiles for batch in plan.batches for chunk in batch.chunks))
    assert shapes[0] == shapes[1] and tiles[0] == tiles[1] == 2 * (2048 // TILE) ** 2
    more = {way: found[1][way][0] - found[0][way][0] for way in found[0]}
    assert more == {"forward": 2, "backward": 1}, "masks and softmaxes, and dlogits"


def test_a_softmax_of_its_own_costs_a_few_more(products: list[Tensor]) -> None:
    """A reduction, thresholds that stand there twice and the larger of two similarities; weights, and one sum."""
    found = [
        counted(problem(2048, 0, directions=BOTH_WAYS, partition_mode=mode), True, products)
        for mode in ("joint", "per_direction")
    ]
    more = {way: found[1][way][0] - found[0][way][0] for way in found[0]}
    assert more == {"forward": 3, "backward": 2}


def test_nothing_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: what waited for one, or made a tensor of a size that depends on one, would raise."""
    monkeypatch.setattr(library, "_add_product", lambda total, *_: None)
    make_plan.cache_clear()
    with FakeTensorMode(), record_launches() as launches:
        call = problem(300, 1, "cpu", hard=True)
        kept = triton.forward(call, True)
        triton.backward(call, kept.loss, kept.lse2, kept.mask_bits)
    make_plan.cache_clear()
    assert launches


@pytest.mark.parametrize("chunk_tiles", [1, 2, 3, 64])
@pytest.mark.parametrize(("rows", "columns", "symmetric"), [(1, 1, False), (300, 129, False), (700, 700, True)])
def test_chunks_cover_every_pair_once(rows: int, columns: int, symmetric: bool, chunk_tiles: int) -> None:
    rectangle = Rectangle(0, 0, 0 if symmetric else rows, rows, columns, 0 if symmetric else NOWHERE, symmetric)
    seen = torch.zeros(rows, columns, dtype=torch.int64)
    end = 0
    for chunk in cut([rectangle], chunk_tiles):
        assert chunk.mask == end
        end += chunk.mask_tiles
        part = torch.ones(chunk.rows, chunk.columns, dtype=torch.int64)
        x, y = chunk.x, slice(chunk.y.start - rectangle.y, chunk.y.stop - rectangle.y)
        seen[x, y] += part
        if chunk.mirrored:
            seen[y, x] += part.T
    assert (seen == 1).all()
    assert end * TILE_WORDS == mask_words(rows, columns, symmetric)


@pytest.mark.parametrize("chunk_tiles", [1, 2, 64])
def test_chunks_of_a_square_of_two_operands_cover_every_pair_twice(chunk_tiles: int) -> None:
    """Once for the rows and once for the columns, which are others than the rows."""
    rectangle = Rectangle(0, 5, 900, 700, 700, 0, symmetric=True, mirror_block=1)
    seen, end = torch.zeros(700, 700, dtype=torch.int64), 0
    for chunk in cut([rectangle], chunk_tiles):
        assert chunk.mask == end
        assert chunk.mirrored and not chunk.triangle
        end += chunk.mask_tiles
        seen[chunk.x.start - 5 : chunk.x.stop - 5, chunk.y.start - 900 : chunk.y.stop - 900] += 1
    assert (seen == 1).all()
    assert end * TILE_WORDS == 2 * mask_words(700, 700, False)


def test_batches_hold_no_more_than_asked_and_all_in_all_everything() -> None:
    rectangles = (
        Rectangle(0, 0, 700, 700, 900),
        Rectangle(1, 0, 0, 700, 700, 0, symmetric=True),
        Rectangle(0, 0, 700, 700, 700, 0, symmetric=True, mirror_block=2, mirror_softmax=1, softmax_rows=700),
    )
    plan = make_plan(rectangles, 2, 9)
    chunks = [chunk for batch in plan.batches for chunk in batch.chunks]
    assert sorted(chunk.mask for chunk in chunks) == [chunk.mask for chunk in cut(rectangles, 2)]
    assert all(sum(chunk.tiles for chunk in batch.chunks) <= 9 for batch in plan.batches)
    alone = make_plan(rectangles, 2, 9, alone=True)
    assert [len(batch.chunks) for batch in alone.batches] == [1] * len(chunks)
    # Every row of the table is somebody's.
    rows = [(each.start, len(each.chunks) * len(FIELDS)) for batch in plan.batches for each in batch.sets]
    assert all(len(batch.reductions) == 2 for batch in plan.batches)
    reductions = [each for batch in plan.batches for each in batch.reductions if each[1]]
    rows += [(start, entries * len(PARTIAL_FIELDS)) for start, entries in reductions]
    end = 0
    for start, length in sorted(rows):
        assert start == end
        end += length
    assert end == len(plan.table)
