"""What the demo says about itself: gains, ranks, examples, JSON, picture, each against a value known by hand."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from gist_fast.demo import report as reports
from gist_fast.demo.picture import draw_run
from gist_fast.demo.report import BASE, GUIDED, UNGUIDED, DemoReport, Example, Gain, Training
from gist_fast.evaluation.evaluators import Retrieval

TASK = Retrieval(
    {"q1": "one", "q2": "two", "q3": "three"},
    {"a": "A", "b": "B", "c": "C", "d": "D [x]"},
    {"q1": {"a"}, "q2": {"b"}, "q3": {"c", "d"}},
)
BEFORE = {"q1": ["b", "a", "c", "d"], "q2": ["b", "a", "c", "d"], "q3": ["c", "d", "a", "b"]}
AFTER = {"q1": ["a", "b", "c", "d"], "q2": ["b", "c", "a", "d"], "q3": ["a", "c", "b", "d"]}


def make_report(**changed: object) -> DemoReport:
    """A small report, its numbers made up."""
    training = Training(2.0, [1, 2], [1.5, 1.0], {"masked_ap": [0.1, 0.2]}, [0, 2], [0.4, 0.5])
    values: dict = {
        "quick": True,
        "seed": 1,
        "recipe": {"batch_size": 2},
        "texts": {"training pairs": 4, "test queries": 3, "test documents": 4},
        "scores": {n: dict.fromkeys(reports.METRICS, s) for n, s in ((BASE, 0.25), (UNGUIDED, 0.5), (GUIDED, 0.75))},
        "gains": {BASE: Gain(0.5, 0.01), UNGUIDED: Gain(-0.25, 0.02)},
        "trainings": {UNGUIDED: Training(1.0, [1], [2.0], {}, [0], [0.4]), GUIDED: training},
        "examples": [Example("gained", "one [y]", ("D [x]",), ("B", "D [x]"), ("D [x]", "B"), 2, None)],
        "seconds": {"all": 3.0},
        "versions": {},
        "model_path": "there/model",
    }  # fmt: skip
    return DemoReport(**(values | changed))


def test_a_gain_is_the_mean_of_the_queries_changes() -> None:
    gain = reports.paired_gain(TASK, BEFORE, AFTER)
    ideal = 1 + 1 / math.log2(3)
    changes = [1 - 1 / math.log2(3), 0.0, (1 / math.log2(3) + 1 / math.log2(5)) / ideal - 1]
    mean = sum(changes) / 3
    error = math.sqrt(sum((c - mean) ** 2 for c in changes) / 2 / 3)
    assert gain.mean == pytest.approx(mean, abs=1e-12)
    assert gain.error == pytest.approx(error, abs=1e-12)


def test_an_answer_below_the_tenth_place_counts_nothing() -> None:
    task = Retrieval({"q": "q"}, {}, {"q": {"right"}})
    rankings = [{"q": [f"d{k}" for k in range(before)] + ["right"]} for before in (10, 9)]
    gain = reports.paired_gain(task, *rankings)
    assert gain.mean == pytest.approx(1 / math.log2(11), abs=1e-12)
    assert math.isinf(gain.error), "one query says nothing about the spread"


def test_examples_show_a_gain_a_stay_and_a_loss() -> None:
    examples = reports.choose_examples(TASK, BEFORE, AFTER, seed=0)
    assert [(e.change, e.query, e.rank_before, e.rank_after) for e in examples] == [
        ("gained", "one", 2, 1),
        ("stayed", "two", 1, 1),
        ("lost", "three", 1, 2),
    ]
    assert examples[2].right == ("C", "D [x]")
    assert examples[2].after == ("A", "C", "B")


def test_rankings_are_read_best_first(tmp_path: Path) -> None:
    hits = {query: [{"corpus_id": document, "score": 1} for document in ranking] for query, ranking in AFTER.items()}
    rows = [{"query_id": query, "query": "", "results": results} for query, results in hits.items()]
    (tmp_path / "x_predictions_cosine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reports.read_rankings(tmp_path, keep=2) == {q: r[:2] for q, r in AFTER.items()}


def test_what_is_printed_is_what_was_measured(tmp_path: Path) -> None:
    out, report = io.StringIO(), make_report()
    console = Console(file=out, width=100)
    reports.print_examples(console, report.examples)
    reports.print_scores(console, report)
    reports.print_ending(console, report, tmp_path / "run.png")
    text = out.getvalue()
    for piece in ("0.2500", "0.5000", "0.7500", "+0.5000", "-0.2500", "one [y]", "* D [x]", "right answer at > 100"):
        assert piece in text
    assert "model = SentenceTransformer('there/model')" in text


def test_the_report_is_kept_whole(tmp_path: Path) -> None:
    report = make_report()
    report.save(tmp_path / "report.json")
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["scores"] == report.scores
    assert kept["gains"][UNGUIDED] == {"mean": -0.25, "error": 0.02}
    assert kept["trainings"][GUIDED]["masked"] == {"masked_ap": [0.1, 0.2]}
    assert kept["examples"][0]["rank_after"] is None


def test_the_picture_shows_both_trainings(tmp_path: Path) -> None:
    from matplotlib.image import imread

    draw_run(make_report(), tmp_path / "with.png")
    flat = make_report(trainings={name: Training(1.0, [], [], {}, [0], [0.4]) for name in (UNGUIDED, GUIDED)})
    draw_run(flat, tmp_path / "without.png")
    drawn, empty = imread(tmp_path / "with.png"), imread(tmp_path / "without.png")
    assert drawn.shape == empty.shape
    width = drawn.shape[1]
    for panel in range(3):
        part = slice(panel * width // 3, (panel + 1) * width // 3)
        assert (drawn[:, part] != empty[:, part]).any(), f"panel {panel} does not depend on the run"
