"""A number is the same number in every format and in every column that means one; what is none is named."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from gist_fast.config.schema import SourceConfig
from gist_fast.data.column_checks import LARGEST
from gist_fast.data.load import load_texts
from gist_fast.evaluation.evaluators import load_retrieval
from gist_fast.evaluation.scored_pairs import load_labelled_pairs, load_sts
from gist_fast.runtime.errors import InputError
from gist_fast.training.collator import GISTDataCollator

# 1 and 0, as this or that library writes them.
WRITTEN = {
    "whole": [1, 0],
    "decimals": [1.0, 0.0],
    "truth values": [True, False],
    "texts": ["1", " 0 "],
    "texts of decimals": ["1.0", "0e3"],
    "texts of truth values": ["True", "false"],
    "mixed texts": ["1", "0.00"],
}
STORED = {
    "Decimal": pa.array([Decimal("1.00"), Decimal("0.00")]),
    "half": pa.array([1.0, 0.0], pa.float16()),
    "uint8": pa.array([1, 0], pa.uint8()),
    "views": pa.array(["1", "0"]).cast(pa.string_view()),
    "categories": pa.array(["1", "0"]).dictionary_encode(),
}


def sources(folder: Path, name: str, texts: dict[str, list], number: str) -> list[str]:
    """The same two rows in every way to write 1 and 0."""
    paths = []
    for how, values in WRITTEN.items():
        rows = [dict(zip([*texts, number], row, strict=True)) for row in zip(*texts.values(), values, strict=True)]
        path = folder / f"{name} {how}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(path)
        if "texts" in how:
            path = folder / f"{name} {how}.csv"
            path.write_text("\n".join(",".join(map(str, row)) for row in ([*texts, number], *map(dict.values, rows))))
            paths.append(path)
        elif how != "mixed texts":
            Dataset.from_list(rows).save_to_disk(folder / f"{name} {how}")
            paths.append(folder / f"{name} {how}")
            STORED.setdefault(how, pa.array(values))
    for how, array in STORED.items():
        path = folder / f"{name} {how}.parquet"
        pq.write_table(pa.table({**texts, number: array}), path)
        paths.append(path)
    return [str(path) for path in paths]


def test_scores_labels_and_margins(tmp_path):
    for path in sources(tmp_path, "s", {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}, "score"):
        assert load_sts(SourceConfig(path)).scores == [1.0, 0.0], path
        assert load_labelled_pairs(SourceConfig(path, columns={"label": "score"})).scores == [1.0, 0.0], path
    for path in sources(tmp_path, "m", {"anchor": ["a", "b"], "positive": ["c", "d"]}, "trust"):
        assert load_texts(path, columns={"margin": "trust"})["margin"][:] == [1.0, 0.0], path


def test_scores_of_relevant_documents(tmp_path):
    for name in ("queries", "corpus"):
        (tmp_path / f"{name}.jsonl").write_text('{"_id": "1", "text": "a"}\n{"_id": "2", "text": "b"}\n')
    files = {name: tmp_path / f"{name}.jsonl" for name in ("queries", "corpus")}
    found = []
    for path in sources(tmp_path, "r", {"query-id": ["1", "2"], "corpus-id": ["2", "1"]}, "score"):
        if Path(path).is_file():
            found.append(load_retrieval(**files, relevant=path).relevant)
    assert len(found) > 12
    # A score of 0 is judged not relevant.
    assert all(list(relevant) == ["1"] and list(relevant["1"]) == ["2"] for relevant in found)


@pytest.mark.parametrize(("value", "says"), [
    (float("nan"), "is nan; a finite number is needed there"),
    (float("-inf"), "is -inf; a finite number is needed there"),
    (-1e39, "is -1e+39; a number of at most 3.403e+38 is needed there"),
    ("nan", "is 'nan'; a finite number is needed there"),
    ("1e400", "is '1e400'; a finite number is needed there"),
    ("0,5", "is '0,5'; a finite number is needed there"),
    ("yes", "is 'yes'; a finite number is needed there"),
    (None, "is None; a finite number is needed there"),
])  # fmt: skip
def test_what_is_no_number(tmp_path, student, value, says):
    rows = [{"anchor": "a", "positive": "b", "trust": m} for m in ("0" if isinstance(value, str) else 0.0, value)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    for source in (path, tmp_path / "saved", tmp_path / "x.parquet"):
        with pytest.raises(InputError) as caught:
            load_texts(source, columns={"margin": "trust"})
        assert f"column 'trust': {says}" in str(caught.value)
        assert f"{source}: row 2" in str(caught.value)
    # A dataset that a user made reaches the trainer without having been read here.
    collator = GISTDataCollator(student.preprocess, row_margins=True)
    with pytest.raises(InputError) as caught:
        collator([{"anchor": "a", "positive": "b", "margin": row["trust"]} for row in rows])
    assert f"row 1 of the batch, column 'margin': {says}" in str(caught.value)


def test_margins_of_a_batch(student):
    collator = GISTDataCollator(student.preprocess, row_margins=True)
    rows = [{"anchor": "a", "positive": "b", "margin": m} for m in (1, True, Decimal("0.5"), "-0.25", LARGEST)]
    margins = collator(rows)["anchor_margin"]
    assert margins.dtype == torch.float32
    assert margins.tolist() == [1.0, 1.0, 0.5, -0.25, LARGEST]


def test_groups_beyond_64_bits(student):
    collator = GISTDataCollator(student.preprocess, groups="column")
    rows = [{"anchor": "a", "positive": "b", "group": g} for g in (-(2**63), 2**63 - 1)]
    assert collator(rows)["anchor_group"].tolist() == [-(2**63), 2**63 - 1]
    rows[1]["group"] = 2**63
    with pytest.raises(
        InputError, match="group: expected a whole number in each row, got 9223372036854775808 in row 1"
    ):
        collator(rows)
