"""Groups of texts: all rows once and in order, within the limits, and no group that a neighbour could have joined."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_fast.losses.packing import by_length, pack

LENGTHS = st.lists(st.integers(1, 60), max_size=80)


@given(LENGTHS)
def test_by_length_puts_the_longest_first_and_keeps_ties_in_order(lengths):
    order = by_length(lengths)
    assert sorted(order) == list(range(len(lengths)))
    for a, b in itertools.pairwise(order):
        assert (lengths[a], -a) > (lengths[b], -b)


@given(LENGTHS, st.none() | st.integers(1, 200), st.none() | st.integers(1, 20), st.booleans())
def test_groups_cover_all_and_keep_the_limits(lengths, max_tokens, max_rows, padded):
    groups = pack(lengths, max_tokens=max_tokens, max_rows=max_rows, padded=padded)
    assert [row for begin, end in groups for row in range(begin, end)] == list(range(len(lengths)))

    def fits(begin: int, end: int) -> bool:
        rows, group = end - begin, lengths[begin:end]
        tokens = rows * max(group) if padded else sum(group)
        return (max_tokens is None or tokens <= max_tokens) and (max_rows is None or rows <= max_rows)

    for begin, end in groups:
        assert end == begin + 1 or fits(begin, end)
    for (begin, _), (start, _) in itertools.pairwise(groups):
        assert not fits(begin, start + 1), "the next row would have fitted"


@pytest.mark.parametrize("limit", ["max_tokens", "max_rows"])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(ValueError, match=rf"{limit}: expected at least 1, or None for no limit, got 0"):
        pack([3], **{limit: 0})
