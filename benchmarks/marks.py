"""The generated parts of a document, each between its marks: ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping


def put(text: str, parts: Mapping[str, str | None]) -> str:
    """The document with its parts made anew; one that is None stays as it is.

    Raises:
        ValueError: the marks of one do not stand there once.
    """
    for name, part in parts.items():
        new = None if part is None else f"{part}\n"
        between = rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)"
        text, times = re.subn(between, lambda old, new=new: old[0] if new is None else new, text, flags=re.DOTALL)
        if times != 1:
            raise ValueError(f"the marks of the part {name!r} stand there {times} times; expected once.")
    return text
