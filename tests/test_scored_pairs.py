"""Pairs and their numbers come out of files as they stand there, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from gist_fast.config.schema import SourceConfig
from gist_fast.evaluation.scored_pairs import ScoredPairs, load_labelled_pairs, load_sts
from gist_fast.runtime.errors import InputError

ROWS = [
    {"sentence1": "a", "sentence2": "b", "score": 4},
    {"sentence1": "c", "sentence2": "d", "score": -0.5},
    {"sentence1": "a", "sentence2": "e", "score": 2.25},
]
PAIRS = ScoredPairs(["a", "c", "a"], ["b", "d", "e"], [4.0, -0.5, 2.25])


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def renamed(rows: list[dict], *names: str) -> list[dict]:
    return [dict(zip(names, row.values(), strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("sentence1", "sentence2", "score"), None),
        (("anchor", "positive", "score"), None),
        (("q", "r", "gold"), ["q", "r", "gold"]),
        (("q", "r", "gold"), {"sentence1": "q", "sentence2": "r", "score": "gold"}),
        (("q", "positive", "score"), {"anchor": "q"}),
        # What is named wins over what is called so.
        (("sentence2", "sentence1", "score"), {"sentence1": "sentence2", "sentence2": "sentence1"}),
    ],
)
def test_columns(tmp_path, names, columns):
    path = jsonl(tmp_path / "s.jsonl", renamed(ROWS, *names))
    assert load_sts(SourceConfig(path, columns=columns)) == PAIRS


def test_every_kind_of_source(tmp_path):
    dataset = Dataset.from_list(ROWS)
    text = "sentence1,sentence2,score\na,b,4\nc,d,-5e-1\na,e, 2.25\n"
    (tmp_path / "s.csv").write_text(text)
    (tmp_path / "s.tsv").write_text(text.replace(",", "\t"))
    dataset.to_parquet(str(tmp_path / "s.parquet"))
    DatasetDict(test=dataset).save_to_disk(str(tmp_path / "saved"))
    for name in ("s.csv", "s.tsv", "s.parquet", "saved"):
        assert load_sts(SourceConfig(str(tmp_path / name))) == PAIRS, name
    as_text = dataset.cast_column("score", dataset.features["sentence1"])
    as_text.save_to_disk(str(tmp_path / "text"))
    assert load_sts(SourceConfig(str(tmp_path / "text"))) == PAIRS


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{**ROWS[0]}, {**ROWS[1], "score": "high"}], "row 2 (line 2), column 'score': is 'high'; a finite number is"),
        ([{**ROWS[0]}, {**ROWS[1], "score": float("nan")}], "row 2 (line 2), column 'score': is nan; a finite number"),
        ([{**ROWS[0]}, {**ROWS[1], "score": "inf"}], "row 2 (line 2), column 'score': is 'inf'; a finite number"),
        ([{**ROWS[0], "score": None}], "row 1 (line 1), column 'score': is None; a finite number is needed there"),
        ([{**ROWS[0], "score": " "}], "column 'score': is empty; a finite number is needed there, so mend or remove"),
        ([{**ROWS[0], "score": [1]}], "column 'score': is [1]; a finite number is needed"),
        ([{**ROWS[0], "score": 1e39}], "column 'score': is 1e+39; a number of at most 3.403e+38 is needed"),
        ([{**ROWS[0], "score": "1_0"}], "column 'score': is '1_0'; a finite number is needed"),
        ([{**ROWS[0], "score": 10**400}], "column 'score': is 1000000"),
        ([{**ROWS[0], "sentence2": ""}], "row 1 (line 1), column 'sentence2': is empty; a text is needed there"),
        (ROWS[:1], "holds one row; a correlation needs at least two."),
        ([{**row, "score": 3} for row in ROWS], "every score is 3; a correlation needs scores that differ."),
        (
            renamed(ROWS, "sentence1", "sentence2", "scor"),
            "no column 'score' (did you mean 'scor'?); it has 'sentence1'",
        ),
        (renamed(ROWS, "x", "sentence2", "score"), "no column 'sentence1' or 'anchor' (did you mean 'sentence2'?)"),
        (renamed(ROWS, "x", "y", "score"), "Rename one, or map it: columns: {sentence1: <name>}."),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, rows, says):
    path = jsonl(tmp_path / "wrong.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load_sts(SourceConfig(path))
    assert str(caught.value).startswith(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"sentence3": "sentence1"}, "'sentence3' is no role (did you mean 'sentence2'?)"),
        ({"sentence1": "q"}, "no column 'q'; it has 'sentence1', 'sentence2', 'score'."),
        ({"sentence1": "sentence2"}, "'sentence2' is named for more than one role."),
        (
            {"sentence1": "sentence1", "anchor": "sentence1"},
            "sentence1 and anchor are two names of one role; keep one.",
        ),
        (
            ["sentence1", "sentence2"],
            "expected three names (sentence1, sentence2, score), got ['sentence1', 'se",
        ),
    ],
)
def test_wrong_columns(tmp_path, columns, says):
    with pytest.raises(InputError) as caught:
        load_sts(SourceConfig(jsonl(tmp_path / "s.jsonl", ROWS), columns=columns))
    assert says in str(caught.value)


def test_a_wrong_number_in_what_is_arrow_already(tmp_path):
    rows = [*ROWS, {**ROWS[0], "score": float("nan")}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "s.parquet"))
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("s.parquet", "saved"):
        with pytest.raises(InputError, match=r"row 4, column 'score': is nan; a finite number is needed"):
            load_sts(SourceConfig(str(tmp_path / name)))


def test_labels(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (1, 0, 1.0, "0")]
    assert load_labelled_pairs(SourceConfig(jsonl(tmp_path / "l.jsonl", rows))).scores == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ((0, 1, 2), "row 3, column 'same': is 2; a label is 1 (the texts belong together) or 0; scores of likeness go"),
        ((0, 0.5), "row 2, column 'same': is 0.5; a label is 1"),
        ((1, 1), "every label is 1; both 0 and 1 must occur."),
        ((0,), "every label is 0; both 0 and 1 must occur."),
    ],
)
def test_wrong_labels(tmp_path, labels, says):
    path = jsonl(tmp_path / "l.jsonl", [{"sentence1": "a", "sentence2": "b", "same": label} for label in labels])
    for columns in ({"label": "same"}, ["sentence1", "sentence2", "same"]):
        with pytest.raises(InputError) as caught:
            load_labelled_pairs(SourceConfig(path, columns=columns))
        assert str(caught.value).startswith(path)
        assert says in str(caught.value)
