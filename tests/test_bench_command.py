"""`gist-fast bench` as a user meets it, at sizes that say nothing about speed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browser import pictures_of
from fabricated import bench_results

from gist_fast.bench import run as runs
from gist_fast.bench.cases import LossCase
from gist_fast.bench.isolated import check_and_measure
from gist_fast.bench.loss import LossSuite
from gist_fast.bench.peers import PEERS, Peer, plain_matmul
from gist_fast.bench.results import (
    NOT_RUN,
    OK,
    UNSUPPORTED,
    WRONG,
    Results,
    Row,
    read,
    write,
    write_numbered,
)
from gist_fast.bench.run import SUITES, Candidate, fits, run, suites_named
from gist_fast.bench.start import StartCase
from gist_fast.bench.suite import SCALES, Scope
from gist_fast.bench.tables import facts, fit_table, markdown, notes, suite_table
from gist_fast.bench.timing import LEAST_ROUNDS
from gist_fast.runtime.environment import machine
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import write_whole

ROOT = Path(__file__).parent.parent


@pytest.fixture
def few_peers(monkeypatch):
    """Without the competitors that cost seconds, and all in this process."""

    def here(suite, case, name, limit, patience, **options):
        return check_and_measure(suite, case, name, patience=patience, **options)

    monkeypatch.setattr(runs, "in_own_process", here)
    monkeypatch.setattr(LossSuite, "matmul_side", lambda *_: 64)
    for name in ("plain compiled", "st GISTEmbedLoss", "st CachedGISTEmbed"):
        monkeypatch.delitem(PEERS, name)


def bench(run_command, folder, *arguments):
    return run_command("bench", "--sizes", "16,24,40", "--seconds", "600", "--output", folder, *arguments)


def test_the_loss_ends_in_a_table_a_file_and_plots(run_command, tmp_path, few_peers):
    report = tmp_path / "out.html"
    found = bench(run_command, tmp_path, "--suite", "loss", "--report", report)
    assert found.code == 0, found.err
    folder = tmp_path / machine()["device"]
    results = read(folder / "bench.json")
    rows = {(row.size, row.what): row for row in results.rows}
    assert set(rows) == {(size, name) for size in (16, 24, 40) for name in PEERS}
    for (size, name), row in rows.items():
        if name in ("gist_fast tiled", "memeff", "inf-cl"):
            assert row.outcome == UNSUPPORTED
            continue
        assert row.outcome == OK, row
        assert set(row.seconds) == {"forward", "backward", "both"}
        both = [f + b for f, b in zip(row.seconds["forward"], row.seconds["backward"], strict=True)]
        assert row.seconds["both"] == pytest.approx(both)
        assert row.memory is not None
        # By hand from what is stored: minimal FLOPs over seconds, against the product's.
        rate = next(rate for rate in results.rates if rate["case"]["rows"] == size)
        flops = LossCase(size).flops()
        shares = [
            flops / own / (rate["flops"] / product)
            for own, product in zip(row.seconds["both"], rate["seconds"], strict=False)
        ]
        assert min(shares) <= row.share["median"] <= max(shares)
    assert rows[16, "gist_fast"].ratio is None
    assert rows[16, "plain"].ratio["rounds"] >= 3
    assert "memeff takes no part: it knows no guide model." in found.out
    assert re.search(r"matrix product, float32 +│ [\d.]+ GFLOP/s \([\d.]+ to [\d.]+\)", found.out)
    assert {path.name for path in folder.iterdir()} == {
        "bench.json", "bench-loss-time.svg", "bench-loss-memory.svg", "bench-loss-share.svg",
    }  # fmt: skip
    page = report.read_text()
    assert any("share of the roofline" in svg for svg in pictures_of(page))
    assert "matrix product, float32" in page
    assert "gist_fast reference" in page

    again = bench(run_command, tmp_path, "--suite", "loss", "--json")
    assert json.loads(again.out)["format"] == 1
    assert (folder / "bench-2.json").exists()
    assert run_command("bench", "compare", folder / "bench.json", folder / "bench-2.json").code == 0
    refused = bench(run_command, tmp_path, "--suite", "loss", "--report", report)
    assert refused.code == 2
    assert "exists" in refused.err
    assert not (folder / "bench-3.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--suite", "los"), "did you mean 'loss'"),
        (("--sizes", "a"), "whole numbers from 2"),
        (("--sizes", "1,8"), "whole numbers from 2"),
        (("--dtype", "int8"), "--dtype: expected 'float32', 'float16', 'bfloat16' or 'float64', got 'int8'"),
        (("--device", "tpu"), "--device: expected cpu or cuda, got 'tpu'"),
        (("--report", "."), "is a folder"),
        (
            ("--report", "bench.json", "--overwrite"),
            "--report: expected a file that ends in .html or .htm, such as bench.html, got bench.json",
        ),
        (("--report", "x/bench-loss-time.svg"), "such as bench-loss-time.html"),
        (("--report", "page"), "such as page.html"),
        (("--sizes", ""), "whole numbers from 2"),
        (("--sizes", "8,1e3"), "whole numbers from 2"),
        (("--suite", ""), "step, start, got ''"),
        (("--suite", "loss,"), "step, start, got ''"),
        (
            ("--suite", "start", "--sizes", "8"),
            "--sizes: says nothing to --suite start; leave it out, or name any of loss",
        ),
        (
            ("--suite", "step,start", "--dtype", "float32"),
            "--suite step nor start; leave it out, or name any of loss, self,",
        ),
        (("--scale", "huge"), "--scale: expected 'small', 'medium' or 'large', got 'huge'"),
        (("--scale", "large", "--quick"), "keep one of the two"),
        (("--seconds", "nan"), "--seconds"),
        (("--seconds", "inf"), "--seconds: expected a number such as 60, got inf"),
        (("--seconds", "0"), "--seconds"),
        (("--seconds", "soon"), "--seconds"),
        (("--output", "taken"), "taken is a file"),
        (("--output", "taken/deeper"), "taken is a file"),
        (("--device", "cuda:7"), "finds no GPU"),
        (("--suite", "nosuch", "compare", "a", "b"), "--suite: is an option of gist-fast bench, and compare measures"),
        (("--json", "compare", "a", "b"), "--json: is an option of gist-fast bench"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_measured(run_command, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "taken").write_text("")
    found = run_command("bench", *arguments)
    assert found.code == 2, found.err
    assert says in found.err
    assert len(found.err.splitlines()) == 1
    assert found.out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]


def test_a_folder_that_cannot_be_written_to_is_refused(run_command, tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")  # root may write by all rights, and still cannot

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    found = run_command("bench", "--output", tmp_path)
    assert (found.code, found.out) == (2, "")
    assert "cannot be written to (No space left on device)" in found.err


def timed(size=16) -> Results:
    seconds = {"both": [1e-3, 1.1e-3, 0.9e-3]}
    rows = [Row("loss", {"rows": b}, b, "gist_fast", seconds=seconds, memory=1 << 20) for b in (size, 2 * size)]
    return Results(machine(), "gist-fast bench", 1.0, rows)


def test_what_was_measured_is_shown_where_it_cannot_be_written(run_command, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "run", lambda *_, **__: timed())
    monkeypatch.setattr("gist_fast.runtime.files.put", full)
    found = run_command("bench", "--output", tmp_path)
    assert found.code == 2
    assert "cannot be written (No space left on device)" in found.err
    assert "1 ms" in found.out
    assert json.loads(run_command("bench", "--output", tmp_path, "--json").out)["rows"]


class TestShow:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "bench-2.json"
        write(path, bench_results())
        return path

    def test_tables_alone(self, run_command, file):
        found = run_command("bench", "show", file)
        assert found.code == 0, found.err
        assert "loss: The loss: embeddings to gradients" in found.out
        assert "st GISTEmbedLoss at B 1,024 and above out of memory: needs" in found.out
        assert "How costs grow" in found.out and "A CPU of some name" in found.out
        assert [path.name for path in file.parent.iterdir()] == [file.name]

    def test_plots_are_added_and_none_is_replaced(self, run_command, file):
        kept = file.with_name("bench-2-loss-time.svg")
        kept.write_text("mine")
        before = file.read_text()
        found = run_command("bench", "show", file, "--plots")
        assert found.code == 0, found.err
        plots = {path.name.removeprefix("bench-2-") for path in file.parent.glob("*.svg")}
        names = {f"{suite}-{of}.svg" for suite in ("loss", "engine", "guide", "step") for of in ("time", "memory")}
        assert plots == names | {"loss-share.svg"}
        assert (kept.read_text(), file.read_text()) == ("mine", before)
        assert 'fill="white"' in file.with_name("bench-2-step-memory.svg").read_text()
        assert "bench-2-{loss-memory,loss-share,engine-time," in found.err
        again = run_command("bench", "show", file, "--plots")
        assert (again.code, again.err) == (0, "plots: all are there\n")

    def test_the_report_alone(self, run_command, file, tmp_path):
        report = tmp_path / "page" / "out.html"
        found = run_command("bench", "show", file, "--report", report)
        assert found.code == 0, found.err
        page = report.read_text()
        assert page.count("<figure") == 9 and "abcdef0" in page
        assert not list(tmp_path.glob("*.svg"))
        refused = run_command("bench", "show", file, "--report", report)
        assert (refused.code, refused.out) == (2, "") and "--overwrite" in refused.err
        assert run_command("bench", "show", file, "--report", report, "--overwrite").code == 0
        refused = run_command("bench", "show", file, "--report", file, "--overwrite")
        assert (refused.code, refused.out) == (2, "") and "such as bench-2.html" in refused.err
        assert read(file) == bench_results()

    def test_plots_that_cannot_be_written_are_an_error(self, run_command, file, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("gist_fast.runtime.files.put", full)
        found = run_command("bench", "show", file, "--plots")
        assert (found.code, found.out) == (2, "")
        assert "bench-2-loss-time.svg cannot be written (No space left on device)" in found.err

    @pytest.mark.parametrize("rows", [[], [{"suite": "later", "case": {}, "size": 8, "what": "x"}]])
    def test_what_says_little_is_shown_all_the_same(self, run_command, file, rows):
        file.write_text(json.dumps({"format": 1, "machine": {}, "command": "", "rows": rows}))
        found = run_command("bench", "show", file, "--plots")
        assert (found.code, found.err) == (0, "plots: nothing to draw\n")
        assert ("later" in found.out) is bool(rows)


def test_two_runs_at_once_keep_their_files_apart(run_command, tmp_path, monkeypatch):
    """The other run ends while this one measures."""
    folder = tmp_path / machine()["device"]

    def meanwhile(*_, **__):
        write_numbered(folder, timed(8))
        return timed(16)

    monkeypatch.setattr(runs, "run", meanwhile)
    assert run_command("bench", "--output", tmp_path).code == 0
    assert [read(folder / name).rows[0].size for name in ("bench.json", "bench-2.json")] == [8, 16]
    assert {path.name for path in folder.glob("*.svg")} == {"bench-2-loss-time.svg", "bench-2-loss-memory.svg"}
    assert 'fill="white"' in (folder / "bench-2-loss-time.svg").read_text()


def test_plots_without_their_results_are_not_replaced(tmp_path):
    (tmp_path / "bench-loss-time.svg").write_text("an earlier one")
    assert write_numbered(tmp_path, timed()).name == "bench-2.json"
    (tmp_path / "bench-3-engine-time.svg").write_text("of another suite")
    assert write_numbered(tmp_path, timed()).name == "bench-3.json"
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "bench-loss-time.svg", "")
    assert (tmp_path / "bench-loss-time.svg").read_text() == "an earlier one"


def test_without_any_figure_the_command_fails_and_says_what_would_do(run_command, tmp_path, monkeypatch):
    results = timed()
    for row in results.rows:
        row.seconds, row.outcome, row.why = {}, "not run", "the time was up"
    monkeypatch.setattr(runs, "run", lambda *_, **__: results)
    found = run_command("bench", "--seconds", "8", "--output", tmp_path)
    assert (found.code, found.out) == (2, "")
    assert (
        "nothing was timed within the 8 s that were planned (gist_fast in the suite loss not run: the time was up); "
        "give a larger --seconds, smaller --sizes or fewer suites." in found.err
    )
    for row in results.rows:
        row.outcome, row.why = "wrong", "by far"
    found = run_command("bench", "--output", tmp_path)
    assert "(gist_fast in the suite loss wrong: by far); give other --sizes" in found.err
    assert not list(tmp_path.iterdir())


def test_sizes_by_scale():
    sizes = {scale: [case.size for case in SUITES["loss"].cases(Scope((), scale=scale))] for scale in SCALES}
    assert sizes["small"] == [256, 512, 1024, 2048]
    assert sizes["medium"] == [256, 512, 1024, 2048, 4096, 8192]
    assert sizes["large"] == [4 * size for size in sizes["medium"]]
    assert [case.size for case in SUITES["step"].cases(Scope((), scale="large"))] == [128, 256, 512, 1024]
    assert [case.size for case in SUITES["step"].cases(Scope((8,), scale="large"))] == [8]


def test_once_the_time_is_up_nothing_is_begun(monkeypatch, few_peers):
    results = run([SUITES["loss"], SUITES["start"]], Scope((16, 24)), command="", budget=1e-9)
    assert {row.outcome for row in results.rows} == {"not run", "not supported"}
    assert {row.why for row in results.rows if row.size == 16 and row.outcome == "not run"} == {"the time was up"}
    assert suite_table(results, "loss")[1][0][:2] == ["16", "gist_fast"]


@pytest.mark.slow
def test_a_process_s_memory_is_its_own():
    """Not what this one holds, which forks it."""
    suite = SUITES["start"]
    assert 2 << 20 < suite.memory(StartCase(), 'python -c "print()"') < 40 << 20
    held = suite.memory(StartCase(), "import gist_fast.losses")
    assert 100 << 20 < held < 3 << 30


def test_what_cannot_fit_is_a_row_by_formula_and_larger_cases_too(monkeypatch, few_peers):
    def huge(case):
        return 1e18 if case.rows > 20 else 0.0

    monkeypatch.setitem(PEERS, "plain", Peer("plain", lambda case: None, plain_matmul, huge))
    results = run([SUITES["loss"]], Scope((16, 24, 40)), command="", budget=300.0)
    rows = [row for row in results.rows if row.what == "plain"]
    assert [row.outcome for row in rows] == ["ok", "out of memory", "out of memory"]
    assert re.fullmatch(
        r"needs 931322574\.6 GiB at least, by formula; [\d.]+ GiB are free, of which 80 % may be taken", rows[1].why
    )
    assert rows[1].least_memory == 1e18
    columns, cells = suite_table(results, "loss")
    assert all(len(line) == len(columns) for line in cells)
    assert [line[0] for line in cells if "out of memory" in line] == ["24", "40"]
    assert any(line.startswith("plain at B 24 and above out of memory: needs 9") for line in notes(results, "loss"))


def test_what_would_take_too_long_is_left_out(monkeypatch, few_peers):
    monkeypatch.setattr(runs, "_expected", lambda smaller, size, *_, **__: 0.0 if smaller is None else 1e4)
    results = run([SUITES["loss"]], Scope((16, 24)), command="", budget=300.0)
    whys = {row.outcome: row.why for row in results.rows if row.what == "gist_fast"}
    assert re.search(
        r"an iteration would take some 10000\.0 s, and 3 of them more than the [\d.]+ s for it", whys["not run"]
    )


def candidate(size, seconds, smaller=None):
    return Candidate(Row("loss", {}, size, "x", seconds={"both": [seconds] * 3}), 9.0, smaller)


@pytest.mark.parametrize(
    ("smaller", "baseline", "expected"),
    [
        (None, False, 0.0),
        (candidate(16, 1e-3), False, 1e-3 * 16**2),
        (candidate(16, 1e-3), True, 0.0),  # it may be all overhead
        (candidate(16, 1e-3, candidate(4, 0.9e-3)), True, 1e-3 * 16),  # no less than in proportion
        (candidate(16, 8e-3, candidate(4, 1e-3)), True, 8e-3 * 16**1.5),
        (candidate(16, 8e-3, candidate(4, 1e-3)), False, 8e-3 * 16**1.5),
        (candidate(16, 1.0, candidate(4, 1e-3)), False, 1.0 * 16**2),  # no more than it is known to grow
        (candidate(16, 1e-3, candidate(0, 1e-3)), False, 1e-3 * 16**2),
        (candidate(512, 1e-3), False, 0.0),
    ],
)
def test_what_a_turn_is_expected_to_take(smaller, baseline, expected):
    assert runs._expected(smaller, 256, 2.0, baseline=baseline) == pytest.approx(expected)


def test_ours_is_not_left_out_for_a_small_size_that_is_all_overhead(monkeypatch, few_peers):
    known, expected = [], runs._expected

    def watched(smaller, size, *grows, baseline):
        if baseline and smaller is not None:
            known.append((size, smaller.row.size, smaller.smaller and smaller.smaller.row.size))
        return expected(smaller, size, *grows, baseline=baseline)

    monkeypatch.setattr(runs, "_expected", watched)
    results = run([SUITES["loss"]], Scope((2, 512, 600)), command="", budget=20.0)
    assert known == [(512, 2, None), (600, 512, 2)]
    rows = [row for row in results.rows if row.what == "gist_fast"]
    # By the square of the sizes' ratio its iterations would have taken more than there was.
    assert [row.outcome for row in rows] == [OK] * 3, rows
    assert LEAST_ROUNDS * rows[0].timing().median * 256**2 > 20.0


def test_the_start_of_the_server_is_not_on_the_clock(monkeypatch, few_peers):
    late = [0.0]
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(late)))
    monkeypatch.setattr(runs, "start_server", lambda: late.append(1e6))
    results = run([SUITES["loss"]], Scope((16,)), command="", budget=300.0)
    assert {row.outcome for row in results.rows if row.what == "gist_fast"} == {OK}
    assert results.seconds > 1e6


@pytest.mark.slow
def test_the_cheap_are_timed_however_long_entering_took(monkeypatch, few_peers):
    def slow_to_enter(case, name):
        time.sleep(1.5)

    monkeypatch.setattr(SUITES["loss"], "check", slow_to_enter)
    monkeypatch.setattr(runs, "time_iterations", partial(runs.time_iterations, budget=0.0))
    results = run([SUITES["loss"]], Scope((16,)), command="", budget=60.0)
    assert {row.outcome for row in results.rows} == {OK, UNSUPPORTED}


def test_growth_is_fitted_and_shown():
    rows = [
        Row("loss", {"rows": b}, b, "gist_fast", seconds={"both": [1e-7 * b * b] * 3}, memory=b << 12)
        for b in (256, 512, 1024, 4096)
    ]
    found = fits(rows)
    assert [(fit["quantity"], round(fit["power"]["exponent"], 6)) for fit in found] == [("time", 2.0), ("memory", 1.0)]
    columns, cells = fit_table(Results({}, "", fits=found))
    assert ["loss", "gist_fast", "time", "B^2.00 (2.00 to 2.00)", "4", "100% quadratic at B 4,096"] in cells
    assert markdown(columns, cells).splitlines()[1] == "|---" * len(columns) + "|"


def test_memory_is_fitted_where_only_the_time_was_not_affordable():
    case = [{"rows": b} for b in (256, 512, 1024)]
    rows = [Row("loss", c, c["rows"], "plain", seconds={"both": [1.0] * 3}, memory=c["rows"] << 12) for c in case]
    for outcome, found in ((NOT_RUN, ["memory"]), (WRONG, [])):
        rows[-1].outcome, rows[-1].seconds = outcome, {}
        assert [fit["quantity"] for fit in fits(rows)] == found


def test_the_rate_of_the_machine_is_told_by_type():
    def rate(dtype, *seconds):
        return {"case": {"dtype": dtype}, "flops": 2e9, "seconds": list(seconds)}

    rates = [rate("float32", 0.02, 0.025), rate("bfloat16", 2e-6), rate("float32", 0.04, 0.05, 0.1)]
    told = facts(Results({}, "", rates=rates))
    assert told["matrix product, float32"] == "50 GFLOP/s (40 to 80)"
    assert told["matrix product, bfloat16"] == "1,000,000 GFLOP/s (1,000,000 to 1,000,000)"
    assert not any("matrix" in name for name in facts(Results({}, "")))


def test_suites_by_name():
    assert [suite.name for suite in suites_named("step, loss")] == ["step", "loss"]
    assert [suite.name for suite in suites_named("step,step")] == ["step"]
    assert [suite.name for suite in suites_named(None)] == ["loss", "engine", "guide", "step", "start"]
    assert [suite.name for suite in suites_named(None, "cuda:0")] == list(SUITES)
    with pytest.raises(InputError, match="expected any of loss, self, unguided, engine, guide, step, start, got"):
        suites_named("")


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(tmp_path, given, found):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    # With a device that is no name it ends before it measures, and has set what torch would read.
    code = (
        "import os, sys; from gist_fast.cli.main import run\n"
        "sys.argv = ['gist-fast', 'bench', '--device', 'no device']\n"
        "try: run()\n"
        "finally: print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == found, done.stderr
    assert "--device: expected cpu or cuda, got 'no device'" in done.stderr


def test_all_that_the_command_needs_is_installed_with_it():
    """`gist-fast bench` works without this checkout's top folders."""
    code = [path.read_text() for path in (ROOT / "gist_fast" / "bench").glob("*.py")]
    assert not any(f"{word} benchmarks" in text for text in code for word in ("import", "from"))
    command = [sys.executable, "-c", "import gist_fast.bench.run, gist_fast.cli.bench; print('ok')"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.slow
def test_every_suite_runs_at_its_smallest(run_command, tmp_path):
    chosen = ("--suite", ",".join(SUITES), "--sizes", "8")
    found = run_command("bench", *chosen, "--seconds", "150", "--output", tmp_path, "--json")
    assert found.code == 0, found.err
    rows = json.loads(found.out)["rows"]
    assert {row["suite"] for row in rows} == set(SUITES)
    assert {row["outcome"] for row in rows} <= {"ok", "not supported", "not run"}
    assert all(row["memory"] for row in rows if row["suite"] == "start")
