"""Mined negatives: those of sentence-transformers where both can, and what it does not do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from sentence_transformers.util import mine_hard_negatives

from gist_fast import GISTTrainer, GISTTrainingArguments
from gist_fast.data.embedded_rows import read_as_stored
from gist_fast.guide_columns import nearest as tiles
from gist_fast.guide_columns.mine import MiningReport, MiningRules, mine_negatives
from gist_fast.guide_columns.nearest import nearest


@pytest.fixture(scope="module")
def rows():
    """Sixty rows, of which some share their anchor and some their positive."""
    random = np.random.default_rng(0)
    words = [f"w{k}" for k in range(40)]
    texts = [" ".join(random.choice(words, 6)) for _ in range(100)]
    return Dataset.from_dict(
        {
            "anchor": [f"q {texts[k % 45]}" for k in range(60)],
            "positive": [texts[(7 * k) % 53 + 40] for k in range(60)],
        }
    )


class Lookup:
    """A model that knows a random vector for each text: no two scores are nearly the same."""

    device = torch.device("cpu")

    def __init__(self, texts):
        random = np.random.default_rng(1)
        self.vectors = {text: random.normal(size=16).astype(np.float32) + 0.5 for text in dict.fromkeys(texts)}

    def encode(self, texts, **_):
        found = np.stack([self.vectors[text] for text in texts])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    encode_query = encode_document = encode

    def similarity(self, a, b):
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a, b):
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


@pytest.fixture(scope="module")
def model(rows):
    return Lookup([*rows["anchor"], *rows["positive"]])


@pytest.fixture
def embedded(rows, model):
    columns = {f"{name}_guide_embedding": model.encode(rows[name]).tolist() for name in ("anchor", "positive")}
    kind = List(Value("float32"), length=16)
    data = Dataset.from_dict(
        {**rows.to_dict(), **columns},
        features=Features({**rows.features, **dict.fromkeys(columns, kind)}),
    )
    return read_as_stored(data)


RULES = {
    "plain": {"relative_margin": None},
    "the paper's": {"relative_margin": 0.05, "negatives": 4},
    "absolute": {"relative_margin": None, "absolute_margin": 0.01},
    "both, and scores": {"absolute_margin": 0.0, "relative_margin": 0.01, "max_score": 0.5, "min_score": 0.1},
    "a window": {"relative_margin": 0.001, "range_min": 3, "range_max": 9, "negatives": 5},
    "more than there are": {"relative_margin": None, "negatives": 60},
}


@pytest.mark.parametrize("tile", [7, 8192])
@pytest.mark.parametrize("name", RULES)
def test_the_negatives_are_those_of_sentence_transformers(name, tile, rows, embedded, model, monkeypatch):
    monkeypatch.setattr(tiles, "DOCUMENTS", tile)
    monkeypatch.setattr(tiles, "QUERIES", tile)
    rules = {"negatives": 3, **RULES[name]}
    mined = mine_negatives(embedded, **rules)
    options = {("num_negatives" if key == "negatives" else key): value for key, value in rules.items()}
    theirs = mine_hard_negatives(rows, model, **options, output_format="triplet", verbose=False)
    wanted: dict[tuple[str, str], list[str]] = {}
    for row in theirs:
        wanted.setdefault((row["anchor"], row["positive"]), []).append(row["negative"])
    columns = [f"negative_{k + 1}" for k in range(rules["negatives"])]
    found = {(row["anchor"], row["positive"]): [row[c] for c in columns if row[c]] for row in mined}
    # A triplet that is there twice is there twice of theirs.
    assert found == {pair: list(dict.fromkeys(wanted.get(pair, []))) for pair in found}
    assert sum(map(len, found.values())) > 0


def test_a_row_keeps_its_place_and_what_else_it_has(rows, embedded):
    data = embedded.add_column("group", list(range(60)))
    report = MiningReport()
    mined = mine_negatives(data, negatives=4, relative_margin=0.02, report=report)
    assert mined.column_names == [
        *data.column_names, *(f"negative_{k}" for k in range(1, 5)),
        *(f"negative_{k}_guide_embedding" for k in range(1, 5)),
    ]  # fmt: skip
    assert mined["anchor"][:] == rows["anchor"][:] and mined["group"][:] == list(range(60))
    vectors = dict(zip(rows["positive"], np.stack(embedded[:]["positive_guide_embedding"]), strict=True))
    there = fewer = 0
    for row in mined:
        texts = [row[f"negative_{k}"] for k in range(1, 5)]
        assert len({text for text in texts if text}) == len([text for text in texts if text])
        for k, text in enumerate(texts, start=1):
            wanted = vectors[text] if text else np.zeros_like(vectors[rows["positive"][0]])
            assert np.array_equal(row[f"negative_{k}_guide_embedding"], wanted)
        there += sum(text != "" for text in texts)
        fewer += "" in texts
    assert (report.rows, report.anchors, report.candidates) == (60, 45, len(set(rows["positive"])))
    assert (report.negatives, report.rows_with_fewer) == (there, fewer)
    assert -1 <= report.negative_score < report.positive_score <= 1


def test_an_anchor_s_own_text_is_no_negative(guide, tmp_path):
    # Questions that stand for each other: each text is an anchor, and a positive elsewhere.
    texts = [f"{a} {b}" for a in ("red", "blue", "green") for b in ("car", "bus", "bike")]
    data = Dataset.from_dict({"anchor": texts, "positive": [*texts[1:], texts[0]]})
    mined = mine_negatives(data, guide, negatives=5, relative_margin=None, cache_dir=tmp_path, show_progress_bar=False)
    assert all(row["anchor"] not in (row[f"negative_{k}"] for k in range(1, 6)) for row in mined)
    assert all(row["positive"] not in (row[f"negative_{k}"] for k in range(1, 6)) for row in mined)
    assert all(row["negative_5"] for row in mined)


def test_what_is_random_is_the_same_for_a_seed(embedded):
    found = [
        mine_negatives(embedded, negatives=3, range_max=20, relative_margin=None, sampling="random", seed=seed)
        for seed in (0, 0, 1)
    ]
    texts = [[row[f"negative_{k}"] for row in mined for k in (1, 2, 3)] for mined in found]
    assert texts[0] == texts[1] != texts[2]
    window = mine_negatives(embedded, negatives=20, range_max=20, relative_margin=None)
    for row, near in zip(found[2], window, strict=True):
        allowed = [near[f"negative_{k}"] for k in range(1, 21)]
        drawn = [row[f"negative_{k}"] for k in (1, 2, 3)]
        assert len(set(drawn)) == 3 and set(drawn) <= set(allowed)
        assert sorted(drawn, key=allowed.index) == drawn  # the nearest first


def test_the_nearest_are_those_of_a_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.nn.functional.normalize(torch.randn(n, 9, generator=generator)) for n in (33, 41))
    never = torch.arange(33) % 41
    never[5] = -1
    scores, places = nearest(queries, documents, 60, never)
    whole = queries.double() @ documents.double().T
    whole[torch.arange(33) != 5, never[torch.arange(33) != 5]] = -math.inf
    for k in range(33):
        order = whole[k].argsort(descending=True)
        order = order[whole[k][order] > -math.inf]
        assert places[k].tolist() == [*order.tolist(), *[-1] * (60 - len(order))]
    assert (scores[places < 0] == -math.inf).all()


def test_training_takes_what_was_mined(tmp_path, student, embedded):
    mined = mine_negatives(embedded, negatives=3, relative_margin=0.02)
    args = GISTTrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=16, report_to=[], save_strategy="no",
        disable_tqdm=True, negatives_scope="own", groups="anchor_or_positive", logging_steps=1,
    )  # fmt: skip
    trainer = GISTTrainer(student, args, mined)
    trainer.train()
    assert "masked_an_1" in trainer.state.log_history[0]


WRONG = {
    "a wrong name": ({"margin": 0.1}, "mine_negatives: .*unexpected keyword argument 'margin'"),
    "no negatives": ({"negatives": 0}, "negatives: expected an int of at least 1, got 0"),
    "a text": ({"relative_margin": "5%"}, r"relative_margin: expected a finite float, got '5%' \(str\)"),
    "a range too small": ({"negatives": 5, "range_max": 4}, "range_max: expected at least 5, .*got 4"),
    "limits the wrong way round": ({"min_score": 0.9, "max_score": 0.5}, "min_score: expected at most max_score 0.5"),
    "another way to sample": ({"sampling": "all"}, "sampling: expected 'top' or 'random', got 'all'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_refused_by_name(name, embedded):
    rules, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        mine_negatives(embedded, **rules)


def test_wrong_data_are_refused_by_name(rows, embedded, guide):
    with pytest.raises(ValueError, match="guide: none was given, and the dataset has no column 'anchor_guide_embed"):
        mine_negatives(rows)
    with pytest.raises(ValueError, match="guide: expected None where the dataset carries embeddings"):
        mine_negatives(embedded, guide)
    with pytest.raises(ValueError, match="it has negatives already, in column 'negative_1'"):
        mine_negatives(mine_negatives(embedded))
    with pytest.raises(ValueError, match="no column 'positive'; it has anchor"):
        mine_negatives(rows.select_columns(["anchor"]), guide)

    def spoilt(row, k):
        return {"positive_guide_embedding": row["positive_guide_embedding"] * (np.nan if k == 6 else 1)}

    broken = embedded.map(spoilt, with_indices=True)
    with pytest.raises(ValueError, match=r"positive_guide_embedding: row 7 \(the first is 1\) is not finite"):
        mine_negatives(broken)


def test_the_depth_is_that_of_sentence_transformers():
    assert MiningRules(negatives=3, relative_margin=None, range_min=2).depth(4) == 9
    assert MiningRules(negatives=3, max_score=0.9, relative_margin=None).depth(1) == 31
