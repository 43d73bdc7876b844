"""Mined negatives and duplicates, from a dataset through collator, trainer and loss to the function."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from oracle import assert_same_step, step_of
from sentence_transformers.sentence_transformer.losses import TripletLoss

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide, guided_contrastive_loss
from gist_fast.data.load import load_texts, stream_texts
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from gist_fast.training.collator import GISTDataCollator
from gist_fast.training.loss_checks import check_data, check_negatives

COLUMNS = ("anchor", "positive", "negative_1", "negative_2")


def arguments(tmp_path, **settings):
    return GISTTrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=6, report_to=[], save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, temperature=0.1, logging_steps=1, **settings,
    )  # fmt: skip


@pytest.fixture
def mined(pairs):
    """Twelve rows with two negatives each, of which some texts stand several times."""
    answers = list(pairs["positive"])
    rows = {
        "anchor": [list(pairs["anchor"])[i] for i in (0, 1, 2, 0, 3, 4)],
        "positive": [answers[i] for i in (0, 1, 2, 5, 1, 4)],
        "negative_1": [answers[i] for i in (2, 7, 8, 0, 9, 10)],
        "negative_2": [answers[i] for i in (1, 11, 12, 13, 14, 5)],
    }
    return Dataset.from_dict({name: texts * 2 for name, texts in rows.items()})


def numbers(dataset, column):
    texts = [text for name in COLUMNS for text in dataset[name]]
    known = {text: k for k, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([known[text] for text in dataset[column]])


def of_texts(*columns):
    return lambda dataset: [numbers(dataset, column) for column in columns]


SETTINGS = {
    "own negatives": ({"negatives_scope": "own"}, {}),
    "one column own": ({"negatives_scope": ["all", "own"]}, {}),
    "protected": ({"mask_negatives": False, "margin": 0.2}, {}),
    "own and protected": ({"mask_negatives": False, "negatives_scope": "own"}, {}),
    "all directions": ({"directions": ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]}, {}),
    "a softmax a direction": (
        {"directions": ["query_to_doc", "doc_to_query"], "partition_mode": "per_direction", "negatives_scope": "own"},
        {},
    ),
    "by the positive": ({"groups": "positive"}, {"groups": of_texts("positive")}),
    "by both": ({"groups": "anchor_or_positive"}, {"groups": of_texts("anchor", "positive")}),
    "by both, own": (
        {"groups": "anchor_or_positive", "negatives_scope": "own"},
        {"groups": of_texts("anchor", "positive")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_of_a_batch_is_that_of_the_function(name, carried, tmp_path, student, guide, mined):
    settings, of_function = SETTINGS[name]
    student.eval()
    data = mined
    if carried:
        judged = None if settings.get("mask_negatives", True) else ["anchor", "positive"]
        data = embed_guide(mined, guide, judged, prompts="", cache_dir=tmp_path / "cache", show_progress_bar=False)
    args = arguments(tmp_path, guide_prompts=None if carried else "", **settings)
    trainer = GISTTrainer(student, args, data, guide=None if carried else guide)
    batch = trainer.data_collator([data[k] for k in range(12)])
    features, labels = trainer.collect_features(batch)
    found = step_of(trainer.loss(features, labels), student)

    embed = {
        role: [model(model.preprocess(list(mined[c])))["sentence_embedding"] for c in COLUMNS]
        for role, model in (("student", student), ("guide", guide))
    }
    options = {k: v for k, v in settings.items() if k != "groups"}
    if of_function:
        options["groups"] = of_function["groups"](mined)
        options["negative_groups"] = [numbers(mined, c) for c in COLUMNS[2:]]
    a, p, *negatives = embed["student"]
    ga, gp, *guide_negatives = (x.detach() for x in embed["guide"])
    expected = guided_contrastive_loss(
        a, p, ga, gp, negatives, guide_negatives, temperature=0.1, backend="reference", **options
    )
    assert_same_step(found, step_of(expected, student))


def test_the_guide_reads_no_negatives_that_it_may_not_mask(tmp_path, student, guide, mined):
    trainer = GISTTrainer(student, arguments(tmp_path, mask_negatives=False), mined, guide=guide)
    read = []
    guide.register_forward_pre_hook(lambda _, given: read.append(len(given[0]["input_ids"])))
    trainer.train()
    batch = trainer.data_collator([mined[k] for k in range(12)])
    assert not any("negative" in key and "guide" in key for key in batch)
    distinct = len({text for name in ("anchor", "positive") for text in mined[name][:6]})
    assert 0 < sum(read) <= 2 * distinct
    blocks = {key for entry in trainer.state.log_history for key in entry if key.startswith("masked_")}
    assert blocks == {"masked_ap", "masked_aa", "masked_pp", "masked_an_1", "masked_an_2"}


def test_groups_of_columns_reach_the_loss(tmp_path, student, guide, mined):
    rows = [
        {**row, "topic": f"t{k % 5}", "doc": f"d{k % 4}", "neg_doc": f"d{k % 3}", "other": "d0"}
        for k, row in enumerate(mined)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"group": "topic", "positive_group": "doc", "negative_1_group": "neg_doc", "negative_2_group": "other"}
    data = load_texts(path, columns=columns)
    # One numbering for all, so that a document has one number wherever it stands.
    assert data["positive_group"][:5] == [5, 6, 7, 8, 5] and data["negative_1_group"][:4] == [5, 6, 7, 5]
    args = arguments(tmp_path, groups="column")
    check_data(args, "data.train", data.column_names)
    trainer = GISTTrainer(student, args, data, guide=guide)
    features, _ = trainer.collect_features(trainer.data_collator([data[k] for k in range(12)]))
    assert [f["group"].tolist() for f in features] == [data[c] for c in ("group", *list(columns)[1:])]
    trainer.train()
    # Of twelve rows four documents: a quarter of all pairs at least.
    assert all(entry["masked_an_1"] > 0.15 for entry in trainer.state.log_history if "masked_an_1" in entry)
    with pytest.raises(ValueError, match="negative_1_group is read as a whole, to number it; leave out streaming"):
        stream_texts(path, columns={"negative_1_group": "neg_doc"})


WRONG = {
    "another number of scopes": (
        {"negatives_scope": ["own"]},
        COLUMNS,
        r"negatives_scope: expected 2, one for each column of negatives that data has, got 1: \['own'\]",
    ),
    "groups that nobody asked for": (
        {},
        (*COLUMNS, "positive_group"),
        "has a column 'positive_group', and the loss does not ask for it",
    ),
    "groups of negatives alone": (
        {"groups": "column"},
        (*COLUMNS, "negative_1_group", "negative_2_group"),
        "groups: 'column', and data has no column 'group'",
    ),
    "groups of one column of negatives": (
        {"groups": "column"},
        (*COLUMNS, "group", "negative_1_group"),
        "groups: 'column', and data has no column 'negative_2_group'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_that_do_not_go_with_the_loss_are_refused(name, tmp_path):
    settings, columns, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        check_data(arguments(tmp_path, **settings), "data", list(columns))


ABOUT_NEGATIVES = {
    "negatives_scope": ({"negatives_scope": "own"}, "expected 'all', as {} has no column of negatives, got 'own'"),
    "mask_negatives": ({"mask_negatives": False}, "expected True, as {} has no column of negatives, got False"),
    "hardness_mode": (
        {"hardness_mode": "hard_negatives", "hardness_strength": 3.0},
        "expected 'in_batch_negatives', as {} has no column of negatives, got 'hard_negatives'",
    ),
}


@pytest.mark.parametrize("name", ABOUT_NEGATIVES)
def test_some_dataset_that_is_trained_on_must_have_negatives(name, tmp_path, student, guide, mined):
    settings, says = ABOUT_NEGATIVES[name]
    args, pairs = arguments(tmp_path, **settings), mined.select_columns(["anchor", "positive"])
    with pytest.raises(ValueError, match=f"^{name}: {says.format('train_dataset')}"):
        GISTTrainer(student, args, pairs, guide=guide)
    with pytest.raises(ValueError, match=f"^{name}: {says.format('data.train')}"):
        check_negatives(args, {"data.train": []})
    # Where one has, others need not: of several that are trained on, or to evaluate on.
    trainer = GISTTrainer(student, args, {"a": mined, "b": pairs}, eval_dataset=pairs, guide=guide)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("several", [False, True])
def test_an_empty_text_stays_a_text_for_other_losses(several, tmp_path, student, guide, mined):
    data = mined.map(lambda row, k: {"negative_1": "" if k % 3 else row["negative_1"]}, with_indices=True)
    data = data.remove_columns("negative_2")
    losses = {"a": TripletLoss(student), "b": GISTEmbedLoss(student, guide, negatives_scope="own")}
    trainer = GISTTrainer(
        student, arguments(tmp_path), {"a": data, "b": data} if several else data,
        loss=losses if several else losses["a"],
    )  # fmt: skip
    trainer.train()


@pytest.mark.parametrize("kind", [GISTEmbedLoss, CachedGISTEmbedLoss])
def test_a_batch_that_does_not_go_with_the_loss_is_refused(kind, student, guide, mined):
    def features(groups, *columns):
        collate = GISTDataCollator(student.preprocess, groups=groups)
        batch = collate([{c: row[c] for c in columns} for row in mined])
        return [
            {k.removeprefix(f"{c}_"): v for k, v in batch.items() if k.startswith(f"{c}_")} for c in columns
        ]  # fmt: skip

    for settings, given, message in (
        ({"negatives_scope": ["own"]}, (None, *COLUMNS), r"negatives_scope: expected 2, one for each column .*got 1"),
        (
            {"groups": "positive"},
            ("anchor", *COLUMNS),
            "group: the batch brings none for column 1, and the loss has gr",
        ),
        (
            {"groups": "anchor"},
            ("positive", *COLUMNS),
            "group: the batch brings none, and the loss has groups='anchor'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            kind(student, guide, **settings)(features(*given))
