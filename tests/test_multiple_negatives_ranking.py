"""The drop-ins for the losses without a guide against sentence-transformers' own: values, gradients, all arguments."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from oracle import assert_close
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim

from gist_fast import losses as ours

PLAIN, CACHED = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"
SYMMETRIC = "MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")
HARDNESS = [{}, *({"hardness_mode": m, "hardness_strength": 5.0} for m in ("in_batch_negatives", "all_negatives"))]
pytestmark = pytest.mark.filterwarnings("ignore:The .*Symmetric.* is deprecated")


def directions() -> list[dict]:
    """All that can be compared, in one softmax; and in several where that is allowed."""
    found = []
    for count in range(4):
        for others in itertools.combinations(ALL[1:], count):
            found.append({"directions": ("query_to_doc", *others)})
    return [*found, {"directions": BOTH, "partition_mode": "per_direction"}]


def step(loss, columns, model):
    """Loss and gradients, dropout on."""
    features = [model.preprocess(column) for column in columns]
    model.zero_grad()
    model.train()
    torch.manual_seed(0)
    value = loss(features, None)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def texts(pairs, columns=3, rows=13):
    answers = list(pairs["positive"])
    return [list(pairs["anchor"])[:rows], *(answers[k * rows : (k + 1) * rows] for k in range(columns - 1))]


def check(name, model, columns, *arguments, **options):
    sizes = {"mini_batch_size": 5} if name.startswith("Cached") else {}
    # In the order of the rows, so that dropout draws the same numbers in both.
    order = {"sort_by_length": False} if sizes else {}
    mine = getattr(ours, name)(model, *arguments, **sizes, **order, **options)
    other = getattr(theirs, name)(model, *arguments, **sizes, **options)
    found, expected = step(mine, columns, model), step(other, columns, model)
    largest = max(x.abs().max().item() for x in expected[1:])
    # What float32 leaves open: a cosine's last place, times the scale, is the error of a logit.
    tolerance = 2e-6 + 2 * torch.finfo(torch.float32).eps * mine.scale
    assert_close(found, expected, tolerance, floor=largest)
    return mine


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("options", directions(), ids=lambda o: "+".join(o["directions"]) + o.get("partition_mode", ""))
def test_the_embeddings_gradients_in_float64(options, columns, student):
    """By every backend, for every direction and every kind of hardness, on embeddings alone."""
    generator = torch.Generator().manual_seed(columns)
    for hardness in [*HARDNESS, *([{"hardness_mode": "hard_negatives", "hardness_strength": 3.0}] * (columns > 2))]:
        leaves = [torch.randn(29, 8, generator=generator, dtype=torch.float64) for _ in range(columns)]
        results = []
        for module, more in ((theirs, {}), *((ours, {"backend": b}) for b in ("reference", "tiled", "auto"))):
            student.zero_grad()
            loss = module.CachedMultipleNegativesRankingLoss(student, 15.0, **options, **hardness, **more)
            parts = [[x.clone().requires_grad_()] for x in leaves]
            value = loss.calculate_loss(parts, []) if module is ours else loss.calculate_loss(parts)
            value.backward()
            results.append([value.detach(), *(part[0].grad for part in parts)])
        for found in results[1:]:
            assert_close(found, results[0], 1e-11, floor=1.0)


@pytest.mark.parametrize("name", [PLAIN, CACHED])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 50.0},
        {"directions": ALL},
        {"directions": BOTH, "partition_mode": "per_direction"},
        {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0, "directions": BOTH},
    ],
    ids=str,
)
def test_every_parameters_gradient(name, options, student, pairs):
    check(name, student, texts(pairs), **options)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_symmetric_ones(name, student, pairs):
    mine = check(name, student, texts(pairs, 2), 30.0)
    assert mine.directions == BOTH and mine.partition_mode == "per_direction"


@pytest.mark.parametrize("name", SYMMETRIC)
def test_what_makes_them_symmetric_is_fixed(name, student):
    with pytest.raises(TypeError, match=rf"directions: no such argument of {name}; it is fixed here, and Multiple"):
        getattr(ours, name)(student, directions=ALL)


@pytest.mark.parametrize("name", [PLAIN, CACHED])
@pytest.mark.parametrize("similarity", [dot_score, euclidean_sim], ids=lambda f: f.__name__)
def test_another_similarity_is_theirs(name, similarity, student, pairs):
    mine = check(name, student, texts(pairs), 0.5, similarity, directions=ALL)
    assert mine.get_config_dict()["similarity_fct"] == similarity.__name__
    with pytest.raises(ValueError, match=r"groups: got 'positive' with a similarity_fct other than.*Leave groups"):
        getattr(ours, name)(student, similarity_fct=similarity, groups="positive")
    assert getattr(ours, name)(student, similarity_fct=similarity, groups=None, backend="tiled").groups is None
    mine.matryoshka_dims = [8, 4]
    with pytest.raises(ValueError, match=r"matryoshka_dims: got \[8, 4\] with a similarity_fct other than cos_sim"):
        step(mine, texts(pairs), student)


@pytest.mark.parametrize("name", [PLAIN, CACHED, *SYMMETRIC])
def test_their_arguments_come_first_in_their_order_with_their_defaults(name):
    wanted = list(inspect.signature(getattr(theirs, name).__init__).parameters.values())[1:]
    found = inspect.signature(getattr(ours, name)).parameters
    assert list(found)[: len(wanted)] == [p.name for p in wanted]
    assert [found[p.name].default for p in wanted] == [p.default for p in wanted]
    assert not {"temperature", "margin", "guided", "self_guided"} & found.keys() and "groups" in found


@pytest.mark.parametrize("name", [PLAIN, CACHED])
def test_what_the_model_card_lists_is_theirs(name, student):
    for options in ({}, {"directions": ALL}, {"directions": BOTH, "partition_mode": "per_direction", "scale": 25.0}):
        mine, other = getattr(ours, name)(student, **options), getattr(theirs, name)(student, **options)
        assert mine.get_config_dict() == other.get_config_dict()
        assert mine.citation == other.citation
    assert getattr(ours, name)(student, groups="positive").get_config_dict()["groups"] == "positive"


def test_a_hardness_that_does_nothing_is_said(student, pairs, caplog):
    for options in ({"hardness_mode": "all_negatives"}, {"hardness_strength": 2.0}):
        caplog.clear()
        mine = check(PLAIN, student, texts(pairs), **options)
        assert "does nothing; give both or neither" in caplog.text
        assert (mine.hardness_mode, mine.hardness_strength) == (None, 0.0)


def test_the_scale_may_be_set(student, pairs):
    mine, other = ours.MultipleNegativesRankingLoss(student), theirs.MultipleNegativesRankingLoss(student)
    assert (mine.scale, mine.temperature) == (20.0, 0.05)
    mine.scale = other.scale = 10.0
    assert mine.temperature == 0.1
    columns = texts(pairs)
    assert_close(step(mine, columns, student)[:1], step(other, columns, student)[:1], 1e-5)
    with pytest.raises(ValueError, match=r"scale: expected a finite float above 0.*got 0"):
        mine.scale = 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.1}, r"temperature: no such argument of Multiple.*; its inverse is scale\."),
        ({"sclae": 1.0}, r"sclae: no such argument of MultipleNegativesRankingLoss \(did you mean 'scale'\?\)\."),
        ({"scale": 0.0}, r"scale: expected a finite float above 0.*got 0\.0"),
        ({"similarity_fct": "cosine"}, r"similarity_fct: expected a function of two tensors, got str\."),
        ({"directions": None}, r"directions: expected a list or tuple with 'query_to_doc' in it, got None\."),
        ({"directions": ("doc_to_query",)}, r"directions: expected 'query_to_doc' among them"),
        ({"directions": ALL, "partition_mode": "per_direction"}, r"partition_mode: expected 'joint' with"),
        ({"hardness_strength": -1.0}, r"hardness_strength: expected a finite float of at least 0, got -1\.0"),
        ({"guided": True}, r"guided: no such argument of"),
        ({"margin": 0.1}, r"margin: no such argument of .*; it is about a guide, which GISTEmbedLoss takes\."),
        ({"contrast_anchors": False}, r"contrast_anchors: no such argument of .*; directions say what is compared\."),
    ],
)
def test_what_is_refused(options, message, student):
    with pytest.raises((ValueError, TypeError), match=message):
        ours.MultipleNegativesRankingLoss(student, **options)


def test_under_matryoshka_loss(student, pairs):
    columns = texts(pairs)
    for name in (PLAIN, CACHED):
        wrapped = [
            theirs.MatryoshkaLoss(student, getattr(module, name)(student, **more), [8, 4])
            for module, more in ((ours, {"sort_by_length": False} if name == CACHED else {}), (theirs, {}))
        ]
        found, expected = (step(loss, columns, student) for loss in wrapped)
        assert_close(found, expected, 2e-5, floor=max(x.abs().max().item() for x in expected[1:]))


def test_in_sentence_transformers_trainer(student, pairs, tmp_path):
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, report_to="none", save_strategy="no", use_cpu=True
    )
    loss = ours.CachedMultipleNegativesRankingLoss(student, mini_batch_size=4, groups="anchor", backend="tiled")
    with pytest.raises(ValueError, match="groups"):
        # Its collator brings no groups, and the loss says so rather than train without.
        SentenceTransformerTrainer(student, args, pairs, loss=loss).train()
    loss = ours.CachedMultipleNegativesRankingLoss(student, mini_batch_size=4)
    trainer = SentenceTransformerTrainer(student, args, pairs, loss=loss)
    trainer.train()
    assert trainer.state.global_step == 2
    assert cos_sim is loss.similarity_fct
