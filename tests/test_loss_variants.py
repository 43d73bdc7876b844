"""The variants in the losses, the trainer and the configuration: what they are given reaches the function."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as theirs

from gist_fast import GISTTrainer, GISTTrainingArguments, guided_contrastive_loss
from gist_fast.data.load import load_texts, stream_texts
from gist_fast.data.names import GROUP, MARGIN
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from gist_fast.losses.guide import EMBEDDING
from gist_fast.training.collator import GISTDataCollator
from gist_fast.training.temperature_schedule import scheduled

BOTH = [GISTEmbedLoss, CachedGISTEmbedLoss]
both = pytest.mark.parametrize("kind", BOTH)


def columns(model, pairs, rows=12):
    return [model.preprocess(list(pairs[name])[:rows]) for name in ("anchor", "positive")]


def embeddings(model, features):
    return [model(dict(f))["sentence_embedding"] for f in features]


def guided_columns(model, guide, pairs):
    """As a dataset with a guide's embeddings gives them."""
    features = columns(model, pairs)
    with torch.no_grad():
        for f, embedding in zip(features, embeddings(guide, columns(guide, pairs)), strict=True):
            f[EMBEDDING] = embedding
    return features


GROUPS = torch.arange(12) // 2
OPTIONS = {
    "self-guided": ({"self_guided": True, "margin": -0.1}, {}),
    "ties": ({"mask_ties": True}, {}),
    "hard": ({"hard": True}, {}),
    "hardness": ({"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0}, {}),
    "triplet": ({"triplet_margin": 0.4}, {}),
    "ladder": ({"matryoshka_dims": [8, 16], "matryoshka_weights": [0.5, 1.0]}, {}),
    "groups": ({"groups": "column"}, {GROUP: GROUPS}),
    "margins": ({"row_margins": True, "margin": 0.02}, {MARGIN: torch.linspace(-0.1, 0.1, 12)}),
}


@both
@pytest.mark.parametrize("name", OPTIONS)
def test_a_variant_is_that_of_the_function(kind, name, student, guide, pairs):
    options, rows = OPTIONS[name]
    student.eval()
    alone = options.get("self_guided", False)
    loss = kind(student, None, temperature=0.1, **options)
    features = columns(student, pairs) if alone else guided_columns(student, guide, pairs)
    features[0].update(rows)
    for _ in range(2):  # a decorator may call again with the same features
        student.zero_grad()
        found = loss(features, None)
        found.backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    assert set(rows) <= set(features[0])

    a, p = embeddings(student, columns(student, pairs))
    ga, gp = (a, p) if alone else (f[EMBEDDING] for f in features)
    arguments = {k: v for k, v in options.items() if k not in ("self_guided", "row_margins", "groups", "margin")}
    margin = options.get("margin", 0.0) + rows.get(MARGIN, 0.0)
    expected = guided_contrastive_loss(
        a, p, ga, gp, temperature=0.1, margin=margin, groups=rows.get(GROUP), backend="reference", **arguments
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    student.zero_grad()
    expected.backward()
    largest = max(p.grad.abs().max() for p in student.parameters() if p.grad is not None)
    for ours, p in zip(gradients, [p for p in student.parameters() if p.grad is not None], strict=True):
        assert (ours - p.grad).abs().max() < 1e-4 * largest


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_a_learnt_temperature_s_gradient_is_the_same_cached_and_not(student, guide, pairs, scale):
    student.eval()
    found = []
    for kind in BOTH:
        loss = kind(student, None, temperature=0.1, learn_temperature=True)
        for _ in range(2):  # gradients add up
            (loss(guided_columns(student, guide, pairs), None) * scale).backward()
        found.append(loss.log_temperature.grad.item())
    # d loss / d log T = T * d loss / d T
    temperature = torch.tensor(0.1, requires_grad=True)
    with torch.no_grad():
        a, p = embeddings(student, columns(student, pairs))
    ga, gp = (f[EMBEDDING] for f in guided_columns(student, guide, pairs))
    value = guided_contrastive_loss(a, p, ga, gp, temperature=temperature, backend="reference")
    (by_temperature,) = torch.autograd.grad(value, [temperature])
    expected = 2 * scale * 0.1 * by_temperature.item()
    assert abs(expected) > 1e-3
    assert found == pytest.approx([expected, expected], rel=1e-4)


def test_a_learnt_temperature_stays_within_its_bounds_and_comes_back(student, guide):
    loss = GISTEmbedLoss(student, guide, temperature=0.1, learn_temperature=True, temperature_min=0.05)
    with torch.no_grad():
        loss.log_temperature.fill_(math.log(0.001))
    temperature = loss.temperature
    assert temperature.item() == pytest.approx(0.05)
    temperature.backward()
    assert loss.log_temperature.grad.item() == pytest.approx(0.05)
    assert loss.get_config_dict()["temperature"] == 0.1


REFUSED = {
    "a margin without a guide": (
        {"guided": False, "margin": 0.1},
        r"margin: expected 0\.0 without a guide,.* got 0\.1",
    ),
    "hard and self-guided": ({"self_guided": True, "hard": True}, "hard: expected False with self_guided, got True"),
    "self-guided and unguided": (
        {"self_guided": True, "guided": False},
        r"self_guided: expected False with guided=False, got True\. Leave out one of the two\.",
    ),
    "margins a row without a guide": (
        {"guided": False, "row_margins": True},
        "row_margins: expected False without a.* got True",
    ),
    "widths above the model's": (
        {"matryoshka_dims": [4096]},
        r"matryoshka_dims: expected at most 32, the width of the embeddings, got 4096\.",
    ),
    "a wrong name": ({"matryoshka_dim": [8]}, "matryoshka_dim: no such .*did you mean 'matryoshka_dims'"),
    "groups by something else": ({"groups": "text"}, r"groups: expected 'anchor', .* or 'column', got 'text'\."),
    "a flag that is a text": ({"hard": "yes"}, r"hard: expected True or False, got 'yes' \(str\)\."),
    "a strategy without a guide": (
        {"guided": False, "margin_strategy": "relative"},
        "margin_strategy: expected 'absolute'.* got 'relative'",
    ),
    "bounds of a fixed temperature": ({"temperature_max": 0.5}, "temperature_max: got 0.5, which bounds a temperature"),
    "bounds the wrong way round": (
        {"temperature_min": 2.0},
        r"temperature_min: expected a float below temperature_max 1\.0, got 2\.0\.",
    ),
    "a start outside": (
        {"learn_temperature": True, "temperature": 0.0001},
        r"temperature: expected a start between.* got 0\.0001\.",
    ),
}


@both
@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_when_the_loss_is_built(kind, name, student):
    options, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        kind(student, None, **options)


@both
def test_hard_with_the_student_as_its_guide_is_refused(kind, student):
    with pytest.raises(
        ValueError,
        match="hard: expected False where the guide is the student itself, got True",
    ):
        kind(student, student, hard=True)


@both
def test_a_batch_without_rows_is_refused_by_name(kind, student, guide, pairs):
    empty = [{name: value[:0] for name, value in column.items()} for column in columns(student, pairs)]
    for features in (empty, [{}, {}]):
        with pytest.raises(ValueError, match="the batch holds no row in column 0"):
            kind(student, guide)(features, None)


def test_a_batch_without_groups_is_refused_by_name(student, guide, pairs):
    loss = GISTEmbedLoss(student, guide, groups="anchor")
    with pytest.raises(ValueError, match="group: the batch brings none, and the loss has groups='anchor'"):
        loss(columns(student, pairs), None)


def run(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "run"), "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return GISTTrainingArguments(**{**defaults, **kwargs})


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_a_trainer_learns_the_temperature_without_decay(tmp_path, student, guide, pairs, mini_batch_size):
    args = run(tmp_path, learn_temperature=True, temperature=0.05, weight_decay=0.5, mini_batch_size=mini_batch_size)
    trainer = GISTTrainer(student, args, pairs, guide=guide)
    trainer.train()
    assert trainer.loss.log_temperature.item() != pytest.approx(math.log(0.05), abs=1e-6)
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decay[id(trainer.loss.log_temperature)] == 0.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.1, 0.06, 0.02]),
        ("cosine", [0.1, 0.06, 0.02]),
        ("exponential", [0.1, 0.1, 0.04]),
    ],
)
def test_a_schedule_sets_the_temperature_of_each_step(tmp_path, student, guide, pairs, schedule, expected):
    decay = {"temperature_decay": 0.2} if schedule == "exponential" else {}
    args = run(tmp_path, temperature=0.1, temperature_schedule=schedule, temperature_end=0.02, max_steps=3, **decay)
    trainer = GISTTrainer(student, args, pairs, guide=guide)
    trainer.train()
    logged = [entry["temperature"] for entry in trainer.state.log_history if "temperature" in entry]
    assert logged == pytest.approx(expected)
    assert scheduled(args, 10, 3) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature_schedule": "sine"},
            r"temperature_schedule: expected 'linear', 'cosine' or 'exponential', got 'sine'\.",
        ),
        (
            {"temperature_schedule": "linear", "temperature_end": 0.0},
            r"temperature_end: expected a finite float above 0, got 0\.0\.",
        ),
        (
            {"temperature_schedule": "exponential", "temperature_decay": 1.0},
            r"temperature_decay: expected a finite float above 0 and below 1, got 1\.0\.",
        ),
        (
            {"temperature_schedule": "exponential", "temperature_end": 0.5},
            r"temperature_end: expected at most the.* got 0\.5\.",
        ),
        ({"temperature_schedule": "linear", "learn_temperature": True, "temperature": 0.1}, "with learn_temperature"),
        ({"temperature_schedule": "cosine"}, "temperature_end: got 0.01, which is the temperature itself"),
        (
            {"temperature_end": 0.001},
            r"temperature_end: got 0\.001, which only the schedule linear or cosine or exponential",
        ),
        (
            {"temperature_schedule": "linear", "temperature": 0.1, "temperature_decay": 0.9},
            r"temperature_decay: got 0\.9, which only the schedule exponential reads\. Set",
        ),
    ],
)
def test_a_wrong_schedule_is_refused(tmp_path, student, guide, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        GISTTrainer(student, run(tmp_path, **options), pairs, guide=guide)


def test_rows_of_the_same_anchor_are_one_group(student, pairs):
    collator = GISTDataCollator(student.preprocess, groups="anchor")
    rows = [pairs[i] for i in (0, 1, 2)]
    rows.append({**rows[1], "positive": "something else"})
    group = collator(rows)[f"anchor_{GROUP}"]
    assert group.dtype == torch.int64 and group[3] == group[1] and len(group.unique()) == 3


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            {"group": "x"},
            {"groups": "column"},
            "group: expected a whole number in each row, got 'x' in row 0",
        ),
        (
            {"margin": float("nan")},
            {"row_margins": True},
            "row 0 of the batch, column 'margin': is nan; a finite number is needed there",
        ),
        ({}, {"groups": "column"}, "group: the loss has groups='column', and the dataset no column 'group'"),
        ({"margin": 0.1}, {}, "margin: the dataset has a column of numbers .* Set row_margins=True"),
    ],
)
def test_wrong_groups_and_margins_are_named(student, pairs, rows, options, message):
    collator = GISTDataCollator(student.preprocess, **options)
    with pytest.raises(ValueError, match=message):
        collator([{**pairs[0], **rows}])


def test_groups_and_margins_of_a_file_reach_the_loss(tmp_path, student, guide, pairs):
    path = tmp_path / "pairs.jsonl"
    rows = [{**pairs[i], "product": "ab"[i % 2], "trust": i / 100} for i in range(16)]
    Dataset.from_list(rows).to_json(path)
    dataset = load_texts(path, columns={"group": "product", "margin": "trust"})
    assert dataset["group"][:4] == [0, 1, 0, 1] and dataset["margin"][:2] == [0.0, 0.01]
    args = run(tmp_path, groups="column", row_margins=True, batch_sampler="no_duplicates", max_steps=2)
    trainer = GISTTrainer(student, args, dataset, guide=guide)
    trainer.train()
    # Half of all other rows are of one's own group: 28 of 56 in a batch of 8, at least 3 of 7 each.
    assert min(e["masked_ap"] for e in trainer.state.log_history if "masked_ap" in e) > 0.3
    with pytest.raises(ValueError, match="group is read as a whole"):
        stream_texts(path, columns={"group": "product"})


@pytest.mark.parametrize(
    ("kinds", "dropout"),
    # Cached, ours embeds texts of like length together, and so draws other dropout.
    [((theirs.GISTEmbedLoss, GISTEmbedLoss), True), ((theirs.CachedGISTEmbedLoss, CachedGISTEmbedLoss), False)],
)
def test_the_loss_curve_follows_sentence_transformers(tmp_path, tiny_student, guide, pairs, kinds, dropout):
    """Same steps, same seed, float32: to 1e-4 relative over 50 steps."""
    curves = []
    for module in kinds:
        student = SentenceTransformer(str(tiny_student), device="cpu")
        for layer in student.modules():
            if isinstance(layer, torch.nn.Dropout) and not dropout:
                layer.p = 0.0
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / module.__module__), max_steps=50, per_device_train_batch_size=8,
            learning_rate=5e-4, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, seed=3,
            dataloader_pin_memory=False,
        )  # fmt: skip
        loss = module(student, guide, temperature=0.05)
        trainer = SentenceTransformerTrainer(student, args, pairs, loss=loss)
        trainer.train()
        curves.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    mine, other = curves[1], curves[0]
    assert len(mine) == 50 and other[0] > 1.1 * other[-1]
    assert mine == pytest.approx(other, rel=1e-4)


def test_settings_beside_a_loss_of_one_s_own_are_said_to_have_no_effect(tmp_path, student, pairs, caplog):
    args = run(tmp_path, temperature=0.3, hard=True)
    with caplog.at_level("WARNING", "gist_fast"):
        GISTTrainer(student, args, pairs, loss=GISTEmbedLoss(student, None, guided=False))
    assert "args: temperature, hard: of the loss that the trainer would build, and not looked at" in caplog.text
