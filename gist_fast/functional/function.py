"""The guided contrastive loss as a function of embeddings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from gist_fast.functional.backends import choose_backend, dense, left_to_auto
from gist_fast.functional.blocks import make_blocks
from gist_fast.functional.checks import (
    REDUCTIONS,
    check_embeddings,
    check_groups,
    check_negative_rows,
    check_other_anchors,
    check_own_negatives,
    check_row_margins,
    check_scopes,
    check_temperature,
)
from gist_fast.functional.choices import (
    Backend,
    Direction,
    HardnessMode,
    MarginStrategy,
    MaskBits,
    PartitionMode,
    Scope,
)
from gist_fast.functional.combinations import check_dims
from gist_fast.functional.distillation import distil, kl_rows
from gist_fast.functional.groups import groups_of_rows
from gist_fast.functional.keywords import SharedKeywords
from gist_fast.functional.loss_config import LossConfig
from gist_fast.functional.mask_products import MaskProduct
from gist_fast.functional.operands import accumulation_dtype, ordinary
from gist_fast.functional.own_negatives import Pairs, own_terms, split_columns
from gist_fast.functional.row_terms import with_row_terms
from gist_fast.functional.rows import guided_rows, inside_transform, refuse_transforms
from gist_fast.functional.stats import GuidedContrastiveStats, make_stats
from gist_fast.functional.values import check_choice
from gist_fast.runtime.errors import InputError


class LossArguments(SharedKeywords, total=False):
    """Arguments of `guided_contrastive_loss` as type checkers see them: once, for both types that it returns."""

    temperature: float | Tensor
    margin: float | Tensor
    margin_strategy: MarginStrategy
    contrast_anchors: bool
    contrast_positives: bool
    rows: int | None
    offset: int
    reduction: Literal["mean", "sum", "none"]
    groups: Tensor | Sequence[Tensor] | None
    negative_groups: Sequence[Tensor] | None
    negative_rows: Sequence[Tensor | None] | None


@overload
def guided_contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    guide_anchors: Tensor | None = ...,
    guide_positives: Tensor | None = ...,
    negatives: Sequence[Tensor] | None = ...,
    guide_negatives: Sequence[Tensor] | None = ...,
    *,
    return_stats: Literal[True],
    **arguments: Unpack[LossArguments],
) -> tuple[Tensor, GuidedContrastiveStats]: ...
@overload
def guided_contrastive_loss(
    anchors: Tensor,
    positives: Tensor,
    guide_anchors: Tensor | None = ...,
    guide_positives: Tensor | None = ...,
    negatives: Sequence[Tensor] | None = ...,
    guide_negatives: Sequence[Tensor] | None = ...,
    *,
    return_stats: Literal[False] = False,
    **arguments: Unpack[LossArguments],
) -> Tensor: ...


def guided_contrastive_loss(
    anchors: Tensor,  # [A, D], A = B but for gathered ones
    positives: Tensor,  # [M, D], M >= offset + B
    guide_anchors: Tensor | None = None,  # [A, G]
    guide_positives: Tensor | None = None,  # [M, G]
    negatives: Sequence[Tensor] | None = None,  # K of [N_k, D]
    guide_negatives: Sequence[Tensor] | None = None,  # K of [N_k, G]
    temperature: float | Tensor = 0.01,
    margin: float | Tensor = 0.0,
    margin_strategy: MarginStrategy = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    offset: int = 0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend = "auto",
    return_stats: bool = False,
    mask_bits: MaskBits = "auto",
    *,
    rows: int | None = None,
    directions: Sequence[Direction] | None = None,
    partition_mode: PartitionMode = "joint",
    mask_ties: bool = False,
    groups: Tensor | Sequence[Tensor] | None = None,  # [M], or two of it
    negative_groups: Sequence[Tensor] | None = None,  # K of [N_k]
    mask_negatives: bool = True,
    negatives_scope: Scope | Sequence[Scope] = "all",
    negative_rows: Sequence[Tensor | None] | None = None,  # K of [N_k]
    hard: bool = False,
    hardness_mode: HardnessMode | None = None,
    hardness_strength: float = 0.0,
    distill_weight: float = 0.0,
    distill_temperature: float = 0.05,
    triplet_margin: float | None = None,
    label_smoothing: float = 0.0,
    positive_prior: float = 0.0,
    spread_out_weight: float = 0.0,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
) -> Tensor | tuple[Tensor, GuidedContrastiveStats]:
    """In-batch contrastive loss whose false negatives a guide model removes (GISTEmbed, arXiv 2402.16829).

    Every other text of the batch is a negative of anchor i, except those that the guide finds closer to the anchor
    than the anchor's own positive. With cosine similarity ``sim`` by the student, ``g`` by the guide, the threshold
    ``t_i = g(a_i, p_{offset+i})`` lowered by the margin, and entries (x, y) of the blocks ap (anchor, positive), aa
    (anchor, anchor), pp (positive, positive) and an_k (anchor, negative):

        loss_i = log(sum over entries of row i with not g(x, y) > t_i of exp(sim(x, y) / temperature))
                 - sim(a_i, p_{offset+i}) / temperature

    With `directions` the blocks pa (positive, anchor) and pn_k (positive, negative) are compared too; see
    `gist_fast.functional.blocks`.

    The positive itself is never masked, and the pair of a row with itself never counts. Embeddings need not be
    normalised nor contiguous. Rows of zeros are defined: similarity 0 to everything, and no gradient.

    Args:
        anchors: ``[A, D]``, float32, float16, bfloat16 or float64. The loss is of the first B of them, which are all
            but where `rows` is given.
        positives: ``[M, D]`` of the same type; anchor i's positive is row ``offset + i``, all others are negatives.
        guide_anchors: ``[A, G]``, the guide's embeddings of the same texts, in a type and width of their own. No
            gradient reaches them. Pass the very tensors of the student (or their ``detach()``) to let it guide itself,
            which costs no second product.
        guide_positives: ``[M, G]``. Both guide arguments None: no guide, nothing is masked.
        negatives: K columns of negatives, ``[N_k, D]`` each; every one of their rows is a negative of every anchor, or
            of its own anchor alone, see `negatives_scope`.
        guide_negatives: K tensors ``[N_k, G]``; needed where there are negatives that a guide may mask.
        temperature: above 0; a 0-d tensor may require a gradient.
        margin: lowers the threshold, so that a positive one masks more, in units of cosine similarity
            (``"absolute"``: ``t - margin``) or as a share (``"relative"``: ``t - |t| * margin``). One for all rows, or
            ``[B]``.
        margin_strategy: ``"absolute"`` or ``"relative"``.
        contrast_anchors: whether the block aa counts.
        contrast_positives: whether the block pp counts.
        offset: rows of `positives` that stand before the first anchor's positive: ``rank * B`` for candidates
            gathered from all ranks.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B]``.
        backend: ``"auto"`` takes ``"triton"`` where it can run and ``"tiled"`` elsewhere (the environment variable
            ``GIST_FAST_BACKEND`` overrides it), and computes small batches on a CPU at once; ``"reference"`` holds all
            scores in memory, and alone has second derivatives.
        return_stats: also return `GuidedContrastiveStats`.
        mask_bits: whether the masks are kept for the backward pass (``"keep"``) or decided again from the guide's
            embeddings (``"recompute"``: no memory, one guide product more a block). Kept, they take one bit a pair;
            ``"tiled"`` keeps the masked scores of up to 2**26 pairs instead, at four bytes each, and saves their
            product. ``"auto"`` keeps up to an eighth of the device's memory.
        rows: B, where there are more anchors than that: those of other ranks, which are candidates in the directions
            ``"query_to_query"`` and ``"doc_to_query"`` alone. Behind the batch's own come then those of all other
            positives, in their order, so that A is M.
        directions: what is compared, in the place of `contrast_anchors` and `contrast_positives`:
            ``"query_to_doc"`` (always; ap and an_k), ``"query_to_query"`` (aa), ``"doc_to_query"`` (pa) and
            ``"doc_to_doc"`` (pp and pn_k, where the row's own negatives do not count), as in sentence-transformers'
            ``MultipleNegativesRankingLoss`` and GTE (arXiv 2308.03281).
        partition_mode: ``"joint"``: one softmax over all directions. The positive is in ``"query_to_doc"`` and in
            ``"doc_to_query"``, and counts in both: ``loss_i = log(1 + exp(L_i))``, where ``L_i`` is the loss with it
            once. ``"per_direction"``: a softmax each, whose losses are averaged; with ``"query_to_doc"`` and
            ``"doc_to_query"``, the symmetric InfoNCE (arXiv 2310.19923).
        mask_ties: whether what ties with the threshold is masked too, as another copy of the positive's text does.
        groups: ``[M]``, int64 or int32: the group of each row of `positives`, and so of its anchor. Rows of one group
            are no negatives of each other, in ap, aa and pp. Or two such tensors, as of the anchors' texts and of the
            positives': rows that have one of them in common are no negatives of each other (arXiv 2503.07891).
        negative_groups: K of ``[N_k]``: the group of each negative. It is left out for the anchors whose own, the last
            of `groups`, is the same, as where it is the text of their positive. None: negatives are in no group.
        mask_negatives: whether the guide may mask columns of negatives. False: `guide_negatives` is not looked at.
        negatives_scope: ``"all"``, or ``"own"``: row i of the column is a negative of anchor i alone, so that it has
            ``B`` rows, never gathered ones; one for all columns, or a sequence of one a column.
        negative_rows: K of ``[N_k]``, int64 or int32, or None: the anchor of each row of an ``"own"`` column that has
            not one a row; each anchor at most once.
        hard: whether negatives that the student already ranks below the positive are left out, too.
        hardness_mode: makes negatives the heavier the more similar they are to the anchor, as in sentence-transformers'
            ``MultipleNegativesRankingLoss``: ``hardness_strength * sim``, held constant, is added to their logits.
            ``"in_batch_negatives"``: in ap, and in an_k but for the anchor's own row; ``"hard_negatives"``: for the
            anchor's own rows (``offset + i``) of an_k; ``"all_negatives"``: both.
        hardness_strength: 0 or more; published: 9 (arXiv 2503.04812, in-batch), 5 (arXiv 2509.20354, own).
        distill_weight: 0 or more: of the KL divergence of the student's distribution over a row's candidates from the
            guide's, which is added; see `gist_fast.functional.distillation`.
        distill_temperature: above 0: what divides the guide's similarities there.
        triplet_margin: adds the soft triplet term of `gist_fast.functional.triplet` with this margin, in units of
            cosine similarity; above 0.
        label_smoothing: from 0 to below 1: the share of each row's target that all of its classes get alike, the
            positive and the negatives that count.
        positive_prior: from 0 to below 1: the share of what counts as negative that is expected to be positive, tau+ of
            debiased contrastive learning (arXiv 2007.00224); see `gist_fast.functional.row_terms`.
        spread_out_weight: 0 or more: of the mean squared similarity of the batch's anchors with each other, and of
            their positives, which is added (arXiv 2509.20354); of this rank's rows alone.
        matryoshka_dims: for nested embeddings (Matryoshka, arXiv 2205.13147): the loss is the weighted sum of
            those of the first so many columns, normalised anew. Masks are decided once, by the guide or, where the
            student's scores decide, by the largest dim.
        matryoshka_weights: one for each of the dims; None for 1.

    Returns:
        The loss, 0-d or ``[B]``, float32 (float64 for float64 embeddings); with `return_stats`, a pair of it and the
        statistics.

    Raises:
        TypeError: an argument is of a wrong type, or embeddings of one model differ in type.
        ValueError: shapes, widths or devices do not go together; a value is out of range; a CPU embedding is not
            finite (its row is named; on an accelerator the loss is NaN instead); the backend cannot run here.

    Example:
        >>> anchors, positives = torch.eye(3, requires_grad=True), torch.eye(3)
        >>> guide = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # finds the texts of rows 1 and 2 alike
        >>> loss, stats = guided_contrastive_loss(anchors, positives, guide, guide, mask_ties=True, return_stats=True)
        >>> stats.masked.tolist()  # their pairs are no negatives in any block
        [2, 2, 2]
    """
    student, guide, rows = check_embeddings(
        anchors, positives, negatives, guide_anchors, guide_positives, guide_negatives, rows, offset, mask_negatives
    )
    check_temperature(temperature, anchors.dtype)
    if isinstance(temperature, Tensor) and temperature.device != anchors.device:
        raise InputError(f"temperature: expected on {anchors.device}, as the anchors, got on {temperature.device}.")
    check_choice("reduction", reduction, REDUCTIONS)
    row_groups, column_groups = check_groups(groups, negative_groups, anchors, positives.shape[0], student[2:])
    margins = margin if isinstance(margin, Tensor) else None
    if margins is not None:
        check_row_margins(margins, rows)
        if not guide:
            raise InputError("margin: expected 0.0 without a guide, which it is about, got a tensor.")
    self_guided = len(guide) > 0 and all(map(_same_tensor, student, guide))
    config = _config(
        margin_strategy=margin_strategy,
        margin=0.0 if isinstance(margin, Tensor) else margin,
        contrast_anchors=contrast_anchors,
        contrast_positives=contrast_positives,
        # A tuple, which can be looked up; what is neither is refused there.
        directions=tuple(directions) if isinstance(directions, list) else directions,  # type: ignore[arg-type]
        partition_mode=partition_mode,
        self_guided=self_guided,
        mask_ties=mask_ties,
        groups=None if groups is None else "column",
        mask_negatives=mask_negatives,
        negatives_scope=tuple(negatives_scope) if isinstance(negatives_scope, list) else negatives_scope,  # type: ignore[arg-type]
        hard=hard,
        hardness_mode=hardness_mode,
        hardness_strength=hardness_strength,
        distill_weight=distill_weight,
        distill_temperature=distill_temperature,
        triplet_margin=triplet_margin,
        label_smoothing=label_smoothing,
        positive_prior=positive_prior,
        spread_out_weight=spread_out_weight,
        matryoshka_dims=matryoshka_dims,  # type: ignore[arg-type]  # any sequence
        matryoshka_weights=matryoshka_weights,  # type: ignore[arg-type]
        backend=backend,
        mask_bits=mask_bits,
        guided=len(guide) > 0,
    )
    dims, weights = check_dims(matryoshka_dims, matryoshka_weights, anchors.shape[1])
    scopes = check_scopes(negatives_scope, len(student) - 2)
    owners = check_negative_rows(negative_rows, student[2:], scopes, anchors, rows)
    check_other_anchors(rows, anchors.shape[0], positives.shape[0], config.gathers_anchors)
    check_own_negatives(hardness_mode, config.pairs_positives_with_negatives, student[2:], scopes, offset + rows)
    columns = split_columns(student, guide, column_groups, scopes, owners)
    own, student, guide = columns.own, columns.student, columns.guide
    types = {x.dtype for x in (*student, *guide)}
    chosen = choose_backend(backend, anchors.device, torch.float64 if torch.float64 in types else anchors.dtype)

    blocks = make_blocks(rows, [x.shape[0] for x in student], config, offset)
    # A traced graph has few operations anyway, and would have to look at values here.
    at_once = not torch.compiler.is_compiling() and chosen == "tiled" and left_to_auto(backend)
    at_once = at_once and dense.covers(config, blocks, anchors.device.type)
    product: MaskProduct | None = None
    reduced = "none"
    if at_once:
        refuse_transforms(student if not isinstance(temperature, Tensor) else (*student, temperature))
        others = () if self_guided else guide
        reduced = reduction if own is None else "none"
        found = dense.forward(
            student, others, temperature, config, offset, margins, blocks, reduced, statistics=return_stats
        )
    else:
        if not isinstance(temperature, Tensor):
            dtype = accumulation_dtype(anchors.dtype)
            temperature = torch.full((), float(temperature), dtype=dtype, device=anchors.device)
        student, guide = tuple(map(ordinary, student)), tuple(map(ordinary, guide))
        found, product = guided_rows(
            chosen,
            config,
            rows,
            offset,
            student,
            () if self_guided else guide,
            temperature,
            None if margins is None else ordinary(margins.to(anchors.device)),
            groups_of_rows(
                [ordinary(each) for each in row_groups],
                [ordinary(each) for each in columns.groups],
                anchors.shape[0],
                rows,
                offset,
            ),
            dims,
            blocks,
            reduction != "none",
        )
    terms = None
    if own is not None:
        its_rows = slice(offset, offset + rows)
        pairs = Pairs(
            (ordinary(student[0])[:rows], ordinary(student[1])[its_rows]),
            () if self_guided or not guide else (guide[0][:rows], guide[1][its_rows]),
            margins,
            row_groups[-1][its_rows] if row_groups else None,
        )
        with torch.autocast(anchors.device.type, enabled=False):
            terms = own_terms(own, pairs, temperature, config, dims)
    loss = _of_each_row(found.loss, None if terms is None else terms.log_sums, config)
    if config.has_row_terms:
        with torch.autocast(anchors.device.type, enabled=False):
            loss = with_row_terms(loss, config, student, blocks, offset, temperature, dims, product, terms)
    divergence: Tensor | None = None
    if config.distill_weight:
        assert isinstance(temperature, Tensor)
        distilled = distil(chosen, config, rows, offset, student, guide, temperature, dims)
        with torch.autocast(anchors.device.type, enabled=False):
            divergence = kl_rows(distilled, config, student, guide, offset, temperature, dims, terms)
        loss = loss + config.distill_weight * divergence
    if not at_once:
        if dims:
            # Weighed one by one: a tensor of the weights would have to be copied to the device, which waits.
            loss = torch.stack([row * weight for row, weight in zip(loss.unbind(), weights, strict=True)]).sum(0)
        else:
            loss = loss[0]
    if reduction != reduced:
        loss = getattr(loss, reduction)()
    if not return_stats:
        return loss
    masked, easy, hardest = found.masked, found.easy_negatives, found.hardest
    if terms is not None:
        masked, easy = torch.cat([masked, terms.masked.sum(1)]), torch.cat([easy, terms.easy.sum(1)])
        hardest = torch.maximum(hardest, terms.hardest)
    names, compared = columns.named(blocks)
    kl = None if divergence is None else divergence[0]
    stats = make_stats(names, compared, masked, easy if hard else None, found.positive, hardest, kl)
    return loss, stats if terms is None else stats.in_order()


def _of_each_row(losses: Tensor, log_sums: Tensor | None, config: LossConfig) -> Tensor:
    """``[L, B]``, or as it came: the loss of each row, of those in each softmax.

    Args:
        losses: ``[L, R]``, `GuidedRows.loss`; or ``[B]`` or 0-d where there is one of all.
        log_sums: `OwnTerms.log_sums`, of own negatives, which are in the softmax of query_to_doc.
    """
    first, *others = losses.chunk(config.softmaxes, dim=-1) if config.softmaxes > 1 else (losses,)
    if log_sums is not None:
        first = torch.logaddexp(first, log_sums[0] if first.ndim == 1 else log_sums)
    if others:
        return torch.stack([first, *others]).mean(0)
    if config.counts_positive_twice:
        return torch.logaddexp(first, torch.zeros_like(first))
    return first


def _config(**settings: Any) -> LossConfig:
    """The checked settings; the same ones again where they came before, of the same types."""
    # Equal tuples may differ in the types of their items (1 and True), and a traced graph has symbols for numbers.
    if settings["matryoshka_dims"] is not None or settings["matryoshka_weights"] is not None:
        return LossConfig(**settings)
    if torch.compiler.is_compiling():
        return LossConfig(**settings)
    try:
        return _known_config(**settings)
    except TypeError:  # not hashable, or refused: say so in the settings' own words
        return LossConfig(**settings)


_known_config = functools.lru_cache(maxsize=64, typed=True)(LossConfig)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or a view of all of the same memory, as ``x`` and ``x.detach()`` are."""
    if a is b:
        return True
    if torch.compiler.is_compiling() or inside_transform():
        return False  # no memory to compare there
    return (
        a.data_ptr() == b.data_ptr()
        and (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)
    )  # fmt: skip
