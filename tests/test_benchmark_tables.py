"""The README's tables out of results: ours beside theirs, no ratio within its noise, and all sections at once."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_table, readme, step
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
            plain = Row("loss", case, size, "plain", OUT_OF_MEMORY, "needs 9.0 GiB at least, by formula; 1.0 are free")
        rows.append(plain)
        rows.append(Row("loss", case, size, "memeff", UNSUPPORTED, "it knows no guide model"))
        slow = [
            Row("loss", case, size, "slow", NOT_RUN, "a turn takes 7 s"),
            Row("loss", case, size, "slow", NOT_RUN, "at B 128 already"),
            Row("loss", case, size, "slow", OUT_OF_MEMORY, "needs 2 GiB"),
            Row("loss", case, size, "slow", OUT_OF_MEMORY, "needs 8 GiB"),
        ]
        rows.append(slow[(128, 256, 512, 1024).index(size)])
        off = Row("loss", case, size, "off", seconds=plain.seconds, memory=0, ratio=SLOWER)
        rows.append(off if size == 256 else Row("loss", case, size, "off", WRONG, "relative error"))
    rows.append(Row("start", {"size": 0}, 0, "import torch", NOT_RUN, "a turn takes 6 s"))
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
        "| loss | plain | 1,024 | out of memory: needs 9.0 GiB at least, by formula; 1.0 are free |",
        "| loss | memeff | 128 to 1,024 | it knows no guide model |",
        "| loss | slow | 128 to 256 | a turn takes 7 s |",
        "| loss | slow | 512 to 1,024 | out of memory: needs 2 GiB |",
        "| loss | off | 128 | wrong: relative error |",
        "| loss | off | 512 to 1,024 | wrong: relative error |",
        "| start | import torch | - | a turn takes 6 s |",
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


@pytest.mark.parametrize(("rounds", "cell"), [(2, "-"), (3, "2.0x (1.9 to 2.1)")])
def test_a_step_has_a_ratio_from_three_rounds_on(rounds, cell):
    runs = {side: [{"seconds": 1.0, "peak": 1 << 30}] * rounds for side in step.SIDES}
    part = {"batch": 8, "texts": "demo", "runs": runs, "machine": ABOUT, "speedup_ours": [1.9, 2.0, 2.1]}
    lines = step.table({"x": part}).splitlines()
    assert lines[3].split(" | ")[2] == cell
    assert lines[-1].endswith(f"`python -m benchmarks.step --batch 8 --texts demo --rounds {rounds}`.")


def test_all_sections_are_written_and_one_without_a_file_is_empty(tmp_path):
    text = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in readme.SECTIONS)
    empty = readme.written(text, tmp_path)
    assert empty == text.replace("old\n", "")
    write(tmp_path / "bench.json", results())
    found = readme.written(empty, tmp_path)
    assert found == empty.replace("<!-- bench -->\n", f"<!-- bench -->\n{bench_table.table(results())}\n")
    assert readme.written(found, tmp_path) == found
    with pytest.raises(SystemExit, match="section demo stand there 2 times"):
        readme.written(text + text, tmp_path)


def test_what_is_on_file_is_whole():
    for name, (file, _) in readme.SECTIONS.items():
        path = readme.RESULTS / readme.DEVICE / file
        if path.exists():
            json.loads(path.read_text())
            assert "at " in readme.section(name)
