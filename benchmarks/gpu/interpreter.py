"""Triton's interpreter as ``--toy`` and the tests need it: quicker, and with the packages that the card's machine has.

Triton 3.6 makes an index of an array with one entry by ``int(array)``, which NumPy 2.4 refuses for any array that has
an axis. Triton 3.9 takes the axis off first. So does the rehearsal, and no kernel computes anything else for it.
"""

from __future__ import annotations

from dataclasses import replace
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


def hurry() -> None:
    """Have this process's interpreter leave out what takes half of its time and more.

    It looks at integers for overflow, and at each call of a device function it looks through all of `triton.language`
    and replaces what it finds, although the launch has done so already. Here it does the latter at the first call alone
    for each module that functions are made of, where this Triton works as those that we know.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "InterpretedFunction")):
        return
    modules: dict[object, frozenset[str]] = {}
    done: set[frozenset[str]] = set()
    plain: Any = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: object, **kwargs: object) -> object:
        if self not in modules:
            names = (getattr(value, "__name__", "") for value in self.fn.__globals__.values())
            modules[self] = frozenset(name for name in names if name in ("triton.language", "triton.language.core"))
        if modules[self] not in done:
            done.add(modules[self])
            return plain(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(".")[:2])
