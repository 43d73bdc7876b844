"""Batches without duplicates: sentence-transformers' own where it keeps its word, and its word kept elsewhere."""

from __future__ import annotations

import logging
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler as TheirSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from gist_fast import GISTTrainer, GISTTrainingArguments
from gist_fast.runtime.errors import InputError
from gist_fast.training.no_duplicates_sampler import NoDuplicatesBatchSampler


def random_rows(rows: int, texts: int, columns: int = 2, seed: int = 0) -> Dataset:
    """Texts drawn from a pool, so that they repeat within columns and across them."""
    drawn = np.random.default_rng(seed).integers(texts, size=(columns, rows))
    names = ["anchor", "positive", *(f"negative_{k}" for k in range(columns - 2))]
    return Dataset.from_dict({name: [f"text {t}" for t in column] for name, column in zip(names, drawn, strict=True)})


def batches(dataset: Dataset, size: int, *, drop_last: bool = False, seed: int = 3, epoch: int = 0) -> list[list[int]]:
    sampler = NoDuplicatesBatchSampler(dataset, size, drop_last, ["label"], torch.Generator(), seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def theirs(dataset: Dataset, size: int, *, drop_last: bool = False, seed: int = 3, epoch: int = 0) -> list[list[int]]:
    sampler = TheirSampler(dataset, size, drop_last, ["label"], torch.Generator(), seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def check(dataset: Dataset, plan: list[list[int]], size: int, *, repeats: bool = False) -> None:
    """No text in two rows of a batch, no row in two batches unless it may be, no batch too large."""
    used = [row for batch in plan for row in batch]
    assert repeats or len(used) == len(set(used))
    for batch in plan:
        assert 0 < len(batch) <= size
        assert len(batch) == len(set(batch))
        texts = Counter(text for row in batch for text in set(dataset[row].values()))
        assert max(texts.values()) == 1, texts.most_common(1)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("rows", "texts", "columns"), [(507, 3000, 2), (252, 9000, 5), (123, 10_000, 3)])
def test_the_same_batches_as_sentence_transformers(rows, texts, columns, drop_last):
    dataset = random_rows(rows, texts, columns)
    for epoch in range(3):
        expected = theirs(dataset, 17, drop_last=drop_last, epoch=epoch)
        assert batches(dataset, 17, drop_last=drop_last, epoch=epoch) == expected
        assert len(expected) == rows // 17 + (not drop_last)
    assert batches(dataset, 17, epoch=0) != batches(dataset, 17, epoch=1)


@pytest.mark.parametrize("seed", range(4))
def test_many_rows_are_deferred_and_the_batches_are_still_theirs(seed):
    # Half of the anchors and two thirds of the positives are common to many rows: the order of first-fit, the batches
    # that a text may still go to, and those above them that it holds already, all play a part.
    common = np.random.default_rng(seed).integers(80, size=(2, 990))
    dataset = Dataset.from_dict(
        {
            "anchor": [f"a {t}" if k % 2 else f"a of {k}" for k, t in enumerate(common[0])],
            "positive": [f"p {t}" if k % 3 else f"p of {k}" for k, t in enumerate(common[1])],
        }
    )
    expected = theirs(dataset, 20)
    assert len(expected) == 50
    assert batches(dataset, 20) == expected


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=60),
    size=st.integers(1, 9),
    drop_last=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_whatever_the_texts_the_promises_hold(rows, size, drop_last, epoch):
    dataset = Dataset.from_dict({f"c{k}": [f"t{row[k]}" for row in rows] for k in range(3)})
    sampler = NoDuplicatesBatchSampler(dataset, size, drop_last, seed=11)
    sampler.set_epoch(epoch)
    plan = list(sampler)
    if plan:
        check(dataset, plan, size, repeats=drop_last and epoch > 0)
    assert len(plan) == len(sampler)
    if drop_last:
        assert all(len(batch) == size for batch in plan)
    else:
        assert len(plan) == -(-len(rows) // size)
    # What is left out could not simply have been added to a batch with room.
    used = {row for batch in plan for row in batch}
    for row in set(range(len(rows))) - used:
        for batch in plan:
            if len(batch) < size and not drop_last:
                assert {t for r in batch for t in rows[r]} & set(rows[row])


def test_a_text_in_as_many_rows_as_there_are_batches_is_spread_over_all():
    # First-fit alone ends with batches past the tenth: one text of 100 stands in exactly ten rows.
    dataset = Dataset.from_dict(
        {"anchor": [f"a {k}" for k in range(100)], "positive": ["same" if k < 10 else f"p {k}" for k in range(100)]}
    )
    for epoch in range(20):
        for drop_last in (False, True):
            plan = batches(dataset, 10, epoch=epoch, drop_last=drop_last)
            check(dataset, plan, 10)
            assert [len(batch) for batch in plan] == [10] * 10
    assert any(len(theirs(dataset, 10, epoch=epoch)) > 10 for epoch in range(20))


def test_no_row_moves_to_where_one_of_its_texts_is():
    # Every text is in twelve rows, so that a row which makes room may meet its own texts where it goes.
    grid = [(k, j) for k in range(12) for j in range(12)]
    dataset = Dataset.from_dict({"anchor": [f"a {k}" for k, _ in grid], "positive": [f"p {j}" for _, j in grid]})
    for epoch in range(15):
        plan = batches(dataset, 8, epoch=epoch)
        check(dataset, plan, 8)
        assert sum(map(len, plan)) >= 140


def test_rows_that_cannot_be_placed_are_counted(caplog):
    dataset = Dataset.from_dict(
        {"anchor": [f"a {k}" for k in range(100)], "positive": ["same" if k >= 60 else f"p {k}" for k in range(100)]}
    )
    with caplog.at_level(logging.WARNING, "gist_fast.training.no_duplicates_sampler"):
        plan = batches(dataset, 10)
    check(dataset, plan, 10)
    # Ten batches hold the text once each; 30 rows of it are over.
    assert len(plan) == 10
    assert sum(map(len, plan)) == 70
    (record,) = caplog.records
    assert "30 of 100 rows are left out" in record.getMessage()
    assert "(of row 61) is in 40 rows" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "gist_fast.training.no_duplicates_sampler"):
        full = batches(dataset, 10, drop_last=True)
    # Six batches of nine others and one of these make do with 54 of the 60.
    assert [len(batch) for batch in full] == [10] * 6
    assert "40 of 100 rows are left out" in caplog.text
    assert len(NoDuplicatesBatchSampler(dataset, 10, True, seed=3)) == 6


def few_anchors(seed: int) -> Dataset:
    """200 rows of at most 12 anchors, the first in most of them, the last in hardly any: ten differ in few batches."""
    shares = 1 / np.arange(1, 13) ** 1.5
    drawn = np.random.default_rng(seed).choice(12, size=200, p=shares / shares.sum())
    return Dataset.from_dict({"anchor": [f"a {t}" for t in drawn], "positive": [f"p {k}" for k in range(200)]})


def test_every_epoch_has_the_batches_that_the_length_promises():
    completed = 0
    for seed in range(12):
        dataset = few_anchors(seed)
        sampler = NoDuplicatesBatchSampler(dataset, 10, True, seed=seed)
        for epoch in range(8):
            sampler.set_epoch(epoch)
            plan = list(sampler)
            assert [len(batch) for batch in plan] == [10] * len(sampler), (seed, epoch)
            if plan:
                check(dataset, plan, 10, repeats=epoch > 0)
            used = [row for batch in plan for row in batch]
            completed += len(used) > len(set(used))
            # A sampler that was made for this epoch alone, as in a resumed run, gives the same.
            assert batches(dataset, 10, drop_last=True, seed=seed, epoch=epoch) == plan
    assert completed > 3, "no epoch had to be completed, so that nothing was tested"


def test_rows_taken_twice_are_counted(caplog):
    for seed in range(12):
        dataset = few_anchors(seed)
        for epoch in range(1, 8):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "gist_fast.training.no_duplicates_sampler"):
                used = [row for batch in batches(dataset, 10, drop_last=True, seed=seed, epoch=epoch) for row in batch]
            twice = len(used) - len(set(used))
            assert f"{200 - len(set(used))} of 200 rows are left out" in caplog.text
            assert (f"rows are taken {twice} times more than once" in caplog.text) == (twice > 0)


def test_a_run_over_completed_epochs_takes_all_its_steps_and_resumes(tmp_path, student, tiny_student):
    from sentence_transformers import SentenceTransformer

    seed = next(s for s in range(20) if short_epochs(few_anchors(s), s))
    data, folder = few_anchors(seed), tmp_path / "run"
    shared = {"batch_sampler": "no_duplicates", "num_train_epochs": 5, "dataloader_drop_last": True, "save_steps": 3}
    shared |= {"per_device_train_batch_size": 10, "seed": seed, "learning_rate": 1e-3, "save_total_limit": None}
    whole = GISTTrainer(student, settings_for(GISTTrainingArguments, folder, **shared), data)
    steps = 5 * len(NoDuplicatesBatchSampler(data, 10, True, seed=seed))
    whole.train()
    assert whole.state.global_step == steps
    again = SentenceTransformer(str(tiny_student), device="cpu")
    resumed = GISTTrainer(again, settings_for(GISTTrainingArguments, folder, **shared), data)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert resumed.state.global_step == steps
    for name, value in student.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def short_epochs(data: Dataset, seed: int) -> bool:
    """Whether one of five epochs would fill fewer batches than the first, of few, without help."""
    planned = [batches(data, 10, drop_last=True, seed=seed, epoch=epoch) for epoch in range(5)]
    rows = [[row for batch in plan for row in batch] for plan in planned]
    return len(planned[0]) == 2 and any(len(epoch) > len(set(epoch)) for epoch in rows)


def test_nothing_is_said_when_all_is_well(caplog):
    with caplog.at_level(logging.WARNING, "gist_fast.training.no_duplicates_sampler"):
        batches(random_rows(103, 5000), 10, drop_last=True)
        batches(random_rows(103, 5000), 10)
    assert not caplog.records


def test_what_is_no_text_is_not_compared():
    rows = {
        "anchor": ["a", "b", "c", "d"],
        "positive": ["p", "q", "r", "s"],
        "label": [1, 1, 1, 1],
        "dataset_name": ["x"] * 4,
        "anchor_guide_embedding": [[0.5, 0.5]] * 4,
    }
    assert [len(batch) for batch in batches(Dataset.from_dict(rows), 4)] == [4]


@pytest.mark.parametrize(
    ("third", "sizes"),
    [
        (("x", "y"), [3]),
        (("b", "y"), [2, 1]),  # the second's anchor
        (("x", "q"), [2, 1]),  # the second's positive
        (("q", "y"), [2, 1]),  # an anchor that is the second's positive
        (("x", "a"), [2, 1]),  # the text that the first row has twice
        (("x", "x"), [3]),  # a text twice in one row alone
    ],
)
def test_texts_are_compared_across_columns_and_rows(third, sizes):
    anchors, positives = zip(("a", "a"), ("b", "q"), third, strict=True)
    # One batch more than the rows need, so that no row is left out.
    dataset = Dataset.from_dict({"anchor": [*anchors, "e"], "positive": [*positives, "f"]})
    for epoch in range(6):
        plan = batches(dataset, 3, epoch=epoch)
        check(dataset, plan, 3)
        assert sum(map(len, plan)) == 4
        together = any(len({0, 1, 2} & set(batch)) == 3 for batch in plan)
        assert not together or sizes == [3]
    assert sizes != [3] or any({0, 1, 2} == set(b) for epoch in range(60) for b in batches(dataset, 3, epoch=epoch))


def test_numbers_and_lists_count_by_what_they_say():
    dataset = Dataset.from_dict({"anchor": ["5", "b", "c"], "positive": [7, 5, 9], "negative": [["x"], ["y"], ["z"]]})
    plans = [batches(dataset, 2, epoch=epoch) for epoch in range(8)]
    assert not any({0, 1} <= set(batch) for plan in plans for batch in plan)
    assert any({0, 2} <= set(batch) for plan in plans for batch in plan)
    dataset = Dataset.from_dict({"anchor": ["a", "b", "c"], "negative": [["x", "y"], ["x", "y"], ["y", "x"]]})
    plans = [batches(dataset, 2, epoch=epoch) for epoch in range(8)]
    assert not any({0, 1} <= set(batch) for plan in plans for batch in plan)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_slices_selections_formats_and_transforms_are_read_rightly(kind):
    texts = ["", "ä", "b" * 300, "", "c", "ä"]
    table = pa.table({"anchor": pa.array(texts, kind), "positive": pa.array([f"p{k}" for k in range(6)], kind)}).slice(
        1
    )
    dataset = Dataset(table)
    # Rows 0 and 4 share a text.
    assert all(not {0, 4} <= set(batch) for batch in batches(dataset, 5))
    assert sorted(map(len, batches(dataset, 4))) == [1, 4]
    shuffled = dataset.select([4, 3, 0])
    assert all(not {0, 2} <= set(batch) for epoch in range(4) for batch in batches(shuffled, 2, epoch=epoch))
    renamed = dataset.with_transform(lambda batch: {name: ["same"] * len(column) for name, column in batch.items()})
    assert batches(renamed, 4) == batches(dataset, 4)


def test_a_missing_text_is_an_error_that_names_the_place():
    texts = [f"t{k}" for k in range(40)]
    dataset = Dataset.from_dict({"anchor": texts, "positive": [*texts[:16], None, *texts[17:]]})
    with pytest.raises(InputError, match=r"row 17, column 'positive' is None"):
        batches(dataset, 4)
    with pytest.raises(InputError, match="none holds texts"):
        NoDuplicatesBatchSampler(Dataset.from_dict({"label": [1]}), 1, False, ["label"])


def test_seeds():
    dataset = random_rows(200, 900)
    assert batches(dataset, 16, seed=1) == batches(dataset, 16, seed=1) != batches(dataset, 16, seed=2)
    # Seed and epoch count as their sum, as in sentence-transformers.
    assert batches(dataset, 16, seed=1, epoch=4) == batches(dataset, 16, seed=2, epoch=3)
    generator = torch.Generator()
    generator.manual_seed(8)
    sampler = NoDuplicatesBatchSampler(dataset, 16, False, generator=generator, seed=None)
    one, other = list(sampler), list(sampler)
    generator.manual_seed(8)
    assert one == list(sampler)
    assert one != other


def test_it_stays_off_the_generator_that_it_shares():
    generator = torch.Generator()
    generator.manual_seed(5)
    state = generator.get_state()
    list(NoDuplicatesBatchSampler(random_rows(40, 100), 4, False, generator=generator, seed=1))
    assert torch.equal(generator.get_state(), state)


class Seen:
    """A collator's batches, by the anchors in them."""

    def __init__(self, trainer: SentenceTransformerTrainer) -> None:
        self.batches: list[list[str]] = []
        collate = trainer.data_collator

        def spy(features):
            self.batches.append([row["anchor"] for row in features])
            return collate(features)

        trainer.data_collator = spy
        spy.valid_label_columns = collate.valid_label_columns


def settings_for(cls, folder, **more):
    return cls(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "report_to": [],
            "use_cpu": True,
            "seed": 4,
            "disable_tqdm": True,
            **more,
        }
    )


def repeated_pairs() -> Dataset:
    return Dataset.from_dict(
        {
            "anchor": [f"question {k}" for k in range(48)],
            "positive": [f"answer {k // 4 if k < 24 else k}" for k in range(48)],
        }
    )


def test_in_the_stock_trainer_by_class(tmp_path, student):
    arguments = settings_for(
        SentenceTransformerTrainingArguments, tmp_path, batch_sampler=NoDuplicatesBatchSampler, num_train_epochs=2,
        save_strategy="no",
    )  # fmt: skip
    data = repeated_pairs()
    trainer = SentenceTransformerTrainer(student, arguments, data, loss=MultipleNegativesRankingLoss(student))
    seen = Seen(trainer)
    trainer.train()
    expected = [batches(data, 8, seed=4, epoch=epoch) for epoch in range(2)]
    assert seen.batches == [[data[row]["anchor"] for row in batch] for plan in expected for batch in plan]
    assert trainer.state.global_step == 12


def test_the_trainer_takes_it_and_resumes_in_the_middle_of_an_epoch(tmp_path, student, tiny_student):
    from sentence_transformers import SentenceTransformer

    data = repeated_pairs()
    shared = {"batch_sampler": "no_duplicates", "num_train_epochs": 2, "save_steps": 8, "learning_rate": 1e-3}
    whole = GISTTrainer(student, settings_for(GISTTrainingArguments, tmp_path / "a", **shared), data)
    assert isinstance(whole.get_train_dataloader().batch_sampler, NoDuplicatesBatchSampler)
    seen = Seen(whole)
    whole.train()
    again = SentenceTransformer(str(tiny_student), device="cpu")
    resumed = GISTTrainer(again, settings_for(GISTTrainingArguments, tmp_path / "a", **shared), data)
    rest = Seen(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-8"))
    # Of the second epoch's six batches two were done.
    assert len(seen.batches) == 12
    assert rest.batches == seen.batches[8:]
    for name, value in student.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_several_datasets_one_a_batch(tmp_path, student):
    data = DatasetDict(
        {"one": repeated_pairs(), "two": repeated_pairs().map(lambda row: {"anchor": row["anchor"] + "!"})}
    )
    arguments = settings_for(
        GISTTrainingArguments, tmp_path, batch_sampler="no_duplicates", num_train_epochs=2, save_strategy="no",
        multi_dataset_batch_sampler="round_robin",
    )  # fmt: skip
    trainer = GISTTrainer(student, arguments, data)
    seen = Seen(trainer)
    trainer.train()
    kinds = [{anchor.endswith("!") for anchor in batch} for batch in seen.batches]
    assert kinds == [{False}, {True}] * 12
    for batch in seen.batches:
        answers = Counter(int(re.findall(r"\d+", anchor)[0]) // 4 for anchor in batch if _number(anchor) < 24)
        assert not answers or max(answers.values()) == 1


def test_each_dataset_with_a_loss_of_its_own(tmp_path, student, guide):
    from gist_fast.losses import GISTEmbedLoss

    data = DatasetDict({"one": repeated_pairs(), "two": repeated_pairs()})
    arguments = settings_for(
        GISTTrainingArguments, tmp_path, max_steps=4, save_strategy="no", multi_dataset_batch_sampler="round_robin",
        logging_steps=1,
    )  # fmt: skip
    losses = {"one": GISTEmbedLoss(student, guide), "two": MultipleNegativesRankingLoss(student)}
    trainer = GISTTrainer(student, arguments, data, loss=losses)
    asked = []
    for name, loss in losses.items():
        loss.register_forward_pre_hook(lambda module, inputs, name=name: asked.append((name, inputs[0][0].keys())))
    trainer.train()
    assert [name for name, _ in asked] == ["one", "two"] * 2
    # What is there for the guide reaches the guided loss alone.
    assert all(any("guide" in key for key in keys) == (name == "one") for name, keys in asked)


def _number(anchor: str) -> int:
    return int(re.findall(r"\d+", anchor)[0])
