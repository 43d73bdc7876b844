"""The README's tables out of results: ours beside theirs, no ratio within its noise, and all sections at once."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_table, readme, step
from benchmarks.machine import measured_on, told
from gist_fast.bench.results import OUT_OF_MEMORY, Results, Row, write
from gist_fast.bench.run import fits

ABOUT = {"cpu": "a CPU", "threads": 2, "torch": "2.13.0", "triton": None, "gist_fast": "0.1.0", "commit": "abc"}


def results() -> Results:
    rows = []
    for size in (256, 512, 1024):
        case = {"rows": size}
        rows.append(Row("loss", case, size, "gist_fast", seconds={"both": [1e-6 * size**2] * 3}, memory=size << 12))
        plain = Row("loss", case, size, "plain", seconds={"both": [2e-6 * size**2] * 3}, memory=size << 14)
        plain.ratio = {"low": 1.9, "median": 2.0, "high": 2.1, "rounds": 3}
        if size == 1024:
            why = "needs 9.0 GiB at least, by formula; 10.0 GiB are free, of which 80 % may be taken"
            plain = Row("loss", case, size, "plain", OUT_OF_MEMORY, why)
        rows.append(plain)
    rows.append(Row("start", {"size": 0}, 0, "gist-fast --version", seconds={"whole": [0.1] * 3}, memory=20 << 20))
    return Results(ABOUT, "gist-fast bench", 12.0, rows, fits(rows))


def test_ours_stands_beside_each_peer_at_the_largest_batch_of_both():
    lines = bench_table.table(results()).splitlines()
    assert lines[2:4] == [
        "| loss | 512 | plain | 262 ms | 524 ms | 2.0x (1.9 to 2.1) | 2 MiB | 8 MiB |",
        "| start | - | gist-fast --version | 100 ms | - | - | 20 MiB | - |",
    ]
    assert lines[5] == (
        "Out of memory: plain in the suite loss at B 1,024 (it needs 9.0 GiB at least, by formula; 10.0 GiB are free, "
        "of which 80 % may be taken)."
    )
    assert lines[6:12] == [
        "",
        "| suite | of | grows as (95 %) | sizes | parts |",
        "|---|---|---|---|---|",
        "| loss | time | B^2.00 (2.00 to 2.00) | 3 | 100% quadratic at B 1,024 |",
        "| loss | memory | B^1.00 (1.00 to 1.00) | 3 | 100% linear at B 1,024 |",
        "",
    ]
    assert lines[12] == "a CPU, 2 threads; torch 2.13.0, gist_fast 0.1.0 at abc; `gist-fast bench`. 12 seconds in all."
    assert len(lines) == 13


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
