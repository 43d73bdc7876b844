"""`embed_guide`: right values, each text once, and again only when something changed."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from gist_fast import embed_guide
from gist_fast.collator import GISTDataCollator, guide_prompt


@pytest.fixture
def encoded(guide, monkeypatch):
    """The texts that the guide encoded, call by call."""
    calls = []
    encode = guide.encode
    monkeypatch.setattr(guide, "encode", lambda texts, **kw: (calls.append(list(texts)), encode(texts, **kw))[1])
    return calls


def embed(dataset, guide, tmp_path, columns=None, **kwargs):
    return embed_guide(dataset, guide, columns, cache_dir=tmp_path / "cache", show_progress_bar=False, **kwargs)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_hold_the_guides_embeddings(dtype, guide, pairs, tmp_path):
    embedded = embed(pairs, guide, tmp_path, dtype=dtype)
    assert embedded.column_names == ["anchor", "positive", "anchor_guide_embedding", "positive_guide_embedding"]
    assert embedded.cache_files, "the embeddings are not memory-mapped"
    for column in ("anchor", "positive"):
        assert list(embedded[column]) == list(pairs[column])
        rows = np.stack([embedded[i][f"{column}_guide_embedding"] for i in range(len(embedded))])
        assert rows.dtype == dtype
        expected = guide.encode(list(pairs[column]), prompt="")
        np.testing.assert_allclose(rows, expected, rtol=2 * np.finfo(dtype).eps, atol=2e-5)
    assert isinstance(embedded[0]["anchor"], str)


def test_each_distinct_text_is_encoded_once(guide, encoded, tmp_path):
    dataset = Dataset.from_dict({"anchor": ["a", "b", "a", "c"], "positive": ["b", "d", "d", "b"]})
    embedded = embed(dataset, guide, tmp_path)
    assert encoded == [["a", "b", "c"], ["d"]]
    rows = [embedded[i] for i in range(4)]
    np.testing.assert_array_equal(rows[0]["anchor_guide_embedding"], rows[2]["anchor_guide_embedding"])
    np.testing.assert_array_equal(rows[1]["anchor_guide_embedding"], rows[0]["positive_guide_embedding"])


def test_nothing_is_encoded_again_unless_something_changed(guide, encoded, pairs, tmp_path):
    embed(pairs, guide, tmp_path)
    first = len(encoded)
    embed(pairs, guide, tmp_path)
    assert len(encoded) == first
    for change in ({"prompts": "q: "}, {"max_length": 5}, {"dtype": "float32"}):
        embed(pairs, guide, tmp_path, **change)
        assert len(encoded) > first, change
        first = len(encoded)
    guide[0].auto_model.get_input_embeddings().weight.data[0, 0] += 1
    embed(pairs, guide, tmp_path)
    assert len(encoded) > first


def test_another_width_or_tokenizer_of_the_same_weights_is_another_guide(guide, encoded, pairs, tmp_path):
    embed(pairs, guide, tmp_path)
    first = len(encoded)
    guide.truncate_dim = 16
    assert len(embed(pairs, guide, tmp_path)[0]["anchor_guide_embedding"]) == 16
    assert len(encoded) > first
    first = len(encoded)
    guide.tokenizer.backend_tokenizer.normalizer = None
    embed(pairs, guide, tmp_path)
    assert len(encoded) > first


def test_columns_added_one_by_one_are_saved_and_loaded_again(guide, pairs, tmp_path):
    embedded = embed(embed(pairs, guide, tmp_path, ["anchor"]), guide, tmp_path, ["positive"])
    embedded.save_to_disk(str(tmp_path / "saved"))
    for dataset in (embedded, load_from_disk(str(tmp_path / "saved"))):
        assert {dataset[0][f"{c}_guide_embedding"].dtype for c in ("anchor", "positive")} == {np.dtype("float16")}


def test_an_interrupted_run_leaves_nothing_half_written(guide, pairs, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gist_fast.guide_columns.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed(pairs, guide, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_wrong_input_is_named(guide, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"columns: the dataset has no 'query', only anchor, positive"):
        embed(pairs, guide, tmp_path, ["query"])
    with pytest.raises(ValueError, match=r"dataset: row 1, column 'anchor' is None; a text would do"):
        embed(Dataset.from_dict({"anchor": ["a", None]}), guide, tmp_path)
    with pytest.raises(ValueError, match="dataset: it has no rows"):
        embed(pairs.select([]), guide, tmp_path)
    with pytest.raises(ValueError, match=r"dtype: got 'int8'; one of 'float16', 'float32'"):
        embed(pairs, guide, tmp_path, dtype="int8")
    with pytest.raises(ValueError, match=r"'anchor' has guide embeddings already"):
        embed(embed(pairs, guide, tmp_path, ["anchor"]), guide, tmp_path, ["anchor"])


def test_whose_prompt_is_read(guide):
    guide.prompts, guide.default_prompt_name = {"query": "Q: ", "document": "D: ", "other": "O: "}, "other"
    assert guide_prompt(guide, "anchor", 0, None) == "Q: "
    assert guide_prompt(guide, "positive", 1, None) == "D: "
    assert guide_prompt(guide, "anchor", 0, {"anchor": "mine: "}) == "mine: "
    assert guide_prompt(guide, "positive", 1, {"anchor": "mine: "}) == ""
    assert guide_prompt(guide, "positive", 1, "all: ") == "all: "
    guide.prompts = {"query": None, "document": "", "other": "O: "}
    assert guide_prompt(guide, "anchor", 0, None) == "O: "


def test_the_collator_carries_embeddings_and_tokens_beside_the_students(student, guide):
    collator = GISTDataCollator(
        preprocess_fn=student.preprocess,
        tokenize_for_guide=lambda texts, column, position: {"input_ids": [column, position, texts]},
    )
    rows = [
        {"anchor": "a", "positive": "b", "anchor_guide_embedding": np.array([i, 2.5], np.float16), "label": i}
        for i in range(2)
    ]
    batch = collator(rows)
    assert batch["anchor_guide_embedding"].tolist() == [[0.0, 2.5], [1.0, 2.5]]
    assert batch["positive_guide"] == {"input_ids": ["positive", 1, ["b", "b"]]}
    assert "anchor_guide" not in batch
    assert batch["label"].tolist() == [0, 1]
    assert not any(k.startswith("anchor_guide_embedding_") for k in batch)
    rows[1]["anchor_guide_embedding"] = np.zeros(3, np.float16)
    with pytest.raises(ValueError, match=r"anchor_guide_embedding: row 1 of the batch has 3 numbers and row 0 has 2"):
        collator(rows)
