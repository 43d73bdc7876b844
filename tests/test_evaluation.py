"""Tasks come out of files and pairs as they are, and scores are those that can be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from gist_fast.config.schema import EvaluationConfig, SourceConfig
from gist_fast.evaluation.evaluators import (
    METRICS,
    configured_evaluator,
    evaluate,
    evaluator_names,
    load_retrieval,
    make_evaluator,
    retrieval_from_pairs,
    short_metrics,
)
from gist_fast.runtime.errors import InputError


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return {
        "queries": jsonl(tmp_path / "q.jsonl", [{"id": 1, "text": "one"}, {"id": "b", "text": "two"}]),
        "corpus": jsonl(tmp_path / "c.jsonl", [{"_id": f"d{k}", "title": "t", "text": f"doc {k}"} for k in range(4)]),
        "relevant": jsonl(
            tmp_path / "r.jsonl",
            [
                {"query-id": "1", "corpus-id": "d0", "score": 1},
                {"query-id": "1", "corpus-id": "d2", "score": 2},
                {"query-id": "1", "corpus-id": "d3", "score": 0},
            ],
        ),
    }


def test_a_task_from_files(files, caplog):
    task = load_retrieval(**files)
    assert task.queries == {"1": "one", "b": "two"}
    assert task.corpus == {f"d{k}": f"t doc {k}" for k in range(4)}
    assert task.relevant == {"1": {"d0", "d2"}}


def test_tab_separated_judgements(files, tmp_path):
    files["relevant"] = tmp_path / "r.tsv"
    files["relevant"].write_text("query_id\tdocument_id\nb\td1\n")
    assert load_retrieval(**files).relevant == {"b": {"d1"}}


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("relevant", [{"query_id": "9", "document_id": "d1"}], "row 1: query '9' is not in "),
        ("relevant", [{"query_id": 1, "document_id": "dd1"}], "(did you mean 'd1'?)"),
        (
            "relevant",
            [{"query_id": 1, "document_id": "d1", "score": "high"}],
            "row 1 (line 1), column 'score': is 'high'; a",
        ),
        ("relevant", [{"query_id": 1, "document_id": "d1", "score": 0}], "names no relevant document"),
        ("relevant", [{"query": 1, "document_id": "d1"}], "no column 'query_id' (did you mean 'query'?); it has"),
        ("queries", [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], "row 2: id '1' stands twice; ids must differ"),
        ("queries", [{"id": 1, "text": " "}], "row 1 (line 1), column 'text': is empty"),
        ("queries", [{"id": None, "text": "a"}], "column 'id': is None; a text or a whole number is needed"),
        ("corpus", [{"id": 1, "body": "a"}], "no column 'text'; it has 'id', 'body'"),
    ],
)
def test_wrong_files(files, tmp_path, name, rows, says):
    files[name] = jsonl(tmp_path / "wrong.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load_retrieval(**files)
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(files[name]))


def test_pairs_become_documents_and_their_judgements():
    task = retrieval_from_pairs(
        Dataset.from_dict({"anchor": ["q", "q", "r", "s"], "positive": ["one", "two", "one", "three"]})
    )
    assert task.queries == {"q0": "q", "q1": "r", "q2": "s"}
    assert task.corpus == {"d0": "one", "d1": "two", "d2": "three"}
    assert task.relevant == {"q0": {"d0", "d1"}, "q1": {"d0"}, "q2": {"d2"}}


class Fixed:
    """Stands in for a model: each text has an embedding, chosen by the test."""

    similarity_fn_name = "cosine"
    model_card_data = type("Card", (), {"set_evaluation_metrics": lambda *_, **__: None})()

    def __init__(self, vectors):
        self.vectors = vectors

    def encode(self, texts, **_):
        return torch.tensor([self.vectors[text] for text in texts], dtype=torch.float32)

    encode_query = encode_document = encode

    @staticmethod
    def similarity(a, b):
        return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T


def test_scores_worked_out_by_hand():
    # q finds its document first, r second (after x): reciprocal ranks 1 and 1/2.
    task = retrieval_from_pairs(Dataset.from_dict({"anchor": ["q", "r"], "positive": ["x", "y"]}))
    model = Fixed({"q": [1, 0.1], "r": [1, 0.2], "x": [1, 0], "y": [0, 1]})
    scores = evaluate(model, make_evaluator(task))
    assert scores == pytest.approx(
        {
            "ndcg@10": (1 + 1 / math.log2(3)) / 2,
            "mrr@10": 0.75,
            "accuracy@1": 0.5,
            "recall@10": 1.0,
            "map@100": 0.75,
        }
    )
    assert list(scores) == ["ndcg@10", "mrr@10", "accuracy@1", "recall@10", "map@100"]


def test_short_names_of_metrics():
    found = short_metrics({"cosine_ndcg@10": 0.5, "dot_ndcg@10": 0.6, "cosine_recall@10": 0.1, "cosine_recall@5": 0.2})
    assert found == {"ndcg@10": 0.6, "recall@10": 0.1}
    names = ("cosine_accuracy", "sts_spearman_dot", "pair_cosine_accuracy", "pair_cosine_accuracy_threshold")
    found = short_metrics({**dict(zip(names, (0.1, 0.2, 0.3, 0.4), strict=True)), "sequential_score": 0.5})
    assert found == {"triplet_accuracy": 0.1, "sts_spearman": 0.2, "pair_accuracy": 0.3}


def test_configured_evaluators(tmp_path, files, student):
    rows = [{"anchor": "a", "positive": "a", "negative": "quite another text"}]
    path = str(jsonl(tmp_path / "t.jsonl", rows))
    triplets = configured_evaluator(EvaluationConfig(triplet=SourceConfig(path)))
    assert evaluate(student, triplets) == {"triplet_accuracy": 1.0}
    pairs = configured_evaluator(EvaluationConfig(pairs=SourceConfig(path), batch_size=3))
    assert (pairs.queries, pairs.corpus, pairs.batch_size) == (["a"], ["a"], 3)
    three = configured_evaluator(EvaluationConfig(**{name: str(file) for name, file in files.items()}))
    assert three.queries == ["one"]
    jsonl(tmp_path / "p.jsonl", [{"anchor": "a", "positive": "b"}])
    with pytest.raises(InputError, match="no column 'negative'; triplets need anchor, positive and negative"):
        configured_evaluator(EvaluationConfig(triplet=SourceConfig(str(tmp_path / "p.jsonl"))))


@pytest.fixture
def scored(pairs) -> list[dict]:
    """Twenty pairs with a score and a label, which follow no order that a model could have learnt."""
    rows = pairs.select(range(20))
    return [{**row, "score": k * 7 % 5 + k / 100, "label": k * 3 % 4 // 2} for k, row in enumerate(rows)]


def similarities(model, rows, one="anchor", other="positive") -> list[float]:
    """Cosines, in float64 and without a look at any evaluator."""
    first, second = (model.encode([row[name] for row in rows]).astype("float64") for name in (one, other))
    return [float(a @ b / math.sqrt((a @ a) * (b @ b))) for a, b in zip(first, second, strict=True)]


def test_sts_is_what_scipy_finds_on_the_embeddings(tmp_path, student, scored):
    from scipy.stats import pearsonr, spearmanr

    path = str(jsonl(tmp_path / "s.jsonl", scored))
    got = evaluate(student, configured_evaluator(EvaluationConfig(sts=SourceConfig(path))))
    found, wanted = similarities(student, scored), [row["score"] for row in scored]
    assert got == pytest.approx(
        {"sts_spearman": spearmanr(wanted, found)[0], "sts_pearson": pearsonr(wanted, found)[0]}, abs=1e-6
    )
    assert abs(got["sts_spearman"] - got["sts_pearson"]) > 1e-3


def test_pair_classification_is_what_sklearn_finds_on_the_embeddings(tmp_path, student, scored):
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score

    path = str(jsonl(tmp_path / "p.jsonl", scored))
    got = evaluate(student, configured_evaluator(EvaluationConfig(pair_classification=SourceConfig(path))))
    found, labels = similarities(student, scored), [row["label"] for row in scored]
    # The threshold that does best is taken for each: try them all, and the one above all.
    tried = [[value >= threshold for value in found] for threshold in [*found, 2.0]]
    want = {
        "pair_accuracy": max(accuracy_score(labels, told) for told in tried),
        "pair_f1": max(f1_score(labels, told, zero_division=0) for told in tried),
        "pair_ap": average_precision_score(labels, found),
    }
    assert got == pytest.approx(want)
    assert len(set(want.values())) == 3


def test_triplets_are_counted_and_the_first_negative_is_taken(tmp_path, student, pairs, caplog):
    rows = [
        {**row, "negative_1": pairs["positive"][k - 1], "negative_2": row["anchor"]}
        for k, row in enumerate(pairs.select(range(20)))
    ]
    path = str(jsonl(tmp_path / "t.jsonl", rows))
    got = evaluate(student, configured_evaluator(EvaluationConfig(triplet=SourceConfig(path))))
    near, far = similarities(student, rows), similarities(student, rows, other="negative_1")
    share = sum(a > b for a, b in zip(near, far, strict=True)) / len(rows)
    assert got == pytest.approx({"triplet_accuracy": share})
    assert "left out: negative_2" in caplog.text
    assert 0 < share < 1


@pytest.mark.parametrize(
    ("primary", "name"), [(None, "cosine_ndcg@10"), ("triplet", "cosine_accuracy"), ("sts", "sts_spearman_cosine")]
)
def test_several_at_once(tmp_path, student, scored, primary, name):
    rows = [{**row, "negative": scored[k - 1]["positive"]} for k, row in enumerate(scored)]
    source = SourceConfig(str(jsonl(tmp_path / "all.jsonl", rows)))
    one_by_one = dict.fromkeys(("pairs", "triplet", "sts", "pair_classification"), source)
    evaluator = configured_evaluator(EvaluationConfig(**one_by_one, primary=primary))
    assert evaluator_names(evaluator) == (
        "InformationRetrievalEvaluator, TripletEvaluator, EmbeddingSimilarityEvaluator, BinaryClassificationEvaluator"
    )
    got = evaluate(student, evaluator)
    assert tuple(got) == METRICS
    alone: dict[str, float] = {}
    for kind in one_by_one:
        alone |= evaluate(student, configured_evaluator(EvaluationConfig(**{kind: source})))
    assert got == pytest.approx(alone)
    # What `metric_for_best_model: sequential_score` goes by.
    logged = evaluator(student)
    assert logged["sequential_score"] == logged[name]


def test_scores_are_those_of_sentence_transformers(student, pairs):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    # Every positive is distinct here, so the task can be written down without a look at the code under test.
    queries = {f"q{k}": text for k, text in enumerate(pairs["anchor"])}
    corpus = {f"d{k}": text for k, text in enumerate(pairs["positive"])}
    stock = InformationRetrievalEvaluator(queries, corpus, {f"q{k}": {f"d{k}"} for k in range(len(pairs))})
    want = stock(student)
    got = evaluate(student, make_evaluator(retrieval_from_pairs(pairs)))
    assert got == pytest.approx({name: want[f"cosine_{name}"] for name in got})
    assert len(got) == 5
