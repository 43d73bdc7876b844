"""benchmarks/gpu.sh survives any one part: with parts that fail, crash and hang in the place of real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("environment", "check", "kernels", "speed", "memory", "peers", "suites", "profile", "tests", "tuned")

# Stands for Python: notes its part, and does to it what BREAK asks for. What gathers results is the real thing.
STUB = f"""#!{sys.executable}
import json, os, pathlib, runpy, signal, sys, time
if sys.argv[2] == "benchmarks.gpu.results":
    sys.argv = sys.argv[2:]
    sys.path.insert(0, os.getcwd())
    runpy.run_module(sys.argv[0], run_name="__main__")
    sys.exit()
what, arguments = sys.argv[3], sys.argv[4:]
out = pathlib.Path(arguments[arguments.index("--out") + 1])
(out / "parts").mkdir(exist_ok=True)
(out / "parts" / (what + ".json")).write_text(json.dumps({{"begun": what}}))
print("in", what)
victim, how = os.environ["BREAK"].split()
if what == victim:
    if how == "fails":
        sys.exit("no such kernel")
    if how == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)
"""


@pytest.mark.parametrize("taken", ["a file", "below a file", "no folder of one's own"])
def test_a_folder_that_cannot_be_made_ends_it_before_anything_runs(tmp_path, taken):
    (tmp_path / "file").write_text("")
    out = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x"}.get(taken, Path("/proc/nope"))
    environment = {**os.environ, "PYTHON": "/bin/false", "OUT": str(out)}
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"benchmarks/gpu.sh: OUT: no results can be written to {out} (mkdir: ")
    assert line.endswith("; name another folder.")


@pytest.mark.parametrize(
    ("victim", "how", "noted"),
    [
        ("environment", "fails", "exit code 1"),
        ("check", "crashes", "exit code 139"),
        ("peers", "hangs", "out of time"),
        ("tuned", "fails", "exit code 1"),
    ],
)
def test_one_part_may_end_badly(tmp_path, victim, how, noted):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "PYTHON": str(stub),
        "OUT": str(out),
        "BREAK": f"{victim} {how}",
        "MOST": "4",
        "PATIENCE": "5",
    }
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True, timeout=120
    )
    results = json.loads((out / "results.json").read_text())
    assert set(PARTS) <= set(results), done.stderr
    for part in PARTS:
        assert results[part]["begun"] == part
        assert results[part].get("ended") == (noted if part == victim else None)
        assert f"{part}: {noted if part == victim else 'ended well'}" in done.stdout
    if how == "fails":
        assert "no such kernel" in results[victim]["log"]


def test_parts_are_chosen_by_name_and_archived(tmp_path):
    stub, out, archive = tmp_path / "python", tmp_path / "out", tmp_path / "archive"
    stub.write_text(STUB)
    stub.chmod(0o755)
    archive.mkdir()
    chosen = {"PARTS": "check tests", "ARCHIVE": str(archive), "OUT": str(out)}
    environment = {**os.environ, **chosen, "PYTHON": str(stub), "BREAK": "no one"}
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True)
    assert set(json.loads((out / "results.json").read_text())) == {"check", "tests"}, done.stderr
    assert (archive / "results.json").read_text() == (out / "results.json").read_text()
    with tarfile.open(archive / "results.tar.gz") as held:
        assert {"./parts/check.json", "./parts/tests.json", "./tests.log"} <= set(held.getnames())
