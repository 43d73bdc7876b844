"""The drop-in losses against sentence-transformers' own, in loss and in every parameter's gradient."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as theirs

from gist_fast import losses as ours
from gist_fast.losses.guide import EMBEDDING, TOKENS

PLAIN, CACHED = "GISTEmbedLoss", "CachedGISTEmbedLoss"
both = pytest.mark.parametrize("name", [PLAIN, CACHED])
SIZES = {PLAIN: {}, CACHED: {"mini_batch_size": 5}}


def make(module, name, model, guide, **kwargs):
    # In the order of the rows, so that dropout draws the same numbers in both.
    order = {"sort_by_length": False} if module is ours and name == CACHED else {}
    return getattr(module, name)(model, guide, **SIZES[name], **{**order, **kwargs})


def batch(model, pairs, rows=16, negatives=0):
    columns = [list(pairs["anchor"])[:rows], list(pairs["positive"])[:rows]]
    columns += [list(pairs["positive"])[rows * (k + 1) : rows * (k + 2)] for k in range(negatives)]
    return [model.preprocess(column) for column in columns]


def result(loss, features, model, seed=0):
    """Loss and gradients, dropout on."""
    model.zero_grad()
    model.train()
    torch.manual_seed(seed)
    value = loss(features, None)
    value.backward()
    return value.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rounding(temperature=0.01):
    """What float32 leaves open: a cosine's last place, divided by the temperature, is the error of a logit."""
    return 2e-6 + 2 * torch.finfo(torch.float32).eps / temperature


def assert_same(first, second, tolerance=None):
    tolerance = rounding() if tolerance is None else tolerance
    assert first[0] == pytest.approx(second[0], rel=tolerance, abs=tolerance / 10)
    assert first[1].keys() == second[1].keys()
    largest = max(g.abs().max().item() for g in second[1].values())
    for name, gradient in second[1].items():
        # Some gradients vanish by symmetry (a key's bias), so the scale is that of the largest one.
        error = (first[1][name] - gradient).abs().max().item()
        assert error <= tolerance * largest, f"{name}: error {error}, largest gradient {largest}"


OPTIONS = [
    {},
    {"temperature": 0.05, "margin": 0.1},
    {"temperature": 0.05, "margin": 0.1, "margin_strategy": "relative"},
    {"contrast_anchors": False},
    {"contrast_positives": False, "temperature": 0.2},
]


@both
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_same_loss_and_gradients(name, options, negatives, backend, student, guide, pairs):
    mine = make(ours, name, student, guide, backend=backend, **options)
    other = make(theirs, name, student, guide, **options)
    assert_same(
        result(mine, batch(student, pairs, negatives=negatives), student),
        result(other, batch(student, pairs, negatives=negatives), student),
        rounding(options.get("temperature", 0.01)),
    )


@both
@pytest.mark.parametrize("negatives", [0, 1])
def test_without_a_guide_anchors_and_positives_alone_are_the_plain_softmax(name, negatives, student, pairs):
    plain = {"guided": False, "contrast_anchors": False, "contrast_positives": False}
    mine = make(ours, name, student, None, temperature=0.05, **plain)
    other = theirs.MultipleNegativesRankingLoss(student, scale=20.0)
    for layer in student.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # mini-batches draw others than a whole batch at once
    found = [result(loss, batch(student, pairs, negatives=negatives), student) for loss in (mine, other)]
    assert_same(*found, rounding(0.05))


def test_positional_arguments_are_in_the_same_order(student, guide, pairs):
    values = (0.07, "relative", 0.15, False, True, False)
    mine, other = ours.GISTEmbedLoss(student, guide, *values), theirs.GISTEmbedLoss(student, guide, *values)
    assert_same(*(result(loss, batch(student, pairs), student) for loss in (mine, other)))
    values = (0.07, 7, 40, False, "relative", 0.15, False, True, False)
    mine = ours.CachedGISTEmbedLoss(student, guide, *values, sort_by_length=False)
    other = theirs.CachedGISTEmbedLoss(student, guide, *values)
    assert_same(*(result(loss, batch(student, pairs), student) for loss in (mine, other)))


@both
def test_a_guide_with_the_students_vocabulary_reads_its_tokens(name, student, tiny_student, pairs):
    guide = SentenceTransformer(str(tiny_student), device="cpu")
    mine, other = (make(m, name, student, guide, temperature=0.1) for m in (ours, theirs))
    assert not mine._encoder.must_retokenize
    assert_same(*(result(loss, batch(student, pairs), student) for loss in (mine, other)))


@both
def test_the_guide_may_be_the_student(name, student, pairs):
    # There the student drops a row's pair with itself by the guide's self-similarity; here it never counts. The two
    # agree while the self-similarity exceeds the threshold, as it does unless anchor and positive are one text.
    options = {"temperature": 0.1, "margin": 0.05}
    mine, other = (make(m, name, student, student, **options) for m in (ours, theirs))
    assert mine.guide is student
    if name == PLAIN:  # the cached one there draws the guide's dropout in another order
        assert_same(*(result(loss, batch(student, pairs), student) for loss in (mine, other)))
    assert student.training


@both
def test_evaluation_returns_the_plain_loss(name, student, guide, pairs):
    student.eval()
    mine, other = (make(m, name, student, guide) for m in (ours, theirs))
    with torch.no_grad():
        first, second = mine(batch(student, pairs), None), other(batch(student, pairs), None)
    assert not first.requires_grad
    assert first.item() == pytest.approx(second.item(), rel=rounding(), abs=1e-6)


@both
def test_matryoshka_around_it(name, student, guide, pairs):
    results, calls = [], []
    for module in (ours, theirs):
        inner = make(module, name, student, guide, temperature=0.1)
        counted = []
        forward = guide.forward
        guide.forward = lambda *a, _f=forward, _c=counted, **k: (_c.append(1), _f(*a, **k))[1]
        loss = theirs.MatryoshkaLoss(student, inner, [32, 16, 8], [1.0, 0.5, 0.25])
        results.append(result(loss, batch(student, pairs), student))
        guide.forward = forward
        calls.append(len(counted))
    assert_same(*results)
    columns = 2
    assert calls[0] == columns  # each text once
    assert calls[0] <= calls[1]


@both
@pytest.mark.parametrize("own_tokens", [False, True])
def test_matryoshka_around_it_when_the_guide_is_the_student(name, own_tokens, student, pairs):
    results = []
    student.eval()  # the two draw the guide's dropout in different orders
    for module in (ours, theirs):
        inner = make(module, name, student, student, temperature=0.1)
        loss = theirs.MatryoshkaLoss(student, inner, [32, 8])
        features = batch(student, pairs)
        if own_tokens and module is ours:
            for f in features:
                f[TOKENS] = dict(f)
        with torch.no_grad():
            results.append(loss(features, None).item())
    assert results[0] == pytest.approx(results[1], rel=rounding(0.1))


def test_a_guide_that_is_the_student_is_asked_again_after_a_step(student, pairs):
    student.eval()
    loss = ours.GISTEmbedLoss(student, student, temperature=0.1, margin=0.05)
    features = batch(student, pairs)
    loss(features, None)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert loss(features, None).item() == loss(batch(student, pairs), None).item()


def test_caching_refuses_a_learnable_temperature(student, guide):
    learned = torch.tensor(0.1, requires_grad=True)
    ours.GISTEmbedLoss(student, guide, temperature=learned)
    with pytest.raises(ValueError, match="temperature: expected a float, got a tensor that requires a gradient, which"):
        ours.CachedGISTEmbedLoss(student, guide, temperature=learned)


def test_statistics_of_batches_with_different_blocks(student, guide, pairs):
    loss = ours.GISTEmbedLoss(student, guide, temperature=0.1)
    result(loss, batch(student, pairs, negatives=1), student)
    expected = loss.statistics.pop()["masked_an_1"]
    assert expected > 0
    result(loss, batch(student, pairs, negatives=1), student)
    result(loss, batch(student, pairs), student)
    assert loss.statistics.pop()["masked_an_1"] == pytest.approx(expected, rel=0.2)


def test_any_number_of_negatives(student, guide, pairs):
    mine = ours.GISTEmbedLoss(student, guide, temperature=0.1)
    other = theirs.CachedGISTEmbedLoss(student, guide, temperature=0.1, mini_batch_size=64)
    student.eval()
    features = [batch(student, pairs, rows=12, negatives=3) for _ in range(2)]
    with torch.no_grad():
        assert mine(features[0], None).item() == pytest.approx(other(features[1], None).item(), rel=rounding(0.1))


@both
def test_the_guide_is_no_child_of_the_loss(name, student, guide):
    loss = make(ours, name, student, guide)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in student.parameters()}
    assert all("guide" not in key for key in loss.state_dict())
    assert loss.guide is guide
    loss.to(torch.float64)
    assert next(guide.parameters()).dtype == torch.float64
    assert copy.deepcopy(loss).guide is not guide


@both
def test_the_trainers_way_of_replacing_models_spares_the_guide(name, student, guide, pairs, tmp_path):
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    inner = make(ours, name, student, guide)
    wrapper = theirs.MatryoshkaLoss(student, inner, [32, 16])
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), report_to=[])
    trainer = SentenceTransformerTrainer(student, arguments, pairs, loss=wrapper)
    replacement = copy.deepcopy(student)
    trainer.override_model_in_loss(wrapper, replacement)
    assert wrapper.model is replacement
    assert inner.model is replacement
    assert inner.guide is guide


def test_a_guide_in_training_mode_is_put_right_with_a_warning(student, guide, pairs, caplog):
    guide.train()
    loss = ours.GISTEmbedLoss(student, guide)
    with caplog.at_level(logging.WARNING, "gist_fast"):
        values = {loss(batch(student.eval(), pairs), None).item() for _ in range(3)}
    assert len(values) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "The guide was in training mode, so its dropout made the masks random: now it is in eval mode."
    ]


@both
def test_embeddings_that_come_with_the_features_are_used(name, student, guide, pairs):
    features, again = batch(student, pairs), batch(student, pairs)
    texts = [list(pairs[c])[:16] for c in ("anchor", "positive")]
    for column, f in zip(texts, again, strict=True):
        f[EMBEDDING] = guide.encode(column, convert_to_tensor=True)
    own = batch(student, pairs)
    for column, f in zip(texts, own, strict=True):
        f[TOKENS] = guide.preprocess(column)
    expected = result(make(ours, name, student, guide), own, student)
    without = result(make(ours, name, student, None), again, student)
    assert_same(without, expected)
    # The student's decoded tokens are other texts to this guide: its vocabulary knows other words.
    decoded = result(make(ours, name, student, guide), features, student)
    assert decoded[0] != pytest.approx(expected[0], rel=1e-6)


@both
def test_without_a_guide_it_must_be_said(name, student, pairs):
    with pytest.raises(ValueError, match=r"guide: none was given, and column\(s\) 0, 1 .* guided=False"):
        make(ours, name, student, None)(batch(student, pairs), None)
    value, _ = result(make(ours, name, student, None, guided=False), batch(student, pairs), student)
    assert value > 0


@both
def test_wrong_arguments(name, student, guide):
    for change, message in [
        ({"temperature": 0.0}, r"temperature: expected a finite float above 0, got 0\.0\."),
        ({"margin_strategy": "none"}, "margin_strategy: expected 'absolute' or 'relative', got 'none'"),
        ({"margin": "0.1"}, "margin: expected a finite float, got '0.1'"),
        ({"backend": "gpu"}, "backend: expected 'auto', 'triton', 'tiled' or 'reference', got 'gpu'"),
        ({"guided": False}, "guided: expected True with a guide, got False"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            make(ours, name, student, guide, **change)
    with pytest.raises(ValueError, match="mini_batch_size: expected an int of at least 1, got 0"):
        ours.CachedGISTEmbedLoss(student, guide, mini_batch_size=0)
    with pytest.raises(ValueError, match=r"the dataset gives 1 text column"):
        make(ours, name, student, guide)([student.preprocess(["alone"])], None)


@both
def test_statistics_are_averaged_over_training_batches(name, student, guide, pairs):
    loss = make(ours, name, student, guide, temperature=0.1)
    assert loss.statistics.pop() == {}
    result(loss, batch(student, pairs), student)
    once = loss.statistics.pop()
    assert set(once) == {
        "masked_ap", "masked_aa", "masked_pp", "positive_similarity", "hardest_negative_similarity",
    }  # fmt: skip
    assert 0 < once["masked_pp"] < 1
    for _ in range(2):
        result(loss, batch(student, pairs), student)
    assert loss.statistics.pop() == pytest.approx(once, rel=0.2)
    with torch.no_grad():
        loss(batch(student, pairs), None)
    assert loss.statistics.pop() == {}


@both
def test_config_is_what_the_model_card_lists(name, student, guide):
    mine, other = (make(m, name, student, guide, margin=0.1) for m in (ours, theirs))
    assert mine.get_config_dict() == other.get_config_dict()
    assert "2402.16829" in mine.citation


@both
def test_the_student_never_sees_the_guides_tokens(name, student, guide, pairs):
    features = batch(student, pairs, negatives=1)
    for f in features:
        f[TOKENS] = guide.preprocess(["a text"] * 16)
    seen = []
    forward = student.forward
    student.forward = lambda f, **kw: (seen.append(set(f)), forward(f, **kw))[1]
    make(ours, name, student, guide)(features, None)
    assert seen
    assert not any(TOKENS in keys for keys in seen)
