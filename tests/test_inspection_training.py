"""What the guide drops in a batch of the data that a trainer holds."""

from __future__ import annotations

import pytest
from datasets import DatasetDict

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
from gist_fast.inspection import inspect_rows
from gist_fast.inspection.training import inspect_training
from gist_fast.losses import GISTEmbedLoss


def trainer_on(tmp_path, student, data, guide=None, **arguments):
    args = GISTTrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=24, use_cpu=True, report_to=[], seed=5, **arguments
    )
    return GISTTrainer(student, args, data, guide=guide)


def encoder(model, prompts, lengths):
    def encode(texts, column, position):
        before, model.max_seq_length = model.max_seq_length, lengths.get(column, model.max_seq_length)
        try:
            return model.encode(texts, prompt=prompts.get(column, ""), convert_to_tensor=True)
        finally:
            model.max_seq_length = before

    return encode


def test_texts_are_read_as_in_training(tmp_path, student, guide, pairs):
    settings = {
        "prompts": {"anchor": "water: "},
        "max_length": {"positive": 9},
        "guide_prompts": {"positive": "ice: "},
        "guide_max_length": {"anchor": 7, "positive": 11},
        "margin": 0.02,
        "margin_strategy": "relative",
        "contrast_anchors": False,
    }
    found = inspect_training(trainer_on(tmp_path, student, pairs, guide, **settings))
    assert list(found) == [""]
    got = found[""]
    assert len(got.rows) == 24
    assert got.rows != tuple(range(1, 25))
    want = inspect_rows(
        pairs,
        [row - 1 for row in got.rows],
        encoder(guide, {"positive": "ice: "}, {"anchor": 7, "positive": 11}),
        encoder(student, {"anchor": "water: "}, {"positive": 9}),
        margin=0.02,
        margin_strategy="relative",
        contrast_anchors=False,
        most=20,
    )
    assert got.counts == want.counts
    assert set(got.counts) == {"ap", "pp"}
    assert got.total_dropped > len(got.dropped) == 20
    for mine, theirs in zip(got.dropped, want.dropped, strict=True):
        assert (mine.block, mine.row, mine.other_row) == (theirs.block, theirs.row, theirs.other_row)
        assert mine.guide == pytest.approx(theirs.guide, abs=1e-5)
        assert mine.student == pytest.approx(theirs.student, abs=1e-5)


def test_guide_columns_serve(tmp_path, student, guide, pairs):
    embedded = embed_guide(pairs, guide, show_progress_bar=False)
    by_columns = inspect_training(trainer_on(tmp_path, student, embedded))[""]
    by_guide = inspect_training(trainer_on(tmp_path, student, pairs, guide))[""]
    assert by_columns.rows == by_guide.rows
    for block, count in by_guide.counts.items():
        # The columns are in half precision.
        assert by_columns.counts[block] == pytest.approx(count, rel=0.02)


def test_several_datasets(tmp_path, student, guide, pairs):
    data = DatasetDict({"first": pairs.select(range(30)), "second": pairs.select(range(30, 40))})
    trainer = trainer_on(tmp_path, student, data, guide, guide_prompts={"second": "ice: ", "first": ""})
    found = inspect_training(trainer)
    assert {name: len(one.rows) for name, one in found.items()} == {"first": 24, "second": 10}
    want = inspect_rows(
        data["second"].with_format(None),
        range(10),
        encoder(guide, {"anchor": "ice: ", "positive": "ice: "}, {}),
    )
    assert found["second"].counts == want.counts
    assert set(inspect_training(trainer, datasets=1)) == {"first"}


def test_variants_are_the_runs(tmp_path, student, guide, pairs):
    groups = [row // 3 for row in range(64)]
    # Copies of a positive, in other groups: ties.
    texts = [pairs[row % 4]["positive"] for row in range(64)]
    data = pairs.remove_columns("positive").add_column("positive", texts)
    data = data.add_column("group", groups).add_column("margin", [0.0 if row % 2 else row / 1000 for row in range(64)])
    variants = {"mask_ties": True, "groups": "column", "row_margins": True}
    got = inspect_training(trainer_on(tmp_path, student, data, guide, **variants))[""]
    rows = [row - 1 for row in got.rows]
    want = inspect_rows(data, rows, encoder(guide, {}, {}), **variants)
    assert (got.counts, got.compared) == (want.counts, want.compared)
    for name in variants:
        other = inspect_rows(data, rows, encoder(guide, {}, {}), **{k: v for k, v in variants.items() if k != name})
        assert other.counts != got.counts, name


def test_a_loss_of_the_users_own_brings_its_settings(tmp_path, student, guide, pairs):
    data = pairs.add_column("margin", [row / 1000 for row in range(64)])
    variants = {"mask_ties": True, "groups": "anchor", "row_margins": True, "hard": True}
    settings = {"margin": 0.03, "margin_strategy": "relative", "contrast_anchors": False, **variants}
    args = GISTTrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=24, use_cpu=True, report_to=[], seed=5, margin=0.9
    )
    trainer = GISTTrainer(student, args, data, loss=GISTEmbedLoss(student, guide, **settings))
    got = inspect_training(trainer)[""]
    rows = [row - 1 for row in got.rows]
    want = inspect_rows(data, rows, encoder(guide, {}, {}), encoder(student, {}, {}), most=20, **settings)
    assert set(got.compared) == {"ap", "pp"}
    assert (got.counts, got.compared, got.student_above) == (want.counts, want.compared, want.student_above)
    assert got.easy == want.easy
    assert 0 < got.total_dropped < sum(got.compared.values())
    for name in ("margin", "margin_strategy", "row_margins"):
        other = {key: value for key, value in settings.items() if key != name}
        found = inspect_rows(data, rows, encoder(guide, {}, {}), encoder(student, {}, {}), **other)
        assert found.counts != got.counts, name


def test_the_users_own_loss_may_guide_itself_or_not_at_all(tmp_path, student, pairs):
    args = GISTTrainingArguments(str(tmp_path / "run"), per_device_train_batch_size=24, use_cpu=True, report_to=[])
    loss = GISTEmbedLoss(student, None, self_guided=True, margin=-0.01)
    got = inspect_training(GISTTrainer(student, args, pairs, loss=loss))[""]
    want = inspect_rows(pairs, [row - 1 for row in got.rows], encoder(student, {}, {}), margin=-0.01)
    assert got.counts == want.counts
    unguided = GISTEmbedLoss(student, None, guided=False)
    assert inspect_training(GISTTrainer(student, args, pairs, loss=unguided)) == {}


def test_a_student_that_guides_itself(tmp_path, student, pairs):
    got = inspect_training(trainer_on(tmp_path, student, pairs, self_guided=True, margin=-0.01))[""]
    want = inspect_rows(pairs, [row - 1 for row in got.rows], encoder(student, {}, {}), margin=-0.01)
    assert got.counts == want.counts
    assert got.dropped[0].guide == got.dropped[0].student


def test_nothing_where_nothing_is_dropped_or_no_batch_is_at_hand(tmp_path, student, guide, pairs):
    assert inspect_training(trainer_on(tmp_path, student, pairs)) == {}
    stream = trainer_on(tmp_path, student, pairs.to_iterable_dataset(), guide, max_steps=1)
    assert inspect_training(stream) == {}
