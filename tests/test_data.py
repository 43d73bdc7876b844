"""Texts come out of every kind of file as they went in, and each wrong file gets one line that says where."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gist_fast.data import text_files
from gist_fast.data.load import (
    checked_stream,
    choose_columns,
    load_texts,
    stream_texts,
)
from gist_fast.data.names import guide_columns, text_columns
from gist_fast.runtime.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
# What a guesser would turn into a number, a null, a date or a truth value.
TRAPS = [
    "1e5",
    "NA",
    "null",
    "None",
    "nan",
    "-inf",
    "007",
    "2020-01-01",
    "true",
    '"quoted"',
    "a,b\tc",
    "two\nlines",
    "a\rb",
]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows with the plain library for the kind of file that the path names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if ".jsonl" in path.name:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            dialect = "excel-tab" if ".tsv" in path.name else "excel"
            writer = csv.DictWriter(stream, list(rows[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
    return path


def message(source: object, **options: object) -> str:
    """The error of loading, which must be one line."""
    with pytest.raises(InputError) as caught:
        load_texts(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_that_look_like_something_else_stay_texts(tmp_path, suffix):
    rows = [{"anchor": trap, "positive": f"answer to {trap}"} for trap in TRAPS]
    dataset = load_texts(write(tmp_path / f"x{suffix}", rows), quoting=True if ".tsv" in suffix else None)
    assert dataset.to_list() == rows
    assert dataset.column_names == ["anchor", "positive"]


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda text: not text.isspace())


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.fixed_dictionaries({"anchor": texts, "positive": texts, "negative": texts}), min_size=1, max_size=5
    )
)
def test_any_text_makes_the_round_trip(tmp_path, suffix, rows):
    # A reader of lines splits at more than \n, and a guesser of types sees numbers: neither may happen here.
    path = write(tmp_path / f"x{suffix}", rows)
    assert load_texts(path, quoting=True if ".tsv" in suffix else None).to_list() == rows


def test_files_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_ROWS", 7)
    rows = [{"anchor": f"a {k}", "positive": f"p {k}"} for k in range(40)]
    assert load_texts(write(tmp_path / "x.jsonl", rows)).to_list() == rows
    rows[31]["positive"] = " "
    assert "row 32 (line 33), column 'positive': is empty" in message(write(tmp_path / "y.csv", rows))


def test_cells_beyond_the_csv_module_s_limit(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"anchor": "x" * (limit + 5), "positive": "p"}]
    assert load_texts(write(tmp_path / "x.csv", rows)).to_list() == rows
    assert csv.field_size_limit() == limit


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfanchor,positive\r\n\r\na,b\r\n\r\n")
    assert load_texts(tmp_path / "x.csv").to_list() == [{"anchor": "a", "positive": "b"}]
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf\n{"anchor": "a", "positive": "b"}\n\n')
    assert load_texts(tmp_path / "x.jsonl").to_list() == [{"anchor": "a", "positive": "b"}]


class TestColumns:
    def test_order_is_anchor_positive_and_negatives_by_number(self):
        names = ["negative_10", "negative_2", "positive", "negative", "anchor"]
        taken = [column.target for column in choose_columns(names, None, "x")]
        assert taken == ["anchor", "positive", "negative", "negative_2", "negative_10"]

    def test_mapping_renames_and_leaves_the_rest_out_and_says_so(self, tmp_path, caplog):
        rows = [{"id": "1", "anchor": "not this", "answer": "b", "question": "a"}]
        with caplog.at_level(logging.INFO):
            dataset = load_texts(write(tmp_path / "x.csv", rows), columns={"anchor": "question", "positive": "answer"})
        assert dataset.to_list() == [{"anchor": "a", "positive": "b"}]
        assert "columns left out: id, anchor" in caplog.text

    def test_a_mapping_may_swap_names(self, tmp_path):
        path = write(tmp_path / "x.csv", [{"anchor": "a", "positive": "b"}])
        Dataset.from_list([{"anchor": "a", "positive": "b"}]).save_to_disk(tmp_path / "saved")
        for source in (path, tmp_path / "saved"):
            dataset = load_texts(source, columns={"anchor": "positive", "positive": "anchor"})
            assert dataset.to_list() == [{"anchor": "b", "positive": "a"}]

    def test_names_in_order(self, tmp_path):
        path = write(tmp_path / "x.tsv", [{"q": "a", "d": "b", "n": "c", "m": "d"}])
        assert load_texts(path, columns=["q", "d", "n", "m"]).to_list() == [
            {"anchor": "a", "positive": "b", "negative": "c", "negative_1": "d"}
        ]

    def test_the_guide_s_embeddings_follow_their_column(self, tmp_path):
        row = {"question": "a", "question_guide_embedding": [1.0, 2.0], "positive": "b", "other_guide_embedding": [0.0]}
        for path in (tmp_path / "x.jsonl", tmp_path / "x.parquet"):
            dataset = load_texts(write(path, [row, row]), columns={"anchor": "question"})
            assert dataset.column_names == ["anchor", "positive", "anchor_guide_embedding"]
            assert {c: dataset[1][c] for c in ("anchor", "positive")} == {"anchor": "a", "positive": "b"}
            assert isinstance(dataset[1]["anchor_guide_embedding"], np.ndarray)
            assert dataset[1]["anchor_guide_embedding"].tolist() == [1.0, 2.0]
            assert text_columns(dataset) == ["anchor", "positive"]
            assert guide_columns(dataset) == ["anchor_guide_embedding"]

    @pytest.mark.parametrize(("columns", "says"), [
        ({"anchor": "qestion"}, "no column 'qestion', named for anchor (did you mean 'question'?); it has 'quest"),
        ({"ancor": "question"}, "'ancor' is no role (did you mean 'anchor'?)"),
        ({"anchor": "question", "positive": "question"}, "'question' is named for more than one role"),
        ({"anchor": 3}, "expected the name of a column for anchor, got 3"),
        ("question", "'question' names one column"),
        (None, "no column 'anchor'; it has 'question', 'positive'. Rename one, or map it: columns: {anchor: <name>}"),
    ])  # fmt: skip
    def test_what_cannot_be_mapped(self, tmp_path, columns, says):
        path = write(tmp_path / "x.csv", [{"question": "a", "positive": "b"}])
        assert says in message(path, columns=columns)


class TestDatasets:
    def test_saved_dataset_and_its_splits(self, tmp_path):
        one = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"], "id": [1, 2]})
        one.save_to_disk(tmp_path / "one")
        assert load_texts(tmp_path / "one").to_list() == one.remove_columns("id").to_list()
        DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "two")
        assert load_texts(tmp_path / "two", split="test")["anchor"][:] == ["b"]
        assert "has the splits 'train', 'test'; choose one" in message(tmp_path / "two")
        assert "no split 'tset' (did you mean 'test'?); it has 'train', 'test'" in message(
            tmp_path / "two", split="tset"
        )
        assert "single dataset, without a split 'dev'" in message(tmp_path / "one", split="dev")
        DatasetDict(train=one).save_to_disk(tmp_path / "only")
        assert len(load_texts(tmp_path / "only")) == 2

    def test_wrong_values_in_a_saved_dataset(self, tmp_path):
        Dataset.from_dict({"anchor": [1, 2], "positive": ["c", "d"]}).save_to_disk(tmp_path / "numbers")
        assert "column 'anchor' holds int64, not text (the first value is 1)" in message(tmp_path / "numbers")
        rows = {"anchor": ["a"] * 20000, "positive": ["b"] * 16999 + [None] + ["b"] * 3000}
        Dataset.from_dict(rows).save_to_disk(tmp_path / "none")
        assert "row 17000, column 'positive': is None; a text is needed" in message(tmp_path / "none")
        Dataset.from_dict({"anchor": [], "positive": []}).save_to_disk(tmp_path / "empty")
        assert "holds no rows" in message(tmp_path / "empty")

    @pytest.mark.parametrize("stored", [["0.5", " 1e-2", "-3"], [0.5, 0.01, -3.0], [1, 2, -3]])
    def test_margins_are_numbers_however_they_are_stored(self, tmp_path, stored):
        rows = {"trust": stored, "anchor": ["a", "b", "c"], "positive": ["d", "e", "f"], "of": ["x", "y", "x"]}
        # As of a selection, whose rows are not in the order in which they are stored.
        dataset = Dataset.from_dict(rows).select([2, 0, 1])
        dataset.save_to_disk(tmp_path / "saved")
        write(tmp_path / "x.csv", dataset.to_list())
        columns = {"margin": "trust", "group": "of"}
        loaded = load_texts(tmp_path / "saved", columns=columns)
        assert loaded["margin"][:] == [float(stored[2]), float(stored[0]), float(stored[1])]
        assert all(type(value) is float for value in loaded["margin"])
        # The same of a file, and of the same row as the text beside it.
        assert loaded.to_list() == load_texts(tmp_path / "x.csv", columns=columns).to_list()
        assert loaded.features == load_texts(tmp_path / "x.csv", columns=columns).features
        stream = checked_stream(dataset.to_iterable_dataset(), {"margin": "trust"}, "stream")
        assert [row["margin"] for row in stream] == loaded["margin"][:]
        assert stream.features["margin"].dtype == "float64"

    def test_margins_that_are_no_numbers(self, tmp_path):
        rows = {"anchor": ["a"] * 3, "positive": ["b"] * 3, "trust": ["1", "2", "much"]}
        Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
        write(tmp_path / "x.csv", Dataset.from_dict(rows).to_list())
        for path in (tmp_path / "saved", tmp_path / "x.csv"):
            said = message(path, columns={"margin": "trust"})
            assert "row 3" in said and "column 'trust': is 'much'; a finite number is needed there" in said

    def test_a_folder_that_is_no_dataset(self, tmp_path):
        write(tmp_path / "x.csv", [{"anchor": "a", "positive": "b"}])
        assert "a folder that `save_to_disk` did not write; name a file in it" in message(tmp_path)
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "state.json").write_text("{")
        assert "not a readable saved dataset" in message(broken)

    def test_a_hub_name_that_cannot_be_reached(self):
        assert "no such file or folder here, and as a dataset of the hub it cannot be loaded" in message(
            "no-one/nothing"
        )

    def test_split_and_name_do_not_go_with_a_file(self, tmp_path):
        path = write(tmp_path / "x.csv", [{"anchor": "a", "positive": "b"}])
        assert "a file has no split; leave out split='train'" in message(path, split="train")
        assert "a file has no name; leave out name='en'" in message(path, name="en")


GOOD = '{"anchor": "a", "positive": "b"}\n'


@pytest.mark.parametrize(("name", "content", "says"), [
    ("x.jsonl", GOOD + '{"anchor": "a", "posi', "line 2 is not a whole JSON object (Unterminated string"),
    ("x.jsonl", GOOD + "\n[1, 2]\n", "line 3: one JSON object a line is needed"),
    ("x.jsonl", '[\n{"anchor": "a"}]', "line 1: one JSON object a line is needed"),
    ("x.jsonl", GOOD + '{"anchor": "a"}\n', "row 2 (line 2) has no 'positive', as the first row has; it has 'anchor'."),
    ("x.jsonl", '{"anchor": "a", "positive": 5}\n', "row 1 (line 1), column 'positive': is 5; a text is needed there"),
    ("x.jsonl", '{"anchor": null, "positive": "b"}\n', "row 1 (line 1), column 'anchor': is None; a text"),
    ("x.jsonl", GOOD + "\n" + '{"anchor": "  \\n", "positive": "b"}\n', "row 2 (line 3), column 'anchor': is empty"),
    ("x.jsonl", '{"anchor": ["a"], "positive": "b"}\n', "column 'anchor': is ['a']; a text"),
    ("x.jsonl", '{"anchor": "\\ud800", "positive": "b"}\n', "column 'anchor': half of a surrogate pair at character 0"),
    ("x.jsonl", '{"anchor": "a", "positiv": "b"}\n', "no column 'positive' (did you mean 'positiv'?); it has 'anch"),
    ("x.jsonl", "", "holds no rows; at least one is needed"),
    ("x.jsonl", "\n\n", "holds no rows"),
    ("x.csv", "", "holds no rows"),
    ("x.csv", "anchor,positive\n", "holds no rows"),
    ("x.csv", "anchor,positive\na,b\n\na,b,c\n", "row 2 (line 4) has 3 cells, the header 2"),
    ("x.csv", "anchor,positive\n\"a\nb\",c\nd\n", "row 2 (line 4) has 1 cell, the header 2"),
    ("x.csv", 'anchor,positive\na,"b\nc,d\n', "the row that starts on line 2 is not well-formed (unexpected end"),
    ("x.csv", 'anchor,positive\n"a"b,c\n', "the row that starts on line 2 is not well-formed"),
    ("x.csv", "anchor,positive,anchor\na,b,c\n", "2 columns are called 'anchor'; names must differ"),
    ("x.csv", "anchor,positive,anchor_guide_embedding\na,b,0.1\n", "embeddings need a .jsonl or .parquet file"),
    ("x.tsv", "anchor\tpositive\na\t \n", "row 1 (line 2), column 'positive': is empty"),
    ("x.parquet", "PAR1", "not a readable Parquet file"),
    ("x.jsonl.gz", GOOD, "not a whole gzip file"),
    ("x.txt", GOOD, "unknown kind of file; it must end in one of .jsonl"),
])  # fmt: skip
def test_each_wrong_file_is_told_apart(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    text = message(path)
    assert text.startswith(str(path))
    assert says in text


def test_bytes_that_are_no_utf8_are_located(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"anchor,positive\na,b\ncaf\xe9,d\n")
    assert "line 3: byte 4 (0xe9) is not UTF-8; write the file as UTF-8" in message(tmp_path / "x.csv")


def test_a_file_cut_off_in_the_middle_of_its_compression(tmp_path):
    path = write(tmp_path / "x.jsonl.gz", [{"anchor": f"a{k}", "positive": f"b{k * k}"} for k in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a whole gzip file" in message(path)


def test_missing_files(tmp_path):
    write(tmp_path / "pairs.jsonl", [{"anchor": "a", "positive": "b"}])
    assert message(tmp_path / "pair.jsonl") == f"{tmp_path}/pair.jsonl: no such file (did you mean 'pairs.jsonl'?)."
    assert "nor is there a folder" in message(tmp_path / "nowhere" / "x.csv")
    assert "no such file or folder" in message("./nowhere/at/all")
    assert "no such file" in message("nowhere.jsonl")


@pytest.mark.parametrize(("rows", "says"), [
    ([[1.0, 2.0], [1.0]], "row 2 (line 2), column 'anchor_guide_embedding': an embedding of 1 numbers, where the ro"),
    ([[1.0], "x"], "row 2 (line 2), column 'anchor_guide_embedding': expected a list of numbers, got 'x'"),
    ([[]], "expected a list of numbers, got []"),
])  # fmt: skip
def test_embeddings_that_are_none(tmp_path, rows, says):
    path = tmp_path / "x.jsonl"
    write(path, [{"anchor": "a", "positive": "b", "anchor_guide_embedding": row} for row in rows])
    assert says in message(path)


def test_wrong_columns_of_a_parquet_file(tmp_path):
    pq.write_table(pa.table({"anchor": ["a", "b"], "positive": [1.5, 2.5]}), tmp_path / "x.parquet")
    assert "column 'positive' holds double, not text (the first value is 1.5)" in message(tmp_path / "x.parquet")
    pq.write_table(pa.table({"anchor": ["a", "b"], "positive": ["c", " "]}), tmp_path / "y.parquet")
    assert "row 2, column 'positive': is empty" in message(tmp_path / "y.parquet")
    words = pa.array(["c", "d", "c"]).dictionary_encode()
    pq.write_table(pa.table({"anchor": ["a", "b", "c"], "positive": words}), tmp_path / "z.parquet")
    assert load_texts(tmp_path / "z.parquet")["positive"][:] == ["c", "d", "c"]
    vectors = {"anchor": ["a"], "positive": ["b"], "positive_guide_embedding": ["not numbers"]}
    pq.write_table(pa.table(vectors), tmp_path / "v.parquet")
    assert "column 'positive_guide_embedding' holds string, not embeddings" in message(tmp_path / "v.parquet")


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        (None, "row 17, column 'anchor_guide_embedding': the embedding is missing"),
        ([1.0], "row 17, column 'anchor_guide_embedding': an embedding of 1 numbers, where the rows before have 2"),
        ([1.0, None], "row 17, column 'anchor_guide_embedding': an embedding with something in it that is no finite"),
        ([float("inf"), 0.0], "row 17, column 'anchor_guide_embedding': an embedding with something in it that is no"),
    ],
)
def test_a_wrong_embedding_in_arrow_is_placed(tmp_path, monkeypatch, vector, says):
    vectors = [[float(k), 0.5] for k in range(40)]
    vectors[16] = vector
    columns = {"anchor": [f"a{k}" for k in range(40)], "positive": ["p"] * 40, "anchor_guide_embedding": vectors}
    pq.write_table(pa.table(columns), tmp_path / "v.parquet")
    Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    for chunk in (1000, 16, 7):
        monkeypatch.setattr(text_files, "CHUNK_ROWS", chunk)
        assert says in message(tmp_path / "v.parquet")
    assert says in message(tmp_path / "saved")


class TestStreams:
    ROWS = [  # noqa: RUF012
        {"anchor": f"a {k}", "positive": f"p {k}", "negative": f"n {k}", "negative_1": f"m {k}"} for k in range(50)
    ]

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_the_same_as_reading_the_file(self, tmp_path, monkeypatch, suffix):
        monkeypatch.setattr(text_files, "CHUNK_ROWS", 16)
        path = write(tmp_path / f"x{suffix}", [dict(reversed(row.items())) | {"other": "x"} for row in self.ROWS])
        stream = stream_texts(path)
        assert list(stream.features) == stream.column_names == ["anchor", "positive", "negative", "negative_1"]
        assert list(stream) == load_texts(path).to_list() == self.ROWS
        assert list(stream) == self.ROWS

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_wrong_row_is_an_error_when_it_is_met(self, tmp_path, monkeypatch, suffix):
        monkeypatch.setattr(text_files, "CHUNK_ROWS", 5)
        rows = [dict(row) for row in self.ROWS]
        rows[16]["positive"] = None if suffix == ".parquet" else ""
        path = write(tmp_path / f"x{suffix}", rows)
        before = path.read_bytes()
        met = []
        with pytest.raises(
            InputError, match=r"x\.\S+: row 17( \(line \d+\))?, column 'positive': is (empty|None); a text"
        ):
            met.extend(row["anchor"] for row in map(dict, stream_texts(path)))
        # The last good ones came before it, but for those of its chunk.
        assert met == [f"a {k}" for k in range(15)]
        assert path.read_bytes() == before

    def test_half_a_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text_files, "CHUNK_ROWS", 5)
        path = write(tmp_path / "x.jsonl.gz", [row | {"anchor": f"{hash(str(row))}"} for row in self.ROWS])
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(InputError, match=r"x\.jsonl\.gz: not a whole gzip file"):
            list(stream_texts(path))

    def test_what_is_wrong_from_the_start_is_said_at_the_start(self, tmp_path):
        path = write(tmp_path / "x.jsonl", [{"anchor": "a", "positve": "b"}])
        with pytest.raises(InputError, match=r"no column 'positive' \(did you mean 'positve'\?\)"):
            stream_texts(path)
        (tmp_path / "y.csv").write_text("anchor,positive\n")
        with pytest.raises(InputError, match="holds no rows"):
            stream_texts(tmp_path / "y.csv")
        with pytest.raises(InputError, match="a file has no split"):
            stream_texts(path, split="train")
        (tmp_path / "z.txt").write_text("a")
        with pytest.raises(InputError, match="unknown kind of file"):
            stream_texts(tmp_path / "z.txt")

    def test_the_size_of_cells_is_left_as_it_was(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text_files, "CHUNK_ROWS", 5)
        limit = csv.field_size_limit()
        for _ in stream_texts(write(tmp_path / "x.csv", [row | {"anchor": "a" * 200_000} for row in self.ROWS[:12]])):
            assert csv.field_size_limit() == limit

    def test_a_dataset_of_the_hub(self, tmp_path, monkeypatch):
        rows = [{"q": f"a {k}", "anchor": f"p {k}", "q_guide_embedding": [k, 0.5], "x": 1} for k in range(600)]
        asked = []

        def load_dataset(source, **options):
            asked.append((source, options))
            return {"train": Dataset.from_list(rows).to_iterable_dataset(num_shards=3)}[options["split"]]

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        stream = stream_texts("me/pairs", split="train", columns={"anchor": "q", "positive": "anchor"})
        assert asked == [("me/pairs", {"name": None, "split": "train", "streaming": True})]
        assert list(stream.features) == ["anchor", "positive", "anchor_guide_embedding"]
        expected = [
            {"anchor": r["q"], "positive": r["anchor"], "anchor_guide_embedding": r["q_guide_embedding"]} for r in rows
        ]
        assert list(stream) == expected
        rows[516]["anchor"] = None
        with pytest.raises(InputError, match=r"me/pairs\[train\]: row 517, column 'anchor': is None"):
            list(stream_texts("me/pairs", split="train", columns={"anchor": "q", "positive": "anchor"}))

    def test_columns_that_are_no_texts(self):
        stream = Dataset.from_dict({"anchor": ["a"], "positive": [3]}).to_iterable_dataset()
        with pytest.raises(InputError, match="where: column 'positive' holds int64, not text"):
            checked_stream(stream, None, "where")


def test_a_dataset_with_guide_embeddings_streams_without_its_format(tmp_path, pairs, student, guide):
    from gist_fast import embed_guide
    from gist_fast.training.collator import GISTDataCollator

    dataset = embed_guide(pairs, guide, cache_dir=tmp_path, show_progress_bar=False)
    # A format of some columns has no counterpart in a stream, says `datasets`, and what would do.
    with pytest.raises(NotImplementedError, match=r"with_format\(None\)"):
        dataset.to_iterable_dataset()
    stream = dataset.with_format(None).to_iterable_dataset()
    collator = GISTDataCollator(preprocess_fn=student.preprocess)
    one, other = collator(list(stream.take(20))), collator([dataset[k] for k in range(20)])
    for column in ("anchor_guide_embedding", "positive_guide_embedding"):
        assert one[column].shape == (20, 48)
        assert (one[column] == other[column].float()).all()
