"""The GPU benchmark's script, at toy size in the interpreter: what it writes, and that one part's end is its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def part(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = SCRIPT.with_name("gpu_results.py") if arguments[0] in ("ended", "table") else SCRIPT
    command = [sys.executable, str(script), *arguments, "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.longest
def test_parts_write_results_and_the_table_shows_them(tmp_path: Path) -> None:
    for name in ("environment", "check", "speed"):
        run = part(tmp_path, name, "--toy")
        assert run.returncode == 0, run.stderr[-2000:]
        part(tmp_path, "ended", "--part", name, "--code", "0")
    (tmp_path / "memory.log").write_text("out of memory")
    part(tmp_path, "ended", "--part", "memory", "--code", "1")

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["device"] == "interpreter"
    assert {"commit", "torch", "triton", "matmul_tflops"} <= set(results["environment"])
    assert not results["check"]["wrong"]
    assert all(error < 1e-5 for name, error in results["check"]["relative_errors"].items() if "float32" in name)
    for row in results["speed"]["rows"]:
        batch, guide, width = 40, 16, row["width"]
        flops = 2 * batch * batch * (10 * width + 2 * guide)
        seconds = (row["forward_ms"] + row["backward_ms"]) / 1e3
        for name in ("forward", "backward"):
            low, median, high = row[f"{name}_ms_quartiles"]
            assert low <= median == row[f"{name}_ms"] <= high
        assert row["tflops"] == pytest.approx(flops / seconds / 1e12)
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / results["speed"]["matmul_tflops"])
    assert results["memory"] == {"ended": "exit code 1", "log": "out of memory"}

    counted = {"batch": 9, "keep_bytes": 7e9, "keep_as_promised": True, "recompute_bytes": 2e9}
    results["memory"] |= {**counted, "recompute_as_promised": False}
    (tmp_path / "results.json").write_text(json.dumps(results))
    table = part(tmp_path, "table").stdout
    assert "keep: 7.00 GB, as promised" in table
    assert "recompute: 2.00 GB, MORE THAN PROMISED" in table
    assert "triton recompute" in table
    # Of one repeat there is no spread.
    assert re.search(r"eager .* forward no difference seen, backward no difference seen", table)
    assert "guide by chunks" in table
    assert "memory: exit code 1" in table


def test_the_limits_of_all_parts_stay_under_nine_minutes() -> None:
    script = SCRIPT.with_name("gpu.sh").read_text()
    limits = [int(line.split()[1]) for line in script.splitlines() if line.strip().startswith("part ")]
    assert len(limits) == 10
    between = {name: int(seconds) for name, seconds in re.findall(r"\b([A-Z]+ING)=(\d+)", script)}
    assert set(between) == {"NAMING", "NOTING", "SHOWING", "ENDING"}
    after_each = between["NOTING"] + between["ENDING"]
    assert sum(limits) + len(limits) * after_each + between["NAMING"] + between["SHOWING"] < 540
    # Nothing runs without a limit: no line calls Python but through one.
    calls = [line for line in script.splitlines() if '"$PYTHON"' in line and not line.strip().startswith("#")]
    assert len(calls) == 13
    assert [line for line in calls if not re.search(r"(^\s*part \d+ |limited \$[A-Z]+ )", line)] == []


@pytest.mark.parametrize(
    ("theirs", "ours", "repeats", "ratio"),
    [
        ([1.9, 2.0, 2.1], [0.9, 1.0, 1.1], 5, 2.0),
        ([0.9, 1.0, 1.1], [1.9, 2.0, 2.1], 5, 0.5),
        ([1.9, 2.0, 2.1], [0.9, 1.0, 1.1], 2, None),
        # Together they spread by more than they differ, though either alone does not.
        ([1.3, 1.5, 1.7], [0.9, 1.0, 1.1], 5, None),
    ],
)
def test_no_ratio_within_the_spread(theirs, ours, repeats, ratio) -> None:
    from benchmarks.gpu import over, to_ours

    assert over(theirs, ours, repeats) == ratio
    rows = [
        {"what": what, "width": 24, "forward_ms_quartiles": times, "backward_ms_quartiles": times}
        for what, times in (("triton", ours), ("eager", theirs))
    ]
    assert to_ours(rows[1], rows[:1], repeats) == {"forward_over_ours": ratio, "backward_over_ours": ratio}
    assert to_ours({"what": "eager", "width": 24, "failed": "no memory"}, rows[:1], repeats) == {}


def test_what_is_wrong_is_not_timed(tmp_path: Path) -> None:
    from benchmarks.gpu import Bench, plain_loss, time_both

    bench = Bench(tmp_path, "speed", toy=True)
    times = {f"{name}_ms{more}" for name in ("forward", "backward") for more in ("", "_quartiles")}
    assert set(time_both(bench, plain_loss, 24)) == times
    off = time_both(bench, lambda *given: 1.01 * plain_loss(*given), 24)
    assert off == {"failed": "wrong: relative error 1.0e-02 at B 20"}


@pytest.mark.slow
@pytest.mark.longest
def test_the_whole_script_runs_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TOY": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    # On a machine with other work.
    environment |= {"PATIENCE": "5", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([SCRIPT.with_suffix(".sh")], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"environment", "check", "speed", "memory", "peers", "suites", "profile", "tests", "tuned"} <= set(results)
    assert {name: part["ended"] for name, part in results.items() if "ended" in part} == {}
    assert all("failed" not in row for name in ("speed", "tuned") for row in results[name]["rows"])
    for file, suites in (("bench.json", {"loss"}), ("bench-models.json", {"step", "engine"})):
        rows = json.loads((tmp_path / file).read_text())["rows"]
        assert {row["suite"] for row in rows if row["outcome"] == "ok"} == suites
    assert (tmp_path / "profile" / "trace.json.gz").exists()
    assert not list(tmp_path.rglob("*.safetensors")), "weights of a model that is of no use"
    assert "share" in run.stdout
    assert results["memory"]["keep_loss"] == results["memory"]["recompute_loss"]
