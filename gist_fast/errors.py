"""The one exception that a wrong command, configuration or file ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong usage or input. The message names what came and what would do; the command exits with 2 on it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the known word most like `word`, or an empty string where none is."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
