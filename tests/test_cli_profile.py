"""``gist-fast profile``: writes a trace, a table and a picture that agree, and touches nothing of the run."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from gist_fast.cli import profile as command
from gist_fast.report import profile as report
from gist_fast.runtime import profiler_regions as ranges

FILES = ["profile.json", "steps.png", "steps.svg", "trace.json.gz"]
ON_HOST = {*ranges.NAMES} - {ranges.STUDENT_FORWARD_AGAIN}


@pytest.fixture
def run(run_command):
    """`run_command` of ``gist-fast profile``."""
    return functools.partial(run_command, "profile")


@pytest.fixture
def config(tmp_path, monkeypatch, pairs, tiny_student, tiny_guide):
    """A run that would save, evaluate and report, in the working directory."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    training = {
        "output_dir": "out",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "load_best_model_at_end": True,
        "use_cpu": True,
    }
    tree = {
        "student": str(tiny_student),
        "guide": str(tiny_guide),
        "data": {"train": "pairs.jsonl", "eval": "pairs.jsonl"},
        "evaluation": {"pairs": "pairs.jsonl"},
        "training": training,
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def refused(result, says: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert says in result.err.strip().splitlines()[-1]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class TestProfile:
    def test_writes_what_it_says_and_nothing_of_the_run(self, run, config, tmp_path, tiny_student):
        before = {path: path.read_bytes() for path in tiny_student.rglob("*") if path.is_file()}
        given = ("--learning_rate", "1e-4", "--hub_token", "secret")
        result = run(config, "--steps", 2, "--warmup", 1, "--json", "--report", "page.html", *given)
        assert result.code == 0, result.err
        found = json.loads(result.out)
        folder = tmp_path / "tiny-profile"
        assert found["files"] == [*(str(folder / name) for name in FILES), "page.html"]
        assert names(tmp_path) == sorted(
            ["pairs.jsonl", "tiny.yaml", "page.html", "tiny-profile", *(f"tiny-profile/{name}" for name in FILES)]
        )
        assert {path: path.read_bytes() for path in tiny_student.rglob("*") if path.is_file()} == before
        written = json.loads((folder / "profile.json").read_text())
        assert written == {name: value for name, value in found.items() if name != "files"}
        assert found["facts"]["configuration"] == str(config)
        assert found["settings"]["learning_rate"] == 1e-4
        assert "secret" not in result.out and found["settings"]["hub_token"] == "(set)"
        assert (found["pairs"], len(found["warmup_ms"])) == ([16, 16], 1)

        # Three steps in all; those shown are the second and the third.
        assert [step["step"] for step in found["steps"]] == [2, 3]
        for step, measured in zip(found["steps"], found["measured_ms"], strict=True):
            assert sum(step["host"].values()) == pytest.approx(step["wall_ms"], rel=1e-6)
            assert step["wall_ms"] == pytest.approx(measured, rel=0.05, abs=5)
            assert step["device"] is None
            # A tiny step has little besides its parts, and all of them.
            assert all(step["host"][name] > 0 for name in ON_HOST)
        assert {part["name"] for part in found["parts"]} == ON_HOST | {ranges.OTHER}
        assert sum(part["host_share"] for part in found["parts"]) == pytest.approx(1)
        machine = found["machine"]
        assert machine["process_memory_mib"] > 50
        assert machine["pairs_per_second"] == pytest.approx(32 / sum(found["measured_ms"]) * 1000)
        assert not any(name.startswith(("gpu", "energy")) for name in machine)
        assert found["busiest"] and all(work["part"] in (*ranges.NAMES, ranges.OTHER) for work in found["busiest"])

        # The trace holds the ranges by the same names, and its steps.
        trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
        annotated = {e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"}
        assert annotated >= ON_HOST | {"step 2", "step 3"}
        # And so does the picture.
        drawn = (folder / "steps.svg").read_text()
        ElementTree.fromstring(drawn)
        page = (tmp_path / "page.html").read_text()
        for name in ON_HOST:
            assert name in drawn or all(word in drawn for word in name.split())
            assert name in page
        assert (folder / "steps.png").read_bytes()[:4] == b"\x89PNG"

    def test_prints_tables(self, run, config, tmp_path):
        (tmp_path / "out" / "final").mkdir(parents=True)
        result = run(config, "--steps", 1, "--warmup", 1, "--output", "deep/er", "--mini_batch_size", 4)
        # A run in output_dir is no obstacle, and stays.
        assert result.code == 0, result.err
        assert names(tmp_path / "out") == ["final"]
        assert names(tmp_path / "deep") == ["er", *(f"er/{name}" for name in FILES)]
        for said in (*ON_HOST, ranges.OTHER, "the step", "100.0%", "pairs a second", "Busiest operators"):
            assert said in result.out
        assert str(tmp_path / "deep" / "er" / "trace.json.gz") in result.out
        assert "step 2 of 2" in result.err

    def test_tokenising_by_workers_is_not_this_process_s(self, run, config):
        result = run(config, "--steps", 2, "--warmup", 1, "--dataloader_num_workers", 1)
        assert result.code == 0, result.err
        assert ranges.WAITING in result.out and "Texts are tokenised by dataloader workers" in result.out
        assert f"\u2502 {ranges.TOKENISE} " not in result.out

    def test_an_earlier_profile_stays_unless_told(self, run, config, tmp_path):
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "profile.json").write_text("old")
        refused(run(config, "--output", folder), "--overwrite")
        (folder / "notes.txt").write_text("keep")
        refused(run(config, "--output", folder, "--overwrite"), "notes.txt")
        assert (folder / "profile.json").read_text() == "old"
        (folder / "notes.txt").unlink()
        assert run(config, "--output", folder, "--overwrite", "--steps", 1, "--warmup", 1).code == 0
        assert names(folder) == FILES

    def test_wrong_usage_is_told_before_any_work(self, run, config, tmp_path):
        refused(run(config, "--learnig_rate", "1"), "--learnig_rate")
        refused(run(tmp_path / "none.yaml"), "no such file")
        (tmp_path / "file").write_text("")
        refused(run(config, "--output", tmp_path / "file"), "is a file")
        refused(run(config, "--report", tmp_path / "file"), "exists")
        refused(run(config, "--report", tmp_path / "file" / "page.html"), "is a file")
        refused(run(config, "--output", tmp_path / "file" / "sub"), "file is a file, not a folder")
        refused(run(config, "--output", tmp_path / ("n" * 250)), "File name too long")
        for option in ("--steps", "--warmup"):
            result = run(config, option, 0)
            assert (result.code, result.out) == (2, "")
        assert names(tmp_path) == ["file", "pairs.jsonl", "tiny.yaml"]

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc here")
    def test_what_rights_do_not_tell_is_seen_before_any_work(self, run, config, monkeypatch):
        def trained(*_):
            raise AssertionError("trained before the folder was looked at")

        monkeypatch.setattr(command, "_run", trained)
        refused(run(config, "--output", "/proc/profile"), "--output: /proc cannot be written to (")

    @pytest.mark.parametrize("report", ["mine/page.html", "mine", "deep"])
    def test_a_report_in_the_way_of_the_profile_is_refused(self, run, config, tmp_path, report):
        output = "deep/mine" if report == "deep" else "mine"
        refused(run(config, "--output", output, "--report", report), f"such as {output}.html.")
        assert names(tmp_path) == ["pairs.jsonl", "tiny.yaml"]

    def test_processes_that_train_together_are_refused(self, run, config, monkeypatch):
        from gist_fast.training.arguments import GISTTrainingArguments

        monkeypatch.setattr(GISTTrainingArguments, "world_size", property(lambda self: 2))
        refused(run(config), "expected one process, got 2")

    def test_interrupted_while_training(self, run, config, tmp_path, monkeypatch):
        from gist_fast.training.trainer import GISTTrainer

        step = GISTTrainer.training_step

        def interrupted(self, *args, **kwargs):
            if self.state.global_step == 1:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(GISTTrainer, "training_step", interrupted)
        result = run(config, "--steps", 2, "--warmup", 1)
        assert (result.code, result.out) == (130, "")
        assert "interrupted; nothing was written" in result.err
        assert names(tmp_path) == ["pairs.jsonl", "tiny.yaml"]
        assert not ranges.recording()

    def test_interrupted_while_writing(self, run, config, tmp_path, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("gist_fast.report.profile.report_page", interrupted)
        result = run(config, "--steps", 1, "--warmup", 1, "--report", "page.html")
        assert result.code == 130
        assert "interrupted; written: " in result.err and "trace.json.gz" in result.err
        assert names(tmp_path / "tiny-profile") == FILES
        monkeypatch.setattr("gist_fast.report.profile.save_pictures", interrupted)
        result = run(config, "--steps", 1, "--warmup", 1, "--output", "again")
        assert "nothing was written" in result.err
        assert not [name for name in names(tmp_path) if "again" in name]

    def test_without_matplotlib_there_is_no_picture(self, run, config, tmp_path, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "matplotlib", None)
        refused(run(config, "--report", "page.html"), "matplotlib")
        result = run(config, "--steps", 1, "--warmup", 1)
        assert result.code == 0, result.err
        assert "No picture" in result.err
        assert names(tmp_path / "tiny-profile") == ["profile.json", "trace.json.gz"]


def test_the_commands_of_the_documentation_run(run_command, config, tmp_path, monkeypatch):
    """On any machine: without a card, and without being told that there is none."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    tree = yaml.safe_load(config.read_text())
    del tree["training"]["use_cpu"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    text = (Path(__file__).parent.parent / "docs" / "profiling.md").read_text()
    commands = [line.partition("#")[0].split() for line in text.split("```")[1].strip().splitlines()]
    assert len(commands) == 2
    for program, *arguments in commands:
        assert program == "gist-fast"
        result = run_command(*arguments)
        assert result.code == 0, result.err
    refused(run_command("profile", "config.yaml", "--output", "half", "--bf16"), "bf16")


def test_the_folder_of_a_profile_holds_no_other_names():
    from gist_fast.report.profile import DEVICE_PICTURE, HOST_PICTURE

    pictures = {f"{name}.{ending}" for name in (HOST_PICTURE, DEVICE_PICTURE) for ending in ("svg", "png")}
    assert {report.TRACE, report.FIGURES} | pictures == report._OURS
