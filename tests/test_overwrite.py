"""``--overwrite`` and ``--resume`` lose nothing: the older run stays until the new one stands."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from prestarted import Command, on_ranks
from sentence_transformers import SentenceTransformer

from gist_fast.pipeline.run_folder import ASIDE, prepare_folder, replacing, settle
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import replace_folder
from gist_fast.training.checkpoints import whole_checkpoints


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, "train")


@pytest.fixture
def config(tmp_path, pairs, tiny_student):
    """A run of four steps without a guide."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    training = {"output_dir": "out", "num_train_epochs": 1, "per_device_train_batch_size": 16, "use_cpu": True}
    tree = {"student": str(tiny_student), "guide": None, "data": {"train": "pairs.jsonl"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "training": training | {"learning_rate": 0.001, "logging_steps": 2}}))
    return path


@pytest.fixture
def old(tmp_path):
    """The folder of an older run: a checkpoint, the model, tables, events; and a file of the user's."""
    out = tmp_path / "out"
    files = {"checkpoint-2": "old", "final": "old", "eval": "table.csv", "runs": "events.out.tfevents.1.host.2.0"}
    for name, file in files.items():
        (out / name).mkdir(parents=True)
        (out / name / file).write_text(name)
    (out / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    return out


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        ["--optim", "adamw_bnb_8bit"],
        ["--batch_sampler", "group_by_label"],
        ["--neftune_noise_alpha", "5"],
        ["--use_liger_kernel"],
        ["--lr_scheduler_type", "cosine_with_min_lr"],
        ["--learning_rate", "-1"],
        ["--dataloader_num_workers", "-1"],
        ["--dataloader_drop_last", "--per_device_train_batch_size", "500"],
        ["--report_to", "wandb"],
        ["--max_steps", "0"],
        ["--num_train_epochs", "0"],
    ],
    ids=lambda options: options[0][2:],
)
def test_what_the_start_of_training_refuses_is_refused_before_anything_is_touched(run, config, old, options):
    before = contents(old)
    for how in ("--dry-run", "--overwrite"):
        result = run(config, "--overwrite", *({how} - {"--overwrite"}), *options)
        assert (result.code, result.out) == (2, "")
        last = result.err.strip().splitlines()[-1]
        assert last.startswith("gist-fast: ") and options[-2 if len(options) % 2 == 0 else -1][2:] in last
        assert contents(old) == before


def test_the_dry_run_tells_what_would_go(run, config, old):
    before = contents(old)
    plan = json.loads(run(config, "--overwrite", "--dry-run", "--json").out)
    assert plan["deletes"] == ["checkpoint-2", "final", "eval", "runs"]
    assert contents(old) == before


@pytest.mark.parametrize("step", ["on_train_begin", "on_step_end"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_run_that_fails_before_it_saved_anything_leaves_the_older_one_as_it_was(
    run, config, old, monkeypatch, step, error
):
    from gist_fast.training.stop_on_signal import StopOnSignal

    def fail(self, args, state, control, **_):
        if state.global_step or step == "on_train_begin":
            # What it would delete is out of the way, and nothing of it is gone.
            assert not whole_checkpoints(old) and not (old / "final").exists()
            raise error

    before = contents(old)
    monkeypatch.setattr(StopOnSignal, step, fail)
    result = run(config, "--overwrite", "--report_to", "tensorboard")
    assert result.code == (1 if isinstance(error, RuntimeError) else 130)
    assert f"{old}: put back, as the run that was to replace it saved nothing: checkpoint-2, eval, final" in result.err
    assert contents(old) == before


def test_the_older_run_goes_once_a_checkpoint_of_the_new_one_stands(run, config, old, monkeypatch):
    from gist_fast.training.stop_on_signal import StopOnSignal

    def fail(self, args, state, control, **_):
        if state.global_step == 2:
            raise RuntimeError("broken")

    monkeypatch.setattr(StopOnSignal, "on_step_begin", fail, raising=False)
    result = run(config, "--overwrite", "--save_steps", "2")
    assert result.code == 1
    assert f"Deleted from {old}: checkpoint-2, eval, final, runs." in result.err
    assert sorted(path.name for path in old.iterdir()) == ["checkpoint-2", "notes.txt"]
    assert not (old / "checkpoint-2" / "old").exists()


def test_without_checkpoints_the_older_run_goes_when_the_model_stands(run, config, old, monkeypatch):
    def kept(new, place, *args):
        assert (next(old.glob(f"{ASIDE}.*")) / "final" / "old").read_text() == "final"
        return replace_folder(new, place, *args)

    monkeypatch.setattr("gist_fast.pipeline.train.replace_folder", kept)
    assert run(config, "--overwrite", "--save_strategy", "no").code == 0
    assert sorted(path.name for path in old.iterdir()) == ["final", "notes.txt"]
    SentenceTransformer(str(old / "final"), device="cpu")


def test_a_model_that_is_not_finite_is_not_saved(run, config, old):
    before = contents(old)
    # The first step breaks the weights, and no later one sees it.
    options = ("--learning_rate", "1e38", "--max_grad_norm", "0", "--max_steps", "1", "--optim", "sgd")
    result = run(config, "--overwrite", "--save_strategy", "no", "--lr_scheduler_type", "constant", *options)
    assert result.code == 1
    assert "after step 1 the weights of " in result.err and "are not finite, so the model is not saved" in result.err
    assert contents(old) == before


def test_a_killed_run_leaves_the_older_one_to_be_put_back(run, config, old):
    before = contents(old)
    first = "import gist_fast.training.trainer as t, os, signal\n"
    first += "t.GISTTrainer.training_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    # The rehearsal makes a step too.
    first += "import gist_fast.pipeline.plan as p\np.rehearse = lambda *_, **__: None\n"
    process = Command("train", config, "--overwrite", first=first)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (old / "final").exists()
    result = run(config)
    assert result.code == 2
    assert "put back, as the run that was to replace it saved nothing: checkpoint-2, eval, final, runs." in result.err
    assert "already holds a run (checkpoint-2, final)" in result.err
    assert contents(old) == before


class TestCutOffAnywhere:
    """Each rename and each deletion is the last thing that a process does; then another one starts there."""

    @pytest.mark.parametrize("new", [None, "final"])
    def test_each_step(self, old, monkeypatch, new):
        before = contents(old)
        real, removed = os.replace, []
        for limit in range(20):
            left = [limit]

            def counted(one, other, left=left):
                if left[0] == 0:
                    raise SystemExit
                left[0] -= 1
                real(one, other)

            monkeypatch.setattr(os, "replace", counted)
            ended = True
            try:
                with replacing(old):
                    (old / "eval").mkdir()
                    (old / "eval" / "new").write_text("of the new run")
                    if new:
                        (old / new).mkdir()
            except SystemExit:
                ended = False
            monkeypatch.setattr(os, "replace", real)
            settle(old)
            if new and not (old / "final" / "old").exists():
                removed.append(limit)
                assert sorted(path.name for path in old.iterdir()) == ["eval", "final", "notes.txt"]
                break
            assert contents(old) == before
            if ended:
                break
        assert ended
        assert bool(removed) == bool(new)


def test_a_run_that_is_being_replaced_is_left_alone(old, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    aside = old / f"{ASIDE}.{socket.gethostname()}-{process.pid}"
    aside.mkdir()
    os.rename(old / "final", aside / "final")
    before = contents(old)
    try:
        for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(InputError, match=f"process {process.pid} is replacing the run there"):
                prepare_folder(old, **options)
        assert contents(old) == before
    finally:
        process.communicate(b"\n")
    os.rename(old / "checkpoint-2", aside / "checkpoint-2")
    assert prepare_folder(old, resume=True, overwrite=False) == old / "checkpoint-2"
    assert (old / "final" / "old").exists()


class TestLinks:
    def test_a_final_that_is_a_link_is_replaced_and_its_target_stays(self, run, config, old, tmp_path):
        target = tmp_path / "models" / "mine"
        target.parent.mkdir()
        os.rename(old / "final", target)
        (old / "final").symlink_to(target)
        kept = contents(target)
        assert run(config, "--overwrite", "--max_steps", "1").code == 0
        assert not (old / "final").is_symlink()
        assert contents(target) == kept
        assert sorted(path.name for path in old.iterdir()) == ["checkpoint-1", "final", "notes.txt"]

    def test_a_checkpoint_and_the_folder_itself_may_be_links(self, run, config, old, tmp_path):
        target = tmp_path / "elsewhere"
        os.rename(old / "checkpoint-2", target)
        (old / "checkpoint-2").symlink_to(target)
        os.rename(old, tmp_path / "real")
        old.symlink_to(tmp_path / "real")
        kept = contents(target)
        assert run(config, "--overwrite", "--max_steps", "1").code == 0
        assert contents(target) == kept
        assert old.is_symlink()
        assert sorted(path.name for path in old.iterdir()) == ["checkpoint-1", "final", "notes.txt"]

    @pytest.mark.parametrize("leads", [True, False])
    def test_a_link_is_replaced_as_such(self, tmp_path, leads):
        (tmp_path / "new").mkdir()
        (tmp_path / "target").mkdir()
        (tmp_path / "old").symlink_to(tmp_path / ("target" if leads else "nowhere"))
        replace_folder(tmp_path / "new", tmp_path / "old")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "target"]
        assert not (tmp_path / "old").is_symlink()

    def test_a_folder_that_is_a_link_to_nothing_is_refused(self, run, config, tmp_path):
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
        result = run(config, "--dry-run")
        assert result.code == 2
        assert f"out is a link to {tmp_path / 'nowhere'}, which does not exist" in result.err


def test_a_place_that_the_run_writes_to_besides_is_tried_first(run, config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval").write_text("a file")
    result = run(config, "--dry-run")
    assert result.code == 2
    assert f"training.output_dir: {tmp_path / 'out' / 'eval'} is a file, not a folder" in result.err


class TestFinished:
    def test_a_run_that_has_reached_its_last_step_is_left_alone(self, run, config, tmp_path):
        options = ("--max_steps", "3", "--save_steps", "1", "--save_total_limit", "2")
        assert run(config, *options).code == 0
        before = contents(tmp_path / "out")
        trained = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        for _ in range(2):
            result = run(config, *options, "--resume", "--json")
            assert result.code == 0
            assert f"{tmp_path / 'out'}: the run is finished (checkpoint-3); nothing is trained." in result.err
            summary = json.loads(result.out)
            assert (summary["steps"], summary["model"]) == (3, str(tmp_path / "out" / "final"))
            assert summary["loss"] > 0 and trained
            assert contents(tmp_path / "out") == before

    def test_a_missing_model_is_written_and_nothing_else(self, run, config, tmp_path):
        options = ("--max_steps", "3", "--report_to", "tensorboard")
        assert run(config, *options).code == 0
        out = tmp_path / "out"
        whole = SentenceTransformer(str(out / "final"), device="cpu").state_dict()
        os.rename(out / "final", tmp_path / "final")
        before = contents(out)
        result = run(config, *options, "--resume")
        assert result.code == 0
        assert "the run is finished" in result.err
        after = contents(out)
        assert {name: after[name] for name in after if not name.startswith("final/")} == before
        written = SentenceTransformer(str(out / "final"), device="cpu").state_dict()
        assert all(torch.equal(whole[name], written[name]) for name in whole)

    def test_the_model_of_an_earlier_stage_is_written_anew(self, run, config, tmp_path):
        assert run(config, "--max_steps", "2", "--lr_scheduler_type", "constant").code == 0
        out = tmp_path / "out"
        os.rename(out / "final", tmp_path / "early")
        assert run(config, "--max_steps", "4", "--lr_scheduler_type", "constant", "--resume").code == 0
        whole = contents(out / "final")["model.safetensors"]
        os.rename(out / "final", tmp_path / "late")
        os.rename(tmp_path / "early", out / "final")  # as if killed between the last checkpoint and the model
        assert run(config, "--max_steps", "4", "--lr_scheduler_type", "constant", "--resume").code == 0
        assert contents(out / "final")["model.safetensors"] == whole

    def test_a_trainer_of_one_s_own_takes_no_step_more(self, student, pairs, tmp_path):
        from gist_fast import GISTTrainer, GISTTrainingArguments

        arguments = GISTTrainingArguments(str(tmp_path / "run"), max_steps=3, use_cpu=True, report_to="none")
        GISTTrainer(student, arguments, pairs).train()
        trained = {name: value.clone() for name, value in student.state_dict().items()}
        outcome = GISTTrainer(student, arguments, pairs).train(resume_from_checkpoint=True)
        assert outcome.global_step == 3
        assert all(torch.equal(value, trained[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("logged", ["between", "never"])
def test_the_loss_of_a_resumed_run_is_the_mean_over_the_steps_it_names(run, config, tmp_path, logged):
    options = ("--num_train_epochs", "3", "--save_steps", "5", "--json")
    options += ("--logging_steps", "4" if logged == "between" else "100")
    whole = json.loads(run(config, *options).out)
    out = tmp_path / "out"
    (tmp_path / "part").mkdir()
    os.rename(out / "checkpoint-5", tmp_path / "part" / "checkpoint-5")
    resumed = json.loads(run(config, *options, "--resume", "--output_dir", tmp_path / "part").out)
    assert resumed["steps"] == whole["steps"] == 12
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_loss_of_a_checkpoint_that_does_not_hold_its_sum(run, config, tmp_path):
    options = ("--num_train_epochs", "3", "--save_steps", "4", "--json", "--logging_steps", "2")
    whole = json.loads(run(config, *options).out)
    (tmp_path / "part").mkdir()
    os.rename(tmp_path / "out" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    file = tmp_path / "part" / "checkpoint-4" / "gist_fast_state_0.pt"
    state = torch.load(file)
    del state["loss_until_log"]  # as earlier versions wrote it
    torch.save(state, file)
    (tmp_path / "part" / "checkpoint-4" / "gist_fast_manifest.json").unlink()
    resumed = json.loads(run(config, *options, "--resume", "--output_dir", tmp_path / "part").out)
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-4)


class TestGoingOn:
    def test_what_training_would_not_go_on_with_is_refused_by_the_dry_run(self, run, config, tmp_path):
        assert run(config, "--max_steps", "4", "--save_steps", "2").code == 0
        assert run(config, "--resume", "--dry-run", "--max_steps", "6").code == 0
        for options, says in (
            (("--per_device_train_batch_size", "8"), "per_device_train_batch_size was 16, is 8."),
            (("--temperature", "0.5"), "loss.temperature was 0.01, is 0.5."),
            (("--seed", "5"), "seed was 42, is 5."),
        ):
            result = run(config, "--resume", "--dry-run", "--max_steps", "6", *options)
            assert (result.code, result.out) == (2, "")
            assert f"{tmp_path / 'out' / 'checkpoint-4'}: was made with other settings: {says}" in result.err
            assert run(config, "--resume", "--dry-run", "--resume_with_changes", *options).code == 0

    def test_a_checkpoint_of_the_model_alone(self, run, config):
        options = ("--max_steps", "4", "--save_only_model", "true")
        assert run(config, *options).code == 0
        for more in (("--dry-run",), ()):
            result = run(config, "--resume", "--max_steps", "6", *more)
            assert (result.code, result.out) == (2, "")
            assert "checkpoint-4: holds the model alone (save_only_model), so the optimizer and its" in result.err
        assert run(config, "--resume", "--max_steps", "6", "--resume_with_changes", "true").code == 0

    def test_the_best_checkpoint_is_found_where_the_run_was_moved_to(self, run, config, tmp_path):
        options = ("--data.eval", tmp_path / "pairs.jsonl", "--load_best_model_at_end", "--max_steps", "4")
        options += ("--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1")
        # So that the first is the best.
        options += ("--metric_for_best_model", "eval_loss", "--learning_rate", "10")
        assert run(config, *options).code == 0
        best = contents(tmp_path / "out" / "final")["model.safetensors"]
        assert best == contents(tmp_path / "out" / "checkpoint-1")["model.safetensors"]
        shutil.rmtree(tmp_path / "out" / "final")
        os.rename(tmp_path / "out", tmp_path / "moved")
        assert run(config, *options, "--output_dir", tmp_path / "moved", "--resume").code == 0
        assert contents(tmp_path / "moved" / "final")["model.safetensors"] == best


@pytest.mark.skipif(os.name == "nt", reason="torchrun's rendezvous with gloo is not offered on Windows")
@pytest.mark.slow
def test_several_processes_overwrite_once_and_finish_once(config, old):
    said = []
    for options in (("--overwrite",), ("--resume",)):
        first = on_ranks(2, "gist_fast.cli.main")
        process = Command("train", config, "--max_steps", "2", "--save_strategy", "steps", *options, first=first)
        said.append(process.communicate(timeout=240)[1].decode())
        assert process.returncode == 0 or "exitcode  : 0" in said[-1], said[-1]
        assert sorted(path.name for path in old.iterdir()) == ["checkpoint-2", "final", "notes.txt"]
    assert said[0].count(f"Deleted from {old}: checkpoint-2, eval, final, runs.") == 1
    assert not (old / "final" / "old").exists()
    assert said[1].count("the run is finished (checkpoint-2); nothing is trained.") == 1
