"""``gist-fast train``: it trains, saves what sentence-transformers loads, and never loses what is there."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from gist_fast.cli.interrupt import StopOnInterrupt
from gist_fast.cli.run_folder import checkpoints, clear_folder, prepare_folder, replace_folder
from gist_fast.errors import InputError


@pytest.fixture
def run(run_command):
    """`run_command` of ``gist-fast train``."""
    return functools.partial(run_command, "train")


@pytest.fixture
def config(tmp_path, pairs, tiny_student, tiny_guide):
    """A configuration of four steps an epoch, beside its data."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "student": str(tiny_student),
                "guide": str(tiny_guide),
                "data": {"train": "pairs.jsonl"},
                "loss": {"temperature": 0.05},
                "training": {
                    "output_dir": "out",
                    "num_train_epochs": 1,
                    "per_device_train_batch_size": 16,
                    "learning_rate": 0.001,
                    "logging_steps": 2,
                    "use_cpu": True,
                },
            }
        )
    )
    return path


def refused(result, says: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("gist-fast: ")
    assert says in last


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(folder), device="cpu").state_dict()


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


class TestRun:
    def test_trains_evaluates_and_saves(self, run, config, tmp_path, tiny_student, tiny_guide, pairs):
        guide_before = contents(tiny_guide)
        result = run(config, "--json", "--evaluation.pairs", config.parent / "pairs.jsonl", "--save_strategy", "no")
        assert result.code == 0, result.err
        summary = json.loads(result.out)
        final = tmp_path / "out" / "final"
        assert summary["model"] == str(final)
        assert (summary["rows"], summary["steps"], summary["epochs"]) == (64, 4, 1)
        assert set(summary["masked"]) == {"masked_ap", "masked_aa", "masked_pp"}
        assert all(0 < share < 1 for share in summary["masked"].values())
        assert summary["evaluation"]["before"] != summary["evaluation"]["after"]
        trained = weights(final)
        assert moved(trained, weights(tiny_student))
        # The guide is no part of what is saved, and stays as it was.
        assert set(trained) == set(weights(tiny_student))
        assert contents(tiny_guide) == guide_before
        # The scores are those of the model that was saved, by an evaluation of its own.
        from gist_fast.evaluation import evaluate, make_evaluator, retrieval_from_pairs

        again = evaluate(SentenceTransformer(str(final), device="cpu"), make_evaluator(retrieval_from_pairs(pairs)))
        assert again == pytest.approx(summary["evaluation"]["after"])
        assert not list((tmp_path / "out").glob("checkpoint-*"))

    def test_the_summary_as_a_table(self, run, config):
        result = run(config, "--max_steps", "1", "--evaluation.triplet", "x.jsonl")
        refused(result, "x.jsonl: no such file")
        result = run(config, "--max_steps", "2")
        assert result.code == 0
        assert "masked ap" in result.out
        assert f'Load it: SentenceTransformer("{config.parent / "out" / "final"}")' in result.out

    def test_without_a_guide(self, run, config):
        result = run(config, "--guide", "null", "--max_steps", "1", "--json")
        assert result.code == 0
        # Nothing masks, so whatever is logged of it is zero.
        assert not any(json.loads(result.out)["masked"].values())

    def test_embeddings_in_the_data_replace_the_guide(self, run, config, tmp_path, pairs, guide):
        from datasets import Dataset

        rows = pairs.to_dict()
        carried = {f"{name}_guide_embedding": guide.encode(texts).tolist() for name, texts in rows.items()}
        Dataset.from_dict(rows | carried).save_to_disk(tmp_path / "embedded")
        run(config, "--output_dir", tmp_path / "with_guide")
        text = [line for line in config.read_text().splitlines() if not line.startswith("guide")]
        config.write_text("\n".join(text))
        result = run(config, "--data.train", tmp_path / "embedded", "--json")
        assert result.code == 0, result.err
        # The same masks to the last pair or two near a threshold, hence the same model.
        one, other = weights(tmp_path / "out" / "final"), weights(tmp_path / "with_guide" / "final")
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)

    def test_settings_reach_their_places(self, run, config, tmp_path):
        result = run(
            config, "--max_steps=1", "--student.max_seq_length", "11", "--mini_batch_size", "4", "--margin", "-0.05"
        )
        assert result.code == 0, result.err
        assert SentenceTransformer(str(tmp_path / "out" / "final"), device="cpu").max_seq_length == 11
        card = (tmp_path / "out" / "final" / "README.md").read_text()
        assert "CachedGISTEmbedLoss" in card


class TestRunFolder:
    def test_an_older_run_is_never_overwritten_silently(self, run, config, tmp_path):
        assert run(config, "--max_steps", "2").code == 0
        out = tmp_path / "out"
        before = contents(out)
        refused(run(config), "already holds a run (checkpoint-2, final); continue it with --resume, start anew with")
        refused(run(config, "--resume", "--overwrite"), "exclude each other")
        assert contents(out) == before
        # Even with --overwrite nothing is lost before all is known to be well.
        refused(run(config, "--overwrite", "--data.train", "nothing.jsonl"), "nothing.jsonl: no such file")
        refused(run(config, "--overwrite", "--guide", "./nothing"), "guide: ")
        assert contents(out) == before
        (out / "notes.txt").write_text("mine")
        result = run(config, "--overwrite", "--max_steps", "1")
        assert result.code == 0
        assert f"Deleted from {out}: checkpoint-2, final." in result.err
        assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "final", "notes.txt"]

    def test_resuming_gives_what_an_unbroken_run_gives(self, run, config, tmp_path):
        # The schedule must be that of four steps in both, so the first part is cut off by removing what came later.
        assert run(config, "--save_steps", "2", "--output_dir", tmp_path / "whole").code == 0
        part = tmp_path / "part"
        part.mkdir()
        os.rename(tmp_path / "whole" / "checkpoint-2", part / "checkpoint-2")
        # A checkpoint that was cut off while it was written is passed over.
        (part / "checkpoint-3").mkdir()
        result = run(config, "--resume", "--save_steps", "2", "--output_dir", part, "--json")
        assert result.code == 0
        assert json.loads(result.out)["resumed_from"] == str(part / "checkpoint-2")
        assert "warning: " in result.err
        assert "checkpoint-3" in result.err
        whole, resumed = weights(tmp_path / "whole" / "final"), weights(part / "final")
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)

    def test_nothing_to_resume(self, run, config, tmp_path):
        refused(run(config, "--resume"), "holds no checkpoint to resume from; leave out --resume")
        assert not (tmp_path / "out").exists()

    def test_the_folder_by_itself(self, tmp_path):
        assert prepare_folder(tmp_path / "new", resume=False, overwrite=False) is None
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is a file"):
            prepare_folder(tmp_path / "file", resume=False, overwrite=False)
        for step in (2, 10, 9):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        (tmp_path / "checkpoint-old").mkdir()
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
        assert prepare_folder(tmp_path, resume=True, overwrite=False) == tmp_path / "checkpoint-10"
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "old").write_text("")
        (tmp_path / "final.part").mkdir()
        (tmp_path / "final.part" / "new").write_text("")
        replace_folder(tmp_path / "final.part", tmp_path / "final")
        assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]
        assert clear_folder(tmp_path) == ["checkpoint-2", "checkpoint-9", "checkpoint-10", "final"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-old", "file"]


class TestDryRun:
    def test_writes_nothing_and_tells_all(self, run, config, tmp_path):
        result = run(
            config, "--dry-run", "--json", "--learning_rate", "3e-5", "--data.eval", config.parent / "pairs.jsonl"
        )
        assert result.code == 0
        plan = json.loads(result.out)
        assert plan["steps"] == 4
        assert plan["rows_a_step"] == 16
        assert plan["train"].endswith("pairs.jsonl: 64 rows of anchor, positive")
        assert plan["settings"]["learning_rate"] == 3e-5
        assert not (tmp_path / "out").exists()
        table = run(config, "--dry-run").out
        assert "All is well; this would be run" in table
        assert "per_device_train_batch_size │ 16" in table

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["--student", "./nothing"], "student: "),
            (["--guide", "no one/nothing"], "guide: no one/nothing: no such folder"),
            (["--data.train", "nothing.csv"], "nothing.csv: no such file"),
            (["--data.train.columns.anchor", "question"], "no column 'question', named for anchor"),
            (["--data.train.split", "train"], "a file has no split"),
            (["--lerning_rate", "1"], "(did you mean '--learning_rate'?)"),
            (["--temperature", "0"], "temperature: got 0; a float above 0"),
            (["--load_best_model_at_end"], "training: --load_best_model_at_end"),
            (["--resume_from_checkpoint", "x"], "the command continues a run with --resume instead"),
            (["--max_steps", "many"], "training.max_steps takes a whole number; got 'many'"),
        ],
    )
    def test_finds_what_is_wrong(self, run, config, overrides, says):
        refused(run(config, "--dry-run", *overrides), says)

    def test_finds_wrong_data(self, run, config):
        data = config.parent / "pairs.jsonl"
        lines = data.read_text().splitlines()
        lines[41] = '{"anchor": "x", "positive": null}'
        data.write_text("\n".join(lines))
        refused(run(config, "--dry-run"), "pairs.jsonl: row 42 (line 42), column 'positive': is None; a text is needed")

    def test_a_missing_guide_must_be_meant(self, run, config):
        text = "\n".join(line for line in config.read_text().splitlines() if not line.startswith("guide"))
        config.write_text(text)
        refused(run(config, "--dry-run"), "'guide' is missing, and the training data carry no embeddings of one")


def start(config: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "gist_fast.cli.main", "train", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_until(process: subprocess.Popen, text: bytes, seen: bytes = b"") -> bytes:
    """What the process says on stderr, up to and with `text`."""
    deadline = time.monotonic() + 120
    while text not in seen:
        assert time.monotonic() < deadline, seen.decode()
        piece = os.read(process.stderr.fileno(), 1 << 16)
        assert piece, seen.decode()
        seen += piece
    return seen


class TestCtrlC:
    def test_once_saves_and_the_run_goes_on_from_there(self, run, config, tmp_path):
        process = start(config, "--max_steps", "1000000", "--save_strategy", "no")
        seen = read_until(process, b"'loss':")
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=120)
        last = (seen + rest).decode().strip().splitlines()[-1]
        (checkpoint,) = checkpoints(tmp_path / "out")
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        assert process.returncode == 130
        assert out == b""
        assert last == (
            f"gist-fast: stopped after step {step} of 1000000; {tmp_path / 'out'} holds {checkpoint.name} "
            "(continue with --resume)."
        )
        assert b"Traceback" not in seen + rest
        result = run(config, "--resume", "--max_steps", step + 1, "--json")
        assert result.code == 0
        assert json.loads(result.out)["steps"] == step + 1

    def test_twice_stops_at_once_and_says_so(self, config, tmp_path):
        process = start(config, "--max_steps", "1000000", "--save_strategy", "no", "--gradient_accumulation_steps", "4")
        seen = read_until(process, b"'loss':")
        process.send_signal(signal.SIGINT)
        seen = read_until(process, b"Ctrl-C again stops at once", seen)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)
        assert process.returncode == 130
        assert b"Traceback" not in seen + rest
        # Whether the first step's end or the second signal came first is the machine's business; both keep their word.
        said = (seen + rest).decode()
        kept = checkpoints(tmp_path / "out")
        assert ("holds no checkpoint." in said) == (not kept)

    def test_the_signal_s_bookkeeping(self):
        stop = StopOnInterrupt()
        before = signal.getsignal(signal.SIGINT)
        control = types.SimpleNamespace(should_training_stop=False, should_save=False, should_evaluate=True)
        with stop:
            stop.on_step_end(None, None, control)
            assert not control.should_training_stop
            signal.raise_signal(signal.SIGINT)
            stop.on_step_end(None, None, control)
            assert (control.should_training_stop, control.should_save, control.should_evaluate) == (True, True, False)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before

    def test_while_getting_ready(self, run, config, tmp_path, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("gist_fast.config.load_config", interrupted)
        result = run(config)
        assert (result.code, result.out) == (130, "")
        assert result.err == "gist-fast: interrupted while getting ready; nothing was written.\n"
        monkeypatch.undo()
        monkeypatch.setattr("gist_fast.cli.models.load_model", interrupted)
        result = run(config)
        assert result.code == 130
        assert "interrupted before the first step" in result.err
        assert not (tmp_path / "out").exists()
