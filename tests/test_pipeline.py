"""From a configuration to a trained model in Python, without the command."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from gist_fast.config import load_config
from gist_fast.pipeline import RunPlan, make_trainer, prepare, train_and_save
from gist_fast.pipeline.plan import prepare_profile
from gist_fast.runtime.errors import InputError
from gist_fast.training.checkpoints import step_of, whole_checkpoints
from gist_fast.training.stop_on_signal import StopOnSignal, TrainingStoppedError


@pytest.fixture
def config(tmp_path, monkeypatch, pairs, tiny_student, tiny_guide):
    """A configuration of four steps, read in the folder that it stands in."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    training = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "output_dir": "out",
    }
    tree = {"student": str(tiny_student), "guide": str(tiny_guide), "data": {"train": "pairs.jsonl"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**tree, "training": training}))
    monkeypatch.chdir(tmp_path)
    return load_config("config.yaml")


class Signal(TrainerCallback):
    """Sends this process a signal in the second step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_configuration_becomes_a_trained_model(config, tmp_path, tiny_student):
    plan = prepare(config)
    assert isinstance(plan, RunPlan)
    assert plan.describe()["train"].endswith("pairs.jsonl: 64 rows of anchor, positive")
    assert not (tmp_path / "out").exists()
    trainer = make_trainer(plan)
    summary = train_and_save(plan, trainer)
    assert (summary["steps"], summary["rows"], summary["evaluation"]) == (4, 64, None)
    saved = SentenceTransformer(summary["model"], device="cpu").state_dict()
    before = SentenceTransformer(str(tiny_student), device="cpu").state_dict()
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in trainer.model.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in saved.items())
    with pytest.raises(InputError, match="already holds a run"):
        prepare(config)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(config):
    arguments = {**config.arguments, "output_dir": "/proc/run"}
    with pytest.raises(InputError, match=r"^training.output_dir: /proc cannot be written to \("):
        prepare(dataclasses.replace(config, arguments=arguments))


def test_what_is_wrong_names_the_file(config):
    with pytest.raises(InputError, match=r"^config\.yaml: 'guide' is missing, and the training data carry no"):
        prepare(dataclasses.replace(config, guide=None))


def test_a_profile_leaves_the_run_s_own_folder_alone(config, tmp_path):
    plan = prepare_profile(config, steps=3, warmup=1, folder=tmp_path / "scratch")
    assert (plan.output_dir, plan.arguments.max_steps, plan.evaluator) == (tmp_path / "scratch", 4, None)


def test_a_profile_needs_nothing_that_it_leaves_out(config, tmp_path):
    arguments = {**config.arguments, "push_to_hub": True, "report_to": "wandb"}
    config = dataclasses.replace(config, arguments=arguments)
    plan = prepare_profile(config, steps=3, warmup=1, folder=tmp_path / "scratch")
    assert (plan.arguments.push_to_hub, plan.arguments.report_to) == (False, [])
    with pytest.raises(InputError, match=r"^training\.(push_to_hub|report_to): "):
        prepare(config)


def test_a_signal_stops_train_and_save_with_a_checkpoint(config, tmp_path):
    plan = prepare(config)
    trainer = make_trainer(plan)
    trainer.add_callback(Signal())
    with pytest.raises(TrainingStoppedError, match=r"stopped after step 2 of 4; .*out holds checkpoint-2") as stopped:
        train_and_save(plan, trainer)
    assert stopped.value.exit_code == 143
    assert [step_of(path) for path in whole_checkpoints(tmp_path / "out")] == [2]
    # The signal is over: the same trainer trains to the end.
    trainer.remove_callback(Signal)
    assert train_and_save(plan, trainer)["steps"] == 4
    assert prepare(config, resume=True).checkpoint == tmp_path / "out" / "checkpoint-2"


def test_a_signal_stops_a_trainer_of_one_s_own(config, tmp_path, capfd):
    trainer = make_trainer(prepare(config))
    before = signal.getsignal(signal.SIGTERM)
    stop = StopOnSignal()
    trainer.add_callback(stop)
    trainer.add_callback(Signal())
    with stop:
        trainer.train()
    assert (stop.requested, stop.exit_code, trainer.state.global_step) == (True, 143, 2)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM: stopping after the step that is running" in capfd.readouterr().err
    trainer.remove_callback(Signal)
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
