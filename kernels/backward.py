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
guide operands in tiles of the same shape and order of summation, which gives the same comparisons.

**Two plans**, `gist_fast.kernels.staged` and `gist_fast.kernels.owned`; which one is a matter of width, and stands in
`gist_fast.kernels.config`.
"""

from __future__ import annotations

from gist_fast.kernels.config import Config
from gist_fast.kernels.owned import backward_part_owned
from gist_fast.kernels.parts import Part
from gist_fast.kernels.staged import backward_part_staged
from torch import Tensor


def backward_part(
    part: Part,
    limits: Tensor | None,
    self_guided: bool,
    lse2: Tensor,
    weights: Tensor,
    row_gradient: Tensor,
    column_gradient: Tensor,
    config: Config,
) -> None:
    """Add a part's gradients by its rows and columns.

    Args:
        limits: ``[R]``, fp32; None where the bits are kept or no guide decides.
        self_guided: the student's own scores decide the masks.
        lse2: ``[R]``, fp32, positive included.
        weights: ``[R]``, fp32.
        row_gradient: ``[R, D]``, fp32; updated.
        column_gradient: ``[C, D]``, fp32; updated. Not looked at for a symmetric part.
        config: its `plan` is kept to, except that masks are decided again by the staged plan alone.
    """
    decide_again = limits is not None
    if config.plan == "owned" and not decide_again:
        backward_part_owned(part, lse2, weights, row_gradient, column_gradient, config.owned)
    else:
        backward_part_staged(part, limits, self_guided, lse2, weights, row_gradient, column_gradient, config)
