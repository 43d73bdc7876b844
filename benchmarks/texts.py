"""Real texts of mixed length that every installation has: the documentation strings of its Python packages.

An anchor is the first paragraph of a documentation string, its positive the rest: from a line to several pages.
"""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "asyncio",
    "unittest",
    "email",
    "http",
    "sentence_transformers",
    "datasets",
)
SHORTEST = 12
"""Characters: shorter ones say nothing."""


def docstring_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` pairs, no text twice, in random order.

    Raises:
        SystemExit: there are fewer.
    """
    seen: set[str] = set()
    pairs: list[tuple[str, str]] = []
    for text in _docstrings(seed):
        first, _, rest = text.partition("\n\n")
        first, rest = " ".join(first.split()), " ".join(rest.split())
        if min(len(first), len(rest)) >= SHORTEST and first not in seen and rest not in seen:
            seen |= {first, rest}
            pairs.append((first, rest))
            if len(pairs) == count:
                break
    if len(pairs) < count:
        raise SystemExit(
            f"texts: {len(pairs)} pairs in the documentation of {', '.join(PACKAGES)}; {count} were asked."
        )
    random.Random(seed).shuffle(pairs)
    return pairs


def _docstrings(seed: int) -> Iterator[str]:
    """In the random order of their files, so that few of them need to be read."""
    specs = [importlib.util.find_spec(package) for package in PACKAGES]
    folders = [Path(next(iter(s.submodule_search_locations))) for s in specs if s and s.submodule_search_locations]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    random.Random(seed).shuffle(files)
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # test data of some packages is not Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text:
                    yield text
