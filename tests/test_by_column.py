"""Settings by column and dataset: what is found, and what is refused because it would have no effect."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict

from gist_fast import GISTTrainer, GISTTrainingArguments
from gist_fast.data.named import columns_by_dataset
from gist_fast.data.per_column import check_lengths, check_names, value_for
from gist_fast.runtime.errors import InputError


@pytest.mark.parametrize(
    ("setting", "column", "dataset", "value"),
    [
        (None, "anchor", None, None),
        (7, "anchor", "x", 7),
        ({"anchor": 7}, "anchor", None, 7),
        ({"anchor": 7}, "positive", None, None),
        ({"anchor": 7}, "anchor", "x", 7),
        ({"x": 7}, "anchor", "x", 7),
        ({"x": 7}, "anchor", "y", None),
        ({"x": {"anchor": 7}, "y": 8}, "anchor", "x", 7),
        ({"x": {"anchor": 7}, "y": 8}, "positive", "x", None),
        ({"x": {"anchor": 7}, "y": 8}, "positive", "y", 8),
        ({"anchor": {"anchor": 7}}, "anchor", "y", None),
    ],
)
def test_values(setting, column, dataset, value):
    assert value_for(setting, column, dataset) == value


def test_sentence_transformers_finds_the_same_prompts():
    from gist_fast.training.collator import GISTDataCollator

    for prompts in ("p", {"a": "p"}, {"x": "p"}, {"x": {"a": "p"}, "y": "q"}, {"x": {"a": "p"}, "y": {"b": "q"}}):
        collator = GISTDataCollator(preprocess_fn=None, prompts=prompts)
        for dataset in ("x", "y", "z"):
            resolved = collator._resolve_prompts({"dataset_name": dataset})
            for column in ("a", "b"):
                assert value_for(prompts, column, dataset) == collator._get_prompt_for_column(resolved, column)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"anchr": 1}, "it: 'anchr' is no column of the data (did you mean 'anchor'?); there is anchor, positive."),
        ({"x": {"anchor": 1}}, "it: 'x' is no dataset of the data; there is only one, without a name."),
    ],
)
def test_names_of_one_dataset(setting, says):
    with pytest.raises(InputError) as caught:
        check_names("it", setting, {"": ["anchor", "positive"]})
    assert str(caught.value) == says


def test_names_of_several():
    one, other = Dataset.from_dict({"a": ["x"], "b": ["y"]}), Dataset.from_dict({"a": ["x"], "c": ["y"]})
    columns = columns_by_dataset(DatasetDict({"one": one, "other": other}), None, {"third": other})
    assert columns == {"one": ["a", "b"], "other": ["a", "c"], "third": ["a", "c"]}
    for setting in (None, 5, {"c": 1}, {"one": 3, "third": {"c": 2}}):
        check_names("it", setting, columns)
    with pytest.raises(InputError, match=r"it\.one: 'c' is no column of the data; there is a, b\."):
        check_names("it", {"one": {"c": 1}}, columns)
    with pytest.raises(InputError, match=r"it: 'onne' is no column or dataset of the data \(did you mean 'one'\?\)"):
        check_names("it", {"onne": 1}, columns)


def test_lengths():
    check_lengths("it", {"a": 4, "x": {"b": 5}}, most=5)
    with pytest.raises(InputError, match=r"it\.x\.b: expected at least 1, got 0"):
        check_lengths("it", {"a": 4, "x": {"b": 0}})
    with pytest.raises(InputError, match=r"it: expected at most 5, the max_seq_length of the student, got 6"):
        check_lengths("it", 6, most=5)


class TestInTheTrainer:
    def trainer(self, student, guide, data, folder, **settings):
        arguments = GISTTrainingArguments(str(folder), report_to=[], use_cpu=True, **settings)
        return GISTTrainer(student, arguments, data, guide=guide)

    def test_lengths_by_column_cut_what_the_student_reads_and_not_the_guide(self, student, guide, pairs, tmp_path):
        trainer = self.trainer(student, guide, pairs, tmp_path, max_length={"positive": 7})
        batch = trainer.data_collator([pairs[k] for k in range(64)])
        alone = {c: student.preprocess(pairs[c]) for c in ("anchor", "positive")}
        assert batch["positive_input_ids"].shape == (64, 7)
        assert alone["positive"]["input_ids"].shape[1] > 7
        # Cut, not cut and padded: each row keeps its first five pieces and both marks.
        assert (batch["positive_input_ids"][:, :6] == alone["positive"]["input_ids"][:, :6]).all()
        assert (batch["anchor_input_ids"] == alone["anchor"]["input_ids"]).all()
        whole = self.trainer(student, guide, pairs, tmp_path).data_collator([pairs[k] for k in range(64)])
        assert (whole["anchor_guide"]["input_ids"] == batch["anchor_guide"]["input_ids"]).all()

    def test_one_length_for_all(self, student, guide, pairs, tmp_path):
        batch = self.trainer(student, guide, pairs, tmp_path, max_length=5).data_collator([pairs[k] for k in range(3)])
        assert batch["anchor_input_ids"].shape == batch["positive_input_ids"].shape == (3, 5)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"max_length": {"anchr": 5}}, "max_length: 'anchr' is no column of the data"),
            ({"max_length": 49}, "max_length: expected at most 48, the max_seq_length of the student, got 49"),
            ({"guide_max_length": {"positive": 0}}, "guide_max_length.positive: expected at least 1, got 0"),
            ({"guide_prompts": {"passage": "x"}}, "guide_prompts: 'passage' is no column of the data"),
        ],
    )
    def test_refused(self, student, guide, pairs, tmp_path, settings, says):
        with pytest.raises(InputError, match=says):
            self.trainer(student, guide, pairs, tmp_path, **settings)
