"""Ctrl-C in the middle of ``gist-fast bench`` and ``gist-fast profile``: code 130, one line, nothing half-written."""

from __future__ import annotations

import json
import signal
import sys

import pytest
import yaml
from interrupting import interrupt

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
    ("arguments", "when", "after"),
    [
        (("--suite", "engine"), "engine 16 ...", 0.3),
        (("--suite", "loss", "--sizes", "256,2048"), "loss 2048 ...", 1.0),
        (("--suite", "start"), "start ...", 2.0),
    ],
)
def test_bench_leaves_nothing(tmp_path, arguments, when, after):
    found = interrupt(("bench", "--report", "page.html", *arguments), tmp_path, when, after)
    assert found.code == 130, found.err
    assert found.out == ""
    assert found.err.splitlines()[-1] == "gist-fast: interrupted; nothing was written."
    assert "Traceback" not in found.err
    assert held(tmp_path) == []


def test_sigterm_ends_it_alike(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    found = interrupt(("bench", "--suite", "engine"), tmp_path, "engine 16 ...", 0.3, how=signal.SIGTERM)
    assert found.code == 143, found.err
    assert found.err.splitlines()[-1] == "gist-fast: interrupted; nothing was written."
    assert "Traceback" not in found.err
    assert [name for name in held(scratch) if name.startswith("pymp-")] == []


@pytest.mark.parametrize("workers", ["0", "2"])
def test_profile_leaves_nothing(tmp_path, config, workers):
    before = held(tmp_path)
    arguments = ("profile", config.name, "--steps", "400", "--dataloader_num_workers", workers)
    found = interrupt((*arguments, "--report", "page.html"), tmp_path, "step 4 of")
    assert found.code == 130, found.err
    assert found.out == ""
    assert "gist-fast: interrupted; nothing was written." in found.err.splitlines()
    assert "Traceback" not in found.err
    assert held(tmp_path) == before
