"""Rows of files in which something comes late, stands in quotes, or is written in an odd way: read whole, or named."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetGenerationError

from gist_fast.data import text_files
from gist_fast.data.column_checks import Column, check_table
from gist_fast.data.load import checked_stream, load_texts, stream_texts
from gist_fast.runtime.errors import InputError

PAIR = {"anchor": "oil a lock", "positive": "How to oil a lock."}
LATE = "row 1 (line 1) has no 'negative', which row 12 (line 12) has; give it in every row, or in none."


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, *rows: dict) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def refusal(source: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_texts(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestLateKeys:
    def test_a_column_that_comes_late_is_named_with_the_row_that_lacks_it(self, tmp_path, monkeypatch):
        path = jsonl(tmp_path / "x.jsonl", *[PAIR] * 11, PAIR | {"negative": "Prices."})
        for chunk in (5, 100):
            monkeypatch.setattr(text_files, "CHUNK_ROWS", chunk)
            assert refusal(path) == f"{path}: {LATE}"
            with pytest.raises(InputError, match="which row 12"):
                list(stream_texts(path))

    @pytest.mark.parametrize(("late", "says"), [
        ({"negative_3": "x"}, "has no 'negative_3', which row 12"),
        ({"anchor_guide_embedding": [1.0]}, "has no 'anchor_guide_embedding', which row 12"),
    ])  # fmt: skip
    def test_every_column_that_would_be_taken(self, tmp_path, late, says):
        assert says in refusal(jsonl(tmp_path / "x.jsonl", *[PAIR] * 11, PAIR | late))

    def test_keys_that_are_left_out_anyway_may_come_and_go(self, tmp_path):
        path = jsonl(tmp_path / "x.jsonl", {**PAIR, "id": 1}, {**PAIR, "url": "x", "negativ": 3}, dict(PAIR))
        assert load_texts(path).to_list() == [PAIR] * 3

    def test_what_may_be_missing_is_an_empty_text(self, tmp_path):
        def choose(names):
            return [Column("_id", "id", "id"), Column("title", "title", "text or nothing")]

        titles = ["", "", " a title", "", ""]
        rows = [{"_id": 1}, {"_id": 2, "title": None}, {"_id": 3, "title": " a title"}, {"_id": 4, "title": ""}]
        jsonl(tmp_path / "x.jsonl", *rows, {"_id": 5, "title": " \n"})
        parquet(tmp_path / "x.parquet", _id=pa.array(range(1, 6)), title=pa.array([None, None, " a title", "", ""]))
        write(tmp_path / "x.csv", "_id,title\n1,\n2,\n3, a title\n4,\n5,\n")
        for name in ("x.jsonl", "x.parquet", "x.csv"):
            assert text_files.read_file(tmp_path / name, choose)["title"].to_pylist() == titles
        parquet(tmp_path / "y.parquet", _id=pa.array([1, 2]))
        write(tmp_path / "y.tsv", "_id\ttext\n1\tx\n2\ty\n")
        for name in ("y.parquet", "y.tsv"):
            assert text_files.read_file(tmp_path / name, choose)["title"].to_pylist() == ["", ""]
        jsonl(tmp_path / "z.jsonl", rows[0], {"_id": 2, "title": 3})
        with pytest.raises(InputError, match=r"row 2 \(line 2\), column 'title': is 3; a text is needed"):
            text_files.read_file(tmp_path / "z.jsonl", choose)

    def test_what_the_hub_s_reader_could_not_read_is_told(self, monkeypatch):
        def load_dataset(*_, **__):
            raise DatasetGenerationError("An error occurred while generating the dataset") from TypeError("a: null\nb")

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        assert "as a dataset of the hub it cannot be loaded (a: null)." in refusal("me/pairs")

    def test_mixed_types_of_the_hub_s_reader(self, tmp_path, monkeypatch):
        import datasets

        path = jsonl(tmp_path / "x.jsonl", {**PAIR, "negative": "n"}, {**PAIR, "negative": ["n"]})
        load = datasets.load_dataset
        options = {"data_files": str(path), "cache_dir": str(tmp_path / "cache"), "split": "train"}
        monkeypatch.setattr(
            "datasets.load_dataset", lambda *_, streaming=False, **__: load("json", streaming=streaming, **options)
        )
        assert "me/pairs: column 'negative' holds " in refusal("me/pairs")
        with pytest.raises(InputError, match=r"me/pairs\[train\]: column 'negative' holds [^(]*, not text; name a col"):
            stream_texts("me/pairs", split="train")

    def test_a_stream_whose_first_rows_show_no_such_column(self):
        def rows():
            for k in range(12):
                yield PAIR | ({"negative": "n"} if k == 11 else {})

        stream = checked_stream(IterableDataset.from_generator(rows), None, "me/pairs")
        with pytest.raises(InputError, match="me/pairs: row 1 has no 'negative', which row 12 has"):
            list(stream)
        named = checked_stream(IterableDataset.from_generator(lambda: iter([PAIR] * 9)), None, "me/pairs")
        assert list(named) == [PAIR] * 9


class TestQuotes:
    TSV = 'anchor\tpositive\nplain one\tp1\n"Born\tp2 is lost\nthird"\tp3\n5" pipe\t"both"\n'

    def test_a_quote_in_a_tsv_is_a_character_like_any_other(self, tmp_path, caplog):
        expected = [("plain one", "p1"), ('"Born', "p2 is lost"), ('third"', "p3"), ('5" pipe', '"both"')]
        path = write(tmp_path / "x.tsv", self.TSV)
        with caplog.at_level(logging.WARNING):
            assert [tuple(row.values()) for row in load_texts(path)] == expected
        # Whoever wrote it with quotes is told, once.
        assert caplog.text.count("row 4 (line 5): a cell stands in double quotes, and they are read as text") == 1
        assert [tuple(row.values()) for row in stream_texts(path)] == expected
        write(tmp_path / "w.tsv", self.TSV.replace("\n", "\r\n"))
        assert [tuple(row.values()) for row in load_texts(tmp_path / "w.tsv")] == expected

    def test_a_key_turns_quoting_on_and_off(self, tmp_path):
        rows = [{"anchor": "a\tb\nc", "positive": 'say "d"'}]
        path = tmp_path / "x.tsv"
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), dialect="excel-tab")
            writer.writeheader()
            writer.writerows(rows)
        assert load_texts(path, quoting=True).to_list() == list(stream_texts(path, quoting=True)) == rows
        assert (
            "row 1 (line 2) has 1 cell, the header 2; if the file's cells are quoted as in CSV, set quoting: true."
            in (refusal(write(tmp_path / "y.tsv", 'anchor\tpositive\n"a\nb"\tc\n')))
        )
        assert 'the column "anchor" stands in quotes, and they are read as text; if the file\'s cells are' in refusal(
            write(tmp_path / "z.tsv", '"anchor"\t"positive"\n"a"\t"b"\n')
        )
        path = write(tmp_path / "x.csv", 'anchor,positive\n"a,b"\nc,d"\n')
        assert load_texts(path, quoting=False).to_list() == [
            {"anchor": '"a', "positive": 'b"'}, {"anchor": "c", "positive": 'd"'}
        ]  # fmt: skip

    def test_an_unclosed_quote_in_a_csv_is_placed(self, tmp_path):
        text = 'anchor,positive\na,b\n"Born,p2\nthird,p3\nfourth,p4\n'
        for path in (write(tmp_path / "x.csv", text), write(tmp_path / "x.tsv", text.replace(",", "\t"))):
            assert "the row that starts on line 3 is not well-formed (unexpected end of data)" in refusal(
                path, quoting=True
            )

    def test_quoting_is_refused_where_there_are_no_cells(self, tmp_path):
        jsonl(tmp_path / "x.jsonl", PAIR)
        Dataset.from_list([PAIR]).save_to_disk(tmp_path / "saved")
        for name in ("x.jsonl", "saved"):
            assert "quoting=True: only .csv and .tsv files have quoted cells" in refusal(tmp_path / name, quoting=True)

    def test_windows_line_ends_within_quotes_stay(self, tmp_path):
        path = write(tmp_path / "x.csv", 'anchor,positive\r\n"two\r\nlines",b\r\n')
        assert load_texts(path).to_list() == [{"anchor": "two\r\nlines", "positive": "b"}]


class TestOddFiles:
    @pytest.mark.parametrize(("name", "content", "says"), [
        ("x.csv", "anchor,positive\na,b\n".encode("utf-16"), "is UTF-16 or UTF-32; write the file as UTF-8."),
        ("x.jsonl", json.dumps(PAIR).encode("utf-16-le"), "is UTF-16 or UTF-32; write the file as UTF-8."),
        ("x.csv", b"anchor,positive\ra,b\rc,d\r", "ends its lines with \\r alone; write the file with \\n."),
        ("x.tsv", b"anchor\tpositive\ra\tb\r", "ends its lines with \\r alone; write the file with \\n."),
        ("x.jsonl", b"\x1f\x8b\x08\x00", "is compressed with gzip; its name must end in .gz."),
        ("x.jsonl", '{"anchor": "a", "positive": "b", "anchor": "c"}', "line 1 is not a whole JSON object (the key 'a"),
        ("x.jsonl", '{"anchor": "a", "positive": ' + "9" * 5000 + "}", "line 1 is not a whole JSON object (Exceeds "),
        ("x.jsonl", b'{"anchor": "a\x00", "positive": "b"}', "line 1 is not a whole JSON object (Invalid cont"),
        ("x.csv", "anchor,positive\na\rb,c\n", "starts on line 2 is not well-formed (a \\r stands outside quotes)"),
        ("x.tsv", "anchor\tpositive\r\r\na\tb\r\r\n", "no column 'positive' (did you mean 'positive\\r'?)"),
        ("x.tsv", "anchor\tpositive\na\tb\tc\n", "row 1 (line 2) has 3 cells, the header 2"),
    ])  # fmt: skip
    def test_what_is_said_of_it(self, tmp_path, name, content, says):
        assert says in refusal(write(tmp_path / name, content))

    def test_only_the_names_of_columns_that_are_read_must_differ(self, tmp_path):
        # A spreadsheet that was once wider.
        path = write(tmp_path / "x.csv", "anchor,positive,,\na,b,,\n")
        assert load_texts(path).to_list() == [{"anchor": "a", "positive": "b"}]
        names = ["anchor", "positive", "x", "x"]
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names=names), tmp_path / "x.parquet")
        assert load_texts(tmp_path / "x.parquet").to_list() == [{"anchor": "a", "positive": "a"}]
        names[3] = "positive"
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names=names), tmp_path / "x.parquet")
        assert "2 columns are called 'positive'; names must differ." in refusal(tmp_path / "x.parquet")

    def test_a_file_without_a_header(self, tmp_path):
        path = write(tmp_path / "x.tsv", "\t".join(f"{k} {'long ' * 50}" for k in range(40)) + "\n")
        said = refusal(path)
        assert "no column 'anchor'; it has '0 long long" in said and said.endswith(
            "and 10 more. Rename one, or map it: columns: {anchor: <name>}."
        )
        assert len(said) < 2500

    def test_line_ends_of_unicode_are_characters(self, tmp_path):
        text = "a\u2028b\x85c\x0bd\x1ce"
        # The last is a control character, which JSON escapes.
        write(tmp_path / "x.jsonl", json.dumps({**PAIR, "anchor": text}, ensure_ascii=False))
        write(tmp_path / "x.tsv", f"anchor\tpositive\n{text}\tb\n")
        assert [load_texts(tmp_path / name)["anchor"][0] for name in ("x.jsonl", "x.tsv")] == [text, text]

    @pytest.mark.parametrize(("source", "says"), [
        ("~no-such-user-here/x.csv", "there is no home directory of that user"),
        ("~no-such-user-here/x", "there is no home directory of that user"),
        (" ", "data: expected a file, a folder or the name of a dataset, got ' '."),
        ("a" * 300 + ".csv", "cannot be read (File name too long)."),
    ])  # fmt: skip
    def test_names_that_can_be_no_path(self, source, says):
        assert says in refusal(source)
        with pytest.raises(InputError):
            stream_texts(source)


class TestTypesOfArrow:
    TEXTS = ("p", "q", "p")
    PLAIN = pa.array(TEXTS)

    @pytest.mark.parametrize("array", [
        PLAIN.cast(pa.string_view()),
        PLAIN.cast(pa.large_string()),
        PLAIN.dictionary_encode(),
        PLAIN.cast(pa.large_string()).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), pa.array(["p", "q"]).cast(pa.string_view())),
    ], ids=lambda array: str(array.type))  # fmt: skip
    def test_every_way_to_hold_texts(self, tmp_path, array):
        table = check_table(pa.table({"t": array}), [Column("t", "anchor")], "where")
        assert table.column("anchor").to_pylist() == list(self.TEXTS)
        if not (pa.types.is_dictionary(array.type) and pa.types.is_string_view(array.type.value_type)):
            path = parquet(tmp_path / "x.parquet", anchor=array, positive=self.PLAIN, group=array)
            loaded = load_texts(path, columns={"group": "group"})
            assert loaded["anchor"][:] == list(self.TEXTS)
            assert loaded["group"][:] == [0, 1, 0]
            assert [row["anchor"] for row in stream_texts(path)] == list(self.TEXTS)

    def test_string_views_of_a_saved_dataset(self, tmp_path):
        Dataset(pa.table({"anchor": self.PLAIN.cast(pa.string_view()), "positive": self.PLAIN})).save_to_disk(tmp_path)
        assert load_texts(tmp_path)["anchor"][:] == list(self.TEXTS)

    @pytest.mark.parametrize(("array", "says"), [
        (pa.array([b"p", b"q"]), "column 'positive' holds binary, not text (the first value is b'p')"),
        (pa.array([[1], [2]]), "column 'positive' holds list<element: int64>, not text"),
        (pa.array([["p"], [None]]), "row 2, column 'positive': is None; a text is needed"),
        (pa.array([["p"], []]), "row 2, column 'positive': is an empty list; 1 text at least is needed"),
        (pa.array([["p"], None]), "row 2, column 'positive': is None; a list of texts is needed"),
        (pa.array([{"a": 1}, {"a": 2}]), "column 'positive' holds struct<a: int64>, not text"),
        (pa.nulls(2), "row 1, column 'positive': is None; a text is needed"),
        (pa.array(["p", None]).cast(pa.string_view()), "row 2, column 'positive': is None; a text is needed"),
    ])  # fmt: skip
    def test_what_holds_no_texts(self, tmp_path, array, says):
        assert says in refusal(parquet(tmp_path / "x.parquet", anchor=pa.array(["a", "b"]), positive=array))

    @pytest.mark.parametrize("wide", [False, True])
    def test_bytes_that_are_no_text(self, tmp_path, wide):
        # Arrow takes them as they come; Python would refuse them in the middle of the training.
        binary = pa.array([b"good", None, b"caf\xe9s x"], pa.large_binary() if wide else pa.binary())
        kind = pa.LargeStringArray if wide else pa.StringArray
        broken = kind.from_buffers(3, *binary.buffers()[1:], binary.buffers()[0])
        path = parquet(tmp_path / "x.parquet", anchor=pa.array(["a", "b", "c"]), positive=broken)
        says = "row 3, column 'positive': byte 4 (0xe9) is not UTF-8; write the texts as UTF-8."
        assert says in refusal(path)
        with pytest.raises(InputError, match="row 3, column 'positive': byte 4"):
            list(stream_texts(path))
        Dataset(pa.table({"anchor": ["a", "b", "c"], "positive": broken})).save_to_disk(tmp_path / "saved")
        assert says in refusal(tmp_path / "saved")

    def test_a_split_without_rows_beside_one_with_rows(self, tmp_path):
        rows = Dataset.from_list([PAIR])
        DatasetDict(train=rows, test=rows.select([])).save_to_disk(tmp_path)
        assert load_texts(tmp_path, split="train").to_list() == [PAIR]
        assert "holds no rows" in refusal(tmp_path, split="test")


class TestEmbeddings:
    @pytest.mark.parametrize(("written", "says"), [
        ("[1e39, 0]", "an embedding with 1e+39 in it; finite numbers of float32 are needed"),
        (f"[{10**400}]", "an embedding with 1000000000000000000000"),
        ("[0.5, NaN]", "an embedding with nan in it"),
        ("[true]", "expected a list of numbers, got [True]"),
        ("[]", "expected a list of numbers, got []"),
    ])  # fmt: skip
    def test_what_float32_cannot_hold_is_refused(self, tmp_path, written, says):
        row = '{"anchor": "a", "positive": "b", "anchor_guide_embedding": %s}\n'
        said = refusal(write(tmp_path / "x.jsonl", row % "[0.5, 1]" + row % written))
        assert says in said
        assert "row 2 (line 2), column 'anchor_guide_embedding'" in said

    def test_whole_numbers_are_rounded_as_decimals_are(self, tmp_path):
        # 16777217 is 2^24 + 1, the first whole number that float32 does not have.
        path = jsonl(tmp_path / "x.jsonl", {**PAIR, "anchor_guide_embedding": [16777217, 0.1, -3]})
        expected = np.float32([16777217, 0.1, -3]).tolist()
        assert load_texts(path)[0]["anchor_guide_embedding"].tolist() == expected
        assert next(iter(stream_texts(path)))["anchor_guide_embedding"] == expected

    @pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float16())])
    def test_embeddings_of_no_numbers(self, tmp_path, kind):
        vectors = pa.array([[], []], kind)
        texts = pa.array(["a", "b"])
        path = parquet(tmp_path / "x.parquet", anchor=texts, positive=texts, positive_guide_embedding=vectors)
        assert "row 1, column 'positive_guide_embedding': an embedding of no numbers." in refusal(path)


def test_the_commands_read_quotes_alike(tmp_path, run_command, tiny_student, tiny_guide):
    path = write(tmp_path / "x.tsv", 'anchor\tpositive\tnegative\nice\t"water\t"\nfire\twood"\ta\n')
    quoted = write(tmp_path / "q.tsv", 'anchor\tpositive\tnegative\n"a\tb"\t"c\nd"\te\n"a\ne"\tf\tg\n')
    config = tmp_path / "c.yaml"
    for source, rows, option in ((path, 2, None), (quoted, 2, True)):
        options = ["--quoting"] if option else []
        found = run_command("evaluate", tiny_student, "--triplet", source, *options, "--json", "--device", "cpu")
        assert json.loads(found.out)["triplets"] == rows, found.err
        found = run_command("inspect", "--data", source, "--guide", tiny_guide, *options, "--json", "--device", "cpu")
        assert json.loads(found.out)["last_row"] == rows, found.err
        embed = ("embed-guide", source, "--guide", tiny_guide, "--output", tmp_path / source.stem, *options)
        found = run_command(*embed, "--cache-dir", tmp_path / "cache", "--quiet", "--json", "--device", "cpu")
        assert json.loads(found.out)["rows"] == rows, found.err
        data = f"{{path: {source}{', quoting: true' if option else ''}}}"
        training = "{output_dir: run, per_device_train_batch_size: 2, max_steps: 2, use_cpu: true}"
        config.write_text(
            f"student: {tiny_student}\nguide: {tiny_guide}\ndata: {{train: {data}}}\ntraining: {training}\n"
        )
        found = run_command("train", config, "--dry-run")
        assert found.code == 0, found.err
        assert f"{source}: {rows} rows" in found.out
    found = run_command("train", config, "--dry-run", "--data.train.quoting", "false")
    assert found.code == 2 and "q.tsv: row 2 (line 3) has 2 cells, the header 3" in found.err
