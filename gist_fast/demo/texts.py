"""The texts of the demo: what clinicians write, and the official description that it is coded as.

Source: the tabular list of ICD-10-CM (the United States' clinical modification of the WHO's classification),
published by the National Center for Health Statistics of the CDC, a work of the federal government, as carried by
the package ``simple-icd-10-cm`` (code: MIT). Under each code stand *inclusion terms*, other wordings of the same
thing ("Bruise of nose" under "Contusion of nose"): several to one code, so a batch holds false negatives that a
guide can drop.

An anchor is an inclusion term, its positive the description of its code. The held-out parts are whole categories
(the three characters before the dot): neither their terms nor their descriptions are trained on. Wording that
two categories share word for word is taken out of the training pairs; `shared_texts` is the check.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from gist_fast.demo.models import package_file
from gist_fast.evaluation.evaluators import Retrieval

if TYPE_CHECKING:
    from datasets import Dataset

_PACKAGE = ("simple_icd_10_cm", "simple-icd-10-cm")
_SPLIT_SEED = 10  # fixed: another seed of the training is judged on the same texts
_DEV_SHARE, _TEST_SHARE = 0.04, 0.08  # of the categories
_CODE = re.compile(r"\b[A-Z]\d[0-9A-Z](\.|\b)")  # "conditions classifiable to F11-F16" is no wording of anything


@dataclass(frozen=True)
class Entry:
    """One code of the classification."""

    code: str
    category: str
    description: str
    terms: tuple[str, ...]


@dataclass(frozen=True)
class DemoTexts:
    """Pairs to train on (columns anchor, positive), texts to watch the training by, and texts to judge it by."""

    train: Dataset
    dev: Retrieval
    test: Retrieval


def normalise(text: str) -> str:
    """`text` case-folded, with every run of white space as one blank: two texts alike in this are the same text."""
    return " ".join(text.casefold().split())


def held_out_texts(*parts: Retrieval) -> set[str]:
    """Every text of held-out parts, normalised: queries and whole corpora."""
    return {normalise(text) for part in parts for text in (*part.queries.values(), *part.corpus.values())}


@lru_cache(maxsize=1)
def read_entries(path: str | os.PathLike[str] | None = None) -> tuple[Entry, ...]:
    """Every code of the tabular list, in its order. Parsed once a process."""
    root = ElementTree.parse(path or package_file(*_PACKAGE, "data/*tabular*.xml")).getroot()
    tops = root.iterfind("chapter/section/diag")
    return tuple(entry for top in tops for entry in _walk(top, (top.findtext("name") or "").strip()))


def _walk(node: ElementTree.Element, category: str) -> Iterator[Entry]:
    description = " ".join((node.findtext("desc") or "").split())
    notes = (" ".join((note.text or "").split()) for note in node.iterfind("inclusionTerm/note"))
    terms = tuple(t for t in notes if t and not _CODE.search(t) and normalise(t) != normalise(description))
    yield Entry((node.findtext("name") or "").strip(), category, description, terms)
    for child in node.iterfind("diag"):
        yield from _walk(child, category)


def build_texts(
    *,
    train_pairs: int | None = None,
    dev_queries: int = 200,
    test_queries: int = 600,
    dev_documents: int | None = 1000,
    test_documents: int | None = None,
    seed: int = 0,
) -> DemoTexts:
    """The three parts of the demo's texts.

    Args:
        train_pairs: How many pairs to train on, drawn with `seed`; None for all of them (some 11,000).
        dev_queries: How many queries the dev part has, at most. Which ones is fixed.
        test_queries: The same of the test part.
        dev_documents: At most this many documents in the dev corpus, the relevant ones always among them; None for
            the descriptions of every code of its categories.
        test_documents: The same of the test corpus.
        seed: Draws and orders the training pairs. The split does not depend on it.
    """
    from datasets import Dataset

    entries = read_entries()
    categories = sorted({entry.category for entry in entries})
    random.Random(_SPLIT_SEED).shuffle(categories)
    dev_end = round(len(categories) * _DEV_SHARE)
    test_end = dev_end + round(len(categories) * _TEST_SHARE)
    dev_categories, test_categories = set(categories[:dev_end]), set(categories[dev_end:test_end])
    dev = _retrieval((e for e in entries if e.category in dev_categories), dev_queries, dev_documents)
    test = _retrieval((e for e in entries if e.category in test_categories), test_queries, test_documents)

    held_out_categories = dev_categories | test_categories
    held_out = held_out_texts(dev, test)
    pairs = {
        (term, entry.description): None
        for entry in entries
        if entry.category not in held_out_categories and normalise(entry.description) not in held_out
        for term in entry.terms
        if normalise(term) not in held_out
    }
    drawn = list(pairs)
    random.Random(seed).shuffle(drawn)
    drawn = drawn[:train_pairs]
    train = Dataset.from_dict({"anchor": [a for a, _ in drawn], "positive": [p for _, p in drawn]})
    return DemoTexts(train, dev, test)


def _retrieval(entries: Iterable[Entry], query_limit: int, corpus_limit: int | None) -> Retrieval:
    """One held-out part. A text is one document (or query) whichever codes share it; its relevance is their union."""
    rng = random.Random(_SPLIT_SEED)
    documents: dict[str, tuple[str, str]] = {}  # normalised description -> (document id, description)
    answers: dict[str, tuple[str, set[str]]] = {}  # normalised term -> (term, ids of its documents)
    for entry in entries:
        document, _ = documents.setdefault(normalise(entry.description), (entry.code, entry.description))
        for term in entry.terms:
            answers.setdefault(normalise(term), (term, set()))[1].add(document)
    chosen = sorted(answers)
    rng.shuffle(chosen)
    chosen = sorted(chosen[:query_limit])
    queries = {f"q{number}": answers[key][0] for number, key in enumerate(chosen)}
    relevant = {f"q{number}": answers[key][1] for number, key in enumerate(chosen)}
    corpus = dict(documents.values())
    if corpus_limit is not None and len(corpus) > corpus_limit:
        needed = set().union(*relevant.values())
        others = sorted(set(corpus) - needed)
        rng.shuffle(others)
        kept = needed | set(others[: max(0, corpus_limit - len(needed))])
        corpus = {code: text for code, text in corpus.items() if code in kept}
    return Retrieval(queries, corpus, relevant)


def shared_texts(train: Dataset, *held_out: Retrieval) -> set[str]:
    """Normalised texts that stand in a column of `train` and in a held-out query or document. Must be empty."""
    columns = [name for name in train.column_names if not name.endswith("_guide_embedding")]
    trained = {normalise(text) for name in columns for text in train[name]}
    return trained & held_out_texts(*held_out)
