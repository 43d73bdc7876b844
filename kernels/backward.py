"""The backward pass: what its gradient is, and which method computes it.

**The gradient.** With base-2 logits ``s_ij = x_i . y_j`` of the pairs that count, ``lse_i`` the base-2 logsumexp of row
i (its positive included) and ``w_i`` the weight of its loss, the pass computes the derivatives of

    L = sum_i w_i sum_j 2^(s_ij - lse_i),  where lse_i is held fixed,

divided by ln 2, which is the derivative of ``sum_i w_i lse_i`` by way of the negatives. With the dlogits

    W_ij = w_i 2^(s_ij - lse_i) where (i, j) counts, else 0

they are ``d x_i = sum_j W_ij y_j`` and ``d y_j = sum_i W_ij x_i``. Each dlogit is at most ``|w_i|``, since ``lse_i`` is
no less than any of its terms: no exponential overflows, whatever the temperature.

**Symmetry.** Where x and y are one operand u, both sums run over the same rows, and ``s_ij = s_ji``:

    d u_i = sum_j W_ij u_j + sum_j W_ji u_j = sum_j V_ij u_j,    V = W + W^T

so one score gives both terms. V is symmetric, and only its tiles on and above the diagonal are computed.

**Masks** are constants: decided once in the forward pass and read as mask bits. Where none were kept (None), they are
decided again from the same operands in tiles of the same shape and order of summation, which gives the same
comparisons. One mask serves all Matryoshka dims, each of which has an L, a logsumexp and weights of its own.

**Hardness weighting** multiplies some logits by a scale that counts as a constant addition: ``s_ij`` above is then the
heavier logit, and its derivative still that of ``x_i . y_j``.

**Two methods.** `gist_fast.kernels.owned` accumulates gradients in registers; `gist_fast.kernels.staged` materialises
dlogits in memory. Which one is a matter of the dim, and stands in `gist_fast.kernels.config`.
"""

from __future__ import annotations

from collections.abc import Sequence

from gist_fast.kernels.config import Config
from gist_fast.kernels.owned import backward_owned
from gist_fast.kernels.rectangle import Rectangle
from gist_fast.kernels.staged import backward_staged
from torch import Tensor


def backward_pass(
    rectangle: Rectangle,
    lse2: Tensor,
    weights: Tensor,
    row_gradients: Sequence[Tensor],
    column_gradients: Sequence[Tensor],
    config: Config,
) -> None:
    """Add a rectangle's gradients by its rows and columns.

    Args:
        lse2: ``[L, R]``, fp32, positive included.
        weights: ``[L, R]``, fp32.
        row_gradients: ``[R, D]`` at each Matryoshka dim, fp32; updated.
        column_gradients: ``[C, D]`` at each dim, fp32; updated. Not looked at for a symmetric rectangle.
        config: its methods are kept to, with one exception. Where masks are decided again, or logits are scaled and no
            mask bits are there, dlogits are materialised.
    """
    staged = []
    for index, (rows, _) in enumerate(rectangle.matryoshka):
        method = config.backward_method if index == 0 else config.narrow_backward_method(rows.shape[1])
        # With logit scales and without mask bits the other kernel spills on some cards.
        only_scaled = rectangle.logit_scales is not None and rectangle.mask_bits is None
        if method == "staged" or rectangle.predicates is not None or only_scaled:
            staged.append(index)
            continue
        gradients = row_gradients[index], column_gradients[index]
        backward_owned(rectangle, index, lse2[index], weights[index], *gradients, config.owned)
    if staged:
        backward_staged(rectangle, staged, lse2, weights, row_gradients, column_gradients, config)
