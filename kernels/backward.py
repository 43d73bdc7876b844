"""The backward pass: what its gradient is, and which plan computes it.

**The gradient.** With base-2 logits ``s_ij = x_i . y_j`` of the pairs that count, ``lse_i`` the base-2 logsumexp of row
i (its positive included) and ``w_i`` the weight of its loss, the pass computes the derivatives of

    L = sum_i w_i sum_j 2^(s_ij - lse_i),  where lse_i is held fixed,

divided by ln 2, which is the derivative of ``sum_i w_i lse_i`` by way of the negatives. With the coefficients

    W_ij = w_i 2^(s_ij - lse_i) where (i, j) counts, else 0

they are ``d x_i = sum_j W_ij y_j`` and ``d y_j = sum_i W_ij x_i``. Every coefficient is at most ``|w_i|``, since
``lse_i`` is no less than any of its terms: no exponential overflows, whatever the temperature.

**Symmetry.** Where x and y are one operand u, both sums run over the same rows, and ``s_ij = s_ji``:

    d u_i = sum_j W_ij u_j + sum_j W_ji u_j = sum_j V_ij u_j,    V = W + W^T

so one score gives both terms. V is symmetric, and only its tiles on and above the diagonal are computed.

**Masks** are constants: decided once in the forward pass, read as bits, or (`bits` None) decided again from the same
operands in tiles of the same shape and order of summation, which gives the same comparisons. One mask serves all
widths of a ladder, each of which has an L, a logsumexp and weights of its own.

**Hardness weighting** multiplies some logits by a factor that counts as a constant addition: ``s_ij`` above is then the
heavier logit, and its derivative still that of ``x_i . y_j``.

**Two plans**, `gist_fast.kernels.staged` and `gist_fast.kernels.owned`; which one is a matter of width, and stands in
`gist_fast.kernels.config`.
"""

from __future__ import annotations

from collections.abc import Sequence

from gist_fast.kernels.config import Config
from gist_fast.kernels.owned import backward_part_owned
from gist_fast.kernels.parts import Part
from gist_fast.kernels.staged import backward_part_staged
from torch import Tensor


def backward_part(
    part: Part,
    lse2: Tensor,
    weights: Tensor,
    row_gradients: Sequence[Tensor],
    column_gradients: Sequence[Tensor],
    config: Config,
) -> None:
    """Add a part's gradients by its rows and columns.

    Args:
        lse2: ``[L, R]``, fp32, positive included.
        weights: ``[L, R]``, fp32.
        row_gradients: ``[R, D]`` at each width, fp32; updated.
        column_gradients: ``[C, D]`` at each width, fp32; updated. Not looked at for a symmetric part.
        config: its plans are kept to, except that masks are decided again, and boosts without bits computed, by the
            staged plan alone.
    """
    staged = []
    for level, (rows, _) in enumerate(part.ladder):
        plan = config.plan if level == 0 else config.plan_below(rows.shape[1])
        # With a boost and without bits the owning kernel spills on some cards.
        boosted_alone = part.boosts is not None and part.bits is None
        if plan == "staged" or part.decision is not None or boosted_alone:
            staged.append(level)
            continue
        gradients = row_gradients[level], column_gradients[level]
        backward_part_owned(part, level, lse2[level], weights[level], *gradients, config.owned)
    if staged:
        backward_part_staged(part, staged, lse2, weights, row_gradients, column_gradients, config)
