"""Retrieval tasks from files or pairs, and a model's scores on them by sentence-transformers' own evaluators."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.config_schema import EvaluationConfig
from gist_fast.data import ANCHOR, POSITIVE, load_texts
from gist_fast.errors import InputError, nearest
from gist_fast.text_files import Column, read_file

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.evaluation import BaseEvaluator

logger = logging.getLogger(__name__)

RETRIEVAL_METRICS = ("ndcg@10", "mrr@10", "accuracy@1", "recall@10", "map@100")
ID_NAMES = ("id", "_id")
QUERY_ID_NAMES = ("query_id", "query-id", "qid")
DOCUMENT_ID_NAMES = ("document_id", "corpus_id", "corpus-id", "doc_id")


@dataclass(frozen=True)
class Retrieval:
    """A retrieval task: for each query, which documents of the corpus answer it."""

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]


def load_retrieval(queries: str | Path, corpus: str | Path, relevant: str | Path) -> Retrieval:
    """A task from three files of any kind that `gist_fast.data.load_texts` reads.

    Args:
        queries: columns ``id`` (or ``_id``) and ``text``.
        corpus: the same.
        relevant: columns ``query_id`` and ``document_id`` (or ``query-id`` and ``corpus-id``), a row for each relevant
            document, and perhaps ``score``: rows of score 0 are judged not relevant, and left out.

    Raises:
        InputError: a file or column is missing, an id stands twice, or a row names an id that is not there.
    """
    texts = {path: _texts_by_id(Path(path)) for path in (queries, corpus)}
    path = Path(relevant)
    table = read_file(path, lambda names: _relevant_columns(names, path))
    scores = table["score"].to_pylist() if "score" in table.column_names else ["1"] * table.num_rows
    found: dict[str, set[str]] = {}
    rows = zip(table["query"].to_pylist(), table["document"].to_pylist(), scores, strict=True)
    for row, (query, document, score) in enumerate(rows, 1):
        for kind, identity, source in (("query", query, queries), ("document", document, corpus)):
            if identity not in texts[source]:
                near = nearest(identity, list(texts[source])[:5000])
                raise InputError(f"{path}: row {row}: {kind} {identity!r} is not in {source}{near}.")
        if _is_relevant(score, path, row):
            found.setdefault(query, set()).add(document)
    if not found:
        raise InputError(f"{path}: names no relevant document; at least one row of a score above 0 is needed.")
    without = len(texts[queries]) - len(found)
    if without:
        logger.info(
            "%s: %d of %d queries have no relevant document and are left out", queries, without, len(texts[queries])
        )
    return Retrieval(texts[queries], texts[corpus], found)


def retrieval_from_pairs(dataset: Dataset) -> Retrieval:
    """A task from pairs: the distinct positives are the corpus, and each anchor's own positives are relevant to it.

    The same text is one document (or query) wherever it stands, so that an anchor with several positives has several
    relevant documents.
    """
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    relevant: dict[str, set[str]] = {}
    for anchor, positive in zip(dataset[ANCHOR], dataset[POSITIVE], strict=True):
        query = queries.setdefault(anchor, f"q{len(queries)}")
        document = corpus.setdefault(positive, f"d{len(corpus)}")
        relevant.setdefault(query, set()).add(document)
    return Retrieval(
        {key: text for text, key in queries.items()}, {key: text for text, key in corpus.items()}, relevant
    )


def make_evaluator(
    task: Retrieval,
    *,
    batch_size: int = 64,
    query_prompt: str | None = None,
    corpus_prompt: str | None = None,
    show_progress_bar: bool = False,
) -> BaseEvaluator:
    """sentence-transformers' evaluator of a task, with the metrics of `RETRIEVAL_METRICS`."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    return InformationRetrievalEvaluator(
        dict(task.queries),
        dict(task.corpus),
        task.relevant,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        map_at_k=[100],
        batch_size=batch_size,
        query_prompt=query_prompt,
        corpus_prompt=corpus_prompt,
        show_progress_bar=show_progress_bar,
    )


def configured_evaluator(config: EvaluationConfig) -> BaseEvaluator:
    """The evaluator that the section ``evaluation`` of a configuration asks for."""
    if config.triplet is not None:
        return _triplet_evaluator(config)
    if config.pairs is not None:
        pairs = config.pairs
        task = retrieval_from_pairs(load_texts(pairs.path, split=pairs.split, columns=pairs.columns, name=pairs.name))
    else:
        # That all three are given was checked where the configuration was read.
        task = load_retrieval(config.queries or "", config.corpus or "", config.relevant or "")
    return make_evaluator(task, batch_size=config.batch_size)


def evaluate(model: SentenceTransformer, evaluator: BaseEvaluator) -> dict[str, float]:
    """The model's scores, under their short names: ``ndcg@10``, or ``accuracy`` for triplets."""
    results = evaluator(model)
    return short_metrics(results if isinstance(results, dict) else {"accuracy": results})


def short_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Scores under their short names, without the name of the similarity function; the best one's, were there two."""
    scores: dict[str, float] = {}
    for name, value in results.items():
        short = name.rpartition("_")[2]
        if short in (*RETRIEVAL_METRICS, "accuracy"):
            scores[short] = max(float(value), scores.get(short, float("-inf")))
    return {name: scores[name] for name in (*RETRIEVAL_METRICS, "accuracy") if name in scores}


def _triplet_evaluator(config: EvaluationConfig) -> BaseEvaluator:
    from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator

    source = config.triplet
    assert source is not None
    dataset = load_texts(source.path, split=source.split, columns=source.columns, name=source.name)
    negative = next((c for c in ("negative", "negative_1") if c in dataset.column_names), None)
    if negative is None:
        raise InputError(f"{source.path}: no column 'negative'; triplets need anchor, positive and negative.")
    return TripletEvaluator(
        list(dataset[ANCHOR]), list(dataset[POSITIVE]), list(dataset[negative]), batch_size=config.batch_size
    )


def _texts_by_id(path: Path) -> dict[str, str]:
    table = read_file(
        path,
        lambda names: [
            Column(_one_of(ID_NAMES, names, path), "id", "id"),
            Column(_one_of(("text",), names, path), "text"),
        ],
    )
    identities = table["id"].to_pylist()
    texts = dict(zip(identities, table["text"].to_pylist(), strict=True))
    if len(texts) < len(identities):
        seen: set[str] = set()
        for row, identity in enumerate(identities, 1):
            if identity in seen:
                raise InputError(f"{path}: row {row}: id {identity!r} stands twice; ids must differ.")
            seen.add(identity)
    return texts


def _relevant_columns(names: list[str], path: Path) -> list[Column]:
    columns = [
        Column(_one_of(QUERY_ID_NAMES, names, path), "query", "id"),
        Column(_one_of(DOCUMENT_ID_NAMES, names, path), "document", "id"),
    ]
    return [*columns, Column("score", "score", "id")] if "score" in names else columns


def _one_of(wanted: Sequence[str], names: list[str], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise InputError(
        f"{path}: no column {wanted[0]!r}{nearest(wanted[0], names)}; it has {', '.join(map(repr, names)) or 'none'}."
    )


def _is_relevant(score: str, path: Path, row: int) -> bool:
    try:
        return float(score) > 0
    except ValueError as error:
        raise InputError(f"{path}: row {row}: score {score!r} is no number.") from error
