"""How float32 is multiplied: as torch's own matmul multiplies it."""

from __future__ import annotations

import torch


def multiplies_in_tf32() -> bool:
    """Whether torch's own setting has float32 matrices of a CUDA device multiplied in TF32.

    Where that was set through ``fp32_precision`` (since torch 2.9), reading the older ``allow_tf32`` raises.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"
