"""SIGTERM and Ctrl-C while training, in one process and in several that have to agree."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from prestarted import Command, on_ranks
from sentence_transformers import SentenceTransformer

from gist_fast.pipeline.run_folder import prepare_folder, replacing
from gist_fast.training.checkpoints import UNFINISHED, last_whole, step_of, whole_checkpoints
from gist_fast.training.stop_on_signal import StopOnSignal


@pytest.fixture
def config(tmp_path, pairs, tiny_student, tiny_guide):
    """A run without an end, that evaluates and saves only where an epoch ends; its epochs are of four steps."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    training = {
        "max_steps": 1_000_000,
        "per_device_train_batch_size": 16,
        "logging_steps": 2,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "output_dir": "out",
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


def start(*arguments: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def torchrun(*arguments: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        "torch.distributed.run",
        *("--nproc-per-node", "2", "--master-port", str(port)),
        *("-m", "gist_fast", *arguments),
    ]


def read_until(process: subprocess.Popen | Command, text: bytes, seen: bytes = b"") -> bytes:
    """What the process says on stderr, up to and with `text`."""
    deadline = time.monotonic() + 180
    while text not in seen:
        assert time.monotonic() < deadline, seen.decode()
        piece = os.read(process.stderr.fileno(), 1 << 16)
        assert piece, seen.decode()
        seen += piece
    return seen


def final(run: Path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(run / "final"), device="cpu").state_dict()


class TestOneProcess:
    def test_sigterm_saves_and_ends_with_143(self, config, tmp_path, run_command):
        process = start("gist_fast", "train", str(config), "--save_strategy", "no")
        seen = read_until(process, b"'loss':")
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=120)
        said = (seen + rest).decode()
        assert process.returncode == 143
        assert out == b""
        assert "SIGTERM: stopping after the step that is running, with a checkpoint.\n" in said
        assert "Traceback" not in said
        (checkpoint,) = whole_checkpoints(tmp_path / "out")
        step = step_of(checkpoint)
        assert said.strip().splitlines()[-1] == (
            f"gist-fast: stopped after step {step} of 1000000; {tmp_path / 'out'} holds {checkpoint.name} "
            "(continue with --resume)."
        )
        result = run_command("train", config, "--resume", "--max_steps", step + 1, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["steps"] == step + 1
        assert f"max_steps was 1000000, is {step + 1}" in result.err

    def test_the_flags_at_the_ends_of_steps_and_epochs(self):
        stop = StopOnSignal()
        state = SimpleNamespace(global_step=5, max_steps=9)

        def flags():
            return SimpleNamespace(should_training_stop=False, should_save=True, should_evaluate=True)

        with stop:
            assert stop.on_epoch_end(None, state, flags()) == flags()
            signal.raise_signal(signal.SIGTERM)
            # Schedulers send it again; torchrun passes on what all have had already.
            signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, stop.exit_code) == (True, 143)
        control = stop.on_step_end(None, state, flags())
        assert (control.should_training_stop, control.should_save, control.should_evaluate) == (True, True, False)
        # The epoch that is broken off is not evaluated, nor saved a second time; the last one of all is both.
        control.should_save = control.should_evaluate = True
        stop.on_epoch_end(None, state, control)
        assert (control.should_save, control.should_evaluate) == (False, False)
        state.global_step = 9
        control.should_save = control.should_evaluate = True
        stop.on_epoch_end(None, state, control)
        assert (control.should_save, control.should_evaluate) == (True, True)

    def test_ctrl_c_after_sigterm_stops_at_once_but_not_where_others_would_wait(self):
        with StopOnSignal() as stop:
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 143
        with StopOnSignal(processes=2) as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert stop.exit_code == 130

    def test_during_the_last_step_the_model_is_still_saved(self, config, tmp_path, run_command, monkeypatch):
        from gist_fast.training.trainer import GISTTrainer

        save = GISTTrainer.save_model

        def told_to_stop(self, folder, **kwargs):
            signal.raise_signal(signal.SIGTERM)
            return save(self, folder, **kwargs)

        monkeypatch.setattr(GISTTrainer, "save_model", told_to_stop)
        result = run_command("train", config, "--max_steps", "1", "--save_strategy", "no")
        assert result.code == 143
        assert f"stopped after the last step; {tmp_path / 'out'} holds final." in result.err
        assert final(tmp_path / "out")


class TestSeveralProcesses:
    @pytest.mark.parametrize(
        ("number", "code", "launched"),
        [
            (signal.SIGTERM, 143, lambda *command: Command(*command, first=on_ranks(2, "gist_fast.cli.main"))),
            pytest.param(signal.SIGINT, 130, lambda *command: start(*torchrun(*command)), marks=pytest.mark.slow),
        ],
        ids=["SIGTERM", "SIGINT"],
    )
    def test_one_is_told_and_all_stop_after_the_same_step(self, number, code, launched, config, tmp_path):
        process = launched("train", str(config))
        seen = read_until(process, b"'loss':")
        ranks = [int(pid) for pid in _children(process.pid)]
        assert len(ranks) == 2
        os.kill(ranks[1], number)
        out, rest = process.communicate(timeout=180)
        said = (seen + rest).decode()
        assert process.returncode != 0
        assert out == b""
        # torchrun says how its workers ended.
        assert re.search(rf"exitcode\s*: {code}\b", said), said
        (checkpoint,) = whole_checkpoints(tmp_path / "out")
        assert said.count(f"gist-fast: stopped after step {step_of(checkpoint)} of 1000000") == 1
        assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in checkpoint.iterdir()}
        assert not (tmp_path / "out" / UNFINISHED).exists()

    @pytest.mark.slow
    def test_a_resumed_run_of_two_ends_the_same(self, config, tmp_path):
        options = [
            "train",
            str(config),
            "--max_steps",
            "8",
            "--per_device_train_batch_size",
            "8",
            "--batch_sampler",
            "no_duplicates",
        ]
        options += ["--save_strategy", "steps", "--save_steps", "6", "--save_total_limit", "5", "--output_dir"]
        run_to_the_end(torchrun(*options, str(tmp_path / "whole")))
        # In the middle of the second epoch, where the samplers of several processes lie behind several wrappers.
        (tmp_path / "part").mkdir()
        os.rename(tmp_path / "whole" / "checkpoint-6", tmp_path / "part" / "checkpoint-6")
        said = run_to_the_end(torchrun(*options, str(tmp_path / "part"), "--resume"))
        assert said.count("Continuing from") == 1
        resumed, whole = final(tmp_path / "part"), final(tmp_path / "whole")
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def run_to_the_end(arguments: list[str]) -> str:
    process = start(*arguments)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err.decode()
    return err.decode()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_leftovers_are_named_and_cleared(tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    for folder in (checkpoint, tmp_path / UNFINISHED / "checkpoint-6", tmp_path / "deleted-checkpoint-2"):
        folder.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert prepare_folder(tmp_path, resume=True, overwrite=False) == checkpoint == last_whole(tmp_path)
    with replacing(tmp_path):
        assert sorted(path.name for path in next(tmp_path.glob("replaced-run.*")).iterdir()) == [
            "checkpoint-4",
            "deleted-checkpoint-2",
            UNFINISHED,
        ]
        (tmp_path / "final").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "notes"]
