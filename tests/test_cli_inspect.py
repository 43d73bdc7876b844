"""``gist-fast inspect``: margins, duplicates and the page. (Its first steps are in ``test_cli.py``.)"""

from __future__ import annotations

import json
import re
import sys

import pytest
from test_cli import refused
from test_report import Tree

from gist_fast.data.load import load_texts
from gist_fast.inspection import find_duplicates, inspect_batch


@pytest.fixture
def data(tmp_path, pairs):
    """The pairs, with a copy of a positive, a text that would be markup, and a very long one."""
    rows = [*pairs]
    rows.append({"anchor": "<script>alert(1)</script> why does ice float", "positive": rows[3]["positive"]})
    rows.append({"anchor": rows[5]["anchor"], "positive": "word " * 400})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(run_command, data, tiny_guide):
    return lambda *options: run_command("inspect", "--data", data, "--guide", tiny_guide, "--device", "cpu", *options)


def encoder(model):
    return lambda texts, *_: model.encode(texts, convert_to_tensor=True)


def test_margins_and_duplicates_as_json(run, data, guide):
    options = ("--batch-size", "33", "--batch", "2", "--margins", "-0.02,0.03,0", "--near", "0.99")
    result = run(*options, "--json", "--limit", "3")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    want = inspect_batch(
        load_texts(data), encoder(guide), batch=2, batch_size=33, margins=[-0.02, 0, 0.03], near=0.99, most=3
    )
    assert found["margins"] == [
        {
            "strategy": outcome.strategy,
            "margin": outcome.margin,
            "share": outcome.share(),
            "blocks": {block: outcome.share(block) for block in ("ap", "aa", "pp")},
            "rows_without_a_negative": outcome.rows_emptied,
        }
        for outcome in want.margins
    ]
    assert [m["margin"] for m in found["margins"]] == [-0.02, 0.0, 0.03] * 2
    assert found["margins"][1]["share"] == found["share"]
    assert found["rows_without_a_negative"] == want.rows_emptied
    assert found["duplicates"]["rows"] == 33
    assert found["duplicates"]["near_pairs"] == want.duplicates.near_pairs > 3
    assert [p["similarity"] for p in found["duplicates"]["pairs"]] == [p.similarity for p in want.duplicates.pairs]
    assert len(found["duplicates"]["pairs"]) == len(found["pairs"]) == 3
    assert found["report"] is None


@pytest.mark.parametrize(("asked", "rows"), [("all", 66), ("65", 65), ("1000", 66)])
def test_duplicates_in_more_than_the_batch(run, data, guide, asked, rows):
    result = run("--duplicates", asked, "--batch-size", "8", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)["duplicates"]
    want = find_duplicates(load_texts(data), encoder(guide), rows=rows)
    assert found["rows"] == rows
    assert found["copied_texts"] == want.copied_texts == (2 if rows == 66 else 1)
    assert found["copies"][0]["places"] == [[4, "positive"], [65, "positive"]]
    assert found["near_pairs"] == want.near_pairs


def test_the_advice_fits_what_was_found(run, tmp_path, pairs, run_command, tiny_guide):
    advice = json.loads(run("--batch-size", "66", "--json").out)["advice"]
    assert advice[0].startswith("2 texts stand in more than one row: batch_sampler: no_duplicates")
    assert advice[1].startswith("2 pairs score exactly as high as the threshold")
    assert "groups" in advice[2]
    assert len(advice) == 3
    # Both copies are outside of the batch.
    assert not [
        line for line in json.loads(run("--batch-size", "3", "--json").out)["advice"] if "more than one" in line
    ]
    everywhere = json.loads(run("--batch-size", "3", "--duplicates", "all", "--json").out)["advice"]
    assert everywhere[0] == advice[0]
    # What was advised is on offer.
    without = json.loads(run("--batch-size", "66", "--mask-ties", "--json").out)
    assert not [line for line in without["advice"] if "exactly as high" in line]
    grouped = json.loads(run("--batch-size", "66", "--groups", "anchor", "--json").out)
    assert grouped["blocks"]["aa"]["compared"] == 66 * 65 - 2
    emptied = json.loads(run("--margin", "1.9", "--json").out)["advice"]
    assert emptied[-1].startswith("64 rows are left without any negative")
    none = json.loads(run("--batch-size", "3", "--margin", "-2", "--near", "0.9999", "--json").out)["advice"]
    assert none == ["The guide drops nothing here and finds no two texts the same: on such data it changes nothing."]


@pytest.fixture
def rated(tmp_path, data):
    """The data with a margin and a product a row."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    path = tmp_path / "rated.jsonl"
    rated = [{**row, "trust": k % 5 / 200, "product": f"p{k % 7}"} for k, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rated))
    return path


def test_what_training_can_be_told_can_be_told_here(run_command, rated, tiny_guide, tiny_student, guide, student):
    models = ("--guide", tiny_guide, "--student", tiny_student, "--device", "cpu", "--batch-size", "66", "--json")
    asked = ("--columns", "margin=trust,group=product", "--row-margins", "--groups", "column", "--no-contrast-anchors")
    result = run_command("inspect", "--data", rated, *models, *asked, "--hard")
    assert result.code == 0, result.err
    blocks = json.loads(result.out)["blocks"]
    options = {"row_margins": True, "groups": "column", "contrast_anchors": False, "hard": True}
    data = load_texts(rated, columns={"margin": "trust", "group": "product"})
    want = inspect_batch(data, encoder(guide), encoder(student), batch_size=66, **options)
    assert {name: block["dropped"] for name, block in blocks.items()} == want.counts
    assert {name: block["easy"] for name, block in blocks.items()} == want.easy
    assert {name: block["compared"] for name, block in blocks.items()} == want.compared
    assert set(blocks) == {"ap", "pp"}
    for name, off in (("row_margins", False), ("groups", None)):
        other = inspect_batch(data, encoder(guide), encoder(student), batch_size=66, **{**options, name: off})
        assert other.counts != want.counts, name
    without = run_command("inspect", "--data", rated, *models, "--no-contrast-positives")
    blocks = json.loads(without.out)["blocks"]
    assert set(blocks) == {"ap", "aa"}
    assert "easy" not in blocks["ap"]


def test_what_hard_drops_has_a_column_of_the_table(run, tiny_student):
    found = json.loads(run("--student", tiny_student, "--hard", "--json").out)["blocks"]
    rows = run("--student", tiny_student, "--hard").out.splitlines()
    assert [cell.strip() for cell in rows[2].split("┃")[1:-1]] == [
        "block",
        "pairs compared",
        "dropped",
        "share",
        "easy",
    ]
    first = [cell.strip() for cell in rows[4].split("│")[1:-1]]
    assert first == [
        "ap",
        str(64 * 63),
        str(found["ap"]["dropped"]),
        f"{found['ap']['share']:.2%}",
        str(found["ap"]["easy"]),
    ]
    assert found["ap"]["easy"] > 0


def test_the_tables(run, tiny_student):
    result = run("--batch-size", "66", "--student", tiny_student, "--limit", "4", "--near", "0.97")
    assert result.code == 0, result.err
    assert "Dropped at a margin, absolute" in result.out
    assert "Dropped at a margin, relative" in result.out
    assert "rows without a negative" in result.out
    assert re.search(r"The student ranks \d+ of the \d+ dropped pairs above the row's own positive\.", result.out)
    assert "Texts of more than one row: 2 of 2, among 66 rows" in result.out
    assert re.search(r"Nearly the same \(above 0.97\): 4 of \d+ pairs, among 66 rows", result.out)
    assert "4 positive, 65 positive" in result.out
    # A text of 2,000 letters does not fill the terminal.
    cells = run("--batch-size", "66", "--margins", "0", "--near", "0.9999", "--limit", "0").out
    rows = re.split(r"\n│ (?=ap|aa|pp)", cells)
    assert max(row.count("word") for row in rows) > 40
    assert max(row.count("word") for row in rows) < 100


class TestReport:
    @pytest.fixture(autouse=True)
    def _matplotlib(self):
        pytest.importorskip("matplotlib", reason="matplotlib (the extra [bench]) is not installed")

    def test_the_page_says_what_the_json_says(self, run, tmp_path, tiny_student):
        path = tmp_path / "new" / "page.html"
        options = ("--batch-size", "66", "--student", tiny_student, "--duplicates", "all", "--near", "0.99")
        result = run(*options, "--report", path, "--limit", "2", "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert found["report"] == str(path)
        page = path.read_text(encoding="utf-8")
        tree = Tree(page)
        assert tree.texts["h2"] == [
            *("What to do", "What the guide dropped", "What each margin would drop", "Pairs that were dropped"),
            "Texts that are the same",
        ]
        assert not tree.all("script")
        assert "&lt;script&gt;alert(1)&lt;/script&gt; why does ice float" in page
        cells = tree.texts["td"]
        for outcome in found["margins"]:
            shares = [*outcome["blocks"].values(), outcome["share"], outcome["rows_without_a_negative"] / 66]
            row = [f"{outcome['margin']:g}", *(f"{share:.2%}" for share in shares)]
            assert any(cells[k : k + 6] == row for k in range(len(cells))), row
        pair = found["pairs"][0]
        start = [pair["block"], str(pair["row"]), pair["text"], str(pair["other_row"]), pair["other_text"]]
        numbers = [f"{pair[name]:.4f}" for name in ("guide", "threshold", "student", "student_positive")]
        assert any(cells[k : k + 10] == [*start, *numbers, pair["student_ranks"]] for k in range(len(cells)))
        for advice in found["advice"]:
            assert advice in tree.texts["p"]
        copy = found["duplicates"]["copies"][0]
        assert ["2", copy["text"], "4 positive, 65 positive"] in [cells[k : k + 3] for k in range(len(cells))]
        # The page has its own number of pairs.
        assert f"50 of {found['dropped']:,}" in tree.texts["caption"]
        assert "word " * 60 not in page
        facts = dict(zip(tree.texts["dt"], tree.texts["dd"], strict=True))
        assert facts["rows"] == "1 to 66 of 66"
        assert facts["margin"] == "0, absolute"

    def test_what_would_fail_at_the_end_fails_before_models_are_loaded(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr("gist_fast.pipeline.models.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        page = tmp_path / "page.html"
        page.write_text("mine")
        refused(run("--report", page), f"{page}: exists; name another file for the report")
        refused(run("--report", page / "deeper.html"), "is a file, not a folder")
        refused(run("--report", tmp_path), "is a folder; name the report's file")
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        refused(run("--report", tmp_path / "other.html"), 'pip install "gist-fast[bench]"')
        assert page.read_text() == "mine"

    def test_an_earlier_one_is_replaced_when_asked(self, run, tmp_path):
        page = tmp_path / "page.html"
        page.write_text("mine")
        result = run("--report", page, "--overwrite")
        assert (result.code, page.read_text()) == (2, "mine")
        assert "is no report of gist_fast, so it is not replaced; name another file for the report." in result.err
        page.unlink()
        assert [run("--report", page, *more).code for more in ((), ("--overwrite",))] == [0, 0]
        assert page.read_text().startswith("<!DOCTYPE html>")

    def test_ctrl_c_leaves_no_half_page(self, run, tmp_path, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        folder = tmp_path / "pages"
        monkeypatch.setattr("gist_fast.runtime.files.put", interrupted)
        result = run("--report", folder / "page.html")
        assert (result.code, result.out) == (130, "")
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--margins", "0.1,nan"), "--margins: expected a finite float, got nan"),
        (("--margins", "0.1,x"), "--margins: expected numbers such as 0,0.05,0.1, got '0.1,x'."),
        (("--margins", ""), "--margins: expected numbers such as 0,0.05,0.1, got ''."),
        (("--near", "1.5"), "near: expected a finite float above 0 and below 1, got 1.5"),
        (("--near", "nan"), "near: expected a finite float above 0 and below 1, got nan"),
        (("--duplicates", "some"), "--duplicates: expected batch, all, or a number of rows of at least 2, got 'some'."),
        (("--duplicates", "1"), "rows of at least 2, got '1'."),
        (("--duplicates", "-3"), "rows of at least 2, got '-3'."),
        (("--batch", "3"), "batch: expected 1 to 2, the batches that 66 rows make at a batch size of 64, got 3"),
        (("--margin", "inf"), "margin: expected a finite float, got inf"),
        (
            ("--columns", "margin=trust"),
            "--columns: margin=trust would be ignored; give --row-margins too, or leave it out",
        ),
        (("--columns", "group=id"), "--columns: group=id would be ignored; give --groups column too, or leave it out"),
        (("--columns", "group=id", "--groups", "anchor"), "group=id would be ignored; give --groups column too"),
        (("--row-margins",), "--row-margins needs a column to read; give --columns margin=COLUMN."),
        (("--groups", "column"), "--groups column needs a column to read; give --columns group=COLUMN."),
        (("--hard",), "--hard goes by the student's ranking; give --student too"),
    ],
)
def test_refused_before_models_are_loaded(run, monkeypatch, options, says):
    monkeypatch.setattr("gist_fast.pipeline.models.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(run(*options), says)
