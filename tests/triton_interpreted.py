"""The kernels run by Triton's interpreter, held to float64. `test_triton_backend.py` starts this file in a process of
its own, because the interpreter must be chosen before Triton is imported:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py

**Masks** are held to exact scores of the very operands that the kernels multiplied. Inside a band of `BAND` around a
row's limit, sums in float32 may fall on either side; few pairs may lie there. Everything else is then compared under
the kernels' own masks, so that no tolerance has to make room for a flipped pair.

**Values**: the error against float64 is at most that of a plain torch computation in the operands' type, plus a little.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from gist_fast.kernels import launch, layout
from gist_fast.kernels.config import Config, choose_config
from gist_fast.kernels.layout import TILE, tiles
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from test_operator import check_a_compiled_step, check_operators
from torch import Tensor

from benchmarks.gpu.interpreter import hurry
from gist_fast import guided_contrastive_loss
from gist_fast.functional.backends import choose_backend, kernel_passes, kernel_work, triton
from gist_fast.functional.backends.interface import Problem as Call
from gist_fast.functional.backends.kernel_work import Work
from gist_fast.functional.blocks import Block, make_blocks
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.operands import (
    Operands,
    Student,
    UnitRows,
    add_positives,
    embedding_gradients,
    make_thresholds,
    operand_norm,
    prepare,
    tie_band,
)

assert triton.interpreted(), "run me with TRITON_INTERPRET=1"


hurry()


EXAMPLES = int(os.environ.get("GIST_FAST_TEST_EXAMPLES", 25))


@pytest.fixture(autouse=True)
def _look_for_overflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are looked at for overflow, which is half of the interpreter's time, in the test of all shapes, and in
    that of all variants in several chunks."""
    from triton.runtime.interpreter import interpreter_builder

    wanted = request.node.name in ("test_everything_agrees_with_float64", "test_variants_in_many_tiles_and_chunks[own]")
    monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, sanitize_overflow=wanted))


@pytest.fixture(autouse=True)
def _see_what_is_not_written() -> Iterator[None]:
    """torch fills what `torch.empty` makes with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


BAND = 2e-6
"""Cosine: a dozen roundings of float32, the type of all sums, at 1.0."""


@dataclass(frozen=True)
class Problem:
    """A call of the loss, small enough to hold all its scores."""

    rows: int = 70
    extra: int = 0
    """Positives beyond the rows' own."""
    others: bool = False
    """Whether there is an anchor of each positive, the rows' own first."""
    offset: int = 0
    negatives: tuple[int, ...] = ()
    width: int = 24
    guide_width: int = 40
    guide: str = "own"
    """``own``, ``self`` or ``none``."""
    contrast_anchors: bool = True
    contrast_positives: bool = True
    directions: tuple[str, ...] = ()
    """In the place of the two; empty for them."""
    per_direction: bool = False
    margin: float = 0.1
    relative: bool = False
    temperature: float = 0.05
    dtype: torch.dtype = torch.float32
    guide_dtype: torch.dtype = torch.float32
    seed: int = 0
    margins: bool = False
    """One a row, around `margin`."""
    mask_ties: bool = False
    hard: bool = False
    groups: int = 0
    """How many; 0 for none."""
    other_groups: int = 0
    """Of the second groups, of negatives too, likewise."""
    mask_negatives: bool = True
    hardness_mode: str = ""
    hardness_strength: float = 0.0
    widths: tuple[int, ...] = ()

    def config(self) -> LossConfig:
        return LossConfig(
            margin=self.margin,
            margin_strategy="relative" if self.relative else "absolute",
            mask_ties=self.mask_ties,
            mask_negatives=self.mask_negatives,
            self_guided=self.guide == "self",
            hard=self.hard,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            directions=list(self.directions) or None,
            partition_mode="per_direction" if self.per_direction else "joint",
            hardness_mode=self.hardness_mode or None,
            hardness_strength=self.hardness_strength,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of anchors, positives and each column of negatives."""
        positives = self.rows + self.extra
        return positives if self.others else self.rows, positives, *self.negatives

    def blocks(self) -> list[Block]:
        return make_blocks(self.rows, self.sizes, self.config(), self.offset)

    def in_softmax(self, index: int) -> list[int]:
        """Which of the blocks each row has in a softmax, by their names."""
        names = [block.name for block in self.blocks()]
        return [k for k, name in enumerate(names) if index == (self.per_direction and name == "pa")]

    @property
    def softmaxes(self) -> int:
        return 1 + (self.per_direction and "doc_to_query" in self.directions)

    def embeddings(self) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        common = torch.randn(1, self.width, generator=generator)
        student = [torch.randn(n, self.width, generator=generator) + 0.5 * common for n in self.sizes]
        guide = [torch.randn(n, self.guide_width, generator=generator) for n in self.sizes]
        return [x.to(self.dtype) for x in student], [x.to(self.guide_dtype) for x in guide]

    def call(self) -> Call:
        """As a backend gets it."""
        student, guide = self.embeddings()
        generator = torch.Generator().manual_seed(self.seed + 1)
        margins = self.margin + 0.1 * torch.rand(self.rows, generator=generator) if self.margins else None
        # Numbers far apart, of which int32 would make one and the same.
        drawn = (self.groups, sum(self.sizes[:2])), (self.other_groups, sum(self.sizes))
        groups = [torch.randint(most, (size,), generator=generator) << 32 for most, size in drawn if most]
        judged = slice(None if self.mask_negatives else 2)
        return Call(
            tuple(student),
            tuple(guide[judged]) if self.guide == "own" else (),
            torch.tensor(self.temperature),
            margins,
            tuple(groups),
            self.widths,
            self.rows,
            self.offset,
            self.rows % 2 == 0,
            self.config(),
        )


FAINT = Problem(
    rows=1,
    negatives=(80, 137),
    width=8,
    contrast_anchors=False,
    contrast_positives=False,
    margin=0.0,
    temperature=0.0056,
    dtype=torch.float16,
    seed=38,
    hardness_mode="in_batch_negatives",
    hardness_strength=2.0,
)
"""Negatives of so little weight that float16 would know their coefficients to a digit."""

SHORT_LEADING_COLUMN = Problem(
    rows=60,
    extra=60,
    offset=42,
    negatives=(124, 140),
    width=32,
    guide="none",
    contrast_anchors=False,
    margin=0.0,
    temperature=1.0,
    seed=83,
    widths=(32, 1),
)
"""A row of norm 4.5 whose leading column holds 0.03: by that dim its gradient is 0, from terms that are large."""


@st.composite
def problems(draw: st.DrawFn, rows: int = 160, most: int = 140) -> Problem:
    """Of so many rows, and so many of each that is beside them."""
    extra = draw(st.integers(0, most))
    return Problem(
        rows=draw(st.integers(1, rows)),
        extra=extra,
        offset=draw(st.integers(0, extra)),
        negatives=tuple(draw(st.lists(st.integers(1, most), max_size=2))),
        width=draw(st.integers(1, 140)),
        guide_width=draw(st.integers(1, 90)),
        guide=draw(st.sampled_from(("own", "own", "self", "none"))),
        contrast_anchors=draw(st.booleans()),
        contrast_positives=draw(st.booleans()),
        margin=draw(st.floats(-0.3, 0.3)),
        relative=draw(st.booleans()),
        temperature=10.0 ** draw(st.floats(-3, 0)),
        dtype=draw(st.sampled_from((torch.float32, torch.float16))),
        guide_dtype=draw(st.sampled_from((torch.float32, torch.float16))),
        seed=draw(st.integers(0, 99)),
    )


BOTH_WAYS = ("query_to_doc", "doc_to_query")
EVERY_WAY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [
    (BOTH_WAYS, True),
    (EVERY_WAY, False),
    (BOTH_WAYS, False),
    (("doc_to_query", "query_to_doc"), True),
    (("query_to_doc",), False),
    (("query_to_doc",), True),
    (("query_to_doc", "doc_to_doc"), False),
    (("query_to_query", "query_to_doc"), False),
    (("doc_to_query", "query_to_doc", "query_to_query"), False),
    (("doc_to_doc", "doc_to_query", "query_to_doc"), False),
]
"""What is compared, and whether each direction has a softmax of its own."""


@st.composite
def variants(draw: st.DrawFn, directed: bool = False) -> Problem:
    """Problems with some of the loss's variants; of `DIRECTIONS`, or as without any."""
    directions, per_direction = draw(st.sampled_from(DIRECTIONS)) if directed else ((), False)
    # The interpreter's time goes by tiles, of which they have more.
    problem = draw(problems(80, 50) if directions else problems())
    mode = draw(st.sampled_from(("", "", "in_batch_negatives", "hard_negatives", "all_negatives")))
    has_own = mode or "doc_to_doc" in directions
    negatives = tuple(n + problem.offset + problem.rows for n in problem.negatives) if has_own else problem.negatives
    if mode == "hard_negatives" and not negatives:
        negatives = (problem.offset + problem.rows,)
    below = draw(st.lists(st.integers(1, problem.width), max_size=2, unique=True))
    # The embeddings' own width may be among them or not.
    whole = {problem.width} if draw(st.booleans()) else set()
    widths = tuple(sorted(whole | set(below), reverse=True)) if below else ()
    if directions:
        problem = replace(problem, contrast_anchors=True, contrast_positives=True)
    return replace(
        problem,
        negatives=negatives,
        directions=directions,
        per_direction=per_direction,
        others=len({"query_to_query", "doc_to_query"} & set(directions)) > 0 and draw(st.booleans()),
        margins=draw(st.booleans()),
        mask_ties=draw(st.booleans()),
        # A student that guides itself by its own floors would be refused further up.
        hard=problem.guide != "self" and draw(st.booleans()),
        groups=draw(st.sampled_from((0, 2, 50))),
        other_groups=draw(st.sampled_from((0, 0, 3, 40))),
        mask_negatives=problem.guide == "none" or draw(st.booleans()),
        hardness_mode=mode,
        hardness_strength=draw(st.floats(0.1, 9.0)) if mode else 0.0,
        widths=widths,
    )


def operands_of(call: Call, config: Config) -> Operands:
    """What the kernels make of the embeddings, which is what plain torch makes of them but for a last bit."""
    work = Work(call, config, norms=True)
    work.make_counts()
    work.decide()
    plain = prepare(call.student, call.guide, call.temperature, call.config, call.rows, call.offset, dims=call.dims)
    own = slice(call.offset, call.offset + call.rows)
    counts = [len(x) for x in call.student]
    students, squared = [], operand_norm(call.temperature).item() ** 2
    for level, (stack, student) in enumerate(zip(work.stacks, plain.matryoshka, strict=True)):
        width = student.operands[0].shape[1]
        assert (stack[: work.count, width:] == 0).all(), "columns that fill up are not 0"
        units = stack[: work.count, :width].split(counts)
        norms = tuple(n[:, None] for n in work.norms[level].split(counts))
        assert all(map(alike, norms, student.norms)) and all(map(alike, units, student.operands))
        students.append(Student(units, work.positives[level], norms))
        scores = (units[0][: call.rows].double() * units[1][own].double()).sum(1)
        assert alike(work.positives[level], scores, squared)
    guide, guide_thresholds = None, None
    margin = call.config.margin if call.margins is None else call.margins
    rule = {"relative": call.config.relative, "mask_ties": call.config.mask_ties}
    if call.guide:
        width = call.guide[0].shape[1]
        counts = [len(x) for x in call.guide]
        units = work._guide_stack(call.guide)[: sum(counts), :width].split(counts)
        assert all(alike(u, g.whole) for u, g in zip(units, plain.guide_rows, strict=True))
        guide = tuple(UnitRows(u, torch.ones(len(u), 1)) for u in units)
        scores = (units[0][: call.rows].double() * units[1][own].double()).sum(1)
        guide_thresholds = make_thresholds(scores, margin, band=tie_band(torch.float32, width), **rule)
    student_band = tie_band(torch.float32, students[0].operands[0].shape[1])
    if call.config.self_guided:
        scores = work.positives[0].double() / squared
        guide_thresholds = make_thresholds(scores, margin, band=student_band, **rule) * squared
    student_thresholds = work.positives[0] - student_band * squared if call.config.hard else None
    thresholds = work.guide_thresholds, work.student_thresholds
    by_guide, by_student = (of_each_row(each, call.rows) for each in thresholds)
    known = (
        (by_guide, guide_thresholds, squared if call.config.self_guided else 1.0),
        (by_student, student_thresholds, squared),
    )
    for found, expected, size in known:
        assert (found is None) == (expected is None)
        assert found is None or alike(found, expected, size)
    return replace(
        plain,
        matryoshka=tuple(students),
        guide_rows=guide,
        guide_thresholds=by_guide,
        student_thresholds=by_student,
        groups=call.groups,
    )


def of_each_row(numbers: Tensor | None, rows: int) -> Tensor | None:
    """Those that stand there once a softmax, once."""
    if numbers is None:
        return None
    first = numbers[:rows]
    assert torch.equal(numbers, first.repeat(len(numbers) // rows)), "softmaxes of other rows"
    return first


def alike(found: Tensor, known: Tensor, size: float = 0.0) -> bool:
    """Whether values differ by a rounding in their type, or by that of a sum of numbers as large as the largest; with
    `size`, by `BAND` of it: so large are the terms of a sum that may come to next to nothing."""
    eps = torch.finfo(found.dtype).eps
    least = max(4 * eps * float(known.abs().max()), BAND * size, 1e-30)
    return torch.allclose(found.double(), known.double(), rtol=2 * eps, atol=least)


def exact_scores(operands: tuple[Tensor, ...], block: Block) -> Tensor:
    rows = operands[block.row_operand][block.row_start : block.row_start + block.rows]
    return rows.double() @ operands[block.column_operand].double().T


def excluded_pairs(block: Block) -> Tensor:
    out = torch.zeros(block.rows, block.columns, dtype=torch.bool)
    if block.excluded is not None:
        out.diagonal(block.excluded).fill_(True)
    return out


def hidden_pairs(bits: Tensor, blocks: list[Block]) -> list[Tensor]:
    """The masks that the bits hold, ``[rows, columns]`` bools a block, by the description of `kernels.layout`."""
    words, side = bits.view(torch.int32), layout.CHUNK_TILES
    stored = words.view(-1, TILE, TILE // 32)
    unpacked = ((stored[..., None] >> torch.arange(32)) & 1).bool().view(-1, TILE, TILE)
    # 2 where no bit says anything.
    out, cursor = [torch.full((block.rows, block.columns), 2, dtype=torch.int8) for block in blocks], 0
    served = {block.transposes: index for index, block in enumerate(blocks) if block.transposes is not None}

    def put(piece: Tensor, r: int, c: int, found: Tensor) -> None:
        piece[r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE] = found

    for index, block in enumerate(blocks):
        # The block whose rows the columns of its square are, or itself.
        other = index if block.symmetric else served.get(block.name)
        spans = [(0, block.columns, False)]
        if other is not None or block.transposes is not None:
            own = block.excluded + block.rows
            spans = [(0, block.excluded, False), (block.excluded, own, True), (own, block.columns, False)]
            if block.transposes is not None:
                del spans[1]  # it is in the other's
        for first, last, is_square in spans:
            if first == last:
                continue
            down, across = tiles(block.rows), tiles(last - first)
            piece = torch.zeros(down * TILE, across * TILE, dtype=torch.bool)
            half = is_square and other == index
            by_columns = piece if half else torch.zeros_like(piece.T)
            for r0 in range(0, down, side):
                for c0 in range(r0 if half else 0, across, side):
                    height, breadth = min(side, down - r0), min(side, across - c0)
                    on_diagonal = half and r0 == c0
                    for r in range(height):
                        for c in range(breadth):
                            place = unpacked[cursor + r * breadth + c]
                            put(piece, r0 + r, c0 + c, place.T if on_diagonal and r > c else place)
                            if is_square and not on_diagonal:
                                put(by_columns, c0 + c, r0 + r, unpacked[cursor + (height + r) * breadth + c].T)
                        if on_diagonal:
                            diagonal = unpacked[cursor + r * breadth + r]
                            assert torch.equal(diagonal, unpacked[cursor + height * breadth + r].T)
                    cursor += height * breadth
                    if is_square:
                        cursor += height if on_diagonal else height * breadth
            assert piece[block.rows :].all() and piece[:, last - first :].all(), "pairs outside the matrix count"
            out[index][:, first:last] = piece[: block.rows, : last - first]
            if is_square and not half:
                theirs, rows = blocks[other], block.rows
                assert by_columns[rows:].all() and by_columns[:, rows:].all(), "pairs outside the matrix count"
                out[other][:, theirs.excluded : theirs.excluded + rows] = by_columns[:rows, :rows]
    assert cursor == len(unpacked)
    assert all((mask < 2).all() for mask in out)
    return [mask.bool() for mask in out]


def masks_of(problem: Problem, operands: Operands, bits: Tensor) -> list[Tensor]:
    blocks = problem.blocks()
    return hidden_pairs(bits, blocks) if operands.masks else [excluded_pairs(b) for b in blocks]


def closely(
    found: Tensor,
    exact: Tensor,
    plain: Tensor,
    what: str,
    little: float,
    largest: float = 1e-6,
    rounding: Tensor | float = 0.0,
) -> None:
    """The kernel's error is at most the plain computation's plus `little` of the largest value, or of what it is the
    difference of, plus what `rounding` allows each row."""
    found, plain = found.double(), plain.double()
    finite = exact.isfinite()
    assert torch.equal(found.isfinite(), finite), f"{what}: finite where float64 is not, or the other way round"
    zero = torch.zeros_like(exact)
    error = torch.where(finite, (found - exact).abs(), zero)
    allowed = torch.where(finite, (plain - exact).abs(), zero).max() + little * torch.where(
        finite, exact.abs(), zero
    ).max().clamp_min(largest)
    beyond = error - (allowed + rounding)
    if beyond.max() > 0:
        worst = np.unravel_index(int(beyond.argmax()), beyond.shape)
        pytest.fail(f"{what}: {found[worst]} instead of {exact[worst]} at {worst}, {beyond[worst]} more than allowed")


def boosted(logits: Tensor, block: Block, operands: Operands) -> Tensor:
    """The logits times what hardness weighting makes of them, by its definition."""
    factor = torch.ones_like(logits)
    place = torch.zeros(logits.shape, dtype=torch.bool)
    if block.own_negative is not None:
        place.diagonal(block.own_negative).fill_(True)
    if block.scaled != "none":
        chosen = {"all": torch.ones_like(place), "own": place, "others": ~place}[block.scaled]
        factor[chosen] = operands.logit_scale.to(logits.dtype)
    return logits * factor


def plain_logits(
    operands: Operands, blocks: list[Block], hidden: list[Tensor], level: int, dtype: torch.dtype
) -> list[Tensor]:
    """Each block's, ``[rows, columns]``, -inf where hidden, computed in `dtype`."""
    student = tuple(u.to(dtype) for u in operands.matryoshka[level].operands)
    return [
        boosted(
            student[b.row_operand][b.row_start : b.row_start + b.rows] @ student[b.column_operand].T, b, operands
        ).masked_fill(h, -math.inf)
        for b, h in zip(blocks, hidden, strict=True)
    ]


def plain_dlogits(problem: Problem, logits: list[Tensor], lse2: Tensor, weights: Tensor) -> list[Tensor]:
    """Derivatives by each block's logits, in their type; of a half type computed in float32. Of each softmax ``[S, B]``
    numbers."""
    scale = torch.promote_types(logits[0].dtype, torch.float32)
    found = {}
    for softmax, (its_lse2, its_weights) in enumerate(zip(lse2.to(scale), weights.to(scale), strict=True)):
        for k in problem.in_softmax(softmax):
            values = torch.exp2(logits[k].to(scale) - its_lse2[:, None]) * its_weights[:, None]
            found[k] = values.to(logits[k].dtype)
    return [found[k] for k in range(len(logits))]


def plain_gradients(student: list[Tensor], blocks: list[Block], dlogits: list[Tensor]) -> list[Tensor]:
    """By the operands, in their type."""
    gradients = [torch.zeros_like(u) for u in student]
    for block, w in zip(blocks, dlogits, strict=True):
        rows = slice(block.row_start, block.row_start + block.rows)
        gradients[block.row_operand][rows] += w @ student[block.column_operand]
        gradients[block.column_operand] += w.T @ student[block.row_operand][rows]
    return gradients


def projection_rounding(
    call: Call, blocks: list[Block], dlogits: list[list[Tensor]], by_positive: Tensor
) -> list[Tensor]:
    """How far each row's gradient, ``scale / |x| * (du - v (v . du))``, may be off, ``[N_k, 1]`` each, because `v` and
    its two products are rounded: by 4 eps of the sum of the absolute terms of `du`, times ``scale / |x|``. That much
    may be left where nothing should be, as of a single column. `by_positive` ``[L, S, B]`` are the derivatives by the
    positives' logits."""
    band = 4 * torch.finfo(torch.float32).eps * operand_norm(call.temperature).item() ** 2
    ones = [torch.ones(len(x), 1, dtype=torch.float64) for x in call.student]
    found = [torch.zeros_like(one) for one in ones]
    for level, width in enumerate(call.dims or (call.student[0].shape[1],)):
        terms = plain_gradients(ones, blocks, [w.abs() for w in dlogits[level]])
        add_positives(terms, ones, by_positive[level].abs().sum(0), call.offset)
        for total, sums, x in zip(found, terms, call.student, strict=True):
            total += band * sums / x[:, :width].double().norm(dim=1, keepdim=True)
    return found


def by_embedding(
    call: Call, operands: Operands, found: list[list[Tensor]], dlogits: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Gradients by the embeddings and the temperature of those by the operands at each dim and by the positives'
    logits ``[L, B]``, computed in `dtype`."""
    sums = [torch.zeros(x.shape, dtype=dtype) for x in call.student]
    along = torch.zeros((), dtype=dtype)
    for gradients, student, dlogit in zip(found, operands.matryoshka, dlogits, strict=True):
        wide, units = [g.to(dtype) for g in gradients], [u.to(dtype) for u in student.operands]
        add_positives(wide, units, dlogit.to(dtype), call.offset)
        width = units[0].shape[1]
        narrow = [x[:, :width].to(dtype) for x in call.student]
        norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in narrow]
        got, more = embedding_gradients(wide, narrow, norms, call.temperature, torch.ones((), dtype=dtype))
        along = along + more
        for total, part in zip(sums, got, strict=True):
            total[:, :width] += part
    return [*sums, along]


def check_masks(problem: Problem, operands: Operands, hidden: list[Tensor], masked: list[int], easy: list[int]) -> None:
    """Masks and counts against exact scores of the operands that the kernels multiplied."""
    unit = operand_norm(torch.tensor(problem.temperature)).item() ** 2
    for block, mask, by_guide, by_floor in zip(problem.blocks(), hidden, masked, easy, strict=True):
        excluded = excluded_pairs(block)
        assert mask[excluded].all(), f"{block.name}: a pair counts that never should"
        assert by_guide + by_floor == int((mask & ~excluded).sum()), f"{block.name}: the count is not that of the bits"
        if not operands.masks:
            continue
        expected = torch.zeros_like(mask)
        near = torch.zeros_like(mask)
        if operands.guide is not None and block.guided:
            distance = exact_scores(operands.guide, block) - operands.guide_thresholds.double()[:, None]
            expected |= distance > 0
            near |= distance.abs() <= BAND * (unit if problem.guide == "self" else 1.0)
        for rows, columns in operands.groups_of(block):
            same = rows[:, None] == columns
            expected |= same
            near &= ~same
        by_guide_alone = int((expected & ~excluded).sum())
        assert abs(by_guide - by_guide_alone) <= int((near & ~excluded).sum()), f"{block.name}: too many are masked"
        if operands.student_thresholds is not None:
            distance = exact_scores(operands.student, block) - operands.student_thresholds.double()[:, None]
            expected |= distance < 0
            near |= distance.abs() <= BAND * unit
        near &= ~excluded
        wrong = (mask != expected) & ~excluded & ~near
        assert not wrong.any(), f"{block.name}: {wrong.nonzero()[0].tolist()} decided wrongly"
        # Width 1 and the like: all cosines are 1 or -1, and every pair is a tie.
        if min(max(problem.widths, default=problem.width), problem.guide_width) > 8:
            assert near.sum() <= 2 + 1e-3 * near.numel(), f"{block.name}: {near.sum()} pairs in the band"


def check_products(problem: Problem, bits: Tensor, hidden: list[Tensor]) -> None:
    """Masks multiplied by numbers so small that every sum is exact."""
    blocks = problem.blocks()
    for index, (block, mask) in enumerate(zip(blocks, hidden, strict=True)):
        counted = (mask & ~excluded_pairs(block)).double()
        for transposed, matrix in ((False, counted), (True, counted.T)):
            other = torch.arange(3 * matrix.shape[1]).view(-1, 3) % 7 - 3
            found = triton.mask_product(blocks, 1, bits, index, other.to(problem.dtype), transposed)
            assert torch.equal(found.double(), matrix @ other.double()), f"{block.name}, transposed: {transposed}"


def check(problem: Problem, columns: int = TILE, descriptors: bool = False) -> None:
    """Everything that a backend returns, against float64."""
    call, blocks = problem.call(), problem.blocks()
    size = max(problem.dtype.itemsize, problem.guide_dtype.itemsize if problem.guide == "own" else 0)
    config = choose_config("sm_90", size)
    if columns != TILE or descriptors:
        launches = {
            name: replace(launch, columns=columns, descriptors=descriptors)
            for name, launch in config.launches().items()
        }
        config = replace(config, **launches)
    operands = operands_of(call, config)
    kept = kernel_passes.forward_with(config, call, True)
    hidden = masks_of(problem, operands, kept.mask_bits)
    check_masks(problem, operands, hidden, kept.masked.tolist(), kept.easy_negatives.tolist())
    if operands.masks and operands.student_thresholds is None:
        check_products(problem, kept.mask_bits, hidden)

    levels, rows, softmaxes = len(operands.matryoshka), problem.rows, problem.softmaxes
    upstream = torch.randn(levels, softmaxes * rows, generator=torch.Generator().manual_seed(1))
    upstream = upstream / upstream.abs().max()
    if call.one_sign:
        upstream = -upstream.abs()
    to_cosine = math.log(2) * problem.temperature
    logits_in = {
        dtype: [plain_logits(operands, blocks, hidden, k, dtype) for k in range(levels)]
        for dtype in (torch.float64, problem.dtype)
    }
    lse2 = torch.empty(levels, softmaxes, rows, dtype=torch.float64)
    for level, student in enumerate(operands.matryoshka):
        positives, hardest = student.positives.double(), []
        for softmax in range(softmaxes):
            logits, plain = (
                torch.cat([logits_in[dtype][level][k] for k in problem.in_softmax(softmax)], dim=1)
                for dtype in (torch.float64, problem.dtype)
            )
            plain = plain.float()
            exact_lse = torch.logsumexp(logits * math.log(2), 1) / math.log(2)
            plain_lse = torch.logsumexp(plain * math.log(2), 1) / math.log(2)
            at = slice(softmax * rows, (softmax + 1) * rows)
            closely(kept.lse2[level, at], exact_lse, plain_lse, f"lse2 {level}, {softmax}", 2e-6)
            losses = [
                torch.nn.functional.softplus(math.log(2) * (lse - own), threshold=200)
                for lse, own in ((exact_lse, positives), (plain_lse, student.positives))
            ]
            closely(kept.loss[level, at], *losses, f"loss {level}, {softmax}", 2e-6 + 2e-7 / problem.temperature)
            hardest.append((logits.amax(1), plain.amax(1)))
            lse2[level, softmax] = exact_lse
        if level == 0:
            largest = [torch.stack(each).amax(0) * to_cosine for each in zip(*hardest, strict=True)]
            closely(kept.hardest, *largest, "hardest", 2e-6)
            closely(kept.positive, positives * to_cosine, student.positives * to_cosine, "positive", 2e-6)

    bits = kept.mask_bits if operands.masks else None
    found = kernel_passes.backward_with(config, call, upstream, kept.lse2, bits)
    # A dlogit 2^(s - lse) carries the absolute error of s and of lse, float32 of up to 1.44 / temperature, with what
    # hardness weighting makes of it; and it is rounded to the operands' type, as in any product of theirs.
    size = 1.5 / problem.temperature + 1.5 * problem.hardness_strength
    little = 1e-5 + 4e-7 * size + (0 if problem.dtype == torch.float32 else 1e-3)
    weights = math.log(2) * upstream.double().view(levels, softmaxes, rows)
    own = torch.stack([student.positives.double() for student in operands.matryoshka])[:, None]
    total, by_positive = torch.logaddexp2(lse2, own), -weights * torch.sigmoid(math.log(2) * (lse2 - own))
    # The positive is in each softmax.
    positive_dlogits = by_positive.sum(1)
    dlogits_in = {
        dtype: [plain_dlogits(problem, *each) for each in zip(logits, total, weights, strict=True)]
        for dtype, logits in logits_in.items()
    }
    exact, same_type = (
        by_embedding(
            call,
            operands,
            [
                plain_gradients([u.to(dtype) for u in student.operands], blocks, of_level)
                for student, of_level in zip(operands.matryoshka, dlogits, strict=True)
            ],
            positive_dlogits,
            torch.promote_types(dtype, torch.float32),
        )
        for dtype, dlogits in dlogits_in.items()
    )
    allowances: list[dict] = [
        {"rounding": rounding} for rounding in projection_rounding(call, blocks, dlogits_in[torch.float64], by_positive)
    ]
    # In the sum of what rows give to the temperature most may cancel.
    heaviest = float(weights.abs().max()) * operand_norm(call.temperature).item() ** 2
    allowances.append({"largest": 0.2 * upstream.shape[1] ** 0.5 * heaviest / problem.temperature})
    for k, (ours, truth, theirs) in enumerate(zip(found, exact, same_type, strict=True)):
        closely(ours, truth, theirs.to(ours.dtype), f"gradient {k}", little, **allowances[k])

    if operands.masks:
        empty = kernel_passes.forward_with(config, call, False)
        assert torch.equal(empty.lse2, kept.lse2) and empty.mask_bits.numel() == 0
        assert torch.equal(empty.masked, kept.masked) and torch.equal(empty.easy_negatives, kept.easy_negatives)
        again = kernel_passes.backward_with(config, call, upstream, kept.lse2, None)
        assert all(map(torch.equal, found, again)), "masks decided again differ from the bits"


# Shrinking what fails would take longer than all tests of the suite.
PROFILE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)


SLOW = pytest.mark.slow
"""The interpreter's own kind of it: seconds. `make test-slow` runs them."""
GUIDES = ["own", pytest.param("self", marks=SLOW), pytest.param("none", marks=SLOW)]


@PROFILE
@given(problems())
def test_everything_agrees_with_float64(problem: Problem) -> None:
    check(problem)


@PROFILE
@given(variants())
@example(FAINT)
@example(SHORT_LEADING_COLUMN)
def test_every_variant_agrees_with_float64(problem: Problem) -> None:
    check(problem)


@settings(PROFILE, max_examples=(EXAMPLES + 2) // 3)
@given(variants(directed=True))
def test_every_variant_in_any_direction_agrees_with_float64(problem: Problem) -> None:
    check(problem)


WIDTHS = [
    (1, 1),
    (3, 257),
    (129, 15),
    (255, 8),
    (513, 64),
    *(pytest.param(*w, marks=SLOW) for w in ((8191, 3), (5, 8192))),
]


@pytest.mark.parametrize(("width", "guide_width"), WIDTHS)
def test_every_width(width: int, guide_width: int) -> None:
    # The widest take long: of them a plain and a symmetric rectangle.
    more = {} if max(width, guide_width) > 1024 else {"extra": 3, "offset": 2, "negatives": (4,)}
    problem = Problem(rows=21, width=width, guide_width=guide_width, contrast_positives=bool(more), **more)
    check(problem)


@SLOW
@pytest.mark.parametrize("guide", ["own", "self", "none"])
def test_many_tiles_and_chunks(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of two tiles: several batches, of which some lie on the diagonal and some end in ragged tiles.
    monkeypatch.setattr(layout, "CHUNK_TILES", 2)
    check(Problem(rows=307, extra=252, offset=123, negatives=(200,), guide=guide))


@SLOW
@pytest.mark.parametrize("guide", ["own", "self", "none"])
def test_variants_in_many_tiles_and_chunks(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_TILES", 1)
    problem = Problem(
        rows=130, extra=35, offset=23, negatives=(155, 160), guide=guide, groups=40, other_groups=90, widths=(24, 7),
        hardness_mode="hard_negatives", hardness_strength=3.0, margins=guide != "none",
    )  # fmt: skip
    check(problem)
    if guide == "own":
        check(replace(problem, hard=True, hardness_mode="all_negatives", widths=()))
        check(replace(problem, groups=0, other_groups=0, mask_negatives=False, hard=True, widths=()))


GATHERED = Problem(rows=61, extra=30, offset=13, others=True, directions=BOTH_WAYS, seed=4)
"""Anchors of three ranks, those of the second first; an odd number, so that weights are of both signs."""
IN_BATCH: dict[str, Any] = {"hardness_mode": "in_batch_negatives", "hardness_strength": 2.0}
WAYS = {
    "of one rank": replace(GATHERED, rows=60, extra=0, offset=0, others=False),
    "both ways": replace(GATHERED, negatives=(9,), groups=20, margins=True),
    "a softmax each": replace(GATHERED, negatives=(9,), groups=20, per_direction=True, hard=True, widths=(24, 7)),
    "a softmax each, nothing masks": replace(GATHERED, guide="none", per_direction=True),
    "every way": replace(GATHERED, directions=EVERY_WAY, negatives=(74,), groups=20, other_groups=30),
    # pa's scores are not those of ap then, and pa alone reaches all anchors.
    "in-batch negatives weighted": replace(GATHERED, negatives=(80,), **IN_BATCH),
    "no negatives, weighted, a softmax each": replace(GATHERED, per_direction=True, **IN_BATCH),
    "own negatives weighted, no guide masks them": replace(
        GATHERED, directions=EVERY_WAY, guide="self", negatives=(90,), mask_negatives=False,
        hardness_mode="hard_negatives", hardness_strength=5.0,
    ),
}  # fmt: skip


@SLOW  # `test_directions_in_many_tiles_and_chunks` shows every way
@pytest.mark.parametrize("name", WAYS)
def test_directions(name: str) -> None:
    check(WAYS[name])


@pytest.mark.parametrize("guide", GUIDES)
def test_directions_in_many_tiles_and_chunks(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(GATHERED, rows=131, extra=35, offset=23, guide=guide, groups=40)
    monkeypatch.setattr(layout, "CHUNK_TILES", 1)
    check(replace(problem, directions=EVERY_WAY, negatives=(155,), other_groups=90, hard=guide == "own"))
    # Three tiles a side, so that chunks are of several tiles, and ragged.
    monkeypatch.setattr(layout, "CHUNK_TILES", 2)
    check(replace(problem, rows=259, per_direction=True))


@SLOW
@pytest.mark.parametrize("guide", ["own", "self", "none"])
def test_a_tile_may_be_shared_by_programs(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_TILES", 2)
    check(Problem(rows=140, extra=130, offset=71, guide=guide), columns=64)
    check(replace(GATHERED, rows=101, guide=guide, per_direction=True), columns=64)


@pytest.mark.parametrize(("columns", "guide"), [pytest.param(128, "own", marks=SLOW), (64, "self")])
def test_operands_may_be_loaded_by_tensor_descriptors(columns: int, guide: str) -> None:
    check(Problem(rows=140, extra=130, offset=71, guide=guide), columns=columns, descriptors=True)


@pytest.mark.parametrize("guide_dtype", [pytest.param(torch.float32, marks=SLOW), torch.float16])
@pytest.mark.parametrize(
    "ways", [pytest.param({}, marks=SLOW), {"others": True, "directions": BOTH_WAYS, "per_direction": True}]
)
def test_a_guide_multiplied_out_chunk_by_chunk_decides_as_one_held_whole(
    ways: dict[str, Any], guide_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_TILES", 1)
    # The same batches, whose order is that of the sums.
    monkeypatch.setattr(kernel_passes, "FORWARD_CHUNKS", 1)
    problem = Problem(
        rows=140, extra=130, offset=71, guide_width=41, guide_dtype=guide_dtype, margin=0.0, margins=True, **ways
    )
    upstream = torch.ones(1, problem.softmaxes * problem.rows)
    found = []
    for held in (kernel_work.HELD_BYTES, 0):
        monkeypatch.setattr(kernel_work, "HELD_BYTES", held)
        call, config = problem.call(), choose_config("sm_90", 4)
        kept = kernel_passes.forward_with(config, call, True)
        gradients = kernel_passes.backward_with(config, call, upstream, kept.lse2, None)
        found.append([*kept, *gradients])
    for whole, chunked in zip(*found, strict=True):
        assert torch.equal(whole, chunked)


@pytest.mark.parametrize("held", [kernel_work.HELD_BYTES, 0])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_a_guide_row_that_is_not_finite_is_seen(operand: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loss and in the gradients, wherever it stands: it would compare as false and mask nothing."""
    monkeypatch.setattr(kernel_work, "HELD_BYTES", held)
    call = Problem(rows=9, negatives=(4,)).call()
    call.guide[operand][3, 2] = math.inf
    config = choose_config("sm_90", 4)
    kept = kernel_passes.forward_with(config, call, True)
    gradients = kernel_passes.backward_with(config, call, torch.ones(1, 9), kept.lse2, kept.mask_bits)
    assert kept.loss.isnan().all() and all(x.isnan().all() for x in gradients)


@pytest.mark.parametrize("rows", [1, *(pytest.param(n, marks=SLOW) for n in (127, 128)), 129])
def test_edges_of_a_tile(rows: int) -> None:
    check(Problem(rows=rows, extra=1, offset=1, negatives=(1, rows)))


def test_an_exact_duplicate_of_the_positive_stays() -> None:
    problem = Problem(rows=40, guide_width=1024, margin=0.0, contrast_positives=False, dtype=torch.float16)
    call = problem.call()
    call.student[1][20:], call.guide[1][20:] = call.student[1][:20].clone(), call.guide[1][:20].clone()
    hidden = hidden_pairs(
        kernel_passes.forward_with(choose_config("sm_90", 4), call, True).mask_bits, problem.blocks()
    )[0]
    row = torch.arange(20)
    assert not hidden[row, row + 20].any() and not hidden[row + 20, row].any()


def loss_and_gradients(
    backend: str, student: list[Tensor], guide: list[Tensor], **kwargs: object
) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().requires_grad_() for x in student]
    loss = guided_contrastive_loss(
        leaves[0], leaves[1], guide[0], guide[1], leaves[2:], guide[2:], backend=backend, reduction="none", **kwargs
    )
    return loss, list(torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("temperature", [0.001, pytest.param(0.01, marks=SLOW), 1.0])
def test_zero_rows_opposites_and_rows_without_negatives_give_numbers(temperature: float) -> None:
    student, guide = Problem(rows=30, negatives=(7,)).embeddings()
    student[0][3] = 0
    student[1][4] = 0
    guide[0][5] = 0
    student[0][6], student[1][6] = student[0][7], -student[0][7]
    for margin in (0.0, 3.0):  # 3.0: everything is masked.
        exact = loss_and_gradients(
            "reference", [x.double() for x in student], [g.double() for g in guide],
            temperature=temperature, margin=margin,
        )  # fmt: skip
        for bits in ("keep", "recompute"):
            loss, gradients = loss_and_gradients(
                "triton", student, guide, temperature=temperature, margin=margin, mask_bits=bits
            )
            assert loss.isfinite().all() and all(g.isfinite().all() for g in gradients)
            torch.testing.assert_close(loss.double(), exact[0], rtol=1e-4, atol=1e-4)
            for ours, theirs in zip(gradients, exact[1], strict=True):
                largest = float(theirs.abs().max())
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=2e-4 * largest + 1e-9)
        if margin == 3.0:
            assert torch.equal(loss, torch.zeros(30))


def test_the_public_function_with_strides_and_a_temperature_tensor() -> None:
    student, guide = Problem(rows=33, extra=9, offset=4, negatives=(5,)).embeddings()
    # Each operand in a way of its own: every second column, columns next to each other, rows next to each other.
    strided = [student[0].repeat_interleave(2, dim=1)[:, ::2], student[1].T.contiguous().T, student[2]]
    assert [x.stride(1) for x in strided] == [2, len(student[1]), 1]
    found = []
    for backend, cast in (("triton", torch.float32), ("reference", torch.float64)):
        temperature = torch.tensor(0.07, dtype=cast, requires_grad=True)
        leaves = [x.to(cast).detach().requires_grad_() for x in (strided if backend == "triton" else student)]
        loss, stats = guided_contrastive_loss(
            leaves[0], leaves[1], guide[0].to(cast), guide[1].to(cast), leaves[2:], [guide[2].to(cast)],
            temperature=temperature, margin=0.1, margin_strategy="relative", offset=4, backend=backend,
            return_stats=True,
        )  # fmt: skip
        loss.backward()
        gradients = (temperature.grad, *(x.grad for x in leaves))
        found.append([loss, *gradients, stats.masked, stats.hardest_negative_similarity])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-6)


GROUPS = torch.arange(44) // 3
WHOLE: dict[str, dict] = {
    "triplet, groups, all boosted, a ladder": {
        "groups": GROUPS, "triplet_margin": 0.9, "matryoshka_dims": [20, 9], "hardness_mode": "all_negatives",
        "hardness_strength": 2.0, "mask_ties": True,
    },
    "triplet, two groups, negatives that no guide masks": {
        "groups": [GROUPS, torch.arange(44) % 9], "negative_groups": [torch.arange(44) // 4], "mask_negatives": False,
        "triplet_margin": 1.5,
    },
    "triplet of groups alone": {"groups": GROUPS, "triplet_margin": 2.0, "guide": "none"},
    "hard, groups, a ladder, decided again": {
        "groups": GROUPS, "hard": True, "matryoshka_dims": [24, 5], "mask_bits": "recompute",
    },
    "self-guided, margins a row, own boosted": {
        "guide": "self", "margin": torch.linspace(-0.3, 0.3, 33), "hardness_mode": "hard_negatives",
        "hardness_strength": 5.0, "mask_bits": "recompute",
    },
    "anchors of all ranks, both ways, a softmax each, a ladder": {
        "rows": 33, "directions": BOTH_WAYS, "partition_mode": "per_direction", "groups": GROUPS,
        "matryoshka_dims": [20, 9],
    },
    "every way, triplet, two groups": {
        "rows": 33, "directions": EVERY_WAY, "groups": [GROUPS, torch.arange(44) % 9],
        "negative_groups": [torch.arange(44) // 4], "triplet_margin": 0.9,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", WHOLE)
def test_the_public_function_s_variants(name: str, dtype: torch.dtype) -> None:
    options = dict(WHOLE[name])
    kind = options.pop("guide", "own")
    others = "rows" in options
    ways = {"others": others, "directions": BOTH_WAYS if others else ()}
    student, _ = Problem(rows=33, extra=11, negatives=(44,), dtype=dtype, **ways).embeddings()
    # Few vectors, so that no comparison is near its threshold.
    chosen = torch.randint(5, (44,), generator=torch.Generator().manual_seed(0))
    vectors = torch.eye(16)[chosen] + 0.5 * torch.eye(16)[chosen].roll(1, dims=1)
    queries = [vectors[4:37], *([vectors[:4], vectors[37:]] if others else [])]
    guide = [torch.cat(queries), vectors, vectors.flip(0)]
    found = []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [x.to(cast).detach().requires_grad_() for x in student]
        guides = {"own": [g.to(cast) for g in guide], "self": leaves, "none": []}[kind]
        arguments = options | {"offset": 4, "temperature": 0.2, "reduction": "none", "backend": backend}
        if guides:
            arguments |= {"guide_anchors": guides[0], "guide_positives": guides[1], "guide_negatives": guides[2:]}
        loss, stats = guided_contrastive_loss(*leaves[:2], negatives=leaves[2:], return_stats=True, **arguments)
        found.append([loss, stats.masked.double(), *torch.autograd.grad(loss.sum(), leaves)])
    for k, (ours, plain, exact) in enumerate(zip(*found, strict=True)):
        closely(
            ours.detach(),
            exact.detach().double(),
            plain.detach(),
            f"{name}, {k}",
            2e-5 if dtype.itemsize == 4 else 2e-3,
        )


@pytest.mark.parametrize(
    ("width", "widths", "dtype"),
    [
        (32, (32, 8), torch.float32),  # the gradients by the widest operands become those by the embeddings
        (64, (64, 16), torch.float16),
        (48, (40, 16), torch.float32),  # as wide as the widest dim filled up
        pytest.param(24, (24, 7), torch.float32, marks=SLOW),
        (24, (7,), torch.float32),  # of the others' columns no kernel knows
        pytest.param(64, (50,), torch.float16, marks=SLOW),
    ],
)
def test_gradients_of_dims(width: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whatever stood in memory before."""
    assert torch.empty(1).isnan(), "what is not written is seen"
    check(Problem(rows=20, extra=5, offset=3, negatives=(9,), width=width, widths=widths, dtype=dtype))


def test_runs_are_bitwise_the_same() -> None:
    call, config = Problem(rows=140, extra=30, offset=11, negatives=(50,)).call(), choose_config("sm_90", 4)
    runs = []
    for _ in range(2):
        kept = kernel_passes.forward_with(config, call, True)
        gradients = kernel_passes.backward_with(config, call, torch.ones(1, 140), kept.lse2, kept.mask_bits)
        runs.append([*kept, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_guide_that_is_the_student_costs_no_second_product() -> None:
    student, _ = Problem().embeddings()
    with launch.record_launches() as launches:
        guided_contrastive_loss(*student, *student, margin=-0.1, backend="triton", mask_bits="recompute")
    by_kernel = {started.kernel.__name__: started.arguments for started in launches}
    assert "masks_kernel" not in by_kernel
    assert by_kernel["forward_kernel"]["guide_thresholds"] is not None


def test_bfloat16_is_refused_by_name_and_auto_stays_tiled() -> None:
    with pytest.raises(ValueError, match="interpreter"):
        choose_backend("triton", "cpu", torch.bfloat16)
    assert choose_backend("triton", "cpu", torch.float32) == "triton"
    assert choose_backend("auto", "cpu", torch.float32) == "tiled"


@SLOW
@pytest.mark.filterwarnings("ignore")
def test_the_operators_are_what_torch_compile_takes_them_for() -> None:
    check_operators("triton")
    check_a_compiled_step("triton")
