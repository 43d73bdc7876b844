"""What the start of training refuses is refused by the dry run, in one line that names the key and the numbers."""

from __future__ import annotations

import json
import logging
import random

import pytest
import torch
import yaml

from gist_fast import GISTTrainer, GISTTrainingArguments
from gist_fast.config import load_config
from gist_fast.pipeline import prepare
from gist_fast.pipeline.saved_model import SavedModel
from gist_fast.runtime.errors import InputError
from gist_fast.training.arguments import LossSettings


@pytest.fixture
def config(tmp_path, pairs, tiny_student, tiny_guide):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs.select(range(5))))
    same = [{"anchor": "the same", "positive": row["positive"]} for row in pairs]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    training = {"output_dir": "out", "per_device_train_batch_size": 16, "use_cpu": True, "report_to": "none"}
    tree = {"student": str(tiny_student), "guide": str(tiny_guide), "data": {"train": "pairs.jsonl"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "training": training}))
    return path


def refusal(config, *options):
    with pytest.raises(InputError) as caught:
        prepare(load_config(config, [str(option) for option in options]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--optim", "lion_8bit"],
            "training.optim: expected a value with which training can start, got 'lion_8bit' (Imp",
        ),
        (
            ["--bf16", "--fp16"],
            "training.bf16, training.fp16: expected values which go together, got True, True (At most",
        ),
        (
            ["--optim_args", "a"],
            "training.optim_args: expected a value with which training can start, got 'a' (ValueErr",
        ),
        (["--adam_beta1", "1"], "training.adam_beta1: expected a finite float of at least 0 and below 1, got 1."),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size: expected an int of at least 1, got 0."),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: expected an int of at least 1, got 0."),
        (["--seed", "-1"], "training.seed: expected an int of at least 0 and below 4294967296, got -1."),
        (["--learning_rate", ".nan"], "training.learning_rate: expected a number, got nan."),
        (["--save_steps", "0"], "training.save_steps: expected a finite float above 0, got 0."),
        (["--max_steps", "-7"], "training.max_steps: expected an int of at least -1, got -7."),
        (["--max_steps", "0"], "training.max_steps: expected at least 1, or -1 to train for num_train_epochs, got 0."),
        (["--num_train_epochs", "0"], "training.num_train_epochs: expected a finite float above 0, got 0."),
        (
            ["--label_smoothing_factor", "0.1"],
            "training.label_smoothing_factor: expected 0.0, got 0.1; there are no lab",
        ),
        (
            ["--train_sampling_strategy", "group_by_length"],
            "got 'group_by_length'; batches are chosen by batch_sampler.",
        ),
        (["--torch_compile_backend", "x"], "training.torch_compile_backend: expected a value with which training can"),
        (
            ["--eval_strategy", "steps"],
            "training.eval_strategy: expected data.eval or evaluation to go with it, got neither; add",
        ),
        (["--accelerator_config", "{a: 1}"], "training.accelerator_config: expected a value with which training can"),
        (
            ["--matryoshka_dims", "[4096]"],
            "loss.matryoshka_dims: expected at most 32, the width of the embeddings, got",
        ),
        (
            ["--warmup_steps", "10", "--warmup_ratio", "0.1"],
            "training.warmup_ratio: expected null with warmup_steps 10,",
        ),
        (["--push_to_hub"], "training.push_to_hub: expected "),
        (["--max_length", "1"], "training.max_length: expected at least 3, as the tokens that begin and end a text"),
        (["--guide_max_length", "{anchor: 2}"], "training.guide_max_length.anchor: expected at least 3, as the tokens"),
        (["--student.max_seq_length", "2"], "student.max_seq_length: expected an int of at least 3, got 2."),
        (["--loss.resume_with_changes", "true"], "--loss.resume_with_changes: no such setting"),
    ],
)
def test_the_line_names_the_key(config, options, says):
    assert says in refusal(config, *options)


class TestNoBatch:
    def test_a_batch_larger_than_the_data(self, config):
        options = ("--dataloader_drop_last", "--per_device_train_batch_size", "500", "--max_steps", "3")
        assert refusal(config, *options).startswith(
            "training.per_device_train_batch_size: expected at most 64, the rows of the training dataset, with "
            "dataloader_drop_last, got 500, so that there is no batch."
        )

    def test_of_several_datasets_one(self, config, tmp_path):
        few, pairs = str(tmp_path / "few.jsonl"), str(tmp_path / "pairs.jsonl")
        data = f"{{train: {{few: {{path: {few}}}, many: {{path: {pairs}}}}}}}"
        said = refusal(config, "--data", data, "--dataloader_drop_last")
        assert "expected at most 5, the rows of the training dataset 'few', with dataloader_drop_last, got 16" in said

    def test_what_is_evaluated(self, config, tmp_path):
        options = ("--data.eval", tmp_path / "few.jsonl", "--dataloader_drop_last")
        assert refusal(config, *options).startswith(
            "training.per_device_eval_batch_size: expected at most 5, the rows of the evaluation dataset, with "
        )

    def test_a_stream_that_is_evaluated(self, config, tmp_path):
        options = (
            "--data.eval.path",
            tmp_path / "few.jsonl",
            "--data.eval.streaming",
            "true",
            "--dataloader_drop_last",
        )
        said = refusal(config, *options)
        assert said.startswith("training.per_device_eval_batch_size: expected at most 5, the rows of the evaluation ")

    @pytest.mark.parametrize("sampler", ["no_duplicates", "no_duplicates_hashed"])
    def test_no_batch_without_duplicates(self, config, tmp_path, sampler):
        options = ("--data.train", tmp_path / "same.jsonl", "--dataloader_drop_last", "--batch_sampler", sampler)
        said = refusal(config, *options)
        assert f"training.per_device_train_batch_size: expected a size to which {sampler} fills one batch at " in said
        assert "of 64 rows" in said and "got 16" in said

    def test_a_trainer_of_one_s_own(self, student, pairs, tmp_path):
        common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
        for more, says in (
            ({"per_device_train_batch_size": 65, "dataloader_drop_last": True}, "expected at most 64, the rows of the"),
            ({"max_steps": 0}, "max_steps: expected at least 1, or -1 to train for num_train_epochs, got 0"),
            ({"num_train_epochs": 0}, "num_train_epochs: expected a number above 0, got 0"),
        ):
            trainer = GISTTrainer(student, GISTTrainingArguments(**common, **more), pairs)
            with pytest.raises(InputError, match=says):
                trainer.train()

    def test_a_stream_that_ends_before_its_first_batch(self, student, pairs, tmp_path):
        arguments = GISTTrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=65,
            dataloader_drop_last=True,
            use_cpu=True,
            report_to="none",
        )
        trainer = GISTTrainer(student, arguments, pairs.to_iterable_dataset())
        with pytest.raises(InputError, match="train_dataset: expected at least one batch, got none"):
            trainer.train()


def test_the_evaluation_is_rehearsed_too(config, tmp_path):
    options = ("--data.eval", tmp_path / "few.jsonl", "--label_names", "[x]")
    said = refusal(config, *options)
    assert said.startswith("training.label_names: expected a value with which training can start, got ['x'] (TypeError")
    few, pairs = str(tmp_path / "few.jsonl"), str(tmp_path / "pairs.jsonl")
    data = f"{{train: {pairs}, eval: {{few: {{path: {few}}}, many: {{path: {pairs}}}}}}}"
    options = ("--data", data, "--lr_scheduler_type", "reduce_lr_on_plateau")
    assert "'loss' could be few_loss or many_loss; write which." in refusal(config, *options)
    plan = prepare(load_config(config, [*options, "--metric_for_best_model", "many_loss"]))
    assert (plan.batches, plan.arguments.metric_for_best_model) == (4, "many_loss")


def test_a_rehearsal_leaves_nothing_behind(config, tmp_path, capfd):
    before = random.getstate(), torch.get_rng_state(), logging.root.manager.disable
    files = sorted(path.name for path in tmp_path.iterdir())
    capfd.readouterr()
    plan = prepare(load_config(config, ["--dataloader_drop_last", "--num_train_epochs", "2"]))
    assert (plan.batches, plan.describe()["steps"]) == (4, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert logging.root.manager.disable == before[2]
    assert capfd.readouterr() == ("", "")
    # Another precision in the same process: accelerate holds one for all.
    other = prepare(load_config(config, ["--bf16"]))
    assert (plan.arguments.output_dir, other.arguments.bf16) == (str(tmp_path / "out"), True)


def test_the_width_of_a_saved_model(tiny_student, tmp_path, student):
    from sentence_transformers.base.modules import Dense

    assert SavedModel(str(tiny_student), "student").width == 32
    student.append(Dense(32, 24))
    student.save_pretrained(str(tmp_path / "narrower"), create_model_card=False)
    assert SavedModel(str(tmp_path / "narrower"), "student").width == 24
    assert SavedModel(str(tmp_path), "student").width is None
    assert SavedModel("nobody/has-this", "student").width is None


def test_a_loss_that_fails_keeps_what_earlier_batches_added_for_the_temperature(student, pairs, monkeypatch):
    from gist_fast.losses import CachedGISTEmbedLoss

    loss = CachedGISTEmbedLoss(student, None, guided=False, learn_temperature=True, mini_batch_size=4)
    features = [student.preprocess(pairs[column][:4]) for column in ("anchor", "positive")]
    loss([dict(f) for f in features]).backward()
    before = loss.log_temperature.grad.clone()
    assert before != 0

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loss, "guided_loss", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss([dict(f) for f in features])
    assert torch.equal(loss.log_temperature.grad, before)


def test_settings_of_the_loss_alone_stand_under_loss():
    from gist_fast.config.schema import loss_settings

    assert set(LossSettings.__dataclass_fields__) <= set(loss_settings())
    assert "resume_with_changes" not in loss_settings()


def test_the_folder_of_tensorboard_is_tried(config, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/proc/logs")
    assert prepare(load_config(config, [])).batches == 4
    said = refusal(config, "--report_to", "tensorboard")
    assert said.startswith("TENSORBOARD_LOGGING_DIR: /proc cannot be written to (")


def test_a_warmup_longer_than_the_run_is_said(config, caplog):
    prepare(load_config(config, ["--max_steps", "5", "--warmup_steps", "5"]))
    assert "training.warmup_steps: 5 of 5 steps" in caplog.text
    caplog.clear()
    prepare(load_config(config, ["--max_steps", "5", "--warmup_steps", "0.2"]))
    assert "warmup_steps" not in caplog.text
