"""Texts that are the same or nearly so, found in tiles, against plain loops in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inspection import lookup

from gist_fast.inspection import Copied, NearPair, duplicates, find_duplicates, inspect_batch
from gist_fast.inspection.best import Best
from gist_fast.runtime.errors import InputError


def texts_with_duplicates(rows, negatives, seed):
    """Columns in which texts recur, in their own column and in others, and vectors that lie in tight clusters."""
    random = np.random.default_rng(seed)
    names = ["anchor", "positive", *(f"negative_{k + 1}" for k in range(negatives))]
    columns = {name: [f"t{random.integers(2 * rows)}" for _ in range(rows)] for name in names}
    centres = random.normal(size=(4, 5))
    vectors = {
        f"t{k}": (centres[random.integers(4)] + random.normal(size=5) * 0.15).astype(np.float32)
        for k in range(2 * rows)
    }
    return columns, vectors


def by_hand(columns, vectors, near):
    """The rows of each text that stands in several, and the similarity of each pair of items nearly the same.

    Returns:
        By text its rows; by pair of (column, text) the similarity, of all that stand in two different rows.
    """

    def cosine(x, y):
        x, y = vectors[x].astype(np.float64), vectors[y].astype(np.float64)
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    where: dict[str, set[int]] = {}
    items: dict[tuple[str, str], set[int]] = {}
    for name, texts in columns.items():
        for row, text in enumerate(texts, 1):
            where.setdefault(text, set()).add(row)
            items.setdefault((name, text), set()).add(row)
    pairs = {}
    for one, other in itertools.combinations(items, 2):
        apart = any(a != b for a in items[one] for b in items[other])
        if one[1] != other[1] and apart:
            pairs[one, other] = cosine(one[1], other[1])
    return {text: rows for text, rows in where.items() if len(rows) > 1}, pairs, items


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 23),
    negatives=st.integers(0, 2),
    tile=st.sampled_from([1, 3, 7, 2048]),
    near=st.sampled_from([0.3, 0.9, 0.97]),
    seed=st.integers(0, 2**31),
)
def test_what_is_found_is_what_loops_find(rows, negatives, tile, near, seed):
    columns, vectors = texts_with_duplicates(rows, negatives, seed)
    copied, pairs, items = by_hand(columns, vectors, near)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "TILE", tile)
        found = find_duplicates(Dataset.from_dict(columns), lookup(vectors), near=near, most=None)
    assert found.rows == rows
    assert {copy.text: copy.rows for copy in found.copies} == {text: len(where) for text, where in copied.items()}
    assert found.copied_texts == len(copied)
    assert found.rows_with_copies == len(set().union(*copied.values()))
    for copy in found.copies:
        assert all(columns[name][row - 1] == copy.text for row, name in copy.places)
    got = {frozenset([(p.column, p.text), (p.other_column, p.other_text)]): p.similarity for p in found.pairs}
    # float32 against float64: what stands within 1e-5 of the threshold may fall either way.
    sure = {frozenset(pair) for pair, score in pairs.items() if score > near + 1e-5}
    perhaps = {frozenset(pair) for pair, score in pairs.items() if score > near - 1e-5}
    assert sure <= set(got) <= perhaps
    assert found.near_pairs == len(got) == len(found.pairs)
    of = {frozenset(pair): score for pair, score in pairs.items()}
    assert all(got[pair] == pytest.approx(of[pair], abs=1e-5) for pair in got)
    assert found.rows_with_near == len({row for pair in got for item in pair for row in items[item]})
    for pair in found.pairs:
        assert pair.row < pair.other_row
        assert columns[pair.column][pair.row - 1] == pair.text
        assert columns[pair.other_column][pair.other_row - 1] == pair.other_text
    similarities = [pair.similarity for pair in found.pairs]
    assert similarities == sorted(similarities, reverse=True)


def test_a_batch_is_searched_by_the_same_rule():
    columns, vectors = texts_with_duplicates(19, 1, seed=3)
    data = Dataset.from_dict(columns)
    assert inspect_batch(data, lookup(vectors), near=0.9).duplicates == find_duplicates(
        data, lookup(vectors), near=0.9, most=None
    )
    second = inspect_batch(data, lookup(vectors), batch=2, batch_size=10, near=0.9).duplicates
    assert {row for pair in second.pairs for row in (pair.row, pair.other_row)} <= set(range(11, 20))


X, NEAR_X, Y = [1.0, 0.0], [1.0, 0.1], [0.0, 1.0]


def test_copies_near_ones_and_texts_of_one_row():
    columns = {"anchor": ["x", "y", "x"], "positive": ["near x", "x", "y"]}
    found = find_duplicates(Dataset.from_dict(columns), lookup({"x": X, "near x": NEAR_X, "y": Y}))
    assert found.copies == [
        Copied("x", 3, ((1, "anchor"), (2, "positive"), (3, "anchor"))),
        Copied("y", 2, ((2, "anchor"), (3, "positive"))),
    ]
    assert (found.copied_texts, found.rows_with_copies) == (2, 3)
    score = pytest.approx(1 / np.sqrt(1.01))
    # "x" of the anchors stands in rows 1 and 3, of which row 3 is another one than that of "near x".
    assert found.pairs == [
        NearPair(score, "near x", 1, "positive", "x", 2, "positive"),
        NearPair(score, "near x", 1, "positive", "x", 3, "anchor"),
    ]
    one_row = {"anchor": ["x", "y"], "positive": ["near x", "-x"]}
    vectors = {"x": X, "near x": NEAR_X, "y": Y, "-x": [-1.0, 0.0]}
    assert find_duplicates(Dataset.from_dict(one_row), lookup(vectors)).near_pairs == 0


def test_few_are_listed_and_all_are_counted():
    columns, vectors = texts_with_duplicates(40, 1, seed=1)
    data = Dataset.from_dict(columns)
    whole = find_duplicates(data, lookup(vectors), near=0.9, most=None)
    few = find_duplicates(data, lookup(vectors), near=0.9, most=4)
    assert len(whole.pairs) > 20
    assert [p.similarity for p in few.pairs] == [p.similarity for p in whole.pairs[:4]]
    assert few.copies == whole.copies[:4]
    assert (few.near_pairs, few.rows_with_near) == (whole.near_pairs, whole.rows_with_near)
    assert (few.copied_texts, few.rows_with_copies) == (whole.copied_texts, whole.rows_with_copies)


def test_the_first_rows_alone():
    columns, vectors = texts_with_duplicates(30, 0, seed=2)
    data, encode = Dataset.from_dict(columns), lookup(vectors)
    assert find_duplicates(data, encode, rows=12) == find_duplicates(data.select(range(12)), lookup(vectors))
    assert {text for _, _, texts in encode.asked for text in texts} == {
        text for texts in columns.values() for text in texts[:12]
    }
    assert find_duplicates(data, encode, rows=1000) == find_duplicates(data, encode)


def test_each_text_is_encoded_once_a_column_and_carried_embeddings_serve():
    columns, vectors = texts_with_duplicates(20, 0, seed=4)
    encode = lookup(vectors)
    found = find_duplicates(Dataset.from_dict(columns), encode)
    for column, _, texts in encode.asked:
        assert texts == list(dict.fromkeys(columns[column]))
    carried = {f"{name}_guide_embedding": [vectors[text] for text in texts] for name, texts in columns.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gist_fast.inspection.embeddings.CHUNK", 7)
        assert find_duplicates(Dataset.from_dict(columns | carried), None) == found


def test_no_tile_is_larger_than_said_and_progress_is_told(monkeypatch):
    monkeypatch.setattr(duplicates, "TILE", 8)
    shapes = []
    multiply = torch.Tensor.__matmul__

    def spied(one, other):
        out = multiply(one, other)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", spied)
    columns, vectors = texts_with_duplicates(50, 0, seed=5)
    told = []
    find_duplicates(Dataset.from_dict(columns), lookup(vectors), on_progress=lambda *progress: told.append(progress))
    assert max(rows for rows, _ in shapes) == max(columns for _, columns in shapes) == 8
    assert told == [(done, len(shapes)) for done in range(1, len(shapes) + 1)]
    assert len(shapes) > 10


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 1}, r"rows: expected at least 2, got 1\."),
        ({"near": 0.0}, r"near: expected a finite float above 0 and below 1, got 0\.0\."),
        ({"near": float("inf")}, r"near: expected a finite float above 0 and below 1, got inf\."),
        ({"guide": None}, "guide: none was given, and the data carry no column 'anchor_guide_embedding'"),
    ],
)
def test_what_cannot_be_searched(options, says):
    data = Dataset.from_dict({"anchor": ["x"] * 4, "positive": ["y"] * 4})
    with pytest.raises(InputError, match=f"^{says}"):
        find_duplicates(data, **{"guide": lookup({"x": X, "y": Y}), **options})


@settings(deadline=None)
@given(parts=st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=9), most=st.integers(1, 7))
def test_the_best_are_kept(parts, most):
    best = Best(most)
    for number, part in enumerate(parts):
        best.add(torch.tensor(part, dtype=torch.float64), torch.tensor([100 * number + k for k in range(len(part))]))
    entries = [(key, 100 * number + k) for number, part in enumerate(parts) for k, key in enumerate(part)]
    want = sorted(entries, key=lambda entry: -entry[0])[:most]
    taken = best.taken()
    got = list(zip(*(column.tolist() for column in taken), strict=True)) if taken else []
    assert got == want
