"""What a wrong command, configuration, file or argument ends in.

Both classes are what Python's users expect (a ValueError, a TypeError) and tell the command that the fault is in what
it was given: it prints their message in one line and exits with 2.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path


class WrongInput(Exception):  # noqa: N818 - what both have in common, never raised itself
    """Wrong usage or input. The message names what was expected and what came."""


class InputError(WrongInput, ValueError):
    """A wrong value."""


class InputTypeError(WrongInput, TypeError):
    """A value of a wrong type."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``" (did you mean 'x'?)"`` for the known word most like `word`, or an empty string where none is.

    Args:
        cutoff: how like it must be; 1 is the same word.
    """
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def nearest_file(path: Path) -> str:
    """`nearest`, among what lies beside a path that does not exist."""
    with contextlib.suppress(OSError):
        return nearest(path.name, (beside.name for beside in path.parent.iterdir()))
    return ""


def shown(value: object, most: int = 60) -> str:
    """A value as an error quotes it: at most `most` characters."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes out no integer of more than 4,300 digits.
        text = "a number of thousands of digits"
    return text if len(text) <= most else text[:most] + "..."


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
