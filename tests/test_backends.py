"""Which backend a call gets, and how the tiled one behaves in the types where rounding shows."""

from __future__ import annotations

import logging
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Problem, largest_errors, make_problem, oracle, values_and_gradients

import gist_fast.functional.backends as backends
from gist_fast import guided_contrastive_loss
from gist_fast.functional.backends import choose_backend, explain_choice, interface, kept, reference, tiled
from gist_fast.functional.blocks import Block, make_blocks
from gist_fast.functional.choices import Direction
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import moved, prepare


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def test_auto_is_tiled_on_a_cpu_and_says_why():
    assert choose_backend("auto", "cpu", torch.float32) == "tiled"
    backend, reason = explain_choice("cpu", torch.float32)
    assert backend == "tiled"
    assert reason


def test_the_environment_overrides_auto_and_only_auto(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert choose_backend("auto", "cpu", torch.float32) == "reference"
    assert choose_backend("tiled", "cpu", torch.float32) == "tiled"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(
        ValueError, match=r"GIST_FAST_BACKEND: expected 'auto', 'triton', 'tiled' or 'reference', got 'fast'"
    ):
        choose_backend("auto", "cpu", torch.float32)


def test_triton_asked_for_by_name_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backends, "triton_obstacle", lambda *_: "there is no GPU")
    with pytest.raises(ValueError, match=r"backend: 'triton' cannot run here: there is no GPU.*Use 'auto' or 'tiled'"):
        choose_backend("triton", "cpu", torch.float32)


def test_auto_takes_triton_where_nothing_is_in_its_way(monkeypatch):
    monkeypatch.setattr(backends, "triton_obstacle", lambda *_: None)
    backends._automatic.cache_clear()
    assert choose_backend("auto", "cuda", torch.bfloat16) == "triton"
    backends._automatic.cache_clear()


def test_auto_falls_back_on_a_gpu_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(backends, "triton_obstacle", lambda *_: "no compiler for this card")
    backends._automatic.cache_clear()
    with caplog.at_level(logging.WARNING, "gist_fast"):
        assert [choose_backend("auto", "cuda", torch.float32) for _ in range(3)] == ["tiled"] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "backend 'auto' falls back to 'tiled' on this GPU: no compiler for this card."
    ]
    backends._automatic.cache_clear()


def values(problem: Problem, backend: str) -> list[torch.Tensor]:
    loss = guided_contrastive_loss(**problem.arguments(), backend=backend, reduction="none")
    return values_and_gradients(loss, problem)


@cache
def in_exact_arithmetic(shape, temperature: float, dtype: torch.dtype):
    """A problem rounded to the type, and exactly so in float64: what both backends strive for; what it comes to, and
    how far the reference is from that."""
    rows, columns, negatives, width, guide_width = shape
    rounded = make_problem(
        rows, columns, negatives, width, guide_width, temperature=temperature, offset=(columns - rows) // 2
    ).to(dtype)
    exact = rounded.to(torch.float64)
    expected = values_and_gradients(oracle(exact)[0], exact)
    return rounded, exact, expected, largest_errors(values(rounded, "reference"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(252, 507, (123,), 96, 40), (64, 64, (), 7, 300)])
@pytest.mark.parametrize("temperature", [0.01, pytest.param(0.1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["scores", "bits"])
def test_tiled_is_no_worse_than_the_reference_of_its_type(monkeypatch, dtype, shape, temperature, form):
    monkeypatch.setattr(tiled, "TILE", 64)
    if form == "bits":
        monkeypatch.setattr(kept, "SCORES_PAIRS", 0)
    rounded, exact, expected, theirs = in_exact_arithmetic(shape, temperature, dtype)
    ours = largest_errors(values(rounded, "tiled"), expected)
    *_, by_temperature = expected
    # "A little" is a step of the type that the result is stored in. The temperature's gradient is a sum over rows of
    # weight * (mean logit - positive's logit) / temperature, in which most of it cancels: its step is that of the sum,
    # taken through coefficients that are rounded to the embeddings' type, as in any mixed-precision product.
    summed = exact.weights.abs().sum() / temperature**2
    steps = [torch.finfo(dtype).eps] * (len(ours) - 1)
    steps.append((torch.finfo(dtype).eps * summed / by_temperature.abs()).item())
    for k, (error, allowed, little) in enumerate(zip(ours, theirs, steps, strict=True)):
        assert error <= 1.5 * allowed + little, f"tensor {k}: error {error}, the reference's {allowed}"


WAYS: list[list[Direction] | None] = [
    None,
    ["query_to_doc", "doc_to_query"],
    ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"],
    ["doc_to_doc", "query_to_doc"],
]


@given(
    rows=st.integers(1, 300),
    offset=st.integers(0, 200),
    more=st.integers(0, 200),
    negatives=st.lists(st.integers(1, 300), max_size=2),
    directions=st.sampled_from(WAYS),
    gathered=st.booleans(),
)
def test_the_bound_on_mask_bytes_holds(rows, offset, more, negatives, directions, gathered):
    blocks = blocks_of(rows, offset, more, negatives, LossConfig(directions=directions), gathered)
    kept.SCORES_PAIRS, before = 0, kept.SCORES_PAIRS
    try:
        check_mask_bytes(blocks)
    finally:
        kept.SCORES_PAIRS = before


def blocks_of(
    rows: int, offset: int, more: int, negatives: list[int], config: LossConfig, gathered: bool
) -> list[Block]:
    """Those of a batch; with `gathered` anchors of all ranks, where they are compared."""
    columns = offset + rows + more
    anchors = columns if gathered and config.gathers_anchors else rows
    return make_blocks(rows, (anchors, columns, *negatives), config, offset)


def check_mask_bytes(blocks: list[Block]) -> None:
    needed = 0
    for tile in tiled.tiles(blocks):
        r, c = tile.shape
        needed += len(list(tiled.sides(tile))) * r * ((c + 7) // 8)
    bound = tiled.mask_bytes(blocks, 1)
    assert needed <= bound
    pairs = sum(b.rows * b.columns for b in blocks)
    assert bound <= pairs / 8 + sum(2 * b.rows + b.columns + 8 for b in blocks)


@given(
    rows=st.integers(1, 90),
    offset=st.integers(0, 50),
    more=st.integers(0, 50),
    negatives=st.lists(st.integers(1, 90), max_size=1),
    directions=st.sampled_from(WAYS),
    weighted=st.booleans(),
    gathered=st.booleans(),
)
def test_tiles_cover_every_pair_once(rows, offset, more, negatives, directions, weighted, gathered):
    weighting = {"hardness_mode": "in_batch_negatives", "hardness_strength": 1.0} if weighted else {}
    config = LossConfig(directions=directions, **weighting)
    blocks = blocks_of(rows, offset, more, negatives, config, gathered)
    before, tiled.TILE = tiled.TILE, 16
    try:
        check_tiles(blocks)
    finally:
        tiled.TILE = before


def check_tiles(blocks: list[Block]) -> None:
    """Each pair of each block is in one side of one tile, and what never counts is where the tile says."""
    seen = [torch.zeros(block.rows, block.columns, dtype=torch.int64) for block in blocks]
    never = [torch.zeros_like(each) for each in seen]
    for tile in tiled.tiles(blocks):
        local = torch.zeros(tile.shape, dtype=torch.int64)
        local.diagonal(tile.excluded).fill_(1)
        for side in tiled.sides(tile):
            block, candidates, excluded = blocks[side.block_index], tile.columns, local
            if side.axis == 0:
                # The same two rows, whose scores these are: of the operands, not of the blocks.
                candidates, excluded = moved(tile.rows, tile.block.row_start), local.T
                assert moved(side.own, block.row_start) == tile.columns
                ours, theirs = tile.block, block
                assert (ours.row_operand, ours.column_operand) == (theirs.column_operand, theirs.row_operand)
            else:
                assert side.own == tile.rows and block is tile.block
            assert side.softmax == moved(side.own, block.softmax * block.rows)
            seen[side.block_index][side.own, candidates] += 1
            never[side.block_index][side.own, candidates] += excluded
    for block, times, excluded in zip(blocks, seen, never, strict=True):
        assert (times == 1).all(), block.name
        expected = torch.zeros_like(excluded)
        if block.excluded is not None:
            expected.diagonal(block.excluded).fill_(1)
        assert torch.equal(excluded, expected), block.name


@pytest.mark.parametrize("form", ["scores", "bits", "recompute"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    ("directions", "options"),
    [
        (WAYS[1], {"partition_mode": "per_direction"}),
        (WAYS[1], {"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0, "groups": torch.arange(60) // 3}),
        (WAYS[2], {"hard": True, "groups": torch.arange(60) // 3, "matryoshka_dims": [12, 5]}),
        (WAYS[2], {"triplet_margin": 0.9}),
    ],
    ids=["a softmax each", "weighted", "every way, hard", "every way, triplet"],
)
def test_tiled_is_the_reference_in_every_direction(monkeypatch, form, gathered, directions, options):
    monkeypatch.setattr(tiled, "TILE", 16)
    if form == "bits":
        monkeypatch.setattr(kept, "SCORES_PAIRS", 0)
    if form == "recompute" and "triplet_margin" in options:
        pytest.skip("the term reads the masks")
    problem = make_problem(37, 60, (57,), anchors=60 if gathered else 37, offset=11, margin=0.1, temperature=0.2)
    # Scores are kept of float32 alone.
    given = problem.to(torch.float32) if form == "scores" else problem
    found = []
    for one, backend in ((given, "tiled"), (problem, "reference")):
        mask_bits = "recompute" if (form, backend) == ("recompute", "tiled") else "keep"
        more = {"rows": 37, "directions": directions, "backend": backend, "mask_bits": mask_bits}
        loss, stats = guided_contrastive_loss(**one.arguments(), **options, **more, reduction="none", return_stats=True)
        found.append([*values_and_gradients(loss, one), stats.masked, stats.hardest_negative_similarity])
    errors = largest_errors(*found)
    assert max(errors) < (1e-4 if form == "scores" else 1e-10), errors


@pytest.mark.parametrize("form", ["scores", "bits"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("directions", WAYS)
def test_the_product_of_a_block_s_mask(monkeypatch, form, gathered, directions):
    """Of every block, also of one whose mask stands among those of another."""
    monkeypatch.setattr(tiled, "TILE", 16)
    if form == "bits":
        monkeypatch.setattr(kept, "SCORES_PAIRS", 0)
    config, offset = LossConfig(margin=0.1, directions=directions), 11
    blocks = blocks_of(37, offset, 12, [57], config, gathered)
    given = make_problem(37, 60, (57,), anchors=60 if gathered and config.gathers_anchors else 37, offset=offset)
    given = given.to(torch.float32)
    student = (given.anchors, given.positives, *given.negatives)
    guide = (given.guide_anchors, given.guide_positives, *given.guide_negatives)
    with torch.no_grad():
        call = interface.Problem(
            student, guide, torch.tensor(0.1), None, (), (), 37, offset, True, config
        )  # fmt: skip
        bits = tiled.forward(call, True).mask_bits
        operands = prepare(student, guide, call.temperature, config, 37, offset)
        for index, block in enumerate(blocks):
            mask = reference.decide(operands, block)[1].float()
            for transposed, matrix in ((False, mask), (True, mask.T)):
                other = torch.arange(3.0 * matrix.shape[1]).view(-1, 3) % 7 - 3
                found = tiled.mask_product(blocks, 1, bits, index, other, transposed)
                assert torch.equal(found, matrix @ other), f"{block.name}, transposed: {transposed}"


def test_masks_are_the_references_outside_a_band_around_the_threshold():
    """In bfloat16 the two sum the same products in another order, so only ties within rounding may part."""
    problem = make_problem(400, width=48, guide_width=64, learned_temperature=False).to(torch.bfloat16)
    student = (problem.anchors.detach(), problem.positives.detach())
    guide = problem.guide_anchors, problem.guide_positives
    operands = prepare(student, guide, torch.tensor(0.05), LossConfig(), 400)
    exact = operands.guide[0].double() @ operands.guide[1].double().T
    band = 4 * torch.finfo(torch.float32).eps * 64**0.5
    near = ((exact - operands.guide_thresholds[:, None].double()).abs() < band).fill_diagonal_(False)
    inside = near.sum().item()  # the positives themselves, on the diagonal, stand at their threshold
    assert inside < 1e-3 * exact.numel()
    clear = (exact > operands.guide_thresholds[:, None].double() + band).fill_diagonal_(False)
    possible = (exact > operands.guide_thresholds[:, None].double() - band).fill_diagonal_(False)
    _, stats = guided_contrastive_loss(
        **problem.arguments() | {"contrast_anchors": False, "contrast_positives": False},
        backend="tiled",
        return_stats=True,
    )
    assert clear.sum().item() <= stats.masked.item() <= possible.sum().item()
