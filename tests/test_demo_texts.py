"""The demo's texts: what they are, and that what judges was never trained on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from datasets import Dataset

from gist_fast.demo.texts import (
    DemoTexts,
    build_texts,
    held_out_texts,
    normalise,
    read_entries,
    shared_texts,
)
from gist_fast.evaluation.evaluators import Retrieval

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("simple_icd_10_cm") is None, reason="the packages of gist_fast[demo] are not installed"
)


@pytest.fixture(scope="module")
def texts() -> DemoTexts:
    return build_texts()


def test_no_text_of_the_evaluation_stands_in_training(texts: DemoTexts) -> None:
    # Written out once more, by other means than the module's own check.
    held_out = set()
    for part in (texts.dev, texts.test):
        held_out |= {" ".join(t.lower().split()) for t in part.queries.values()}
        held_out |= {" ".join(t.lower().split()) for t in part.corpus.values()}
    for column in ("anchor", "positive"):
        assert not [t for t in texts.train[column] if " ".join(t.lower().split()) in held_out]
    assert shared_texts(texts.train, texts.dev, texts.test) == set()
    assert not held_out_texts(texts.dev) & set(map(normalise, texts.test.queries.values()))


def test_a_shared_text_is_found_whatever_its_case_and_spaces() -> None:
    train = Dataset.from_dict({"anchor": ["a", "Wide  SPACE"], "positive": ["b", "c"]})
    held_out = Retrieval({"q": "wide\tspace"}, {"d": "B"}, {"q": {"d"}})
    assert shared_texts(train, held_out) == {"wide space", "b"}


def test_no_category_is_in_two_parts(texts: DemoTexts) -> None:
    category = {entry.code: entry.category for entry in read_entries()}
    of_text: dict[str, set[str]] = {}
    for entry in read_entries():
        of_text.setdefault(entry.description, set()).add(entry.category)
    dev, test = ({category[code] for code in part.corpus} for part in (texts.dev, texts.test))
    assert not dev & test
    for positive in texts.train["positive"]:
        assert of_text[positive] - dev - test, f"{positive!r} belongs to held-out categories only"


def test_the_sizes_are_worth_a_demo(texts: DemoTexts) -> None:
    assert len(texts.train) > 10_000
    assert len(texts.test.queries) == 600
    assert len(texts.test.corpus) > 3_000
    assert len(set(texts.train["positive"])) < 0.7 * len(texts.train), "several terms to one code are wanted"


def test_every_query_has_its_answer_in_the_corpus(texts: DemoTexts) -> None:
    terms = {(normalise(term), normalise(e.description)) for e in read_entries() for term in e.terms}
    for part in (texts.dev, texts.test):
        assert set(part.relevant) == set(part.queries)
        for query, right in part.relevant.items():
            assert right
            for document in right:
                assert (normalise(part.queries[query]), normalise(part.corpus[document])) in terms
        assert len({normalise(text) for text in part.corpus.values()}) == len(part.corpus)


def test_entries_are_those_of_the_tabular_list() -> None:
    entries = {entry.code: entry for entry in read_entries()}
    nose = entries["S00.33"]
    assert (nose.category, nose.description, nose.terms) == (
        "S00", "Contusion of nose", ("Bruise of nose", "Hematoma of nose"),
    )  # fmt: skip
    # "Conditions classifiable to F11-F16, F18-F19" stands there too, and says nothing.
    assert not [t for e in entries.values() for t in e.terms if "F11-F16" in t]


def test_a_written_list_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "tabular.xml"
    path.write_text(
        "<t><chapter><section><diag><name>A00</name><desc>Cold</desc>"
        "<inclusionTerm><note>cold</note><note>Common\n  cold</note><note>as in B01.2</note></inclusionTerm>"
        "<diag><name>A00.1</name><desc>Bad cold</desc></diag></diag></section></chapter></t>"
    )
    got = [(e.code, e.category, e.description, e.terms) for e in read_entries(path)]
    assert got == [("A00", "A00", "Cold", ("Common cold",)), ("A00.1", "A00", "Bad cold", ())]


def test_the_seed_draws_the_pairs_and_leaves_the_judges_alone(texts: DemoTexts) -> None:
    few, again, other = (build_texts(train_pairs=300, seed=seed) for seed in (3, 3, 4))
    assert len(few.train) == 300
    assert few.train["anchor"][:] == again.train["anchor"][:]
    assert few.train["anchor"][:] != other.train["anchor"][:]
    assert few.test == other.test == texts.test
    assert few.dev == other.dev


def test_a_limited_corpus_keeps_every_answer() -> None:
    small = build_texts(train_pairs=1, test_queries=50, test_documents=80).test
    assert len(small.queries) == 50
    assert len(small.corpus) == 80
    assert set().union(*small.relevant.values()) <= set(small.corpus)
