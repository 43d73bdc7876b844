"""The README's tables out of results: ours beside theirs, no ratio within its noise, and all sections at once."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_table, loss_cpu, readme, step
from benchmarks.machine import measured_on, told
from gist_fast.bench.results import NOT_RUN, OUT_OF_MEMORY, UNSUPPORTED, WRONG, Results, Row, write
from gist_fast.bench.run import fits

ABOUT = {"cpu": "a CPU", "threads": 2, "torch": "2.13.0", "triton": None, "gist_fast": "0.1.0", "commit": "abc"}
RATIO = {"low": 1.9, "median": 2.0, "high": 2.1, "rounds": 3}
SLOWER = {"low": 0.79, "median": 0.8, "high": 0.81, "rounds": 3}


def results() -> Results:
    rows = []
    for size in (128, 256, 512, 1024):
        case = {"rows": size}
        rows.append(Row("loss", case, size, "gist_fast", seconds={"both": [1e-6 * size**2] * 3}, memory=size << 12))
        plain = Row("loss", case, size, "plain", seconds={"both": [2e-6 * size**2] * 3}, memory=size << 14)
        plain.ratio = SLOWER if size == 128 else RATIO
        if size == 1024:
            why = "needs 9.0 GiB at least, by formula; 10.0 GiB are free, of which 80 % may be taken"
            plain = Row("loss", case, size, "plain", OUT_OF_MEMORY, why)
        rows.append(plain)
        rows.append(Row("loss", case, size, "memeff", UNSUPPORTED, "it knows no guide model"))
        slow = [
            Row("loss", case, size, "slow", NOT_RUN, "an iteration takes 7 s"),
            Row("loss", case, size, "slow", NOT_RUN, "at B 128 already"),
            Row("loss", case, size, "slow", OUT_OF_MEMORY, "needs 2 GiB"),
            Row("loss", case, size, "slow", OUT_OF_MEMORY, "needs 8 GiB"),
        ]
        rows.append(slow[(128, 256, 512, 1024).index(size)])
        off = Row("loss", case, size, "off", seconds=plain.seconds, memory=0, ratio=SLOWER)
        rows.append(off if size == 256 else Row("loss", case, size, "off", WRONG, "relative error"))
    rows.append(Row("start", {"size": 0}, 0, "import torch", NOT_RUN, "an iteration takes 6 s"))
    rows.append(Row("start", {"size": 0}, 0, "gist-fast --version", seconds={"whole": [0.1] * 3}, memory=20 << 20))
    return Results(ABOUT, "gist-fast bench", 12.0, rows, fits(rows))


def test_ours_stands_beside_each_peer_at_the_smallest_and_the_largest_batch_of_both():
    lines = bench_table.table(results()).splitlines()
    assert lines[2:5] == [
        "| loss | 128 | plain | 16.4 ms | 32.8 ms | 0.8x (0.79 to 0.81) | under 1 MiB | 2 MiB |",
        "| loss | 512 | plain | 262 ms | 524 ms | 2.0x (1.9 to 2.1) | 2 MiB | 8 MiB |",
        "| loss | 256 | off | 65.5 ms | 131 ms | 0.8x (0.79 to 0.81) | 1 MiB | under 1 MiB |",
    ]
    # A suite in which nobody is compared with ours has nothing in the column of ours.
    assert lines[5:9] == [
        "",
        "| suite | what | time | memory |",
        "|---|---|---|---|",
        "| start | gist-fast --version | 100 ms | 20 MiB |",
    ]


def test_who_was_not_timed_is_listed_with_the_reason():
    lines = bench_table.table(results()).splitlines()
    assert lines[9:19] == [
        "",
        "| suite | not timed | at B | why |",
        "|---|---|---|---|",
        "| loss | plain | 1,024 | out of memory: needs 9.0 GiB at least, by formula; 10.0 GiB are free, of which 80 % "
        "may be taken |",
        "| loss | memeff | 128 to 1,024 | it knows no guide model |",
        "| loss | slow | 128 to 256 | an iteration takes 7 s |",
        "| loss | slow | 512 to 1,024 | out of memory: needs 2 GiB |",
        "| loss | off | 128 | wrong: relative error |",
        "| loss | off | 512 to 1,024 | wrong: relative error |",
        "| start | import torch | - | an iteration takes 6 s |",
    ]


def test_growth_and_where_figures_come_from_stand_below():
    lines = bench_table.table(results()).splitlines()
    assert lines[19:25] == [
        "",
        "| suite | of | grows as (95 %) | sizes | parts |",
        "|---|---|---|---|---|",
        "| loss | time | B^2.00 (2.00 to 2.00) | 4 | 100% quadratic at B 1,024 |",
        "| loss | memory | B^1.00 (1.00 to 1.00) | 3 | 100% linear at B 1,024 |",
        "",
    ]
    assert lines[25] == "a CPU, 2 threads; torch 2.13.0, gist_fast 0.1.0 at abc; `gist-fast bench`. 12 seconds in all."
    assert len(lines) == 26


def test_a_card_is_named_in_the_place_of_the_cpu():
    assert measured_on({**ABOUT, "gpu": "a card"}, "x").startswith("a card; torch")


@pytest.mark.parametrize(
    ("quartiles", "rounds", "says"),
    [
        ([1.9, 2.0, 2.1], 3, "2.0x (1.9 to 2.1)"),
        ([0.8, 1.1, 1.3], 3, "no difference seen"),
        ([1.9, 2.0, 2.1], 2, "no difference seen"),
    ],
)
def test_a_ratio_within_its_noise_is_refused(quartiles, rounds, says):
    assert told(quartiles, rounds=rounds) == says


@pytest.mark.parametrize(
    ("seconds", "cells"),
    [([11.0, 12.0], ["11.5", "-"]), ([11.0, 12.0, 13.0], ["12.0 (11.5 to 12.5)", "2.0x (1.9 to 2.1)"])],
)
def test_a_step_has_spread_and_a_ratio_from_three_rounds_on(seconds, cells):
    runs = {side: [{"seconds": taken, "peak": 1 << 30} for taken in seconds] for side in step.SIDES}
    about = {"machine": {**ABOUT, "sentence-transformers": "6.2.0"}, "command": "python -m benchmarks.step --memory 1"}
    part = {**about, "batch": 8, "texts": "demo", "runs": runs, "speedup_ours": [1.9, 2.0, 2.1]}
    lines = step.table({"x": part}).splitlines()
    assert lines[3].split(" | ")[1:3] == cells
    assert lines[-1] == (
        f"B 8, demo, {len(seconds)} rounds: a CPU, 2 threads; torch 2.13.0, sentence-transformers 6.2.0, "
        "gist_fast 0.1.0 at abc; `python -m benchmarks.step --memory 1`."
    )


def test_a_step_that_was_not_measured_is_said_to_be():
    assert step.table({}) == "Not measured yet."


def test_a_step_s_results_hold_versions_the_command_and_ratios_to_theirs(tmp_path, monkeypatch):
    taken = {"theirs": 6.0, "ours": 2.0}
    monkeypatch.setattr(step, "in_own_process", lambda side, *_: {"seconds": taken[side], "peak": 1 << 30})
    monkeypatch.setattr(step, "check", lambda: {})
    monkeypatch.setattr(step, "lengths", lambda _: {})
    given = ["--batch", "8", "--memory", "0.25", "--device", str(tmp_path), "--sides", "ours", "theirs"]
    monkeypatch.setattr("sys.argv", ["step.py", *given])
    step.main()
    (part,) = json.loads((tmp_path / "step.json").read_text()).values()
    assert part["command"] == " ".join(["python -m benchmarks.step", *given])
    assert {"torch", "sentence-transformers", "transformers", "gist_fast", "commit"} <= set(part["machine"])
    assert part["speedup_ours"] == pytest.approx([3, 3, 3])
    assert "speedup_theirs" not in part


def test_a_run_for_growth_shows_nothing_else():
    lines = bench_table.growth(results()).splitlines()
    whole = bench_table.table(results()).splitlines()
    assert lines[0] == "| suite | of | grows as (95 %) | sizes | parts |"
    assert lines[2].startswith("| loss | time | B^2.00 (2.00 to 2.00) | 4 | ")
    assert lines == whole[-len(lines) :]


class TestReadme:
    TEXT = "<!-- figures of a -->\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in readme.SECTIONS)

    def test_sections_are_written_and_one_without_a_file_stays(self, tmp_path):
        assert readme.written(self.TEXT, results=tmp_path) == self.TEXT
        write(tmp_path / "a" / "bench.json", results())
        found = readme.written(self.TEXT, results=tmp_path)
        assert found == self.TEXT.replace("<!-- bench -->\nold", f"<!-- bench -->\n{bench_table.table(results())}")
        assert readme.written(found, results=tmp_path) == found

    def test_another_device_is_named(self, tmp_path):
        write(tmp_path / "b" / "bench.json", results())
        found = readme.written(self.TEXT, "b", tmp_path)
        assert readme.device_of(found) == "b"
        # So that the README is then held to that device's files.
        assert readme.written(found, results=tmp_path) == found
        assert "| loss | 128 | plain |" in found and "<!-- demo -->\nold\n" in found

    def test_marks_that_are_not_there_once_are_refused(self, tmp_path):
        with pytest.raises(SystemExit, match="part 'demo' stand there 2 times"):
            readme.written(self.TEXT + self.TEXT.partition("\n")[2], results=tmp_path)
        with pytest.raises(SystemExit, match="figures of DEVICE --> stands there 2 times"):
            readme.written(self.TEXT + self.TEXT, results=tmp_path)

    def test_a_device_without_results_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sys.argv", ["readme.py", "--device", "no-such-device"])
        with pytest.raises(SystemExit, match="no-such-device holds no results"):
            readme.main()


@pytest.mark.parametrize("given", [[], ["--keep", "--rounds", "2"]])
def test_the_loss_s_figures_are_kept_only_if_asked(tmp_path, monkeypatch, capsys, given):
    found = json.loads((readme.RESULTS / "cpu-2-threads" / "loss_cpu.json").read_text())
    parts = {
        "memory": "memory",
        "against_sentence_transformers": "sentence_transformers",
        "against_plain": "plain",
        "bfloat16": "bfloat16",
        "matryoshka": "nested",
    }
    for function, name in parts.items():
        monkeypatch.setattr(loss_cpu, function, lambda *_, result=found[name]: result)
    monkeypatch.setattr("sys.argv", ["loss_cpu.py", "--device", str(tmp_path), *given])
    loss_cpu.main()
    command = " ".join(["python -m benchmarks.loss_cpu", "--device", str(tmp_path), *given])
    assert f"`{command}`." in capsys.readouterr().out
    if given:
        assert json.loads((tmp_path / "loss_cpu.json").read_text())["command"] == command
    else:
        assert list(tmp_path.iterdir()) == []


def test_what_is_on_file_is_whole():
    folder = readme.RESULTS / readme.device_of(readme.README.read_text())
    for name in readme.SECTIONS.keys() - readme.missing(folder):
        file, _ = readme.SECTIONS[name]
        results = json.loads((folder / file).read_text())
        assert "at " in readme.section(name, folder) or not results
