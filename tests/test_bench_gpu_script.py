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
PARTS = (
    *("environment", "check", "kernels", "shapes", "speed", "memory", "small", "peers", "suites", "profile", "tuned"),
    "tests",
)

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


def run_script(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "BREAK": "no one", **variables}
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_run_goes_on_from_its_archive_with_what_did_not_end_well(tmp_path):
    archive = tmp_path / "archive"
    chosen = {"ARCHIVE": str(archive), "PARTS": "check small", "TMPDIR": str(tmp_path)}
    run_script(tmp_path, BREAK="small fails", OUT=str(archive), **chosen)
    assert sorted(file.name for file in archive.iterdir()) == ["results.json", "results.tar.gz"]
    assert json.loads((archive / "results.json").read_text())["small"]["ended"] == "exit code 1"
    again = run_script(tmp_path, "--resume", str(archive), OUT=str(archive), **chosen)
    assert "== check: ended well before" in again.stdout and "== small (at most" in again.stdout, again.stderr
    assert json.loads((archive / "results.json").read_text()) == {
        "check": {"begun": "check"},
        "small": {"begun": "small"},
    }


def test_no_part_is_begun_for_which_no_time_is_left(tmp_path):
    # What is kept back to note and to show a part takes the whole minute.
    done = run_script(tmp_path, "--minutes", "1", OUT=str(tmp_path / "out"), PARTS="check small", PATIENCE="7")
    assert "== check: skipped, no time is left for it" in done.stdout
    done = run_script(tmp_path, "--minutes", "1", OUT=str(tmp_path / "out"), PARTS="check", PATIENCE="1")
    limit = int(done.stdout.split("== check (at most ")[1].split()[0])
    assert 15 <= limit <= 50


@pytest.mark.parametrize("arguments", [("--minutes", "soon"), ("--minutes",), ("--resume", "/proc/nope"), ("--more",)])
def test_arguments_that_make_no_sense_are_refused(tmp_path, arguments):
    done = run_script(tmp_path, *arguments, OUT=str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert arguments[0] in done.stderr


def test_results_are_not_overwritten_by_those_resumed(tmp_path):
    for name in ("one", "two"):
        run_script(tmp_path, OUT=str(tmp_path / name), PARTS="check")
    done = run_script(tmp_path, "--resume", str(tmp_path / "one"), OUT=str(tmp_path / "two"))
    assert done.returncode == 2 and "holds results" in done.stderr
