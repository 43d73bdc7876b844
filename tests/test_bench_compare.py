"""What `gist-fast bench compare` says moved, on results made here."""

from __future__ import annotations

import copy
import json
import math

import pytest

from gist_fast.bench.compare import compare
from gist_fast.bench.results import FAILED, NOT_RUN, OK, OUT_OF_MEMORY, UNSUPPORTED, WRONG, Results, Row, read, write
from gist_fast.runtime.errors import InputError

CASE = {"rows": 512, "dtype": "float32"}
ROUNDS = [1.00, 1.01, 1.02, 1.03, 1.04]  # quartiles 1.01 and 1.03: a spread of 2 %


def results() -> Results:
    return Results(
        {"device": "cpu-2-threads", "torch": "2.13.0", "commit": "abc"},
        "gist-fast bench",
        rows=[
            Row("loss", CASE, 512, "gist_fast", seconds={"both": ROUNDS}, memory=100 << 20),
            Row("loss", CASE, 512, "plain", seconds={"both": ROUNDS}, memory=10 << 20),
        ],
        rates=[{"case": CASE, "flops": 2.0, "seconds": ROUNDS}],
    )


def scaled(factor: float) -> list[float]:
    return [factor * x for x in ROUNDS]


@pytest.mark.parametrize(("factor", "moved"), [(1.03, False), (0.97, False), (1.05, True), (0.95, True)])
def test_a_time_moved_if_it_left_the_noise_of_both_runs(factor, moved):
    new = results()
    new.rows[0].seconds = {"both": scaled(factor)}
    change = next(c for c in compare(results(), new).changes if c.what == "gist_fast" and c.figure == "both")
    assert change.noise == pytest.approx(2 * 0.0196, rel=0.01)
    assert change.moved is moved
    assert change.verdict == ("no difference seen" if not moved else "1.05x slower" if factor > 1 else "1.05x faster")


def test_too_few_rounds_show_nothing():
    old, new = results(), results()
    old.rows[0].seconds, new.rows[0].seconds = {"both": [1.0, 1.0]}, {"both": [9.0, 9.0]}
    change = next(c for c in compare(old, new).changes if c.what == "gist_fast" and c.figure == "both")
    assert not change.moved
    assert change.noise is None


def test_the_machine_itself_is_compared_first():
    new = results()
    new.rates[0]["seconds"] = scaled(2.0)
    change = compare(results(), new).changes[0]
    assert (change.suite, change.verdict) == ("machine", "2.00x slower")


def test_memory_outcomes_facts_and_what_only_one_has():
    new = results()
    new.machine["torch"], new.machine["device"] = "2.14.0", "h100"
    new.rows[0].memory = 80 << 20
    new.rows[1] = Row("loss", CASE, 512, "plain", OUT_OF_MEMORY, "ran out")
    new.rows.append(Row("step", {"size": 8}, 8, "gist_fast", seconds={"whole": ROUNDS}))
    found = compare(results(), new)
    assert found.facts == [("device", "cpu-2-threads", "h100"), ("torch", "2.13.0", "2.14.0")]
    said = {(c.what, c.figure): c.verdict for c in found.changes}
    assert said["gist_fast", "memory"] == "1.25x less"
    assert said["plain", "outcome"] == "was ok, is out of memory"
    assert found.only_new == ["step 8 gist_fast"]
    assert found.only_old == []


@pytest.mark.parametrize(
    ("was", "is_now", "moved"),
    [
        (OK, NOT_RUN, False),
        (NOT_RUN, OK, False),
        (NOT_RUN, OUT_OF_MEMORY, False),
        (UNSUPPORTED, OK, False),
        (OK, OUT_OF_MEMORY, True),
        (WRONG, OK, True),
        (FAILED, WRONG, True),
    ],
)
def test_an_outcome_for_want_of_time_is_no_movement(run_command, tmp_path, was, is_now, moved):
    both = [results(), results()]
    for path, found, outcome in zip(("old", "new"), both, (was, is_now), strict=True):
        found.rows[1].outcome = outcome
        found.rows[1].seconds = found.rows[1].seconds if outcome == OK else {}
        write(tmp_path / path, found)
    (change,) = [c for c in compare(*both).changes if c.figure == "outcome"]
    assert change.moved is moved
    assert change.verdict == f"{'' if moved else 'not comparable: '}was {was}, is {is_now}"
    told = run_command("bench", "compare", tmp_path / "old", tmp_path / "new").out
    assert "Outcomes that changed" in told
    assert ("not comparable" in told.split("0 of")[0]) is not moved
    assert f"{int(moved)} of 1 changed outcomes moved" in told
    # Memory was measured in both, whatever time there was.
    comparable = {was, is_now} <= {OK, NOT_RUN}
    assert f"0 of {4 if comparable else 3} figures moved" in told


def test_small_amounts_of_memory_are_the_allocators():
    old, new = results(), results()
    old.rows[1].memory, new.rows[1].memory = 3 << 20, 4 << 20
    changes = [c for c in compare(old, new).changes if c.what == "plain" and c.figure == "memory"]
    assert [c.moved for c in changes] == [False]


def test_the_command_prints_it(run_command, tmp_path):
    new = results()
    new.rows[0].seconds = {"both": scaled(3.0)}
    new.machine["torch"] = "2.14.0"
    write(tmp_path / "old.json", results())
    write(tmp_path / "new.json", new)
    found = run_command("bench", "compare", tmp_path / "old.json", tmp_path / "new.json")
    assert found.code == 0, found.err
    assert "3.00x slower" in found.out
    assert "2.14.0" in found.out
    assert "1 of 5 figures moved" in found.out
    told = json.loads(run_command("bench", "compare", tmp_path / "old.json", tmp_path / "new.json", "--json").out)
    assert [c["verdict"] for c in told["changes"] if c["moved"]] == ["3.00x slower"]


def test_results_come_back_as_they_were_and_are_never_replaced(tmp_path):
    path = tmp_path / "a" / "bench.json"
    write(path, results())
    assert read(path) == results()
    with pytest.raises(FileExistsError):
        write(path, copy.deepcopy(results()))


ROW = {"suite": "loss", "case": {}, "size": 8, "what": "x"}


POWER = {"exponent": 2.0, "low": 1.9, "high": 2.1, "factor": 1.0, "sizes": 3}
FIT = {"suite": "loss", "what": "x", "quantity": "time", "largest": 8, "power": POWER, "split": None}


def file(**changed) -> str:
    return json.dumps({"format": 1, "machine": {}, "command": "", "rows": [], **changed})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "format 'list'"),
        ('{"format": 7}', "format 7"),
        ("{", "cannot be read"),
        ('{"format": 1}', "not whole"),
        (file(machine=3), "not whole"),
        (file(rows=[7]), "not whole"),
        (file(rows=7), "not whole"),
        (file(rows=[{**ROW, "new": 1}]), "not whole"),
        (file(rows=[{**ROW, "size": "a"}]), "not whole"),
        (file(rows=[{**ROW, "seconds": {"both": "fast"}}]), "are no seconds"),
        (file(rows=[{**ROW, "seconds": {"both": [1.0, 0.0]}}]), "are no seconds"),
        (file(rows=[{**ROW, "seconds": {"both": [1.0, math.nan]}}]), "[1.0, nan] are no seconds"),
        (file(rows=[{**ROW, "seconds": {"both": [math.inf, 1.0]}}]), "[inf, 1.0] are no seconds"),
        (file(rows=[{**ROW, "seconds": {"both": [True, 1.0]}}]), "[True, 1.0] are no seconds"),
        (file(rows=[{**ROW, "memory": math.nan}]), "memory: nan"),
        (file(rows=[{**ROW, "memory": -1}]), "memory: -1"),
        (file(rows=[{**ROW, "memory": True}]), "memory: True"),
        (file(rows=[{**ROW, "size": -8}]), "size: -8"),
        (file(rows=[{**ROW, "size": 8.5}]), "size: 8.5"),
        (file(rows=[{**ROW, "suite": 7}]), "suite: 7"),
        (file(rows=[{**ROW, "what": None}]), "what: None"),
        (file(rows=[{**ROW, "ratio": {"low": 0.0, "median": 1.0, "high": 2.0, "rounds": 3}}]), "ratio: Ratio(low=0.0"),
        (file(rows=[{**ROW, "share": {"low": 1.0}}]), "not whole"),
        (file(fits=[{**FIT, "largest": "many"}]), "fits: 'many'"),
        (file(fits=[{**FIT, "split": {"fixed": 1.0}}]), "not whole"),
        (file(fits=[{**FIT, "power": {}}]), "not whole"),
        (file(seconds="some"), "seconds: 'some'"),
        (file(rates=[{"flops": 1.0}]), "not whole"),
        (file(rates=[{"case": {"dtype": "float32"}, "flops": math.nan, "seconds": [1.0]}]), "flops: nan"),
        ("\0\x80", "cannot be read"),
    ],
)
def test_what_is_no_result_is_refused(run_command, tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    found = run_command("bench", "compare", path, path)
    assert found.code == 2
    assert says in found.err
    assert len(found.err.splitlines()) == 1
    assert found.out == ""


def test_paths_that_hold_no_file_are_refused(run_command, tmp_path):
    for path in (tmp_path, tmp_path / "absent.json", tmp_path / "absent" / "x.json"):
        found = run_command("bench", "compare", path, path)
        assert (found.code, found.out, len(found.err.splitlines())) == (2, "", 1), found.err
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "absent.json")


def test_a_file_as_it_should_be_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(file(rows=[ROW], fits=[FIT]))
    assert read(path).rows == [Row(**ROW)]
