"""The GPU benchmark's script, at toy size in the interpreter: what it writes, and that one part's end is its own."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gist_fast.bench.results import OUT_OF_MEMORY, Results, Row, read, write

pytest.importorskip("triton", reason="Triton is not installed on this platform")
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def part(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    module = "benchmarks.gpu.results" if arguments[0] in ("ended", "table") else "benchmarks.gpu"
    command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
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
    found = read(tmp_path / results["speed"]["file"])
    assert {row.what for row in found.rows} >= {"gist_fast", "gist_fast recompute", "plain"}
    for row, rate in itertools.product(found.rows, found.rates):
        assert row.outcome == "ok", row
        batch, guide, width = 40, 16, row.case["width"]
        flops = 2 * batch * batch * (8 * width + 2 * guide)
        for name in ("forward", "backward"):
            assert len(row.seconds[name]) >= 3
        both = zip(rate["seconds"], row.seconds["both"], strict=False)
        shares = [flops / taken * product / rate["flops"] for product, taken in both]
        assert row.share["low"] <= row.share["median"] <= row.share["high"]
        assert min(shares) <= row.share["median"] * (1 + 1e-9) and row.share["median"] <= max(shares) * (1 + 1e-9)
    assert results["memory"] == {"ended": "exit code 1", "log": "out of memory"}

    counted = {"batch": 9, "keep_bytes": 7e9, "keep_as_promised": True, "recompute_bytes": 2e9}
    results["memory"] |= {**counted, "recompute_as_promised": False}
    (tmp_path / "results.json").write_text(json.dumps(results))
    table = part(tmp_path, "table").stdout
    assert "keep: 7.00 GB, as promised" in table
    assert "recompute: 2.00 GB, MORE THAN PROMISED" in table
    assert "gist_fast recompute" in table
    assert "guide by chunks" in table
    assert "memory: exit code 1" in table


def test_a_checkout_is_enough() -> None:
    """Where nothing is installed, importing the benchmark is what makes the kernels known."""
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]; "
        "import benchmarks.gpu, gist_fast, gist_fast.kernels.config as config; "
        "from gist_fast.bench import isolated; assert isolated.PRELOAD[0] == 'benchmarks.gpu'; "
        "print(gist_fast.__file__, config.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found = [Path(name) for name in done.stdout.split()]
    assert found == [ROOT / "gist_fast" / "__init__.py", ROOT / "kernels" / "config.py"], done.stderr[-2000:]


def test_the_limits_of_all_parts_stay_under_nine_minutes() -> None:
    script = SCRIPT.read_text()
    limits = [int(line.split()[1]) for line in script.splitlines() if line.strip().startswith("part ")]
    assert len(limits) == 13
    between = {name: int(seconds) for name, seconds in re.findall(r"\b([A-Z]+ING)=(\d+)", script)}
    assert set(between) == {"NAMING", "NOTING", "SHOWING", "ENDING"}
    after_each = between["NOTING"] + between["ENDING"]
    assert sum(limits) + len(limits) * after_each + between["NAMING"] + between["SHOWING"] < 540
    # Nothing runs without a limit: no line calls Python but through one.
    calls = [line for line in script.splitlines() if '"$PYTHON"' in line and not line.strip().startswith("#")]
    assert len(calls) == 16
    assert [line for line in calls if not re.search(r"(^\s*part \d+ |limited \$[A-Z]+ )", line)] == []


@pytest.mark.parametrize(
    ("ratio", "told"),
    [
        ({"low": 1.9, "median": 2.0, "high": 2.1, "rounds": 5}, "2.0x (1.9 to 2.1)"),
        ({"low": 0.4, "median": 0.5, "high": 0.6, "rounds": 5}, "0.5x (0.4 to 0.6)"),
        ({"low": 1.9, "median": 2.0, "high": 2.1, "rounds": 2}, "no difference seen"),
        ({"low": 1.1, "median": 1.5, "high": 1.9, "rounds": 5}, "no difference seen"),
        (None, None),
    ],
)
def test_no_ratio_within_the_spread(ratio, told, tmp_path, capsys) -> None:
    from benchmarks.gpu.results import table

    seconds = {"forward": [1e-3] * 5, "backward": [2e-3] * 5}
    rows = [
        Row("speed", {"width": 24}, 40, "plain", seconds=seconds, ratio=ratio),
        Row("speed", {"width": 24}, 40, "plain compiled", OUT_OF_MEMORY, "ran out"),
    ]
    write(tmp_path / "bench-speed.json", Results({}, "benchmarks/gpu.sh", rows=rows))
    (tmp_path / "results.json").write_text(json.dumps({"speed": {"file": "bench-speed.json"}}))
    table(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("plain  ")]
    assert "1.00 (1.00 to 1.00)" in line and "2.00 (2.00 to 2.00)" in line
    assert line.endswith(told) if told else line.endswith("-")
    assert any(line.startswith("plain compiled") and line.endswith("out of memory: ran out") for line in lines)


def test_what_is_wrong_is_not_timed(tmp_path: Path) -> None:
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.speed import SpeedSuite
    from gist_fast.bench.peers import PEERS, Peer

    plain = PEERS["plain"]
    wrong = Peer("wrong", plain.obstacle, lambda case: lambda e: 1.1 * plain.make(case)(e))
    bench = Bench(tmp_path, "speed", toy=True)
    bench.measure([SpeedSuite(bench, {"plain": plain, "wrong": wrong})], "found.json", 1.0)
    right, off = read(tmp_path / "found.json").rows
    assert (right.outcome, set(right.seconds)) == ("ok", {"forward", "backward", "both"})
    assert (off.outcome, off.seconds) == ("wrong", {})
    assert off.why == "relative error of the loss 1.0e-01 at B 40, allowed 2e-02"


def test_a_part_in_which_ours_is_wrong_ends_badly(tmp_path: Path) -> None:
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.speed import SpeedSuite
    from gist_fast.bench.peers import OURS, PEERS, Peer

    plain = PEERS["plain"]
    wrong = Peer(OURS, plain.obstacle, lambda case: lambda e: 1.1 * plain.make(case)(e))
    bench = Bench(tmp_path, "speed", toy=True)
    with pytest.raises(SystemExit, match="ours at speed 40: wrong relative error of the loss"):
        bench.measure([SpeedSuite(bench, {OURS: wrong, "plain": plain})], "found.json", 1.0)
    assert [row.outcome for row in read(tmp_path / "found.json").rows] == ["wrong", "ok"]


@pytest.mark.parametrize(
    ("numpy", "triton", "mended"), [("2.4.0", "3.6.0", True), ("2.3.5", "3.6.0", False), ("2.10.1", "3.9.0", False)]
)
def test_the_rehearsal_mends_an_old_interpreter_for_newer_numpy(numpy, triton, mended, monkeypatch) -> None:
    from types import SimpleNamespace

    import numpy as np

    from benchmarks.gpu.interpreter import accept_newer_numpy

    fake = SimpleNamespace(_patch_lang_tensor=lambda tensor, scope: scope.set_attr(tensor, "__index__", None))
    monkeypatch.setattr(np, "__version__", numpy)
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr(importlib.import_module("triton.runtime"), "interpreter", fake, raising=False)
    said = accept_newer_numpy()
    assert (said is not None and "mended for NumPy 2.4.0" in said) == mended

    class Tensor:
        handle = SimpleNamespace(data=np.array([7]))

    fake._patch_lang_tensor(Tensor, SimpleNamespace(set_attr=setattr))
    assert Tensor.__index__ is None if not mended else range(9)[Tensor()] == 7


def test_bars_are_kept_out_where_datasets_is_not_installed(monkeypatch) -> None:
    from transformers.utils import logging

    from gist_fast.runtime.progress_bars import without_progress_bars

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    before = logging.is_progress_bar_enabled()
    with without_progress_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() == before


@pytest.mark.slow
def test_a_peer_is_compiled_once_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked, its memory measured and timed by one compilation, as on a card; the compiler is replaced by a count."""
    import torch
    from torch._dynamo.testing import CompileCounter

    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.speed import SpeedSuite
    from gist_fast.bench.peers import PEERS

    counter, widths = CompileCounter(), (16, 24)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    bench = Bench(tmp_path, "speed", toy=True)
    # Too many for the small size at which others are checked.
    bench.sizes = {**bench.sizes, "batch": 150, "widths": widths}
    suite = SpeedSuite(bench, {"plain compiled": PEERS["plain compiled"]})
    suite.isolated = True
    monkeypatch.setattr(suite, "has_own_process", lambda case: False)
    bench.measure([suite], "found.json", 1.0)
    rows = read(tmp_path / "found.json").rows
    assert [(row.outcome, len(row.seconds), row.memory is not None) for row in rows] == [("ok", 3, True)] * 2
    assert counter.frame_count == len(widths)


@pytest.mark.slow
@pytest.mark.longest
def test_the_whole_script_runs_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TOY": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    # On a machine with other work.
    environment |= {"PATIENCE": "5", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    parts = "environment check kernels shapes speed memory small peers suites profile tests tuned"
    assert set(parts.split()) <= set(results)
    assert {name: part["ended"] for name, part in results.items() if "ended" in part} == {}
    for name in ("speed", "tuned"):
        rows = read(tmp_path / f"bench-{name}.json").rows
        assert rows and all(row.outcome == "ok" and row.seconds for row in rows)
    for file, suites in (("bench.json", {"loss"}), ("bench-models.json", {"step", "engine"})):
        assert {row.suite for row in read(tmp_path / file).rows if row.outcome == "ok"} == suites
    assert (tmp_path / "profile" / "trace.json.gz").exists()
    assert not list(tmp_path.rglob("*.safetensors")), "weights of a model that is of no use"
    assert "share" in run.stdout
    assert results["memory"]["keep_loss"] == results["memory"]["recompute_loss"]
