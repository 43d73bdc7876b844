"""The suites under pytest-benchmark: they are collected at every scale, and the smallest case of each runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (the extra bench)")
ROOT = Path(__file__).parent.parent


def suites(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", "benchmarks/suites", *arguments]
    # Without the marks of a worker of xdist, in which pytest-benchmark does not measure.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.parametrize(("scale", "least"), [("small", 150), ("medium", 500), ("large", 1000)])
def test_suites_are_collected(scale, least):
    done = suites("--scale", scale, "--collect-only")
    assert done.returncode == 0, done.stdout[-2000:]
    for kind in (
        "test_loss[gist_fast-",
        "test_training[engine-",
        "[guide-",
        "[step-",
        "test_start[gist-fast_--version]",
    ):
        assert kind in done.stdout
    assert int(done.stdout.splitlines()[-1].split()[0]) >= least


def smallest(chosen: str, tmp_path: Path) -> tuple[list[dict], str]:
    out = tmp_path / "out.json"
    done = suites("--scale", "tiny", "-k", chosen, "--benchmark-json", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return json.loads(out.read_text())["benchmarks"], done.stdout


@pytest.mark.slow
def test_the_smallest_cases_run(tmp_path):
    chosen = "(loss and (gist_fast-B33 or plain-B33) and both) or (engine-gist_fast-12) or start"
    found, shown = smallest(chosen, tmp_path)
    assert len(found) == 4
    assert all(entry["extra_info"]["memory"] is not None for entry in found)
    problem = "loss rows=33 width=24 guide_width=16 dtype=float32 device=cpu guide=model blocks=ap+aa+pp"
    assert {entry["group"] for entry in found} == {
        f"{problem} both: gist_fast",
        f"{problem} both: plain",
        "engine size=12 device=cpu whole: gist_fast",
        "start size=0 whole: gist-fast --version",
    }
    # Of two competitors on one problem the table shows both, and no ratio in brackets: it knows no noise.
    assert shown.count(problem) == 2
    assert shown.count("Name (time in ms)") == 4
    assert not re.search(r"\(\d+\.\d+\)|\(>1000\.0\)", shown)


@pytest.mark.slow
def test_every_smallest_case_runs(tmp_path):
    found, _ = smallest("test", tmp_path)
    assert {entry["group"].split()[0] for entry in found} == {"loss", "engine", "guide", "step", "start"}
    assert len(found) >= 20
