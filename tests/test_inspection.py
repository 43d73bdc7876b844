"""The pairs shown as dropped are those that the rule drops, found here with plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_fast import guided_contrastive_loss
from gist_fast.inspection import guide_scores as rule
from gist_fast.inspection import inspect_batch, inspect_rows
from gist_fast.runtime.errors import InputError


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
    tile=st.sampled_from([1, 7, 2**22]),
    seed=st.integers(0, 2**31),
)
def test_the_dropped_pairs_are_those_of_the_rule(rows, negatives, margin, strategy, tile, seed):
    random = np.random.default_rng(seed)
    names = ["anchor", "positive", *(f"negative_{k + 1}" for k in range(negatives))]
    columns = {name: [f"{name} {i}" for i in range(rows)] for name in names}
    vectors = {text: random.normal(size=5) for column in columns.values() for text in column}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "SCORES", tile)
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
        ({"batch": 0}, r"batch: expected 1 to 2, the batches that 4 rows make at a batch size of 3, got 0\."),
        ({"batch": 3}, r"batch: expected 1 to 2, the batches that 4 rows make at a batch size of 3, got 3\."),
        ({"batch_size": 1}, r"batch_size: expected at least 2 rows, got 1\."),
        ({"margin": math.nan}, r"margin: expected a finite float, got nan\."),
        ({"margins": []}, r"margins: expected 1 to 64 of them, got 0\."),
        ({"margins": [0.1, math.inf]}, r"margins: expected a finite float, got inf\."),
        ({"groups": "anchors"}, r"groups: expected 'anchor', 'positive', .*, got 'anchors'\."),
        ({"groups": "column"}, "groups: 'column', and the dataset has no column 'group'; its"),
        ({"row_margins": True}, "row_margins: True, and the data have no column 'margin'"),
        ({"hard": True}, r"hard: expected False without a student, whose ranking it goes by, got True\."),
        ({"near": 1.0}, r"near: expected a finite float above 0 and below 1, got 1\.0\."),
        ({"near": math.nan}, "near: expected a finite float above 0 and below 1, got nan"),
        ({"margin_strategy": "relativ"}, r"margin_strategy: expected 'absolute' or 'relative', got 'relativ'\."),
    ],
)
def test_what_cannot_be_inspected(options, says):
    data = Dataset.from_dict({"anchor": ["x"] * 4, "positive": ["y"] * 4})
    with pytest.raises(ValueError, match="^" + says.replace("(", r"\(")):
        inspect_batch(data, lookup(AXES), **{"batch_size": 3, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"margins": "0.1"}, r"margins: expected a list of numbers such as \[0, 0\.05\], got '0\.1'\."),
        ({"margins": [0.1, "0.2"]}, r"margins: expected a finite float, got '0\.2' \(str\)\."),
        ({"margins": [True]}, r"margins: expected a finite float, got True \(bool\)\."),
        ({"near": "0.9"}, r"near: expected a finite float above 0 and below 1, got '0\.9' \(str\)\."),
    ],
)
def test_what_is_no_number(options, says):
    data = Dataset.from_dict({"anchor": ["x"] * 4, "positive": ["y"] * 4})
    with pytest.raises(TypeError, match=f"^{says}"):
        inspect_batch(data, lookup(AXES), **options)


def random_batch(rows, negatives, seed=0, width=6):
    """Columns of distinct texts, and their vectors, in float32 so that both sides read the same numbers."""
    random = np.random.default_rng(seed)
    names = ["anchor", "positive", *(f"negative_{k + 1}" for k in range(negatives))]
    columns = {name: [f"{name} {i}" for i in range(rows)] for name in names}
    vectors = {text: random.normal(size=width).astype(np.float32) for column in columns.values() for text in column}
    return columns, vectors


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 9),
    negatives=st.integers(0, 2),
    margins=st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=5),
    tile=st.sampled_from([1, 7, 2**22]),
    seed=st.integers(0, 2**31),
)
def test_each_margin_drops_what_the_rule_says(rows, negatives, margins, tile, seed):
    columns, vectors = random_batch(rows, negatives, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule, "SCORES", tile)
        found = inspect_batch(Dataset.from_dict(columns), lookup(vectors), margins=margins)
    tried = sorted({margin + 0.0 for margin in margins})
    assert [(o.strategy, o.margin) for o in found.margins] == [
        (strategy, margin) for strategy in ("absolute", "relative") for margin in tried
    ]
    for outcome in found.margins:
        pairs = all_pairs(columns, vectors, outcome.margin, outcome.strategy)
        assert outcome.compared == found.compared
        for block, dropped in outcome.dropped.items():
            excess = [score - threshold for (name, _, _), (score, threshold) in pairs.items() if name == block]
            # float32 against float64: what stands within 1e-5 of its threshold may fall either way.
            assert sum(e > 1e-5 for e in excess) <= dropped <= sum(e > -1e-5 for e in excess)
            assert outcome.share(block) == dropped / len(excess)
        assert outcome.share() == sum(outcome.dropped.values()) / len(pairs)
        least = dict.fromkeys(range(1, rows + 1), math.inf)
        for (_, i, _), (score, threshold) in pairs.items():
            least[i] = min(least[i], score - threshold)
        assert sum(e > 1e-5 for e in least.values()) <= outcome.rows_emptied <= sum(e > -1e-5 for e in least.values())
        assert outcome.share_emptied == outcome.rows_emptied / rows


@pytest.mark.parametrize(("margin", "strategy"), [(0.0, "absolute"), (0.07, "absolute"), (-0.2, "relative")])
def test_the_counts_are_those_of_the_loss(margin, strategy):
    columns, vectors = random_batch(rows=61, negatives=2)
    found = inspect_batch(
        Dataset.from_dict(columns), lookup(vectors), margin=margin, margin_strategy=strategy, margins=[margin]
    )
    anchors, positives, *negatives = (
        torch.from_numpy(np.stack([vectors[text] for text in texts])) for texts in columns.values()
    )
    _, stats = guided_contrastive_loss(
        *(anchors, positives, anchors, positives, negatives, negatives),
        margin=margin,
        margin_strategy=strategy,
        return_stats=True,
    )
    assert found.counts == dict(zip(stats.blocks, stats.masked.tolist(), strict=True))
    assert found.compared == dict(zip(stats.blocks, stats.compared, strict=True))
    (mine,) = [outcome for outcome in found.margins if outcome.strategy == strategy]
    assert mine.dropped == found.counts
    assert mine.rows_emptied == found.rows_emptied
    assert 0 < found.total_dropped < sum(found.compared.values())


@pytest.mark.parametrize("mask_ties", [False, True])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
def test_ties_groups_and_rows_margins_are_those_of_the_loss(mask_ties, strategy):
    columns, vectors = random_batch(rows=37, negatives=1)
    # Copies: ties in ap, and rows of one anchor.
    columns["positive"][20] = columns["positive"][4]
    columns["anchor"][30] = columns["anchor"][7]
    random = np.random.default_rng(1)
    groups, margins = random.integers(5, size=37), random.normal(size=37).astype(np.float32) * 0.1
    margins[[4, 20]] = 0
    data = Dataset.from_dict({**columns, "group": groups.tolist(), "margin": margins.tolist()})
    tensors = [torch.from_numpy(np.stack([vectors[text] for text in texts])) for texts in columns.values()]
    anchors, positives, negatives = tensors

    def masked(of, margin=0.0):
        _, stats = guided_contrastive_loss(
            *(anchors, positives, anchors, positives, [negatives], [negatives]),
            margin=torch.from_numpy(margins) + margin,
            margin_strategy=strategy,
            mask_ties=mask_ties,
            groups=of,
            return_stats=True,
        )
        return dict(zip(stats.blocks, stats.masked.tolist(), strict=True))

    options = {"margin_strategy": strategy, "mask_ties": mask_ties, "row_margins": True, "margins": [0.0, 0.1]}
    plain = inspect_batch(data, lookup(vectors), **options)
    assert plain.counts == masked(None)
    assert plain.ties == {"ap": 0 if mask_ties else 2, "aa": 0, "pp": 0, "an_1": 0}
    higher = [outcome for outcome in plain.margins if (outcome.strategy, outcome.margin) == (strategy, 0.1)]
    assert higher[0].dropped == masked(None, 0.1)
    for name, numbers in (("column", groups), ("anchor", [7 if i == 30 else i for i in range(37)])):
        found = inspect_batch(data, lookup(vectors), groups=name, **options)
        of = torch.tensor(numbers)
        same = int((of[:, None] == of).sum()) - 37
        pairs = 37 * 36 - same
        assert found.compared == {"ap": pairs, "aa": pairs, "pp": pairs, "an_1": 37 * 37}
        # The loss counts pairs of one group among the masked ones, and a guide compares none of them.
        assert found.counts == {b: n - (same if b != "an_1" else 0) for b, n in masked(of).items()}
        assert not [p for p in found.dropped if p.block != "an_1" and numbers[p.row - 1] == numbers[p.other_row - 1]]
        assert found.rows_emptied == 0


@pytest.mark.parametrize("tile", [1, 2**22])
@pytest.mark.parametrize("groups", [None, "positive", "anchor_or_positive", "column"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negatives_scope": ["all", "own"]},
        {"mask_negatives": False},
        {
            "negatives_scope": ["all", "own"],
            "directions": ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"],
        },
    ],
    ids=str,
)
def test_mined_negatives_and_duplicates_are_those_of_the_loss(settings, groups, tile, monkeypatch):
    monkeypatch.setattr(rule, "SCORES", tile)
    columns, vectors = random_batch(rows=29, negatives=2)
    columns["anchor"][20], columns["positive"][11] = columns["anchor"][4], columns["positive"][3]
    columns["negative_2"][5], columns["negative_2"][6] = columns["positive"][5], columns["positive"][8]
    names = list(columns)
    known = {text: k for k, text in enumerate(vectors)}
    texts = [torch.tensor([known[text] for text in columns[name]]) for name in names]
    of_column = [torch.arange(29) % 3, *(torch.arange(29) % n for n in (5, 4, 7))]
    beside = dict(zip(("group", *(f"{name}_group" for name in names[1:])), of_column, strict=True))
    data = Dataset.from_dict({**columns, **{name: values.tolist() for name, values in beside.items()}})
    a, p, *n = (torch.from_numpy(np.stack([vectors[text] for text in columns[name]])) for name in names)
    numbers = {"column": of_column, None: []}.get(groups, texts[1:] if groups == "positive" else texts)
    rows, of_negatives = numbers[: len(numbers) - 2 if numbers else 0], numbers[-2:]
    _, stats = guided_contrastive_loss(
        *(a, p, a.clone(), p.clone(), n, n), margin=0.1, groups=rows or None, negative_groups=of_negatives or None,
        return_stats=True, hard=True, **settings,
    )  # fmt: skip
    options = {"margin": 0.1, "groups": groups, "hard": True, "margins": [0.1], **settings}
    found = inspect_batch(data, lookup(vectors), lookup(vectors), **options)
    same = {name: n - found.compared[name] for name, n in zip(stats.blocks, stats.compared, strict=True)}
    masked = dict(zip(stats.blocks, stats.masked.tolist(), strict=True))
    # The loss counts pairs of one group among the masked ones, and here they are not compared.
    assert found.counts == {name: masked[name] - same[name] for name in masked}
    assert found.easy == dict(zip(stats.blocks, stats.easy.tolist(), strict=True))
    assert [o.dropped for o in found.margins if o.strategy == "absolute"] == [found.counts]
    assert any(same.values()) == (groups is not None)
    assert (found.counts["an_2"] > 0) == settings.get("mask_negatives", True)


@pytest.mark.parametrize("tile", [1, 2**22])
@pytest.mark.parametrize("groups", [None, "column"])
def test_what_hard_drops_is_what_the_loss_calls_easy(groups, tile, monkeypatch):
    monkeypatch.setattr(rule, "SCORES", tile)
    columns, vectors = random_batch(rows=41, negatives=1)
    # A copy of a positive ties for the student too, and is not below it.
    columns["positive"][20] = columns["positive"][4]
    numbers = np.random.default_rng(1).integers(5, size=41)
    data = Dataset.from_dict({**columns, "group": numbers.tolist()})
    _, others = random_batch(rows=41, negatives=1, seed=3)
    guided, studied = (
        [torch.from_numpy(np.stack([known[text] for text in texts])) for texts in columns.values()]
        for known in (vectors, others)
    )

    def easy(margin):
        _, stats = guided_contrastive_loss(
            *(*studied[:2], *guided[:2], studied[2:], guided[2:]),
            margin=margin,
            groups=None if groups is None else torch.from_numpy(numbers),
            hard=True,
            return_stats=True,
        )
        return dict(zip(stats.blocks, stats.easy.tolist(), strict=True))

    options = {"groups": groups, "margins": [-0.1, 0.3]}
    found = inspect_batch(data, lookup(vectors), lookup(others), margin=0.3, hard=True, **options)
    plain = inspect_batch(data, lookup(vectors), lookup(others), margin=0.3, **options)
    assert found.easy == easy(0.3)
    assert min(found.easy.values()) > 0
    # Apart from what the guide drops, which is the same without.
    assert (found.counts, found.compared, plain.easy) == (plain.counts, plain.compared, None)
    assert inspect_batch(data, lookup(vectors), lookup(others), margin=-0.1, hard=True, **options).easy == easy(-0.1)
    # A row is empty where nothing is left of it by both.
    unit = [[torch.nn.functional.normalize(x.double(), dim=1) for x in side] for side in (guided, studied)]
    left = torch.zeros(41, dtype=torch.int64)
    for one, other in ((0, 1), (0, 0), (1, 1), (0, 2)):
        (g, s), own = (side[one] @ side[other].T for side in unit), [(x[0] * x[1]).sum(dim=1) for x in unit]
        counts = (g <= own[0][:, None] - 0.3 + 1e-6) & (s >= own[1][:, None] - 1e-6)
        if other != 2:
            same = numbers[:, None] == numbers if groups else np.eye(41, dtype=bool)
            counts &= ~torch.from_numpy(same)
        left += counts.sum(dim=1)
    emptied = [outcome for outcome in found.margins if (outcome.strategy, outcome.margin) == ("absolute", 0.3)]
    assert found.rows_emptied == emptied[0].rows_emptied == int((left == 0).sum()) > plain.rows_emptied


def test_few_are_listed_and_all_are_counted():
    columns, vectors = random_batch(rows=23, negatives=1)
    data = Dataset.from_dict(columns)
    student = lookup({text: np.roll(vector, 1) for text, vector in vectors.items()})
    whole = inspect_batch(data, lookup(vectors), student)
    few = inspect_batch(data, lookup(vectors), student, most=5)
    none = inspect_batch(data, lookup(vectors), student, most=0)
    assert len(whole.dropped) == whole.total_dropped > 20
    assert few.dropped == whole.dropped[:5]
    assert none.dropped == []
    assert few.counts == none.counts == whole.counts
    assert few.student_above == whole.student_above == sum(p.student_ranks == "above" for p in whole.dropped)


def test_where_the_student_ranks_a_pair():
    # The guide drops all pairs with x (it scores 1.0 with the anchor x, the positive less).
    data = Dataset.from_dict({"anchor": ["x"] * 2, "positive": ["diagonal", "y"], "negative": ["near x", "x"]})
    student = {"x": [1.0, 0.0], "diagonal": [1.0, 1.0], "y": [1.0, 0.0], "near x": [1.0, -1.0]}
    found = inspect_batch(data, lookup(AXES), lookup(student))
    ranks = {(p.block, p.row, p.other_row): (p.student_ranks, p.student, p.student_positive) for p in found.dropped}
    half = pytest.approx(math.sqrt(0.5))
    assert ranks["an_1", 1, 1] == ("level", half, half)
    assert ranks["an_1", 1, 2] == ("above", pytest.approx(1.0), half)
    assert ranks["an_1", 2, 1] == ("below", half, pytest.approx(1.0))
    assert ranks["aa", 1, 2][0] == "above"
    assert ranks["aa", 2, 1][0] == "level"
    assert found.student_above == sum(rank == "above" for rank, _, _ in ranks.values())
    without = inspect_batch(data, lookup(AXES))
    assert without.student_above is None
    assert {pair.student_ranks for pair in without.dropped} == {None}


def test_ties_with_the_positive_are_counted():
    random = np.random.default_rng(0)
    vectors = {text: random.normal(size=8) for text in "abcpq"}
    found = inspect_batch(Dataset.from_dict({"anchor": list("abc"), "positive": list("pqp")}), lookup(vectors))
    # Rows 1 and 3 have one positive; in pp it is no tie, for there two copies of it score 1.0.
    assert found.ties == {"ap": 2, "aa": 0, "pp": 0}
    lower = inspect_batch(
        Dataset.from_dict({"anchor": list("abc"), "positive": list("pqp")}), lookup(vectors), margin=0.001
    )
    assert lower.ties == {"ap": 0, "aa": 0, "pp": 0}
    assert lower.counts["ap"] == found.counts["ap"] + 2


def test_rows_of_any_kind():
    columns, vectors = random_batch(rows=17, negatives=0)
    data = Dataset.from_dict(columns)
    chosen = [3, 4, 9, 16]
    found = inspect_rows(data, chosen, lookup(vectors))
    assert found.rows == (4, 5, 10, 17)
    same = inspect_batch(data.select(chosen), lookup(vectors))
    assert {(p.text, p.other_text, p.guide) for p in found.dropped} == {
        (p.text, p.other_text, p.guide) for p in same.dropped
    }
    for pair in found.dropped:
        assert pair.text in (data[pair.row - 1]["anchor"], data[pair.row - 1]["positive"])


def test_an_embedding_that_is_not_finite_is_named():
    data = Dataset.from_dict({"anchor": ["x", "y", "x"], "positive": ["y", "x", "bad"]})
    broken = lookup(AXES | {"bad": [1.0, math.inf]})
    with pytest.raises(InputError, match=r"^guide: its embedding of row 3 \(the first is 1\), column 'positive'"):
        inspect_batch(data, broken)
    with pytest.raises(InputError, match=r"^student: its embedding of row 3"):
        inspect_batch(data, lookup(AXES | {"bad": [1.0, 0.0]}), broken)
