"""Ctrl-C in the middle of ``gist-fast bench``, ``profile``, ``evaluate`` and ``inspect``: code 130, one line, nothing
half-written; also where Python swallows it."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from interrupting import interrupt

from gist_fast.cli.ctrl_c import CtrlC
from gist_fast.pipeline import models

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX's")


@pytest.fixture
def config(tmp_path, pairs, tiny_student, tiny_guide):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    path = tmp_path / "tiny.yaml"
    training = {"output_dir": "out", "per_device_train_batch_size": 16, "use_cpu": True, "max_steps": 500}
    tree = {"student": str(tiny_student), "guide": str(tiny_guide), "data": {"train": "pairs.jsonl"}}
    path.write_text(yaml.safe_dump({**tree, "training": training}))
    return path


def held(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# In a competitor's own process, on the clock, and in processes that a suite starts.
@pytest.mark.parametrize(
    ("arguments", "when", "after", "computing"),
    [
        (("--suite", "engine"), "engine 16 ...", 0.3, 0.0),
        pytest.param(("--suite", "self", "--sizes", "1024"), "self 1024 ...", 0.0, 0.5, marks=pytest.mark.slow),
        (("--suite", "start"), "start ...", 2.0, 0.0),
    ],
)
@pytest.mark.slow
def test_bench_leaves_nothing(tmp_path, arguments, when, after, computing):
    found = interrupt(("bench", "--report", "page.html", *arguments), tmp_path, when, after, computing=computing)
    assert found.code == 130, found.err
    assert found.out == ""
    assert found.err.splitlines()[-1] == "gist-fast: interrupted; nothing was written."
    assert "Traceback" not in found.err
    assert held(tmp_path) == []


@pytest.fixture
def scratch(monkeypatch):
    """Where the command keeps what is to be gone; short, as the path of a socket must be."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.slow
def test_sigterm_ends_it_alike(tmp_path, scratch):
    found = interrupt(("bench", "--suite", "engine"), tmp_path, "engine 16 ...", 0.3, number=signal.SIGTERM)
    assert found.code == 143, found.err
    assert found.err.splitlines()[-1] == "gist-fast: interrupted; nothing was written."
    assert "Traceback" not in found.err
    assert [name for name in held(scratch) if name.startswith("pymp-")] == []


@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [(signal.SIGINT, "0", 130), (signal.SIGINT, "2", 130), (signal.SIGTERM, "2", 143), (signal.SIGTERM, "0", 143)],
)
@pytest.mark.slow
def test_profile_leaves_nothing(tmp_path, scratch, config, number, workers, code):
    before = held(tmp_path)
    arguments = ("profile", config.name, "--steps", "400", "--dataloader_num_workers", workers)
    found = interrupt((*arguments, "--report", "page.html"), tmp_path, "step 4 of", number=number)
    assert found.code == code, found.err
    assert found.out == ""
    assert "gist-fast: interrupted; nothing was written." in found.err.splitlines()
    assert "Traceback" not in found.err
    assert held(tmp_path) == before
    # What torch keeps for its sockets there is no profile's.
    assert [name for name in held(scratch) if "gist-fast" in name] == []


@pytest.fixture
def many(tmp_path, pairs):
    """Documents that a model takes minutes for, one at a time, and few questions, which are encoded first."""
    rows = [{"anchor": row["anchor"], "positive": f"{row['positive']} {k}"} for k in range(600) for row in pairs]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "many.jsonl"


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_reading_commands_end_at_once(tmp_path, many, tiny_student, tiny_guide, command):
    before = held(tmp_path)
    arguments = {
        "evaluate": ("evaluate", str(tiny_student), "--pairs", many, "--batch-size", "1"),
        "inspect": (
            "inspect",
            "--data",
            many,
            "--guide",
            str(tiny_guide),
            "--duplicates",
            "all",
            "--report",
            "page.html",
        ),
    }[command]
    # Both say it before they encode; the evaluator logs nothing sooner than its bar.
    found = interrupt(
        (*arguments, "--device", "cpu"), tmp_path, {"evaluate": "Corpus", "inspect": "Comparing"}[command]
    )
    assert found.code == 130, found.err
    assert found.out == ""
    tail = {"evaluate": "", "inspect": "; nothing was written"}[command]
    assert found.err.splitlines()[-1] == f"gist-fast: interrupted{tail}."
    assert "Traceback" not in found.err
    assert held(tmp_path) == before


class Swallowing:
    """Ctrl-C comes while this is finalised, where Python lets no exception through."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("command", ["evaluate", "evaluate the baseline", "inspect", "inspect the student"])
def test_a_swallowed_ctrl_c_ends_it_all_the_same(
    run_command, tmp_path, many, tiny_student, tiny_guide, monkeypatch, command
):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back at the end
    load, batches = models.load_model, []
    role = {"evaluate": "model", "evaluate the baseline": "baseline", "inspect": "guide"}.get(command, "student")

    def loading(path, as_what, **options):
        model = load(path, as_what, **options)

        def forward(*_):
            if as_what == role:
                batches.append(0)
                if len(batches) == 2:
                    Swallowing()

        model.register_forward_pre_hook(forward)
        return model

    monkeypatch.setattr(models, "load_model", loading)
    monkeypatch.chdir(tmp_path)
    sources = {
        "evaluate": ("evaluate", tiny_student, "--baseline", tiny_guide, "--pairs", many, "--batch-size", "16"),
        "inspect": ("inspect", "--data", many, "--guide", tiny_guide, "--student", tiny_student, "--batch-size", "200"),
    }
    (tmp_path / many).write_text("".join((tmp_path / many).read_text().splitlines(True)[:200]))
    result = run_command(*sources[command.split()[0]], "--device", "cpu")
    assert (result.code, result.out) == (130, ""), result.err
    assert result.err.splitlines()[-1] == "gist-fast: interrupted."
    assert "Exception ignored" not in result.err
    # It came before the second batch: that one was still done, the third was not.
    assert len(batches) in (2, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
@pytest.mark.parametrize("sigterm", [False, True])
def test_a_forked_process_leaves_ctrl_c_to_the_one_that_forked_it(sigterm):
    """As a data loader's worker before its first line, where an exception would be printed with its traceback."""
    with CtrlC(sigterm=sigterm) as ctrl_c:
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGINT)
                os._exit(0 if not ctrl_c.came else 2)
            except KeyboardInterrupt:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert ctrl_c.came
