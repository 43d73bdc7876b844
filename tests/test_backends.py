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
from gist_fast.functional.backends import choose_backend, explain_choice, kept, tiled
from gist_fast.functional.blocks import make_blocks
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import prepare


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


@given(
    rows=st.integers(1, 300),
    offset=st.integers(0, 200),
    more=st.integers(0, 200),
    negatives=st.lists(st.integers(1, 300), max_size=2),
)
def test_the_bound_on_mask_bytes_holds(rows, offset, more, negatives):
    kept.SCORES_PAIRS, before = 0, kept.SCORES_PAIRS
    try:
        check_mask_bytes(rows, offset, more, negatives)
    finally:
        kept.SCORES_PAIRS = before


def check_mask_bytes(rows, offset, more, negatives):
    columns = [offset + rows + more, *negatives]
    blocks = make_blocks(rows, columns, LossConfig(), offset)
    needed = 0
    for block in blocks:
        for tile in tiled._tiles(block):
            r, c = tile.shape
            needed += len(list(tiled._sides(block, tile))) * r * ((c + 7) // 8)
    bound = tiled.mask_bytes(blocks, 1)
    assert needed <= bound
    pairs = sum(b.rows * b.columns for b in blocks)
    assert bound <= pairs / 8 + sum(2 * b.rows + b.columns + 8 for b in blocks)


@given(rows=st.integers(1, 90), offset=st.integers(0, 50), more=st.integers(0, 50))
def test_tiles_cover_every_pair_once(rows, offset, more):
    columns = offset + rows + more
    blocks = make_blocks(rows, [columns], LossConfig(), offset)
    before, tiled.TILE = tiled.TILE, 16
    try:
        for block in blocks:
            seen = torch.zeros(block.rows, block.columns, dtype=torch.int64)
            for tile in tiled._tiles(block):
                seen[tile.rows, tile.columns] += 1
                if tile.mirrored:
                    mirror = slice(tile.columns.start - block.excluded, tile.columns.stop - block.excluded)
                    across = slice(tile.rows.start + block.excluded, tile.rows.stop + block.excluded)
                    seen[mirror, across] += 1
            assert (seen == 1).all()
    finally:
        tiled.TILE = before


def test_masks_are_the_references_outside_a_band_around_the_threshold():
    """In bfloat16 the two sum the same products in another order, so only ties within rounding may part."""
    problem = make_problem(400, width=48, guide_width=64, learned_temperature=False).to(torch.bfloat16)
    student = (problem.anchors.detach(), problem.positives.detach())
    operands = prepare(student, (problem.guide_anchors, problem.guide_positives), torch.tensor(0.05), LossConfig())
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
