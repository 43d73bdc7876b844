"""Retrieval is measured as trec_eval, BEIR and mteb do: grades, titles, ties, and queries that are documents."""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path

import pytest
import pytrec_eval
import torch
from datasets import Dataset

from gist_fast.evaluation import evaluate, load_retrieval, make_evaluator, retrieval_from_pairs
from gist_fast.evaluation.ranking import InformationRetrievalEvaluator
from gist_fast.evaluation.retrieval import Retrieval
from gist_fast.runtime.errors import InputError


@pytest.fixture
def write(tmp_path):
    """Write rows to a file of that name; the suffix says how."""

    def to(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        if path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
            path.write_text("\n".join("\t".join(line) for line in lines) + "\n")
        return path

    return to


class Scored:
    """Stands in for a model: the similarity of each query and document is chosen by the test."""

    similarity_fn_name = "cosine"
    model_card_data = type("Card", (), {"set_evaluation_metrics": lambda *_, **__: None})()

    def __init__(self, task: Retrieval, scores: dict[str, dict[str, float]]):
        self.queries = {text: query for query, text in task.queries.items()}
        self.documents = {text: document for document, text in task.corpus.items()}
        self.scores = scores

    def encode_query(self, texts, **_):
        self.asked = [self.queries[text] for text in texts]
        return torch.arange(len(texts)).float()[:, None]

    def encode_document(self, texts, **_):
        self.read = [self.documents[text] for text in texts]
        return torch.arange(len(texts)).float()[:, None]

    def similarity(self, queries, documents):
        return torch.tensor([[self.scores[self.asked[int(q)]][self.read[int(d)]] for d in documents] for q in queries])


def a_task(queries: int, documents: int, relevant: dict, grades: dict | None = None) -> Retrieval:
    texts = {f"q{k}": f"query {k}" for k in range(queries)}, {f"d{k}": f"document {k}" for k in range(documents)}
    return Retrieval(*texts, relevant, grades or {})


def random_task(seed: int, documents: int, most_relevant: int) -> tuple[Retrieval, dict, dict]:
    """A task, its judgements as trec_eval takes them, and scores with many ties."""
    rng = random.Random(seed)
    judged = {
        f"q{q}": {f"d{d}": rng.choice((-1, 0, 1, 2, 3)) for d in rng.sample(range(documents), most_relevant)}
        for q in range(12)
    }
    judged["q0"] = dict.fromkeys(judged["q0"], 0)
    relevant = {query: {d for d, grade in of.items() if grade > 0} for query, of in judged.items()}
    task = a_task(13, documents, relevant, judged)  # the last query was not judged
    scores = {
        f"q{q}": {f"d{d}": rng.choice((0.25, 0.5, 0.75)) + d % 3 / 8 for d in range(documents)} for q in range(13)
    }
    return task, judged, scores


@pytest.mark.parametrize(("documents", "most_relevant"), [(7, 5), (60, 20), (400, 250)])
def test_metrics_are_those_of_trec_eval(documents, most_relevant):
    task, judged, scores = random_task(documents, documents, most_relevant)
    wanted = pytrec_eval.RelevanceEvaluator(
        judged, {"ndcg_cut.10,5", "map_cut.100,3", "recall.10,5", "P.10,5", "success.1", "recip_rank"}
    ).evaluate({query: scores[query] for query in judged})
    depths = {"ndcg_at_k": [5, 10], "map_at_k": [3, 100], "precision_recall_at_k": [5, 10], "accuracy_at_k": [1]}
    evaluator = InformationRetrievalEvaluator(
        task, **depths, mrr_at_k=[documents], corpus_chunk_size=32, write_csv=False
    )
    got = evaluator(Scored(task, scores))
    names = {
        "cosine_ndcg@5": "ndcg_cut_5",
        "cosine_ndcg@10": "ndcg_cut_10",
        "cosine_map@3": "map_cut_3",
        "cosine_map@100": "map_cut_100",
        "cosine_recall@5": "recall_5",
        "cosine_recall@10": "recall_10",
        "cosine_precision@5": "P_5",
        "cosine_precision@10": "P_10",
        "cosine_accuracy@1": "success_1",
        f"cosine_mrr@{documents}": "recip_rank",
    }
    means = {name: sum(of[theirs] for of in wanted.values()) / len(judged) for name, theirs in names.items()}
    assert got == pytest.approx(means, abs=1e-7)
    assert 0 < min(means.values()) < max(means.values()) < 1


def test_the_reciprocal_rank_ends_at_its_cut():
    task = a_task(1, 12, {"q0": {"d11"}})
    scores = {"q0": {f"d{k}": -float(k) for k in range(12)}}  # d11 is the twelfth
    assert evaluate(Scored(task, scores), make_evaluator(task))["mrr@10"] == 0.0
    assert make_evaluator(task, write_csv=False)(Scored(task, scores))["cosine_map@100"] == pytest.approx(1 / 12)


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".parquet"])
def test_grades_count_in_ndcg(write, suffix):
    queries = write("q.jsonl", [{"_id": "q1", "text": "the query"}])
    corpus = write("c.jsonl", [{"_id": f"d{k}", "text": f"document {k}"} for k in range(4)])
    grades = {"d0": 3, "d1": 3, "d2": 1, "d3": -1}
    judged = [{"query-id": "q1", "corpus-id": d, "score": grade} for d, grade in grades.items()]
    task = load_retrieval(queries, corpus, write(f"r{suffix}", judged))
    assert task.relevant == {"q1": {"d0", "d1", "d2"}}
    scores = evaluate(Scored(task, {"q1": {"d0": 0.1, "d1": 0.2, "d2": 0.3, "d3": 0.4}}), make_evaluator(task))
    wanted = (1 / math.log2(3) + 3 / 2 + 3 / math.log2(5)) / (3 + 3 / math.log2(3) + 1 / 2)
    assert scores["ndcg@10"] == pytest.approx(wanted)
    assert scores["mrr@10"] == 0.5
    assert scores["recall@10"] == 1.0
    # Without the document that is judged to be irrelevant.
    scores = evaluate(Scored(task, {"q1": {"d0": 0.1, "d1": 0.2, "d2": 0.3, "d3": 0.0}}), make_evaluator(task))
    assert scores["ndcg@10"] == pytest.approx(0.8146, abs=5e-5)


def test_grades_may_stand_among_the_relevant_documents():
    """As mteb and BEIR hand them over."""
    judged = {"q0": {"d0": 3, "d1": 0, "d2": 1}}
    task = a_task(1, 3, judged)
    assert (task.relevant, task.grades) == ({"q0": {"d0", "d2"}}, judged)
    scores = evaluate(Scored(task, {"q0": {"d0": 0.1, "d1": 0.3, "d2": 0.2}}), make_evaluator(task))
    assert scores["ndcg@10"] == pytest.approx((1 / math.log2(3) + 3 / 2) / (3 + 1 / math.log2(3)))
    assert scores["mrr@10"] == 0.5


def test_a_contradiction_is_named_and_a_repetition_is_none(write):
    queries, corpus = write("q.jsonl", [{"id": "q", "text": "a"}]), write("c.jsonl", [{"id": "d", "text": "b"}])
    row = {"query_id": "q", "document_id": "d", "score": 2}
    assert load_retrieval(queries, corpus, write("r.jsonl", [row, row])).grades == {"q": {"d": 2.0}}
    with pytest.raises(
        InputError, match="row 2: query 'q' and document 'd' have the score 1 here, and 2 in a row before"
    ):
        load_retrieval(queries, corpus, write("r.jsonl", [row, {**row, "score": 1}]))


def test_a_query_whose_judgements_are_all_zero_counts_as_zero(write, caplog):
    queries = write("q.jsonl", [{"id": k, "text": f"query {k}"} for k in range(3)])
    corpus = write("c.jsonl", [{"id": f"d{k}", "text": f"document {k}"} for k in range(2)])
    rows = [{"query_id": q, "document_id": "d0", "score": score} for q, score in ((0, 1), (1, 0))]
    with caplog.at_level(logging.INFO):
        task = load_retrieval(queries, corpus, write("r.jsonl", rows))
    assert "1 queries have no document of a score above 0; each counts as 0 in every mean" in caplog.text
    assert "1 of 3 queries have no relevant document and are left out" in caplog.text
    scores = {str(q): {"d0": 1.0, "d1": 0.5} for q in range(3)}
    assert set(evaluate(Scored(task, scores), make_evaluator(task)).values()) == {0.5}


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".parquet"])
def test_titles_are_joined_as_mteb_does(write, suffix):
    rows = [
        {"id": "a", "title": "Sharpening a saw", "text": "Go slowly."},
        {"id": "b", "title": "", "text": " Rice "},
        {"id": "c", "title": " Rome ", "text": "x"},
        {"id": "d", "title": "Ice", "text": ""},
    ]
    queries = write("q.jsonl", [{"id": 1, "title": "of a query", "text": "saws"}])
    judged = write("r.jsonl", [{"query_id": 1, "document_id": "a"}])
    task = load_retrieval(queries, write(f"c{suffix}", rows), judged)
    assert task.corpus == {"a": "Sharpening a saw Go slowly.", "b": "Rice", "c": "Rome  x", "d": "Ice"}
    assert task.queries == {"1": "saws"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_title_or_a_text_of_null_is_none(write, suffix):
    rows = [{"id": "a", "title": None, "text": "b"}, {"id": "c", "title": "d", "text": None}]
    queries = write("q.jsonl", [{"id": 1, "text": "saws"}])
    judged = write("r.jsonl", [{"query_id": 1, "document_id": "a"}])
    assert load_retrieval(queries, write(f"c{suffix}", rows), judged).corpus == {"a": "b", "c": "d"}
    rows += [{"id": "e", "title": " ", "text": None}]
    with pytest.raises(InputError, match="row 3, column 'text': is empty; a text is needed there"):
        load_retrieval(queries, write(f"c{suffix}", rows), judged)
    # Titles that are all missing.
    only = [{"id": "a", "title": None, "text": "b"}]
    assert load_retrieval(queries, write(f"c{suffix}", only), judged).corpus == {"a": "b"}


@pytest.mark.parametrize("name", ["relevance", "grade", "rel"])
def test_grades_have_several_names(write, name):
    texts = {kind: write(f"{kind}.jsonl", [{"id": i, "text": f"{kind} {i}"} for i in "ab"]) for kind in ("q", "c")}
    rows = [{"query_id": "a", "document_id": "a", name: 0}, {"query_id": "a", "document_id": "b", name: 2}]
    task = load_retrieval(texts["q"], texts["c"], write("r.tsv", rows))
    assert (task.relevant, task.grades) == ({"a": {"b"}}, {"a": {"a": 0.0, "b": 2.0}})


def test_a_column_that_may_be_a_grade_is_not_passed_over_silently(write, caplog):
    texts = {kind: write(f"{kind}.jsonl", [{"id": "a", "text": kind}]) for kind in ("q", "c")}
    judged = write("r.tsv", [{"query_id": "a", "document_id": "a", "judgement": 0}])
    assert load_retrieval(texts["q"], texts["c"], judged).relevant == {"a": {"a"}}
    assert "r.tsv: columns left out: judgement; the grade is looked for under score, relevance" in caplog.text


def test_a_title_may_be_missing_in_some_rows_and_come_late(write):
    queries = write("q.jsonl", [{"id": 1, "text": "saws"}])
    judged = write("r.jsonl", [{"query_id": 1, "document_id": "a"}])
    rows = [{"id": "a", "text": "b"}, {"id": "c", "text": "d", "title": "e"}, {"id": "f", "text": "g"}]
    assert load_retrieval(queries, write("c.jsonl", rows), judged).corpus == {"a": "b", "c": "e d", "f": "g"}
    assert load_retrieval(queries, write("c.jsonl", rows[1:] + rows[:1]), judged).corpus["c"] == "e d"


BOTH = {"anchor": ["a", "b", "c", "d"], "positive": ["b", "a", "d", "c"]}


def test_in_pairs_of_both_directions_a_query_is_no_answer_to_itself(caplog):
    with caplog.at_level(logging.INFO):
        task = retrieval_from_pairs(Dataset.from_dict(BOTH))
    assert "4 of 4 queries are documents of the corpus themselves (same id); each is left out" in caplog.text
    assert task.corpus == {"q0": "a", "q1": "b", "q2": "c", "q3": "d"}
    assert task.relevant == {"q0": {"q1"}, "q1": {"q0"}, "q2": {"q3"}, "q3": {"q2"}}
    vectors = {"q0": (1, 0), "q1": (0.9, 0.1), "q2": (0, 1), "q3": (0.1, 0.9)}
    scores = {q: {d: vectors[q][0] * vectors[d][0] + vectors[q][1] * vectors[d][1] for d in vectors} for q in vectors}
    assert set(evaluate(Scored(task, scores), make_evaluator(task)).values()) == {1.0}
    # In whichever part of the corpus it lies.
    assert set(evaluate(Scored(task, scores), make_evaluator(task, corpus_chunk_size=1)).values()) == {1.0}


def test_a_document_with_the_id_of_its_query(write, caplog):
    queries = write("q.jsonl", [{"id": "1", "text": "one"}, {"id": "2", "text": "two"}, {"id": "3", "text": "three"}])
    documents = [{"id": "1", "text": "one!"}, {"id": "2", "text": "two!"}, {"id": "4", "text": "three"}]
    rows = [{"query_id": "1", "document_id": "2"}, {"query_id": "2", "document_id": "2"}]
    rows += [{"query_id": "3", "document_id": "1"}]
    with caplog.at_level(logging.INFO):
        task = load_retrieval(queries, write("c.jsonl", documents), write("r.jsonl", rows))
    # Out for query 1; in for query 2, whose answer it is; another id is another document.
    assert task.identical == {"1": "1"}
    assert "1 of 3 queries are documents of the corpus themselves" in caplog.text
    assert "1 of 3 queries have their own id among their relevant documents" in caplog.text
    assert "1 of 3 queries stand in the corpus under another id" in caplog.text
    scores = {
        "1": {"1": 0.9, "2": 0.8, "4": 0.1},
        "2": {"1": 0.1, "2": 0.9, "4": 0.8},
        "3": {"1": 0.8, "2": 0.1, "4": 0.9},
    }
    assert evaluate(Scored(task, scores), make_evaluator(task))["mrr@10"] == pytest.approx((1 + 1 + 1 / 2) / 3)


def test_predictions_of_a_small_corpus_are_json(tmp_path):
    task = retrieval_from_pairs(Dataset.from_dict(BOTH))
    scores = {f"q{q}": {f"q{d}": q / 8 + d / 4 for d in range(4)} for q in range(4)}
    make_evaluator(task, write_predictions=True)(Scored(task, scores), str(tmp_path))
    (path,) = tmp_path.glob("*_predictions_cosine.jsonl")
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in path.read_text().splitlines()]
    assert [hit["corpus_id"] for hit in rows[3]["results"]][:3] == ["q2", "q1", "q0"]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_similarities_are_computed_in_float32(half):
    """Half precision has too few numbers between 0.9 and 1 for 300 documents."""
    task = a_task(3, 300, {f"q{q}": {f"d{90 * q}"} for q in range(3)})
    vectors = torch.nn.functional.normalize(torch.randn(300, 24, generator=torch.Generator().manual_seed(5)) / 9 + 1)
    seen = []

    class Half(Scored):
        def encode_query(self, texts, **_):
            return vectors[[90 * int(text.split()[1]) + 1 for text in texts]].to(half)

        def encode_document(self, texts, **_):
            return vectors[[int(text.split()[1]) for text in texts]].to(half)

        def similarity(self, queries, documents):
            scores = queries @ documents.T
            seen.append((scores.dtype, scores.unique().numel()))
            return scores

    plain = evaluate(Half(task, {}), make_evaluator(task))
    with torch.autocast("cpu", dtype=half):
        assert evaluate(Half(task, {}), make_evaluator(task)) == plain
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert min(count for _, count in seen) > 800


def test_a_corpus_of_nothing_but_the_query_itself():
    task = Retrieval({"q": "a"}, {"q": "a"}, {"q": {"elsewhere"}})
    assert set(evaluate(Scored(task, {"q": {"q": 1.0}}), make_evaluator(task)).values()) == {0.0}


def test_a_second_model_is_measured_anew():
    task = a_task(1, 3, {"q0": {"d0"}})
    evaluator = make_evaluator(task, corpus_chunk_size=2)
    best = Scored(task, {"q0": {"d0": 0.9, "d1": 0.1, "d2": 0.2}})
    worst = Scored(task, {"q0": {"d0": 0.1, "d1": 0.9, "d2": 0.2}})
    assert evaluate(best, evaluator)["mrr@10"] == evaluate(best, evaluator)["mrr@10"] == 1.0
    assert evaluate(worst, make_evaluator(task))["mrr@10"] == pytest.approx(1 / 3)
