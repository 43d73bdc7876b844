"""The generated parts of a document, each between its marks: ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations

import re


def put(text: str, name: str, part: str) -> str:
    """The document with one of its parts made anew.

    Raises:
        ValueError: its marks do not stand there once.
    """
    between = rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)"
    text, times = re.subn(between, lambda _: f"{part}\n", text, flags=re.DOTALL)
    if times != 1:
        raise ValueError(f"the marks of the part {name!r} stand there {times} times; once would do.")
    return text
