"""From embeddings to operands: what every backend multiplies, and the way back for the gradient.

Each student embedding ``x`` becomes ``u = x / |x| * sqrt(log2(e) / temperature)``. Then a plain dot product of two
operands is a finished logit in base 2, for every block alike (``aa`` and ``pp`` stay symmetric, which scaling only
one side would break), a backend never sees the temperature, and its softmax uses ``exp2``, which is the hardware's
own instruction on a GPU and over twice as fast as ``exp`` in torch's CPU vectorisation.

Guide embeddings become plain unit vectors. Each row has a *guide threshold*, the guide score above which an entry is
masked, with the margin already taken off. Where only hard negatives count, it has a *student threshold* too, the logit
below which an entry is masked.

**Matryoshka dims.** Nested embeddings are the first columns of each embedding, normalised anew, as operands of their
own. Thresholds are those of the largest dim, so that one mask serves all.

**Memory.** No step here makes a float32 copy of all rows: they are taken in pieces (`PIECE`). The guide's unit vectors
are kept as their two factors (`UnitRows`), which a backend multiplies out where and when it needs them.

**Ties.** The rule is ``guide score > threshold``, strictly, so that another copy of the positive's text stays a
negative. A dot product summed in another order differs in its last bits, and would decide such a tie at random: the
threshold is therefore raised by `tie_band`, or lowered by it where ties are to be masked. For sums in
float32 that is 1.9e-6 up to a width of 256, 7.6e-6 at 1024; for float64 3.6e-15 and 1.4e-14.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gist_fast.functional.blocks import ANCHORS, POSITIVES, Block
from gist_fast.functional.loss_config import LossConfig
from gist_fast.kernels.precision import multiplies_in_tf32
from gist_fast.runtime.errors import InputError

ZERO_NORM = 1e-12
"""Rows of a smaller norm are zero vectors: similarity 0 to everything, and no gradient."""
PIECE = 2**24
"""Elements that a step over rows takes at a time, so that what it holds in between is 64 MiB in float32, whatever the
batch. On a GPU such a step still takes longer than its launch."""


class UnitRows:
    """Embeddings and the factor of each row, multiplied out as a whole or where rows are needed. Without gradient.

    A row comes out the same, bit for bit, whichever others it is asked for with.

    Args:
        raw: ``[N, width]``
        factors: ``[N, 1]``, accumulation type.
    """

    def __init__(self, raw: Tensor, factors: Tensor) -> None:
        self.raw, self.factors = raw, factors
        self._whole: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """All rows, ``[N, width]``, in the type of `raw`; kept from then on."""
        if self._whole is None:
            self._whole = self._multiply(slice(0, self.raw.shape[0]), self.raw.shape[1])
        return self._whole

    def rows(self, rows: slice, width: int | None = None) -> Tensor:
        """``[n, width]`` of the rows, contiguous; filled up with zeros where `width` is more than theirs."""
        own_width = self.raw.shape[1]
        if width in (None, own_width) and self.raw.numel() <= PIECE:
            return self.whole[rows]
        return self._multiply(rows, width or own_width)

    def _multiply(self, rows: slice, width: int) -> Tensor:
        raw, factors = self.raw[rows], self.factors[rows]
        count, own_width = raw.shape
        with torch.no_grad():
            # In a traced graph only the reference comes here, and all it has is small.
            if torch.compiler.is_compiling():
                unit = _as_multiplied((raw * factors).to(raw.dtype))
                return torch.nn.functional.pad(unit, (0, width - own_width))
            out = raw.new_empty(count, width)
            out[:, own_width:] = 0
            for piece in pieces(raw):
                target = out[piece, :own_width]
                # On a GPU one pass, which casts in registers; other devices make a copy of the piece.
                torch.mul(raw[piece], factors[piece], out=target)
                rounded = _as_multiplied(target)
                if rounded is not target:
                    target.copy_(rounded)
        return out


@dataclass(frozen=True)
class Student:
    """The student's operands of one Matryoshka dim ``D``."""

    operands: tuple[Tensor, ...]
    """Anchors ``[A, D]``, positives ``[M, D]``, negatives ``[N_k, D]``, in the type of the embeddings. A dot product
    of two rows is their logit in base 2."""
    positives: Tensor
    """``[B]``, accumulation type: the logit (base 2) of each anchor with its own positive."""
    norms: tuple[Tensor, ...]
    """Norms of the raw student rows, ``[.., 1]`` each, accumulation type."""


@dataclass(frozen=True)
class Operands:
    """What a backend computes with. ``B`` anchors, ``G`` guide width, ``L`` Matryoshka dims."""

    matryoshka: tuple[Student, ...]
    """``[L]``, the largest dim first, which decides where the student's own scores decide."""
    guide_rows: tuple[UnitRows, ...] | None
    """The guide's unit vectors, same rows, ``[.., G]``; None without a guide that has embeddings of its own."""
    self_guided: bool
    """Whether the student guides itself."""
    guide_thresholds: Tensor | None
    """``[B]``, accumulation type: entries of row i whose guide score exceeds ``guide_thresholds[i]`` are masked."""
    student_thresholds: Tensor | None = None
    """``[B]``, accumulation type: entries of row i whose logit (of the largest dim) is below
    ``student_thresholds[i]`` are masked."""
    groups: tuple[Tensor, ...] = ()
    """Two at most, int64: ``[A + M]``, of the anchors and the positives, or of all negatives behind them too. Entries
    whose row and column have one of them in common are masked."""
    logit_scale: Tensor | None = None
    """0-d, accumulation type: what hardness weighting multiplies the logits of the entries by that it is
    about, without being part of their derivative."""

    @property
    def student(self) -> tuple[Tensor, ...]:
        """The operands of the largest dim."""
        return self.matryoshka[0].operands

    @property
    def guide(self) -> tuple[Tensor, ...] | None:
        """The guide's unit vectors, whole and kept; `student` where it guides itself; None without a guide."""
        if self.self_guided:
            return self.student
        return None if self.guide_rows is None else tuple(rows.whole for rows in self.guide_rows)

    @property
    def guided(self) -> bool:
        """Whether a guide decides masks, be it the student."""
        return self.guide_thresholds is not None

    @property
    def masks(self) -> bool:
        """Whether there is anything to mask but what never counts."""
        return self.guided or self.student_thresholds is not None or len(self.groups) > 0

    def groups_of(self, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """The groups of a block's rows ``[rows]`` and columns ``[columns]``, as often as there are some of both."""
        sizes = [x.shape[0] for x in self.student]
        first_row = sum(sizes[: block.row_operand]) + block.row_start
        first_column = sum(sizes[: block.column_operand])
        for groups in self.groups:
            if len(groups) > first_column:
                yield groups[first_row : first_row + block.rows], groups[first_column : first_column + block.columns]

    def logit_scales_of(self, block: Block) -> tuple[Tensor | None, Tensor | None]:
        """What multiplies the logits of a block's entries, 0-d: of an anchor's own negative, and of all others."""
        own = self.logit_scale if block.scaled in ("all", "own") else None
        others = self.logit_scale if block.scaled in ("all", "others") else None
        return own, others


def tie_band(dtype: torch.dtype, width: int) -> float:
    """How far apart two cosines over `width` columns, summed in `dtype`, may be and still count as equal.

    Sums that round to nearest stay within 16 units of the last place of 1.0. Matrix units are reported to cut off
    instead, after each 8 (TF32) or 16 columns: of a sum below 1 half a unit at most each time, always downwards.
    """
    return max(16, width / 16) * torch.finfo(dtype).eps


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which dot products of this type are summed: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ordinary(x: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can keep where it came out of inference mode, as ``encode`` leaves them."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def operand_norm(temperature: Tensor) -> Tensor:
    """``sqrt(log2(e) / temperature)``: the norm of every student operand."""
    return (math.log2(math.e) / temperature).sqrt()


def prepare(
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    temperature: Tensor,
    config: LossConfig,
    rows: int,
    offset: int = 0,
    *,
    margins: Tensor | None = None,
    groups: Sequence[Tensor] = (),
    dims: Sequence[int] = (),
    differentiable: bool = False,
) -> Operands:
    """Normalise, scale and round the embeddings, and work out each row's thresholds.

    Args:
        student: anchors ``[A, D]``, positives ``[M, D]``, then any negatives ``[N_k, D]``, as the user gave them.
        guide: the guide's embeddings of the same texts, or of those alone that it may mask; or an empty sequence.
        temperature: 0-d.
        config: where it is self-guided, the student's own scores decide the mask, and `guide` is empty.
        rows: B, how many of the anchors, from the first on, the loss is of.
        offset: anchor i's positive is row ``offset + i`` of the positives.
        margins: ``[B]``, in the place of the one margin of `config`.
        groups: see `Operands.groups`.
        dims: Matryoshka dims, the largest first; empty for the embeddings' whole width.
        differentiable: keep to operations that autograd knows, by student and temperature, at the price of copies in
            the accumulation type.

    Raises:
        ValueError: on the CPU, when a row is not finite; it is named. On an accelerator looking would make the host
            wait, so the loss comes out as NaN instead.
    """
    dtype = accumulation_dtype(student[ANCHORS].dtype)
    scale = operand_norm(temperature.to(dtype))
    students = tuple(
        _student([x[:, :dim] for x in student], scale, rows, offset, differentiable)
        for dim in dims or (student[ANCHORS].shape[1],)
    )
    guides, guide_thresholds, student_thresholds, logit_scale = None, None, None, None
    with torch.no_grad():
        margin = config.margin if margins is None else margins.to(dtype)
        rule = {"relative": config.relative, "mask_ties": config.mask_ties}
        own_logits, squared = students[0].positives.detach(), scale.square()
        student_band = tie_band(dtype, students[0].operands[ANCHORS].shape[1])
        if config.self_guided:
            # The student's scores carry the factor scale**2, so the thresholds must carry it too.
            guide_thresholds = make_thresholds(own_logits / squared, margin, band=student_band, **rule) * squared
        elif guide:
            guides = tuple(unit_rows(x, "guide_" + _student_name(k)) for k, x in enumerate(guide))
            own_scores = [
                row_dots(guides[ANCHORS].rows(piece), guides[POSITIVES].rows(moved(piece, offset)))
                for piece in pieces(guide[ANCHORS][:rows])
            ]
            own = torch.cat(own_scores)
            guide_thresholds = make_thresholds(own, margin, band=tie_band(own.dtype, guide[ANCHORS].shape[1]), **rule)
            guide_thresholds = guide_thresholds + nan_where_bad(guides)
        if config.hard:
            student_thresholds = own_logits - student_band * squared
        if config.hardness_mode:
            logit_scale = 1 + config.hardness_strength * temperature.to(dtype)
    return Operands(
        students, guides, config.self_guided, guide_thresholds, student_thresholds, tuple(groups), logit_scale
    )


def unit_rows(x: Tensor, name: str) -> UnitRows:
    """Embeddings ``[N, G]`` of a guide as unit vectors.

    Raises:
        ValueError: on the CPU, where a row is not finite; `name` is what they are called.
    """
    return UnitRows(x, _inverse(_norms(x, name)))


def nan_where_bad(guides: Sequence[UnitRows]) -> Tensor:
    """0-d: 0, or NaN where a row is not finite. It would compare as false and mask nothing, unseen."""
    return torch.stack([(g.factors - g.factors).sum() for g in guides]).sum()


def check_finite(x: Tensor, name: str) -> None:
    """Raise where a row of ``x [N, D]``, on the CPU, is not finite."""
    if x.device.type == "cpu":
        _norms(x, name)


def _student(embeddings: Sequence[Tensor], scale: Tensor, rows: int, offset: int, differentiable: bool) -> Student:
    norms = tuple(_norms(x, _student_name(k)) for k, x in enumerate(embeddings))
    if differentiable:
        operands = tuple(
            (x.to(norm.dtype) * (scale * _inverse(norm))).to(x.dtype) for x, norm in zip(embeddings, norms, strict=True)
        )
    else:
        operands = tuple(UnitRows(x, scale * _inverse(norm)).whole for x, norm in zip(embeddings, norms, strict=True))
    positives = row_dots(operands[ANCHORS][:rows], operands[POSITIVES][offset : offset + rows])
    return Student(operands, positives, norms)


def add_positives(gradients: Sequence[Tensor], operands: Sequence[Tensor], dlogits: Tensor, offset: int) -> None:
    """Add ``dlogits_i * d (anchor_i . positive_{offset + i})`` to the gradients by anchors and positives."""
    anchors, positives = operands[ANCHORS][: len(dlogits)], operands[POSITIVES]
    column = dlogits[:, None]
    for piece in pieces(anchors):
        own = moved(piece, offset)
        gradients[ANCHORS][piece].addcmul_(column[piece], positives[own])
        gradients[POSITIVES][own].addcmul_(column[piece], anchors[piece])


def embedding_gradients(
    gradients: list[Tensor],
    student: Sequence[Tensor],
    norms: Sequence[Tensor],
    temperature: Tensor,
    factor: Tensor,
    *,
    keep_wide: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Carry gradients by the operands back to the embeddings and the temperature.

    With ``v = x / |x|`` and ``u = scale * v``: ``dx = scale / |x| * (du - v (v . du))``, and since ``scale`` goes as
    ``temperature ** -0.5``, ``d temperature = -1 / (2 temperature) * sum(u . du)``. The rounding of ``u`` to the
    embeddings' type is passed straight through.

    Args:
        gradients: by each operand, accumulation type. Emptied, so that each one's memory goes as soon as it can.
        student: the raw embeddings of that dim, as given to `prepare`.
        norms: ``Student.norms``.
        factor: 0-d; all gradients are multiplied by it.
        keep_wide: leave them in the accumulation type, for a sum that is yet to be made.

    Returns:
        The gradients by the embeddings, in their types, and the gradient by the temperature, 0-d.
    """
    temperature = temperature.to(accumulation_dtype(student[0].dtype))
    scale = operand_norm(temperature)
    by_embedding, along = [], torch.zeros_like(temperature)
    for x, norm in zip(student, norms, strict=True):
        gradient = gradients.pop(0)
        inverse = _inverse(norm)
        # Where the types are one, the gradient by the embedding takes the place of that by the operand.
        in_place = keep_wide or x.dtype == gradient.dtype
        out = gradient if in_place else torch.empty_like(gradient, dtype=x.dtype)
        for piece in pieces(x):
            du = gradient[piece]
            direction = x[piece] * inverse[piece]
            radial = (direction * du).sum(dim=1, keepdim=True)
            along = along + radial.sum()
            du.addcmul_(direction, radial, value=-1).mul_(factor * scale * inverse[piece])
            if out is not gradient:
                out[piece] = du
        by_embedding.append(out)
        del gradient, du
    return by_embedding, -factor * scale * along / (2 * temperature)


def _student_name(index: int) -> str:
    return ("anchors", "positives")[index] if index < 2 else f"negatives[{index - 2}]"


def reciprocal_norms(embeddings: Sequence[Tensor], rows: Tensor, prefix: str) -> Tensor:
    """``[N, 1]``, accumulation type: one over the norm of each row on a CPU, 0 for zero vectors.

    Args:
        rows: the embeddings, concatenated.
        prefix: of their names.

    Raises:
        ValueError: a row is not finite; it is named.
    """
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=accumulation_dtype(rows.dtype))
    least, largest = torch.aminmax(norms)
    if least.item() > ZERO_NORM and largest.item() < math.inf:  # false for NaN, which both come out as
        return norms.reciprocal_()
    for k, x in enumerate(embeddings):
        _norms(x, prefix + _student_name(k))
    return _inverse(norms)


def _norms(x: Tensor, name: str) -> Tensor:
    """``[N, 1]``, accumulation type."""
    dtype = accumulation_dtype(x.dtype)
    norms = [torch.linalg.vector_norm(x[piece], dim=1, keepdim=True, dtype=dtype) for piece in pieces(x)]
    norm = norms[0] if len(norms) == 1 else torch.cat(norms)
    # A traced graph cannot branch on values; there, as on an accelerator, the loss comes out as NaN.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _refuse_not_finite(x, norm, name)
    return norm


def _inverse(norm: Tensor) -> Tensor:
    # The inner where keeps the derivative of the branch not taken finite. Infinite and NaN norms become NaN (the
    # difference is 0 for all others): 1 / inf would make a zero vector of an overflow, silently.
    zero = norm <= ZERO_NORM
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, norm)) + (norm - norm)


def _refuse_not_finite(x: Tensor, norm: Tensor, name: str) -> None:
    if torch.isfinite(norm).all():
        return
    row = int(torch.nonzero(~torch.isfinite(norm[:, 0]))[0, 0])
    bad = torch.nonzero(~torch.isfinite(x[row]))
    if len(bad):
        column = int(bad[0, 0])
        found = f"row {row}, column {column} is {x[row, column].item()}"
    else:
        found = f"the norm of row {row} overflows {norm.dtype}"
    raise InputError(f"{name}: {found}. Embeddings must be finite; look at the model or the text of that row.")


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    accumulate = accumulation_dtype(a.dtype)
    dots = [(a[piece].to(accumulate) * b[piece].to(accumulate)).sum(dim=1) for piece in pieces(a)]
    return dots[0] if len(dots) == 1 else torch.cat(dots)


def moved(rows: slice, by: int) -> slice:
    """The same number of rows, `by` further on."""
    return slice(rows.start + by, rows.stop + by)


def lowered(own: Tensor, margin: float | Tensor, *, relative: bool) -> Tensor:
    """``[B]``: the guide's scores of the anchors with their positives, less the margin; ties are not thought of yet."""
    return own - (own.abs() * margin if relative else margin)


def make_thresholds(own: Tensor, margin: float | Tensor, *, relative: bool, mask_ties: bool, band: float) -> Tensor:
    """``[B]``: what row i's other entries must score above to be masked.

    Args:
        own: ``[B]``, the guide's scores of the anchors with their positives.
        margin: one, or ``[B]``.
        relative: whether it is a share of the score.
        mask_ties: whether scores that tie with the positive's are masked.
        band: see `tie_band`.
    """
    return lowered(own, margin, relative=relative) + (-band if mask_ties else band)


def _as_multiplied(unit: Tensor) -> Tensor:
    """Round as the matrix units will, so that thresholds (summed here) and scores (summed there) see equal factors."""
    if unit.dtype == torch.float32 and unit.is_cuda and multiplies_in_tf32():
        # TF32 keeps 10 of float32's 23 mantissa bits: add half of the last kept one, and cut.
        cut = ((unit.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        # A card's own NaN has all bits set, and would become a zero.
        return torch.where(unit.isnan(), unit, cut)
    return unit


def pieces(x: Tensor) -> Iterator[slice]:
    """Cut the rows of ``x [N, width]`` into slices of at most `PIECE` elements, or a row."""
    step = max(1, PIECE // max(1, x.shape[1]))
    for start in range(0, max(1, x.shape[0]), step):
        yield slice(start, min(start + step, x.shape[0]))
