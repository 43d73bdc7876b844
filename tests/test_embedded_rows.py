"""A dataset with guide embeddings reaches the loss in the type that it stores, however it came about."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
from gist_fast.data.embedded_rows import read_as_stored, without_embeddings
from gist_fast.data.load import load_texts
from gist_fast.training.collator import GISTDataCollator

COLUMNS = ("anchor_guide_embedding", "positive_guide_embedding")


@pytest.fixture
def embedded(guide, pairs, tmp_path):
    return embed_guide(pairs, guide, cache_dir=tmp_path / "cache", show_progress_bar=False)


def trainer_of(student, data, tmp_path, **more):
    arguments = GISTTrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True, per_device_train_batch_size=16, disable_tqdm=True, **more
    )
    return GISTTrainer(student, arguments, data)


def assert_stored(rows, embedded, first=0, dtype="float16"):
    """Numpy rows, bit for bit those of a dataset that was just embedded; texts as texts."""
    for k, row in enumerate(rows):
        for column in COLUMNS:
            assert isinstance(row[column], np.ndarray)
            assert row[column].dtype == dtype
            np.testing.assert_array_equal(row[column], embedded[first + k][column])
        assert type(row["anchor"]) is str


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_saved_folder_is_read_as_it_is_stored(dtype, guide, pairs, student, tmp_path):
    embedded = embed_guide(pairs, guide, dtype=dtype, cache_dir=tmp_path / "cache", show_progress_bar=False)
    embedded.save_to_disk(str(tmp_path / "saved"))
    loaded = load_texts(tmp_path / "saved")
    assert_stored([loaded[0], loaded[5]], embedded.select([0, 5]), dtype=dtype)
    batch = GISTDataCollator(preprocess_fn=student.preprocess)(loaded.__getitems__(list(range(20))))
    for column in COLUMNS:
        assert batch[column].dtype == getattr(torch, dtype)
        assert np.array_equal(batch[column].numpy(), np.stack([embedded[k][column] for k in range(20)]))


def test_what_other_tools_stored_is_read_as_rows_too(tmp_path, student):
    rows = {"anchor": ["a", "b"], "positive": ["c", "d"], COLUMNS[0]: [[1.0, 2.5], [0.0, 3.0]]}
    Dataset.from_dict(rows).to_parquet(str(tmp_path / "x.parquet"))
    loaded = load_texts(tmp_path / "x.parquet")
    assert loaded[1][COLUMNS[0]].tolist() == [0.0, 3.0]
    assert loaded[1][COLUMNS[0]].dtype == "float32"
    assert load_texts(tmp_path / "x.parquet").to_list() == Dataset.from_dict(rows).to_list()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda d: d.with_format("torch"), id="torch"),
        pytest.param(lambda d: d.with_format(None), id="none"),
        pytest.param(lambda d: d.with_format("numpy"), id="all numpy"),
        pytest.param(lambda d: d.shuffle(seed=1).shuffle(seed=2), id="shuffled"),
        pytest.param(lambda d: d.select(range(0, 64, 2)), id="selected"),
    ],
)
@pytest.mark.parametrize("named", [False, True], ids=["one", "by name"])
def test_the_trainer_reads_as_stored_whatever_was_done_to_the_dataset(change, named, embedded, student, tmp_path):
    changed = change(embedded)
    # Prompts by dataset, so that the trainer needs to know whose a batch is.
    data = DatasetDict({"x": changed, "y": embedded}) if named else changed
    more = {"prompts": {"x": {"anchor": "q: "}, "y": {}}} if named else {}
    trainer = trainer_of(student, data, tmp_path, max_steps=2, save_strategy="no", **more)
    train = trainer.train_dataset["x"] if named else trainer.train_dataset
    expected = changed.with_format(None)
    assert list(train["anchor"]) == list(expected["anchor"])
    by_text = {row["anchor"]: row for row in embedded}
    assert_stored([train[k] for k in range(9)], [by_text[train[k]["anchor"]] for k in range(9)])
    assert train._data.nbytes >= embedded._data.nbytes, "the embeddings were written anew"
    if named:
        assert train[3]["dataset_name"] == "x"
        assert (train._indices is None) == (changed._indices is None)
    batch = next(iter(trainer.get_train_dataloader()))
    assert {batch[column].dtype for column in COLUMNS} == {torch.float16}
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_dictionary_that_was_trained_on_can_be_trained_on_again(embedded, student, tmp_path):
    data = DatasetDict({"x": embedded.with_format("torch"), "y": embedded})
    for _ in range(2):
        trainer = trainer_of(student, data, tmp_path, prompts={"x": {"anchor": "q: "}, "y": {}})
        assert trainer.train_dataset["x"][0][COLUMNS[0]].dtype == "float16"
        assert trainer.train_dataset["x"].column_names.count("dataset_name") == 1
        data = trainer.train_dataset


def test_reading_leaves_the_rest_alone(embedded, pairs):
    assert read_as_stored(embedded) is embedded
    assert read_as_stored(pairs) is pairs
    assert read_as_stored(None) is None
    both = DatasetDict({"x": embedded, "y": pairs})
    assert read_as_stored(both) is both
    transformed = embedded.with_transform(lambda batch: batch)
    assert read_as_stored(transformed) is transformed
    assert without_embeddings(both)["x"].column_names == ["anchor", "positive"]
    assert without_embeddings(embedded)[1] == pairs[1]


def test_a_missing_embedding_is_named(embedded, student, tmp_path):
    rows = [{**row, COLUMNS[1]: None if k == 37 else row[COLUMNS[1]]} for k, row in enumerate(embedded.to_list())]
    lacking = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=r"dataset: row 38 \(the first is 1\), column 'positive_guide_embedding' is"):
        trainer_of(student, lacking, tmp_path)
    # The row that lacks it was not selected.
    trainer_of(student, lacking.select(range(20)), tmp_path)
    collator = GISTDataCollator(preprocess_fn=student.preprocess)
    text = re.escape(rows[37]["positive"][:20])
    says = rf"positive_guide_embedding: row 2 of the batch, of the text .{text}.*is None"
    with pytest.raises(ValueError, match=says):
        collator([rows[35], rows[36], rows[37]])


def test_the_model_card_shows_texts_not_embeddings(embedded, student, tmp_path):
    trainer = trainer_of(student, embedded, tmp_path, max_steps=1, save_strategy="no")
    assert set(COLUMNS) < set(trainer.train_dataset.column_names)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "<code>anchor</code>" in card
    assert "guide_embedding" not in card
