"""The pairs shown as dropped are those that the rule drops, found here with plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_fast.errors import InputError
from gist_fast.inspection import inspect_batch


def lookup(vectors: dict[str, list[float]]):
    """An encoder that knows its texts' embeddings by heart, and which texts it was asked for."""
    asked: list[tuple[str, int, list[str]]] = []

    def encode(texts, column, position):
        asked.append((column, position, texts))
        return torch.from_numpy(np.array([vectors[text] for text in texts]))

    encode.asked = asked
    return encode


def all_pairs(columns, vectors, margin, strategy):
    """``{(block, row, other row): (similarity, threshold)}`` of all that is compared, as the rule is written down."""

    def cosine(x, y):
        x, y = np.asarray(vectors[x]), np.asarray(vectors[y])
        return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))

    names = list(columns)
    anchors, positives = columns["anchor"], columns["positive"]
    blocks = {"ap": (anchors, positives), "aa": (anchors, anchors), "pp": (positives, positives)}
    blocks |= {f"an_{k + 1}": (anchors, columns[name]) for k, name in enumerate(names[2:])}
    found = {}
    for block, (left, right) in blocks.items():
        for i in range(len(anchors)):
            t = cosine(anchors[i], positives[i])
            threshold = t - margin if strategy == "absolute" else t - abs(t) * margin
            for j in range(len(anchors)):
                if i != j or block.startswith("an"):
                    found[block, i + 1, j + 1] = (cosine(left[i], right[j]), threshold)
    return found


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 7),
    negatives=st.integers(0, 2),
    margin=st.floats(-0.5, 0.5),
    strategy=st.sampled_from(["absolute", "relative"]),
    seed=st.integers(0, 2**31),
)
def test_the_dropped_pairs_are_those_of_the_rule(rows, negatives, margin, strategy, seed):
    random = np.random.default_rng(seed)
    names = ["anchor", "positive", *(f"negative_{k + 1}" for k in range(negatives))]
    columns = {name: [f"{name} {i}" for i in range(rows)] for name in names}
    vectors = {text: random.normal(size=5) for column in columns.values() for text in column}
    found = inspect_batch(Dataset.from_dict(columns), lookup(vectors), margin=margin, margin_strategy=strategy)
    pairs = all_pairs(columns, vectors, margin, strategy)
    got = {(pair.block, pair.row, pair.other_row): pair for pair in found.dropped}
    # float32 against float64: what stands within 1e-5 of its threshold may fall either way.
    assert {key for key, (score, threshold) in pairs.items() if score > threshold + 1e-5} <= set(got)
    assert set(got) <= {key for key, (score, threshold) in pairs.items() if score > threshold - 1e-5}
    assert len(pairs) == sum(found.compared.values())
    for key, pair in got.items():
        assert math.isclose(pair.guide, pairs[key][0], abs_tol=1e-5)
        assert math.isclose(pair.threshold, pairs[key][1], abs_tol=1e-5)
        assert pair.student is None
    assert [pair.excess for pair in found.dropped] == sorted((pair.excess for pair in found.dropped), reverse=True)


AXES = {"x": [1.0, 0.0], "near x": [0.9, 0.1], "y": [0.0, 1.0], "diagonal": [1.0, 1.0], "-x": [-1.0, 0.0]}


def test_texts_similarities_and_shares_of_one_batch():
    data = Dataset.from_dict({"anchor": ["x", "y", "x", "-x"], "positive": ["diagonal", "diagonal", "near x", "y"]})
    student = lookup({text: [value + 1 for value in vector] for text, vector in AXES.items()})
    found = inspect_batch(data, lookup(AXES), student, batch=1, batch_size=2)
    assert (found.first_row, found.last_row) == (1, 2)
    assert found.compared == {"ap": 2, "aa": 2, "pp": 2}
    # Both rows have the same positive: identical texts tie with the threshold in ap, and exceed it in pp.
    assert [(pair.block, pair.row, pair.other_row) for pair in found.dropped] == [("pp", 1, 2), ("pp", 2, 1)]
    pair = found.dropped[0]
    assert (pair.text, pair.other_text) == ("diagonal", "diagonal")
    assert pair.guide == pytest.approx(1.0)
    assert pair.threshold == pytest.approx(math.sqrt(0.5))
    assert pair.student == pytest.approx(1.0)
    assert found.share_dropped("pp") == 1.0
    assert found.share_dropped() == pytest.approx(2 / 6)


def test_a_later_batch_counts_rows_of_the_data():
    data = Dataset.from_dict({"anchor": ["x", "y", "x", "near x"], "positive": ["x", "y", "diagonal", "y"]})
    found = inspect_batch(data, lookup(AXES), batch=2, batch_size=2)
    assert (found.first_row, found.last_row) == (3, 4)
    assert {(pair.block, pair.row, pair.other_row) for pair in found.dropped} == {
        ("aa", 3, 4), ("aa", 4, 3), ("ap", 4, 3), ("pp", 4, 3)
    }  # fmt: skip


def test_another_copy_of_the_positive_is_a_tie_and_stays():
    # The threshold and the score are summed in different orders; an exact tie must not be decided by that.
    random = np.random.default_rng(0)
    for width in (3, 48, 384, 1023):
        vectors = {"a": random.normal(size=width), "b": random.normal(size=width), "p": random.normal(size=width)}
        data = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["p", "p"]})
        found = inspect_batch(data, lookup(vectors))
        assert not [pair for pair in found.dropped if pair.block == "ap"]


def test_each_text_is_encoded_once_a_column():
    data = Dataset.from_dict({"anchor": ["x", "x"], "positive": ["y", "diagonal"], "negative": ["x", "x"]})
    encode = lookup(AXES)
    inspect_batch(data, encode)
    assert encode.asked == [("anchor", 0, ["x"]), ("positive", 1, ["y", "diagonal"]), ("negative", 2, ["x"])]


def test_embeddings_that_the_data_carry_need_no_guide():
    rows = {"anchor": ["x", "near x"], "positive": ["y", "diagonal"]}
    carried = {f"{name}_guide_embedding": [AXES[text] for text in texts] for name, texts in rows.items()}
    with_guide = inspect_batch(Dataset.from_dict(rows), lookup(AXES))
    without = inspect_batch(Dataset.from_dict(rows | carried), None)
    assert without == with_guide
    assert without.dropped
    with pytest.raises(InputError, match="the data carry no column 'anchor_guide_embedding'"):
        inspect_batch(Dataset.from_dict(rows), None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, "batch: got 0; the 4 rows make batches 1 to 2 at a batch size of 3"),
        ({"batch": 3}, "batch: got 3; the 4 rows make batches 1 to 2"),
        ({"batch_size": 1}, "batch_size: got 1; pairs need at least 2 rows"),
        ({"margin": math.nan}, "margin: got nan"),
        ({"margin_strategy": "relativ"}, "margin_strategy: got 'relativ'; one of 'absolute', 'relative' would do"),
    ],
)
def test_what_cannot_be_inspected(options, says):
    data = Dataset.from_dict({"anchor": ["x"] * 4, "positive": ["y"] * 4})
    with pytest.raises(ValueError, match="^" + says.replace("(", r"\(")):
        inspect_batch(data, lookup(AXES), **{"batch_size": 3, **options})
