"""A run may die at any moment: what it left is whole, and going on from there ends in bitwise the same weights."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, DatasetDict
from prestarted import Command
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
from gist_fast.losses import GISTEmbedLoss
from gist_fast.runtime import files
from gist_fast.runtime.errors import InputError
from gist_fast.training import checkpoints as folders
from gist_fast.training.checkpoints import (
    MANIFEST,
    UNFINISHED,
    CheckpointError,
    checkpoint_folders,
    delete_old,
    fault,
    last_whole,
    publish,
    whole_checkpoints,
)
from gist_fast.training.resume import _set_epoch

STEPS_AN_EPOCH = 4
SPEEDS = ("per_second", "runtime", "memory", "epoch", "flos")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_bitwise(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, among them {different[:3]}"


def logged(trainer) -> list[dict[str, float]]:
    """The log but for speeds, and for the summary of what one process did."""
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in SPEEDS)}
        for entry in trainer.state.log_history
        if "train_loss" not in entry
    ]


@pytest.fixture(autouse=True)
def _no_model_cards(monkeypatch):
    # Writing one takes longer than all else that such a small run does.
    monkeypatch.setattr(SentenceTransformer, "_create_model_card", lambda *_, **__: None)


class SaveAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_save = control.should_save or state.global_step in self.steps


class Runs:
    """Runs of one kind: a whole one that saves on its way, and others that go on from there."""

    def __init__(self, tmp_path, student, guide, pairs, *, loss=None, datasets=None, **options):
        self.folder, self.student, self.guide = tmp_path, student, guide
        self.data, self.loss, self.options = datasets or pairs, loss, options
        self.eval = pairs.select(range(16)) if "eval_strategy" in options else None

    def train(self, name: str, resume: Path | None = None, callback=None, guided: bool | None = None, **more):
        model = SentenceTransformer(str(self.student), device="cpu")
        args = GISTTrainingArguments(
            **{
                "output_dir": str(self.folder / name),
                "num_train_epochs": 2,
                "per_device_train_batch_size": 16,
                "learning_rate": 1e-3,
                "logging_steps": 3,
                "save_strategy": "steps",
                "save_steps": 1,
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                **self.options,
                **more,
            }
        )
        trainer = GISTTrainer(
            model,
            args,
            self.data,
            self.eval,
            loss=None if self.loss is None else self.loss(model, self.guide),
            guide=self.guide if self.loss is None else None,
            guided=guided,
            callbacks=[callback] if callback else None,
        )
        # What a program did with the random numbers before has no bearing on a run that goes on.
        torch.rand(7 if resume else 1), random.random()
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    def from_step(self, step: int):
        """The run from the checkpoint of a step, in a folder that holds nothing else."""
        name = f"from-{step}"
        shutil.copytree(self.folder / "whole" / f"checkpoint-{step}", self.folder / name / f"checkpoint-{step}")
        return self.train(name, self.folder / name / f"checkpoint-{step}", save_strategy="no")


def learnt_temperature(model, guide):
    return GISTEmbedLoss(model, guide, temperature=nn.Parameter(torch.tensor(0.05)))


RUNS = {
    "plain": ({}, (4, 6)),
    "no duplicates": ({"batch_sampler": "no_duplicates"}, (6,)),
    "accumulation": ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5, "logging_steps": 2}, (7,)),
    "gradient cache": ({"mini_batch_size": 3, "activation_memory": 0}, (5,)),
    "evaluated by epoch": ({"eval_strategy": "epoch"}, (4, 6)),
    "learnt temperature": ({"loss": learnt_temperature}, (5,)),
}
MORE_RUNS = {
    "evaluated by steps": ({"eval_strategy": "steps", "eval_steps": 3}, (5,)),
    "bf16": ({"bf16": True}, (6,)),
    "another optimizer": ({"lr_scheduler_type": "cosine", "warmup_steps": 3, "optim": "adafactor"}, (5,)),
    "two datasets": ({"datasets": (24, 40), "multi_dataset_batch_sampler": "proportional"}, (7,)),
    "workers": ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, (4,)),
}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        *(pytest.param(*run, id=name) for name, run in RUNS.items()),
        *(pytest.param(*run, id=name, marks=pytest.mark.slow) for name, run in MORE_RUNS.items()),
    ],
)
def test_from_any_step_it_ends_the_same(options, steps, tmp_path, tiny_student, guide, pairs):
    # The student has dropout, so random numbers that are not what they were show in every weight.
    if "datasets" in options:
        cut, end = options["datasets"][0], sum(options["datasets"])
        parts = {"one": pairs.select(range(cut)), "two": pairs.select(range(cut, end))}
        options = {**options, "datasets": DatasetDict(parts)}
    runs = Runs(tmp_path, tiny_student, guide, pairs, **options)
    whole = runs.train("whole", save_strategy="no", callback=SaveAfter(steps))
    assert whole.state.global_step > max(steps)
    for step in steps:
        resumed = runs.from_step(step)
        assert_bitwise(weights(resumed.model), weights(whole.model))
        assert logged(resumed) == logged(whole)
        if options.get("loss"):
            assert whole.loss.temperature.item() != pytest.approx(0.05, abs=1e-5)
            assert torch.equal(resumed.loss.temperature, whole.loss.temperature)


def test_samplers_of_several_processes_are_told_the_epoch():
    """Where a run goes on inside an epoch, the trainer's own way to them ends at the wrapper that skips."""

    def loader():
        rows = Dataset.from_dict({"text": [str(k) for k in range(40)]})
        batches = NoDuplicatesBatchSampler(rows, batch_size=4, drop_last=False, generator=torch.Generator(), seed=0)
        plain = DataLoader(rows, batch_sampler=batches, collate_fn=list)
        return prepare_data_loader(plain, num_processes=2, process_index=1, put_on_device=False)

    def batches_of(batches, epoch):
        # What transformers does before an epoch.
        batches.set_epoch(epoch)
        inner = getattr(batches.batch_sampler, "batch_sampler", None)
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)
        return list(batches)

    second = batches_of(loader(), 1)
    assert second != batches_of(loader(), 0)
    skipped = skip_first_batches(loader(), 2)
    assert batches_of(skipped, 1) != second[2:], "it is told by itself now"
    skipped = skip_first_batches(loader(), 2)
    _set_epoch(skipped, 1)
    assert batches_of(skipped, 1) == second[2:]


@pytest.mark.slow
def test_evaluating_leaves_the_training_alone(tmp_path, tiny_student, guide, pairs):
    results = [
        Runs(tmp_path, tiny_student, guide, pairs, **options).train(f"run{k}", save_strategy="no", max_steps=6).model
        for k, options in enumerate([{}, {"eval_strategy": "steps", "eval_steps": 1}])
    ]
    assert_bitwise(weights(results[0]), weights(results[1]))


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def test_the_best_and_the_last_checkpoint_stay(tmp_path, tiny_student, guide, pairs):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the worst, so that the best is not the last
        "save_total_limit": 1,
    }
    runs = Runs(tmp_path, tiny_student, guide, pairs, **options)
    trainer = runs.train("run", callback=StopAfter(6))
    best = trainer.state.best_global_step
    assert best < 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    assert [path.name for path in checkpoint_folders(tmp_path / "run")] == [f"checkpoint-{best}", "checkpoint-6"]
    told = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert told["best_model_checkpoint"] == trainer.state.best_model_checkpoint
    resumed = runs.train("run", resume=last_whole(tmp_path / "run"))
    whole = runs.train("whole")
    assert_bitwise(weights(resumed.model), weights(whole.model))


class TestSettings:
    @pytest.fixture
    def run(self, tmp_path, tiny_student, guide, pairs):
        runs = Runs(tmp_path, tiny_student, guide, pairs, save_steps=2, max_steps=4)
        runs.train("whole")
        return runs

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"per_device_train_batch_size": 8}, "per_device_train_batch_size was 16, is 8"),
            ({"seed": 7}, "seed was 42, is 7"),
            ({"temperature": 0.5}, "loss.temperature was 0.01, is 0.5"),
            ({"hard": True}, "loss.hard was 'none', is True"),
            ({"temperature_schedule": "linear", "temperature_end": 0.02}, "temperature_schedule was None, is 'linear'"),
            ({"margin_strategy": "relative"}, "loss.margin_strategy was 'absolute', is 'relative'"),
            ({"batch_sampler": "no_duplicates"}, "batch_sampler was 'batch_sampler', is 'no_duplicates'"),
            ({"prompts": {"anchor": "query: "}}, "prompts was None, is {'anchor': 'query: '}"),
        ],
    )
    def test_what_makes_another_run_of_it_is_refused(self, run, change, says, caplog):
        last = last_whole(run.folder / "whole")
        with pytest.raises(InputError, match="was made with other settings") as refused:
            run.train("whole", resume=last, **change)
        assert says in str(refused.value)
        with caplog.at_level(logging.WARNING, "gist_fast"):
            run.train("whole", resume=last, resume_with_changes=True, **change)
        assert says in caplog.text

    def test_training_without_the_guide_is_another_run(self, run, tiny_guide):
        """Embeddings of a guide in the data are no model that could be compared."""
        run.data = embed_guide(run.data, run.guide, show_progress_bar=False)
        run.guide = None
        run.train("columns")
        with pytest.raises(InputError, match=r"loss\.guided was True, is False"):
            run.train("columns", resume=last_whole(run.folder / "columns"), guided=False)

    def test_other_data_guide_or_length_are_refused(self, run, pairs, tiny_guide):
        last = last_whole(run.folder / "whole")
        data = run.data
        rows = data.to_dict()
        rows["positive"][63] += "!"
        run.data = type(data).from_dict(rows)
        with pytest.raises(InputError, match=r"data\.train was '64 rows of anchor, positive"):
            run.train("whole", resume=last)
        run.data = data
        guide = run.guide
        run.guide = SentenceTransformer(str(tiny_guide), device="cpu")
        with torch.no_grad():
            next(run.guide.parameters())[0, 0] += 1
        with pytest.raises(InputError, match=r"loss\.guide was '\w+', is '\w+'"):
            run.train("whole", resume=last)
        run.guide = guide
        run.train("whole", resume=last)

    def test_other_changes_are_told_and_harmless_ones_are_not(self, run, caplog):
        last = last_whole(run.folder / "whole")
        with caplog.at_level(logging.WARNING, "gist_fast"):
            run.train("whole", resume=last, logging_steps=1, save_steps=1, dataloader_num_workers=0)
        assert "other settings" not in caplog.text
        with caplog.at_level(logging.WARNING, "gist_fast"):
            run.train("whole", resume=last, learning_rate=1e-4, max_steps=5)
        assert "learning_rate was 0.001, is 0.0001; max_steps was 4, is 5" in caplog.text


class TestFolders:
    @pytest.fixture
    def made(self, tmp_path):
        """A function that makes a whole checkpoint."""

        def make(step: int) -> Path:
            part = tmp_path / UNFINISHED / f"checkpoint-{step}"
            (part / "1_Pooling").mkdir(parents=True)
            (part / "1_Pooling" / "config.json").write_text("{}")
            (part / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
            (part / "model.safetensors").write_bytes(bytes(range(100)) * step)
            publish(part, tmp_path / f"checkpoint-{step}")
            return tmp_path / f"checkpoint-{step}"

        return make

    @pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "1_Pooling/config.json", MANIFEST])
    def test_what_is_not_whole_is_known_by_name(self, made, name, tmp_path):
        first, second = made(5), made(12)
        assert whole_checkpoints(tmp_path) == [first, second]
        (second / name).write_bytes((second / name).read_bytes()[:-1])
        assert name in fault(second)
        assert last_whole(tmp_path) == first
        (second / name).unlink()
        if name == MANIFEST:
            # As another trainer would have written it.
            assert fault(second) is None
            return
        assert fault(second) == f"{name} is missing"
        (first / "trainer_state.json").write_text("{")
        with pytest.raises(
            InputError, match=r"checkpoint-5: trainer_state.json cannot be read; checkpoint-12: .* is m"
        ):
            last_whole(tmp_path)

    @pytest.mark.parametrize("reads", [0, 1, 2])
    def test_one_that_goes_while_it_is_looked_at_is_not_whole(self, made, reads, tmp_path, monkeypatch):
        # As a run renames a checkpoint that it deletes, while another process asks which ones are whole.
        checkpoint, real, calls = made(5), Path.read_text, 0

        def read_text(path, **options):
            nonlocal calls
            if calls == reads:
                checkpoint.rename(tmp_path / "deleted-checkpoint-5")
            calls += 1
            text = real(path, **options)
            if calls == reads == 2:
                checkpoint.rename(tmp_path / "deleted-checkpoint-5")
            return text

        monkeypatch.setattr(Path, "read_text", read_text)
        assert whole_checkpoints(tmp_path) == []

    def test_old_ones_go_but_not_the_last_nor_the_best(self, made, tmp_path):
        for step in (2, 9, 10, 11):
            made(step)
        delete_old(tmp_path, None, None)
        assert len(checkpoint_folders(tmp_path)) == 4
        delete_old(tmp_path, 3, str(tmp_path / "checkpoint-2"))
        assert [folders.step_of(path) for path in checkpoint_folders(tmp_path)] == [2, 10, 11]
        delete_old(tmp_path, 1, str(tmp_path / "checkpoint-2"))
        assert [folders.step_of(path) for path in checkpoint_folders(tmp_path)] == [2, 11]
        delete_old(tmp_path, 1, None)
        assert [folders.step_of(path) for path in checkpoint_folders(tmp_path)] == [11]

    @pytest.mark.parametrize("death", ["replace", "rmtree", "flush"])
    def test_dying_anywhere_while_one_takes_the_place_of_another(self, made, tmp_path, monkeypatch, death):
        """Each call of a function that moves, deletes or flushes is once the last one that the process makes."""
        owner = {"replace": folders.os, "rmtree": folders.shutil, "flush": files}[death]
        real = getattr(owner, death)
        made(3)
        for last in range(20):
            calls = 0

            def dies(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > last:  # noqa: B023
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(owner, death, dies)
                made(3)
                made(4)
                delete_old(tmp_path, 1, None)
                last = None
            assert whole_checkpoints(tmp_path), f"nothing whole after {calls} calls of {death}"
            assert folders.step_of(last_whole(tmp_path)) in (3, 4)
            if last is None:
                break
            folders.tidy(tmp_path)
            shutil.rmtree(tmp_path / UNFINISHED, ignore_errors=True)
            made(3)
            for path in checkpoint_folders(tmp_path):
                if folders.step_of(path) == 4:
                    shutil.rmtree(path)
        assert last is None
        folders.tidy(tmp_path)
        assert [path.name for path in tmp_path.iterdir() if path.name != UNFINISHED] == ["checkpoint-4"]


class TestFullDisk:
    def fails(self, runs, monkeypatch, owner, name, error, after):
        """The run, with a function that raises from its call number `after` on."""
        real, calls = getattr(owner, name), 0

        def full(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > after:
                raise error
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(CheckpointError) as said:
                runs.train("run")
        return str(said.value)

    @pytest.mark.parametrize("after", [0, 2, 5])
    def test_the_last_checkpoint_stays_and_the_error_tells_the_numbers(
        self, after, tmp_path, tiny_student, guide, pairs, monkeypatch
    ):
        runs = Runs(tmp_path, tiny_student, guide, pairs, save_total_limit=1, max_steps=3)
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        said = self.fails(runs, monkeypatch, torch, "save", error, after)
        run = tmp_path / "run"
        whole = whole_checkpoints(run)
        # Five files of a checkpoint go through torch.save: arguments, optimizer, schedule, random and own state.
        assert [path.name for path in whole] == (["checkpoint-1"] if after == 5 else [])
        assert [path.name for path in run.iterdir()] == [path.name for path in whole]
        assert said.startswith(f"{run}: checkpoint-{len(whole) + 1} could not be saved ([Errno 28] No space left on")
        assert "It needs about " in said and " MiB are free there." in said
        assert ("checkpoint-1 is whole and stays" in said) == (after == 5)
        needed = float(said.partition("It needs about ")[2].partition(" MiB")[0])
        if whole:
            assert needed == pytest.approx(folders.size_of(whole[0]) / 2**20, abs=0.06)
            resumed = runs.train("run", resume=whole[0])
            assert_bitwise(weights(resumed.model), weights(runs.train("whole").model))

    def test_other_errors_pass(self, tmp_path, tiny_student, guide, pairs, monkeypatch):
        runs = Runs(tmp_path, tiny_student, guide, pairs)

        def broken(*_, **__):
            raise ZeroDivisionError

        monkeypatch.setattr(torch, "save", broken)
        with pytest.raises(ZeroDivisionError):
            runs.train("run")
        assert not list((tmp_path / "run").iterdir())


@pytest.fixture
def config(tmp_path, pairs, tiny_student, tiny_guide):
    """A configuration of three epochs of four steps, beside its data, that saves after every second step."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    training = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.001,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "output_dir": "whole",
    }
    tree = {
        "student": str(tiny_student),
        "guide": str(tiny_guide),
        "data": {"train": "pairs.jsonl"},
        "training": training,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def final(run: Path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(run / "final"), device="cpu").state_dict()


def wait_for(condition, process: Command) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        if process.poll() is not None:
            raise AssertionError(process.stderr.read().decode())
        time.sleep(0.001)


def kill_and_resume(config: Path, run: Path, run_command, moments: random.Random, kills: int, *overrides: str) -> int:
    """Start a run, kill it at random moments, resume it in this process; how often it died while it was saving."""
    while_saving = 0
    options = ("--output_dir", str(run), *overrides)
    for _ in range(kills):
        resume = ("--resume",) if whole_checkpoints(run) else ()
        done = folders.step_of(last_whole(run)) if resume else 0
        if not resume:
            shutil.rmtree(run, ignore_errors=True)
        process = Command("train", config, *options, *resume)
        try:
            wait_for(
                lambda done=done: run.is_dir() and any(folders.step_of(path) > done for path in whole_checkpoints(run)),
                process,
            )
            if moments.random() < 0.5:
                # Saving takes most of such a small step's time, so this hits the middle of it.
                time.sleep(moments.random() * 0.15)
            else:
                wait_for((run / UNFINISHED).is_dir, process)
                time.sleep(moments.random() * 0.02)
        finally:
            process.kill()
        while_saving += (run / UNFINISHED).is_dir()
        if (run / "final").is_dir():
            break
    if not (run / "final").is_dir():
        result = run_command("train", config, *options, "--resume")
        assert result.code == 0, result.err
    assert not folders.leftovers(run)
    return while_saving


def test_a_killed_run_ends_the_same(config, tmp_path, run_command):
    assert run_command("train", config).code == 0
    kill_and_resume(config, tmp_path / "killed", run_command, random.Random(0), 1)
    assert_bitwise(final(tmp_path / "killed"), final(tmp_path / "whole"))
    # And in the middle of saving: of the seventh checkpoint, each of which takes five calls of torch.save.
    run = tmp_path / "killed while saving"
    process = Command("train", config, "--output_dir", run, first=DIES_WHILE_SAVING)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err.decode()
    assert (run / UNFINISHED / "checkpoint-7" / "optimizer.pt").is_file()
    assert [path.name for path in checkpoint_folders(run)] == ["checkpoint-5", "checkpoint-6"]
    result = run_command("train", config, "--output_dir", run, "--resume")
    assert result.code == 0, result.err
    assert f"not whole, and passed over: {UNFINISHED}" in result.err
    assert not folders.leftovers(run)
    assert_bitwise(final(run), final(tmp_path / "whole"))


DIES_WHILE_SAVING = """
import os, signal, torch
save, calls = torch.save, 0
def dies(*args, **kwargs):
    global calls
    calls += 1
    if calls == 33:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*args, **kwargs)
torch.save = dies
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--batch_sampler", "no_duplicates"),
        ("--mini_batch_size", "5", "--activation_memory", "0"),
        ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "8"),
    ],
    ids=["plain", "no_duplicates", "gradient_cache", "accumulation"],
)
def test_a_run_killed_again_and_again_ends_the_same(config, tmp_path, run_command, overrides):
    assert run_command("train", config, *overrides).code == 0
    moments = random.Random(len(overrides))
    print("killed while saving:", kill_and_resume(config, tmp_path / "killed", run_command, moments, 6, *overrides))
    assert_bitwise(final(tmp_path / "killed"), final(tmp_path / "whole"))


def test_a_file_that_may_not_grow_any_more(config, tmp_path):
    """The system itself refuses to write the optimizer, which is larger than the model, in the middle of it."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    process = Command("train", config, first=limit)
    _, err = process.communicate(timeout=240)
    last = err.decode().strip().splitlines()[-1]
    assert process.returncode == 1
    assert last.startswith(f"gist-fast: CheckpointError: {tmp_path / 'whole'}: checkpoint-1 could not be saved (")
    assert "there is no older one" in last
    assert not list((tmp_path / "whole").glob("*checkpoint*"))
