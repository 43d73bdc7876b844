"""The guided loss written a second time, by another road, and how two results are compared.

The road is the one of the papers and of sentence-transformers: a cosine similarity by broadcasting, masks of a whole
matrix, minus infinity, and ``cross_entropy`` over the concatenated blocks. It shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn


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
    anchors: int | None = None,
    seed: int = 0,
    learned_temperature: bool = True,
    temperature: float = 0.05,
    **options,
) -> Problem:
    """Random float64 embeddings in which positives resemble their anchors; `guide_width` None for no guide.

    Args:
        anchors: how many, where there are more of them than rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=generator, dtype=torch.float64)

    columns = rows if columns is None else columns
    offset = options.get("offset", 0)

    def family(d: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        queries, positives = draw(anchors or rows, d), draw(columns, d)
        positives[offset : offset + rows] += 0.7 * queries[:rows]
        # Norms differ, so that a missing normalisation shows.
        return queries * (0.3 + draw(len(queries), 1).abs()), positives * 3, tuple(draw(n, d) for n in negatives)

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


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.cosine_similarity(x[:, None], y[None, :], dim=-1)


def loss_by_settings(
    problem: Problem,
    *,
    self_guided: bool = False,
    mask_ties: bool = False,
    groups: list[Tensor] | None = None,
    negative_groups: list[Tensor] | None = None,
    mask_negatives: bool = True,
    negatives_scope: list[str] | str = "all",
    negative_rows: list[Tensor | None] | None = None,
    hard: bool = False,
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    triplet_margin: float | None = None,
    distill_weight: float = 0.0,
    distill_temperature: float = 0.05,
    label_smoothing: float = 0.0,
    positive_prior: float = 0.0,
    spread_out_weight: float = 0.0,
    matryoshka_dims: list[int] | None = None,
    matryoshka_weights: list[float] | None = None,
    rows: int | None = None,
    directions: list[str] | None = None,
    partition_mode: str = "joint",
    statistics: dict[str, Any] | None = None,
) -> Tensor:
    """Loss ``[B]`` with any of the loss's settings, by whole matrices, minus infinity and ``logsumexp``.

    Args:
        statistics: filled with how many pairs of each block are masked, and how many are easy, and the mean of the
            hardest similarities, with what hardness weighting adds.
    """
    q = problem
    rows = torch.arange(len(q.anchors) if rows is None else rows)
    own = q.offset + rows
    # Whose positive each anchor's is: the batch's own first.
    others = [j for j in range(len(q.positives)) if j not in own.tolist()]
    pair_of = torch.cat([own, torch.tensor(others, dtype=torch.int64)])[: len(q.anchors)]
    dims = matryoshka_dims or [q.anchors.shape[1]]
    weights = matryoshka_weights or [1.0] * len(dims)
    widest = max(dims)
    student = [q.anchors, q.positives, *q.negatives]
    scopes = [negatives_scope] * len(q.negatives) if isinstance(negatives_scope, str) else negatives_scope
    mine = {}  # of a column of own negatives, whose each is
    for k, scope in enumerate(scopes):
        if scope == "own":
            theirs = rows if negative_rows is None or negative_rows[k] is None else negative_rows[k]
            mine[k + 2] = rows[:, None] == theirs
    guide = [q.guide_anchors, q.guide_positives, *(q.guide_negatives or ())]
    if self_guided:
        guide = [x.detach()[:, :widest] for x in student]
    cut = None
    if guide[0] is not None:
        threshold = torch.cosine_similarity(guide[0][rows], guide[1][own], dim=-1)
        margin = torch.as_tensor(q.margin, dtype=threshold.dtype)
        cut = threshold - (margin if q.margin_strategy == "absolute" else margin * threshold.abs())
    asked = {"query_to_doc": True, "query_to_query": q.contrast_anchors, "doc_to_doc": q.contrast_positives}
    asked = {name for name, on in asked.items() if on} if directions is None else set(directions)
    names = [("ap", 0, 1), *([("aa", 0, 0)] if "query_to_query" in asked else [])]
    names += [("pp", 1, 1)] if "doc_to_doc" in asked else []
    names += [("pa", 1, 0)] if "doc_to_query" in asked else []
    names += [(f"an_{k - 1}", 0, k) for k in range(2, len(student))]
    if directions is not None and "doc_to_doc" in asked:
        names += [(f"pn_{k - 1}", 1, k) for k in range(2, len(student)) if k not in mine]
    # The column of what never counts, or is the positive, of each row.
    place_of = {"ap": own, "aa": rows, "pp": own, "pa": rows}
    place_of |= {name: own for name, _, _ in names if name.startswith("pn")}

    def rows_of(x: Tensor, index: int) -> Tensor:
        return x[own] if index == 1 else x[rows]

    hidden = {}
    for name, r, c in names:
        mask = torch.zeros(len(rows), len(student[c]), dtype=torch.bool)
        if cut is not None and (c < 2 or mask_negatives):
            score = cosine(rows_of(guide[r], r), guide[c])
            mask |= score > cut[:, None] - (1e-12 if mask_ties else -1e-12)
        for each in groups or ():
            if c < 2:
                mask |= each[own][:, None] == (each if c == 1 else each[pair_of])
        if negative_groups is not None and c >= 2:
            mask |= groups[-1][own][:, None] == negative_groups[c - 2]
        if c in mine:
            mask &= mine[c]
        if name in place_of:
            mask[rows, place_of[name]] = False
        hidden[name] = mask
    guided = {name: mask.clone() for name, mask in hidden.items()}
    easy = {name: torch.zeros_like(mask) for name, mask in hidden.items()}
    if hard:
        full = [x.detach()[:, :widest] for x in student]
        floor = torch.cosine_similarity(full[0][rows], full[1][own], dim=-1)
        for name, r, c in names:
            easy[name] = (cosine(rows_of(full[r], r), full[c]) < floor[:, None] - 1e-12) & ~hidden[name]
            easy[name] &= mine.get(c, torch.tensor(True))
            if name in place_of:
                easy[name][rows, place_of[name]] = False
            hidden[name] |= easy[name]
    total = torch.zeros(len(rows), dtype=q.anchors.dtype)
    for width, weight in zip(dims, weights, strict=True):
        x = [e[:, :width] for e in student]
        logits, positives, negatives = {}, [], []
        for name, r, c in names:
            score = cosine(rows_of(x[r], r), x[c])
            penalty = torch.zeros_like(score)
            place = torch.zeros_like(score, dtype=torch.bool)
            if c in mine:
                place = mine[c]
            elif c != 0:
                place[rows, own] = True
            if hardness_mode in ("in_batch_negatives", "all_negatives") and r == 0 and c == 1:
                penalty[~place] = 1
            if r == 0 and c >= 2:
                if hardness_mode in ("in_batch_negatives", "all_negatives"):
                    penalty[~place] = 1
                if hardness_mode in ("hard_negatives", "all_negatives"):
                    penalty[place] = 1
            logit = score / q.temperature + hardness_strength * penalty * score.detach()
            drop = hidden[name].clone()
            if name in place_of:
                # The positive is in both of the directions between the sides.
                drop[rows, place_of[name]] = name not in ("ap", "pa")
            if c in mine:
                drop |= ~mine[c]
            logits[name] = logit.masked_fill(drop, -torch.inf)
            if r == 0:
                near = guided[name].clone()
                far = ~near
                if c in mine:
                    far &= mine[c]
                if name in place_of:
                    far[rows, place_of[name]] = False
                if c == 1:
                    near[rows, own] = True
                positives.append((score, near))
                negatives.append((score, far))
        if statistics is not None and width == widest:
            negatives_alone = {name: x.detach().clone() for name, x in logits.items()}
            for name in {"ap", "pa"} & negatives_alone.keys():
                negatives_alone[name][rows, place_of[name]] = -torch.inf
            negatives_alone = torch.cat(list(negatives_alone.values()), dim=1)
            hardest = negatives_alone.amax(1) * torch.as_tensor(q.temperature).detach()
            statistics["hardest"] = hardest[hardest > -torch.inf].mean()
            statistics |= {f"masked_{name}": int(mask.sum()) for name, mask in guided.items()}
            statistics |= {f"easy_{name}": int(mask.sum()) for name, mask in easy.items() if hard}
        positive = logits["ap"][rows, own]
        partitions = [list(logits)]
        if partition_mode == "per_direction":
            partitions = [[name for name in logits if name != "pa"], *([["pa"]] if "pa" in logits else [])]
        sums = [torch.logsumexp(torch.cat([logits[name] for name in names], dim=1), dim=1) for names in partitions]
        loss = sum(sums) / len(sums) - positive
        every = torch.cat(list(logits.values()), dim=1)
        left = every > -torch.inf
        if positive_prior:
            number = left.sum(1).to(every.dtype) - 1
            above = torch.exp(every - positive[:, None]).sum(1) - 1  # the negatives' sum, in units of the positive's
            corrected = (above / number.clamp_min(1) - positive_prior) / (1 - positive_prior)
            least = torch.exp(-1 / torch.as_tensor(q.temperature) - positive)
            loss = torch.log1p(number * torch.maximum(corrected, least))
        if label_smoothing:
            log_shares = (every - torch.logsumexp(every, dim=1, keepdim=True)).masked_fill(~left, 0.0)
            share = label_smoothing / left.sum(1).to(every.dtype)
            loss = (1 - label_smoothing) * loss - share * log_shares.sum(1)
        if spread_out_weight:
            for own_side in (x[0][rows], x[1][own]):
                squared = cosine(own_side, own_side).square().fill_diagonal_(0.0)
                loss = loss + spread_out_weight * squared.sum(1) / max(1, len(rows) - 1)
        if distill_weight:
            divergences = []
            for part in partitions:
                of_student, of_guide = [], []
                for name, r, c in names:
                    if name not in part:
                        continue
                    never = torch.zeros(logits[name].shape, dtype=torch.bool)
                    if name in place_of and name not in ("ap", "pa"):
                        never[rows, place_of[name]] = True
                    if c in mine:
                        never |= ~mine[c]
                    for found, vectors, by in (
                        (of_student, x, q.temperature),
                        (of_guide, guide, distill_temperature),
                    ):
                        found.append((cosine(rows_of(vectors[r], r), vectors[c]) / by).masked_fill(never, -1e9))
                p = torch.log_softmax(torch.cat(of_student, dim=1), dim=1)
                t = torch.log_softmax(torch.cat(of_guide, dim=1), dim=1)
                divergences.append(torch.nn.functional.kl_div(p, t, log_target=True, reduction="none").sum(1))
            divergence = sum(divergences) / len(divergences)
            loss = loss + distill_weight * divergence
            if statistics is not None and width == widest:
                statistics["distillation"] = divergence.detach().mean()
        if triplet_margin is not None:

            def mean(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
                count = sum(mask.sum(1) for _, mask in pairs)
                return sum((score * mask).sum(1) for score, mask in pairs) / count.clamp_min(1), count

            (near, _), (far, count) = mean(positives), mean(negatives)
            loss = loss + torch.where(count > 0, torch.relu(far - near + triplet_margin), 0.0)
        total = total + weight * loss
    return total


def values_and_gradients(loss: Tensor, problem: Problem) -> list[Tensor]:
    """The rows' losses, and the gradients of their weighted sum."""
    return [loss.detach(), *torch.autograd.grad((loss * problem.weights).sum(), problem.tensors)]


def step_of(loss: Tensor, model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """A loss and the model's gradients of it by parameter, of which the model keeps none."""
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def assert_same_step(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    """The losses agree to 1e-4, and each gradient to 2e-3 of the largest of all."""
    assert abs(found[0] - expected[0]) <= max(1e-4 * abs(expected[0]), 1e-12)
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() < 2e-3 * largest, name


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
