"""Texts of mixed length into groups of like length, so that a group is padded to little more than its texts.

For the guide that embeds a dataset (`gist_fast.guide_columns`) and for the student's mini-batches alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from gist_fast.runtime.errors import InputError


def by_length(lengths: Sequence[int]) -> list[int]:
    """The positions of `lengths`, longest first; equal lengths keep their order."""
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def group_tokens(lengths: Sequence[int], *, padded: bool = True) -> int:
    """Tokens that a group takes: rows times the longest, or without padding the sum."""
    return len(lengths) * max(lengths, default=0) if padded else sum(lengths)


def pack(
    lengths: Sequence[int], *, max_tokens: int | None = None, max_rows: int | None = None, padded: bool = True
) -> list[tuple[int, int]]:
    """Cut a sequence of texts, as ordered, into consecutive groups.

    Args:
        lengths: tokens of each text.
        max_tokens: tokens of a group (see `group_tokens`); at least 1. A text longer than that is a group of its own.
            None: any number.
        max_rows: rows of a group; at least 1. None: any number.
        padded: whether the texts of a group are padded to the longest.

    Returns:
        ``(begin, end)`` of each group, in order, none empty; no group for no texts.

    Raises:
        ValueError: a limit is below 1.
    """
    for name, limit in (("max_tokens", max_tokens), ("max_rows", max_rows)):
        if limit is not None and limit < 1:
            raise InputError(f"{name}: expected at least 1, or None for no limit, got {limit}.")
    groups = []
    begin = longest = total = 0
    for row, length in enumerate(lengths):
        rows, longest, total = row + 1 - begin, max(longest, length), total + length
        tokens = rows * longest if padded else total
        if row > begin and (
            (max_tokens is not None and tokens > max_tokens) or (max_rows is not None and rows > max_rows)
        ):
            groups.append((begin, row))
            begin, longest, total = row, length, length
    if len(lengths) > begin:
        groups.append((begin, len(lengths)))
    return groups
