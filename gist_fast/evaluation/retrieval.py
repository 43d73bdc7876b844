"""Retrieval tasks: queries, documents, and which of the documents answer which query."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gist_fast.data.column_checks import Column, no_column, wrong_value
from gist_fast.data.names import ANCHOR, POSITIVE
from gist_fast.data.text_files import read_file
from gist_fast.runtime.errors import InputError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ID_NAMES = ("id", "_id")
QUERY_ID_NAMES = ("query_id", "query-id", "qid")
SCORE_NAMES = ("score", "relevance", "grade", "rel")
DOCUMENT_ID_NAMES = ("document_id", "corpus_id", "corpus-id", "doc_id")


@dataclass(frozen=True)
class Retrieval:
    """A retrieval task: for each query, which documents of the corpus answer it.

    Example:
        >>> from gist_fast.evaluation import evaluate, make_evaluator
        >>> task = Retrieval({"q1": "what falls"}, {"d1": "rain", "d2": "rivers"}, {"q1": {"d1"}})
        >>> list(evaluate(student, make_evaluator(task)))
        ['ndcg@10', 'mrr@10', 'accuracy@1', 'recall@10', 'map@100']
    """

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]
    """By query, the ids of the relevant documents; or a mapping of ids to grades, relevant if above 0."""
    grades: dict[str, dict[str, float]] = field(default_factory=dict)
    """By query and document, how relevant it is, which counts for nDCG; 1 for a relevant one that is missing here."""

    def __post_init__(self) -> None:
        graded = {query: dict(of) for query, of in self.relevant.items() if isinstance(of, Mapping)}
        above = {query: {document for document, grade in of.items() if grade > 0} for query, of in graded.items()}
        found = {query: documents for query, documents in {**self.relevant, **above}.items() if documents}
        object.__setattr__(self, "grades", {**self.grades, **graded})
        object.__setattr__(self, "relevant", found)

    @property
    def asked(self) -> list[str]:
        """The queries that were judged, in their order. The others are left out."""
        return [query for query in self.queries if query in self.relevant or query in self.grades]

    @property
    def identical(self) -> dict[str, str]:
        """By query, the document that is the query itself: it has the query's id, and is not relevant to it.

        It stays out of that query's ranking, as in BEIR. A relevant one stays in: its id is then a mere coincidence.
        """
        return {
            query: query for query in self.asked if query in self.corpus and query not in self.relevant.get(query, ())
        }


def load_retrieval(queries: str | Path, corpus: str | Path, relevant: str | Path) -> Retrieval:
    """A task from three files of any kind that `gist_fast.data.load_texts` reads.

    Args:
        queries: columns ``id`` (or ``_id``) and ``text``.
        corpus: the same, and perhaps ``title``, which is put before the text, as BEIR and mteb do.
        relevant: columns ``query_id`` and ``document_id`` (or ``query-id`` and ``corpus-id``), a row for each document
            that was judged, and perhaps ``score`` (or ``relevance``, ``grade``, ``rel``), its
            grade: relevant if above 0; without that column, 1.

    Raises:
        InputError: a file or column is missing, an id stands twice, a row names an id that is not there, or a pair is
            judged twice, differently.
    """
    texts = {"query": _texts_by_id(Path(queries)), "document": _texts_by_id(Path(corpus), titled=True)}
    path = Path(relevant)
    grades = _grades(path, texts, {"query": queries, "document": corpus})
    task = Retrieval(texts["query"], texts["document"], grades)  # type: ignore[arg-type]
    if not task.relevant:
        raise InputError(f"{path}: names no relevant document; at least one row of a score above 0 is needed.")
    if without := len(task.queries) - len(task.asked):
        told = "%s: %d of %d queries have no relevant document and are left out"
        logger.info(told, queries, without, len(task.queries))
    if unanswered := len(task.asked) - len(task.relevant):
        told = "%s: %d queries have no document of a score above 0; each counts as 0 in every mean, as in trec_eval"
        logger.warning(told, path, unanswered)
    _tell_identical(task)
    return task


def retrieval_from_pairs(dataset: Dataset) -> Retrieval:
    """A task from pairs: the distinct positives are the corpus, and each anchor's own positives are relevant to it.

    The same text is one document (or query) wherever it stands, so that an anchor with several positives has several
    relevant documents. A document that is an anchor too has that query's id, see `Retrieval.identical`.
    """
    anchors, positives = list(dataset[ANCHOR]), list(dataset[POSITIVE])
    queries = {text: f"q{place}" for place, text in enumerate(dict.fromkeys(anchors))}
    corpus: dict[str, str] = {}
    relevant: dict[str, set[str]] = {}
    for anchor, positive in zip(anchors, positives, strict=True):
        document = corpus.setdefault(positive, queries.get(positive, f"d{len(corpus)}"))
        relevant.setdefault(queries[anchor], set()).add(document)
    texts, documents = ({key: text for text, key in keys.items()} for keys in (queries, corpus))
    task = Retrieval(texts, documents, relevant)
    _tell_identical(task)
    return task


def _tell_identical(task: Retrieval) -> None:
    """Say which documents stay out of a ranking, and which texts of queries stay in as documents."""
    if left_out := len(task.identical):
        told = "%d of %d queries are documents of the corpus themselves (same id); each is left out of its own ranking"
        logger.info(told, left_out, len(task.asked))
    if kept := sum(query in documents for query, documents in task.relevant.items()):
        told = "%d of %d queries have their own id among their relevant documents; these stay in the ranking"
        logger.info(told, kept, len(task.asked))
    asked = {text: set[str]() for text in task.queries.values()}
    for document, text in task.corpus.items():
        if text in asked:
            asked[text].add(document)
    if others := sum(bool(asked[task.queries[q]] - {q} - task.relevant.get(q, set())) for q in task.asked):
        told = "%d of %d queries stand in the corpus under another id; there they are documents like any other"
        logger.warning(told, others, len(task.asked))


def _grades(
    path: Path, texts: Mapping[str, Mapping[str, str]], sources: Mapping[str, str | Path]
) -> dict[str, dict[str, float]]:
    """The grades in a file of judgements, by query and document."""
    table = read_file(path, lambda names: _relevant_columns(names, path))
    scores = table["score"].to_pylist() if "score" in table.column_names else [1.0] * table.num_rows
    grades: dict[str, dict[str, float]] = {}
    rows = zip(table["query"].to_pylist(), table["document"].to_pylist(), scores, strict=True)
    for row, (query, document, score) in enumerate(rows, 1):
        for kind, identity in (("query", query), ("document", document)):
            if identity not in texts[kind]:
                near = nearest(identity, list(texts[kind])[:5000])
                raise InputError(
                    f"{path}: row {row}: {kind} {identity!r} is not in {sources[kind]}{near}; add it there, or leave "
                    "that row out."
                )
        before = grades.setdefault(query, {}).setdefault(document, score)
        if before != score:
            raise InputError(
                f"{path}: row {row}: query {query!r} and document {document!r} have the score {score:g} here, and "
                f"{before:g} in a row before; keep one."
            )
    return grades


def _texts_by_id(path: Path, *, titled: bool = False) -> dict[str, str]:
    """The texts of a file by their ids, each after its title where `titled` and the file has titles."""

    def choose(names: list[str]) -> list[Column]:
        identity = Column(_one_of(ID_NAMES, names, path), "id", "id")
        text = _one_of(("text",), names, path)
        if not titled:
            return [identity, Column(text, "text")]
        return [identity, Column(text, "text", "text or nothing"), Column("title", "title", "text or nothing")]

    table = read_file(path, choose)
    texts: dict[str, str] = {}
    for row, (identity, text, *title) in enumerate(zip(*table.to_pydict().values(), strict=True), 1):
        if identity in texts:
            raise InputError(f"{path}: row {row}: id {identity!r} stands twice; ids must differ.")
        texts[identity] = " ".join([*title, text]).strip() if titled else text
        if not texts[identity]:
            raise wrong_value(f"{path}: row {row}", Column("text", "text"), text)
    return texts


def _relevant_columns(names: list[str], path: Path) -> list[Column]:
    columns = [
        Column(_one_of(QUERY_ID_NAMES, names, path), "query", "id"),
        Column(_one_of(DOCUMENT_ID_NAMES, names, path), "document", "id"),
    ]
    score = [Column(name, "score", "number") for name in SCORE_NAMES if name in names][:1]
    chosen = [column.source for column in (*columns, *score)]
    if left := [name for name in names if name not in chosen]:
        graded = "" if score else f"; the grade is looked for under {', '.join(SCORE_NAMES)}, and counts as 1 here"
        logger.warning("%s: columns left out: %s%s", path, ", ".join(left), graded)
    return [*columns, *score]


def _one_of(wanted: Sequence[str], names: list[str], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise no_column(path, repr(wanted[0]), wanted[0], names)
