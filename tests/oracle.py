"""The guided loss written a second time, by another road, and how two results are compared.

The road is the one of the papers and of sentence-transformers: a cosine similarity by broadcasting, masks of a whole
matrix, minus infinity, and ``cross_entropy`` over the concatenated blocks. It shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Problem:
    """Arguments of one call; `tensors` lists those that take a gradient."""

    anchors: Tensor
    positives: Tensor
    guide_anchors: Tensor | None
    guide_positives: Tensor | None
    negatives: tuple[Tensor, ...] = ()
    guide_negatives: tuple[Tensor, ...] | None = ()
    temperature: Tensor | float = 0.05
    margin: float = 0.0
    margin_strategy: str = "absolute"
    contrast_anchors: bool = True
    contrast_positives: bool = True
    offset: int = 0
    weights: Tensor = field(default_factory=lambda: torch.ones(1))
    """Upstream gradient of each row."""

    @property
    def tensors(self) -> list[Tensor]:
        learned = [self.temperature] if isinstance(self.temperature, Tensor) else []
        return [self.anchors, self.positives, *self.negatives, *learned]

    def arguments(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "weights"}

    def to(self, dtype: torch.dtype, guide_dtype: torch.dtype | None = None) -> Problem:
        """The same values rounded to other types; the temperature keeps float32 at least."""

        def student(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_()

        def guide(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(guide_dtype or dtype)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.detach().to(wide).requires_grad_()
        return replace(
            self,
            anchors=student(self.anchors),
            positives=student(self.positives),
            negatives=tuple(map(student, self.negatives)),
            guide_anchors=guide(self.guide_anchors),
            guide_positives=guide(self.guide_positives),
            guide_negatives=None if self.guide_negatives is None else tuple(map(guide, self.guide_negatives)),
            temperature=temperature,
            weights=self.weights.to(wide),
        )


def make_problem(
    rows: int,
    columns: int | None = None,
    negatives: tuple[int, ...] = (),
    width: int = 12,
    guide_width: int | None = 7,
    *,
    seed: int = 0,
    learned_temperature: bool = True,
    temperature: float = 0.05,
    **options,
) -> Problem:
    """Random float64 embeddings in which positives resemble their anchors; `guide_width` None for no guide."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=generator, dtype=torch.float64)

    columns = rows if columns is None else columns
    offset = options.get("offset", 0)

    def family(d: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        anchors, positives = draw(rows, d), draw(columns, d)
        positives[offset : offset + rows] += 0.7 * anchors
        # Norms differ, so that a missing normalisation shows.
        return anchors * (0.3 + draw(rows, 1).abs()), positives * 3, tuple(draw(n, d) for n in negatives)

    a, p, n = family(width)
    ga, gp, gn = (None, None, None) if guide_width is None else family(guide_width)
    value: Tensor | float = temperature
    if learned_temperature:
        value = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    for x in (a, p, *n):
        x.requires_grad_()
    return Problem(a, p, ga, gp, n, gn, temperature=value, weights=draw(rows, 1)[:, 0], **options)


def oracle(problem: Problem) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Loss ``[B]``, and (compared, masked) of each block, in the type of the problem."""
    logits, own, counts = oracle_logits(problem)
    return torch.nn.functional.cross_entropy(logits, own, reduction="none"), counts


def oracle_logits(problem: Problem) -> tuple[Tensor, Tensor, dict[str, tuple[int, int]]]:
    """All blocks side by side, minus infinity where masked; the positives' columns; the counts of `oracle`."""
    q = problem
    rows = torch.arange(len(q.anchors))
    own = q.offset + rows
    threshold = None
    if q.guide_anchors is not None:
        threshold = torch.cosine_similarity(q.guide_anchors, q.guide_positives[own], dim=-1)
        cut = q.margin if q.margin_strategy == "absolute" else q.margin * threshold.abs()
        threshold = threshold - cut
    scores, counts = [], {}

    def add(name, x, y, gx, gy, never=None, is_positive=False):
        # Divided before masking: minus infinity over the temperature would make the temperature's gradient NaN.
        score = torch.cosine_similarity(x[:, None], y[None, :], dim=-1) / q.temperature
        mask = torch.zeros(score.shape, dtype=torch.bool)
        if threshold is not None:
            mask = torch.cosine_similarity(gx[:, None], gy[None, :], dim=-1) > threshold[:, None]
        if never is not None:
            mask[rows, never] = False
        counts[name] = (mask.numel() - (0 if never is None else len(rows)), int(mask.sum()))
        if never is not None and not is_positive:
            mask[rows, never] = True
        scores.append(score.masked_fill(mask, -torch.inf))

    ga, gp = q.guide_anchors, q.guide_positives
    add("ap", q.anchors, q.positives, ga, gp, never=own, is_positive=True)
    if q.contrast_anchors:
        add("aa", q.anchors, q.anchors, ga, ga, never=rows)
    if q.contrast_positives:
        add("pp", q.positives[own], q.positives, None if gp is None else gp[own], gp, never=own)
    for k, n in enumerate(q.negatives):
        add(f"an_{k + 1}", q.anchors, n, ga, None if ga is None else q.guide_negatives[k])
    return torch.cat(scores, dim=1), own, counts


def values_and_gradients(loss: Tensor, problem: Problem) -> list[Tensor]:
    """The rows' losses, and the gradients of their weighted sum."""
    return [loss.detach(), *torch.autograd.grad((loss * problem.weights).sum(), problem.tensors)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float, floor: float = 1e-3) -> None:
    """Each tensor's largest error is within `tolerance` of its largest value, taken for `floor` where it is smaller
    (a gradient that vanishes by symmetry is rounding alone); else the worst element is named."""
    for k, (got, want) in enumerate(zip(actual, expected, strict=True)):
        allowed = tolerance * max(want.abs().max().item(), floor)
        error = (got.to(want.dtype) - want).abs()
        assert not error.isnan().any(), f"tensor {k} holds NaN"
        if error.max() > allowed:
            worst = torch.nonzero(error == error.max())[0].tolist()
            at = tuple(worst)
            raise AssertionError(
                f"tensor {k} {list(want.shape)}, element {worst}: got {got[at].item()}, expected {want[at].item()}, "
                f"allowed error {allowed}"
            )


def largest_errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each tensor, the largest error as a share of its largest value."""
    return [
        ((got.to(want.dtype) - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()
        for got, want in zip(actual, expected, strict=True)
    ]
