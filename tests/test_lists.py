"""Lists of positives and negatives in a row: read, spread over columns, and trained on."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from oracle import assert_same_step, step_of

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide, guided_contrastive_loss
from gist_fast.config.schema import SourceConfig
from gist_fast.data.lists import spread_lists
from gist_fast.data.load import load_texts, stream_texts
from gist_fast.evaluation.evaluators import _load_triplets
from gist_fast.inspection import find_duplicates, inspect_batch
from gist_fast.training.no_duplicates_sampler import NoDuplicatesBatchSampler

ROWS = [
    {"query": "q1", "pos": ["p1", "p2"], "neg": ["n1", "n2", "n3"], "pos_scores": [0.9, 0.8], "topic": "a"},
    {"query": "q2", "pos": ["p3"], "neg": [], "pos_scores": [0.7], "topic": "b"},
    {"query": "q3", "pos": ["p4"], "neg": ["n4"], "pos_scores": [0.6], "topic": "a"},
]
SPREAD = {
    "anchor": ["q1", "q1", "q2", "q3"], "positive": ["p1", "p2", "p3", "p4"], "negative_1": ["n1", "n1", "", "n4"],
    "negative_2": ["n2", "n2", "", ""], "negative_3": ["n3", "n3", "", ""],
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_rows_of_flag_embedding_are_read(kind, tmp_path, caplog):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(path, ROWS)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        Dataset.from_list(ROWS).save_to_disk(path)
    assert load_texts(path).to_dict() == SPREAD
    assert "3 rows with lists of positives became 4 rows of one" in caplog.text
    named = {"anchor": "query", "positive": "pos", "negative": "neg", "group": "topic"}
    assert load_texts(path, columns=named).to_dict() == {**SPREAD, "group": [0, 0, 1, 0]}
    assert load_texts(path, columns={"anchor": "query", "positive": "pos"}).column_names == ["anchor", "positive"]
    if kind == "jsonl":
        with pytest.raises(ValueError, match=r"column 'positive' holds lists of texts, .* leave out streaming"):
            stream_texts(path)


WRONG = {
    "no positive": ([{"query": "a", "pos": []}], {}, r"row 1.*, column 'pos': is an empty list; 1 text at least"),
    "a blank positive": ([{"query": "a", "pos": ["b", " "]}], {}, r"row 1.*, column 'pos': is empty; a text is needed"),
    "a number": ([{"query": "a", "pos": ["b"], "neg": [1]}], {}, r"row 1.*, column 'neg': is 1; a text is needed"),
    "a text later": (
        [{"query": "a", "pos": ["b"]}, {"query": "a", "pos": "b"}],
        {},
        r"row 2.*, column 'pos': is 'b'; a list of texts is needed, as before",
    ),
    "a list later": (
        [{"query": "a", "pos": "b"}, {"query": "a", "pos": ["b"]}],
        {},
        r"row 2.*, column 'pos': is \['b'\]; a text is needed",
    ),
    "lists of anchors": (
        [{"query": ["a"], "pos": ["b"]}],
        {},
        r"row 1.*, column 'query': is \['a'\]; a text is needed",
    ),
    "a negative beside lists": (
        [{"query": "a", "pos": ["b"], "neg": ["x"], "negative_1": "y"}],
        {"anchor": "query", "positive": "pos", "negative": "neg"},
        "column 'negative_1' stands beside lists of negatives",
    ),
    "groups of negatives that are lists": (
        [{"query": "a", "pos": "b", "neg": ["x"], "of": 1}],
        {"anchor": "query", "positive": "pos", "negative": "neg", "negative_3_group": "of"},
        "column 'negative_3_group' stands beside lists of negatives",
    ),
    "groups of negatives that are not there": (
        [{"query": "a", "pos": "b", "of": "d0"}],
        {"anchor": "query", "positive": "pos", "negative_group": "of"},
        "columns: negative_group is for the texts of negative, and there are none",
    ),
    "groups beside lists": (
        [{"query": "a", "pos": ["b"], "neg": ["x"], "of": 1}],
        {"anchor": "query", "positive": "pos", "positive_group": "of"},
        "column 'positive_group' goes with a column of lists",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_list_is_refused_by_row_and_column(name, tmp_path):
    rows, columns, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        load_texts(write(tmp_path / "rows.jsonl", rows), columns=columns or None)


def test_groups_may_be_named_beside_flag_embedding_s_columns(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert load_texts(path, columns={"group": "topic"}).to_dict() == {**SPREAD, "group": [0, 0, 1, 0]}


def test_groups_of_a_saved_dataset_may_be_of_several_types(tmp_path):
    rows = {"anchor": ["a", "b"], "positive": ["c", "d"], "group": ["1", "2"], "positive_group": [2, 7]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    found = load_texts(tmp_path / "saved", columns={"group": "group", "positive_group": "positive_group"})
    assert found["group"][:] == [0, 1] and found["positive_group"][:] == [1, 2]


def test_lists_of_one_s_own_dataset():
    data = Dataset.from_list(
        [{"query": "q", "pos": ["p1", "p2"], "neg": None}, {"query": "r", "pos": ["p3"], "neg": ["n"]}]
    )
    assert spread_lists(data).to_dict() == {
        "anchor": ["q", "q", "r"], "positive": ["p1", "p2", "p3"], "negative_1": ["", "", "n"]
    }  # fmt: skip
    for nothing in ([], None):
        rows = Dataset.from_list([{"query": "q", "pos": ["p"]}, {"query": "r", "pos": nothing}])
        with pytest.raises(ValueError, match="dataset: row 2, column 'positive': no text; one at least is needed"):
            spread_lists(rows)


@pytest.fixture
def uneven(pairs):
    """Eight rows with none, one or two negatives."""
    anchors, positives = list(pairs["anchor"]), list(pairs["positive"])
    return Dataset.from_dict(
        {
            "anchor": anchors[:8],
            "positive": positives[:8],
            "negative_1": [positives[20 + k] if k % 3 else "" for k in range(8)],
            "negative_2": [positives[30 + k] if k % 3 == 2 else "" for k in range(8)],
        }
    )


def arguments(tmp_path, **settings):
    settings = {"temperature": 0.1, "max_steps": 2, "per_device_train_batch_size": 8} | settings
    return GISTTrainingArguments(
        str(tmp_path / "run"), report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        logging_steps=1, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("mini_batch_size", [None, 3])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("scope", ["own", "all"])
def test_a_batch_of_unequal_numbers_of_negatives(scope, carried, mini_batch_size, tmp_path, student, guide, uneven):
    student.eval()
    data = uneven
    if carried:
        data = embed_guide(uneven, guide, prompts="", cache_dir=tmp_path / "cache", show_progress_bar=False)
    args = arguments(
        tmp_path, negatives_scope=scope, groups="positive", guide_prompts=None if carried else "",
        mini_batch_size=mini_batch_size,
    )  # fmt: skip
    trainer = GISTTrainer(student, args, data, guide=None if carried else guide)
    batch = trainer.data_collator([data[k] for k in range(8)])
    features, labels = trainer.collect_features(batch)
    assert [len(f["input_ids"]) for f in features] == [8, 8, 5, 2]
    found = step_of(trainer.loss(features, labels), student)

    columns = [[text for text in uneven[name] if text] for name in uneven.column_names]
    a, p, *negatives = (student(student.preprocess(texts))["sentence_embedding"] for texts in columns)
    with torch.no_grad():
        ga, gp, *judged = (guide(guide.preprocess(texts))["sentence_embedding"] for texts in columns)
    rows = [torch.tensor([k for k in range(8) if k % 3]), torch.tensor([2, 5])]
    expected = guided_contrastive_loss(
        a, p, ga, gp, negatives, judged, temperature=0.1, backend="reference", negatives_scope=scope,
        negative_rows=rows if scope == "own" else None,
    )  # fmt: skip
    assert_same_step(found, step_of(expected, student))


@pytest.mark.parametrize("mode", [None, "hard_negatives", "in_batch_negatives", "all_negatives"])
@pytest.mark.parametrize("scope", ["own", ["own", "own"]])
def test_training_goes_through_batches_without_any_negative(scope, mode, tmp_path, student, guide, uneven):
    args = arguments(
        tmp_path, negatives_scope=scope, per_device_train_batch_size=1, max_steps=8, batch_sampler="no_duplicates",
        hardness_mode=mode, hardness_strength=3.0 if mode else 0.0,
    )  # fmt: skip
    trainer = GISTTrainer(student, args, uneven, guide=guide)
    trainer.train()
    assert trainer.state.global_step == 8


REFUSED = {
    "a scope for each": ({"negatives_scope": ["own", "all"]}, r"negatives_scope: expected 'all' or 'own' where rows"),
    "gathered": ({"gather_across_devices": True}, r"gather_across_devices: expected False .*With negatives_scope: own"),
    "hardness of own rows": (
        {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
        r"hardness_mode: expected 'all_negatives' or None .*in train_dataset there is none in 'negative_1' in 3, 'neg",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_as_many_negatives_of_each_row_is_refused(name, tmp_path, student, guide, uneven):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        GISTTrainer(student, arguments(tmp_path, **settings), uneven, guide=guide)


def test_hardness_of_own_negatives_needs_not_all(tmp_path, student, guide, uneven):
    own = {"negatives_scope": "own", "hardness_mode": "hard_negatives", "hardness_strength": 5.0}
    GISTTrainer(student, arguments(tmp_path, **own), uneven, guide=guide).train()


def test_what_is_not_there_is_no_duplicate(uneven, guide):
    batches = list(NoDuplicatesBatchSampler(uneven, 4, drop_last=True))
    assert [len(batch) for batch in batches] == [4, 4]

    def encode(texts, column, place):
        return guide.encode(texts, convert_to_tensor=True)

    assert find_duplicates(uneven, encode, near=0.9999).copied_texts == 0
    assert find_duplicates(uneven.select([0, 3]), encode, near=0.9999).copied_texts == 0
    found = inspect_batch(uneven, encode, batch_size=8)
    assert found.compared["an_1"] == 8 * 5 and found.compared["an_2"] == 8 * 2
    own = inspect_batch(uneven, encode, batch_size=8, negatives_scope="own")
    assert own.compared["an_1"] == 5 and own.compared["an_2"] == 2


def test_triplets_to_evaluate_need_a_negative_each(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="row 3 has no negative; triplets need one in each row"):
        _load_triplets(SourceConfig(str(path)))
    whole = write(tmp_path / "whole.jsonl", [ROWS[0], ROWS[2]])
    assert _load_triplets(SourceConfig(str(whole)))["negative_1"] == ["n1", "n1", "n4"]


def test_the_command_trains_on_lists(tmp_path, tiny_student, tiny_guide, pairs):
    from typer.testing import CliRunner

    from gist_fast.cli.main import app

    answers = list(pairs["positive"])
    random = np.random.default_rng(0)
    rows = [
        {"query": pairs[k]["anchor"], "pos": answers[k : k + 1 + k % 2], "neg": random.choice(answers, k % 4).tolist()}
        for k in range(24)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    config = {
        "student": str(tiny_student), "guide": str(tiny_guide), "data": {"train": str(path)},
        "loss": {"groups": "anchor_or_positive", "negatives_scope": "own", "mask_negatives": False},
        "training": {"output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 8,
                     "logging_steps": 1, "use_cpu": True},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml")])
    assert done.exit_code == 0, done.output
