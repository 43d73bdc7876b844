"""Triton's interpreter as ``--toy`` needs it: a rehearsal runs with the packages that the card's machine has.

Triton 3.6 makes an index of an array with one entry by ``int(array)``, which NumPy 2.4 refuses for any array that has
an axis. Triton 3.9 takes the axis off first. So does the rehearsal, and no kernel computes anything else for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def accept_newer_numpy() -> str | None:
    """Mend the interpreter of this process, where NumPy needs it.

    Returns:
        What was done, in one line; None where nothing was.
    """
    import triton
    from triton.runtime import interpreter

    if _version(np.__version__) < (2, 4) or _version(triton.__version__) >= (3, 9):
        return None
    patch: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
    return f"Triton {triton.__version__}'s interpreter was mended for NumPy {np.__version__}: indices of one entry"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(".")[:2])
