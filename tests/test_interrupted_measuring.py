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


@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [(signal.SIGINT, "0", 130), (signal.SIGINT, "2", 130), (signal.SIGTERM, "2", 143), (signal.SIGTERM, "0", 143)],
)
def test_profile_leaves_nothing(tmp_path, config, number, workers, code, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    before = held(tmp_path)
    arguments = ("profile", config.name, "--steps", "400", "--dataloader_num_workers", workers)
    found = interrupt((*arguments, "--report", "page.html"), tmp_path, "step 4 of", number=number)
    assert found.code == code, found.err
    assert found.out == ""
    assert "gist-fast: interrupted; nothing was written." in found.err.splitlines()
    assert "Traceback" not in found.err
    # What torch keeps for its sockets there is no profile's.
    assert [name for name in held(tmp_path) if "gist-fast" in name or "scratch" not in name] == [
        name for name in before if name != "scratch"
    ]
