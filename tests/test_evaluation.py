"""Tasks come out of files and pairs as they are, and scores are those that can be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from gist_fast.config_schema import EvaluationConfig, SourceConfig
from gist_fast.errors import InputError
from gist_fast.evaluation import (
    configured_evaluator,
    evaluate,
    load_retrieval,
    make_evaluator,
    retrieval_from_pairs,
    short_metrics,
)


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
    assert task.corpus == {f"d{k}": f"doc {k}" for k in range(4)}
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
        ("relevant", [{"query_id": 1, "document_id": "d1", "score": "high"}], "row 1: score 'high' is no number"),
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


def test_configured_evaluators(tmp_path, files, student):
    rows = [{"anchor": "a", "positive": "a", "negative": "quite another text"}]
    path = str(jsonl(tmp_path / "t.jsonl", rows))
    triplets = configured_evaluator(EvaluationConfig(triplet=SourceConfig(path)))
    assert evaluate(student, triplets) == {"accuracy": 1.0}
    pairs = configured_evaluator(EvaluationConfig(pairs=SourceConfig(path), batch_size=3))
    assert (pairs.queries, pairs.corpus, pairs.batch_size) == (["a"], ["a"], 3)
    three = configured_evaluator(EvaluationConfig(**{name: str(file) for name, file in files.items()}))
    assert three.queries == ["one"]
    jsonl(tmp_path / "p.jsonl", [{"anchor": "a", "positive": "b"}])
    with pytest.raises(InputError, match="no column 'negative'; triplets need anchor, positive and negative"):
        configured_evaluator(EvaluationConfig(triplet=SourceConfig(str(tmp_path / "p.jsonl"))))


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
