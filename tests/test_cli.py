"""The command as a user meets it: exit codes, one clear line, JSON alone on stdout."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import types

import pytest
import torch

import gist_fast
from gist_fast.bench.results import Results, Row, write
from gist_fast.cli.output import parse_columns
from gist_fast.runtime.errors import InputError


@pytest.fixture
def run(run_command):
    return run_command


@pytest.fixture
def pairs_file(tmp_path, pairs):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def refused(result, says: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that says it."""
    assert result.code == 2
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert says in lines[0]
    assert "Traceback" not in lines[0]


def test_version_and_help(run):
    assert run("--version").out == f"gist-fast {gist_fast.__version__}\n"
    result = run("--help")
    assert result.code == 0
    for command in ("train", "evaluate", "inspect", "doctor", "demo"):
        assert f"  {command} " in result.out
        assert run(command, "--help").code == 0


def test_help_starts_without_the_heavy_packages():
    code = """
import sys
from gist_fast.cli.main import run
code = run(["train", "--help"])
heavy = {"torch", "transformers", "sentence_transformers", "datasets", "pyarrow", "numpy"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else code)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "gist_fast.cli.main", "trian"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr == "gist-fast: no such command 'trian'. Did you mean 'train'? See gist-fast --help.\n"


def test_wrong_usage_is_one_line(run):
    refused(run("evaluate", "m", "--nope"), "gist-fast evaluate: no such option")
    refused(run("train"), "gist-fast train: missing argument 'CONFIG.yaml'")
    refused(run("inspect", "--data", "x", "--batch", "two"), "invalid value for '--batch'")
    nothing = run()
    assert nothing.code == 2
    assert "Usage: gist-fast" in nothing.err


@pytest.mark.parametrize(
    "arguments",
    [("train", "c.yaml"), ("profile", "c.yaml"), ("inspect", "--guide", "g", "--data", "d"), ("bench",)],
    ids=lambda given: given[0],
)
def test_a_report_in_the_home_directory(run, arguments, tmp_path, monkeypatch):
    """``--report=~/run.html`` reaches the command as it stands."""
    pytest.importorskip("matplotlib", reason="matplotlib (the extra [bench]) is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.html").write_text("mine")
    refused(run(*arguments, "--report=~/run.html"), f"{tmp_path / 'run.html'}: exists; ")
    refused(
        run(*arguments, "--report=~nobody-of-that-name/run.html"), "expected a path below an existing home directory"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]


@pytest.mark.skipif(not hasattr(select, "poll"), reason="whether a pipe is closed cannot be asked here")
@pytest.mark.parametrize(
    ("arguments", "closed"),
    [
        (("bench", "compare", "--json", "FILE", "FILE"), "stdout"),  # plain text
        (("bench", "compare", "FILE", "FILE"), "stdout"),  # tables
        (("--help",), "stdout"),
        (("bench", "compare", "absent", "FILE"), "stderr"),
    ],
)
def test_a_closed_pipe_ends_it_quietly(tmp_path, arguments, closed):
    path = tmp_path / "bench.json"
    write(path, Results({"device": "a"}, "", rows=[Row("loss", {}, 8, "x", seconds={"both": [1.0] * 3})]))
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "gist_fast", *(str(path) if word == "FILE" else word for word in arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: write_end}
    done = subprocess.run(command, **streams, text=True, timeout=60, check=False)
    os.close(write_end)
    assert (done.returncode, done.stdout or "", done.stderr or "") == (141, "", "")


class TestErrors:
    """Errors of each kind, raised where a command would raise them."""

    @pytest.fixture
    def raising(self, run, monkeypatch):
        def with_error(error, *options):
            def examine():
                raise error

            monkeypatch.setattr("gist_fast.pipeline.doctor.examine", examine)
            return run(*options, "doctor")

        return with_error

    def test_wrong_input(self, raising):
        refused(raising(InputError("that file:\n  is wrong")), "gist-fast: that file: is wrong")

    def test_an_argument_check_of_the_package(self, run, monkeypatch):
        from gist_fast.functional.checks import check_temperature

        monkeypatch.setattr("gist_fast.pipeline.doctor.examine", lambda: check_temperature(-1.0))
        refused(run("doctor"), "gist-fast: temperature: expected a finite float above 0, got -1.0")

    def test_what_nobody_checked(self, raising):
        result = raising(ValueError("inner trouble"))
        # This ValueError comes from no module of gist_fast, so it is no wrong input.
        assert result.code == 1
        assert result.err == "gist-fast: ValueError: inner trouble (for the traceback: gist-fast --debug doctor ...)\n"

    def test_a_failing_expression_inside_the_package_is_no_wrong_input(self, run, monkeypatch):
        monkeypatch.setattr("gist_fast.pipeline.doctor.examine", lambda: None)
        result = run("doctor")
        assert result.code == 1
        assert "AttributeError" in result.err

    def test_the_traceback_on_request(self, raising):
        result = raising(RuntimeError("inner trouble"), "--debug")
        assert result.code == 1
        assert "Traceback (most recent call last)" in result.err
        assert result.err.splitlines()[-1] == "gist-fast: RuntimeError: inner trouble"

    def test_a_pipe_between_processes_that_broke(self, raising):
        result = raising(BrokenPipeError(32, "Broken pipe"))
        assert result.code == 1
        assert result.err.startswith("gist-fast: BrokenPipeError: ")

    def test_ctrl_c(self, raising):
        result = raising(KeyboardInterrupt())
        assert (result.code, result.out, result.err) == (130, "", "gist-fast: interrupted.\n")


class TestDoctor:
    def test_table_and_json(self, run):
        result = run("doctor", "--json")
        assert result.code == 0
        report = json.loads(result.out)
        assert report["packages"]["torch"] == torch.__version__
        assert {choice["backend"] for choice in report["choices"]} <= {"triton", "tiled"}
        table = run("doctor").out
        assert torch.__version__ in table
        assert report["choices"][0]["reason"] in table


class TestEvaluate:
    def test_json_of_a_model_and_its_baseline(self, run, pairs_file, tiny_student, tiny_guide):
        result = run(
            "evaluate", tiny_student, "--baseline", tiny_guide, "--pairs", pairs_file, "--json", "--device", "cpu"
        )
        assert result.code == 0
        found = json.loads(result.out)
        assert (found["queries"], found["documents"]) == (64, 64)
        assert found["model"]["name"] == str(tiny_student)
        assert list(found["model"]["metrics"]) == ["ndcg@10", "mrr@10", "accuracy@1", "recall@10", "map@100"]
        assert found["model"]["metrics"] != found["baseline"]["metrics"]
        alone = json.loads(run("evaluate", tiny_guide, "--pairs", pairs_file, "--json").out)
        assert alone["model"]["metrics"] == found["baseline"]["metrics"]
        assert "baseline" not in alone

    def test_table_from_three_files(self, run, tmp_path, tiny_student):
        (tmp_path / "q.tsv").write_text("id\ttext\n1\twhy does ice float\n")
        (tmp_path / "c.tsv").write_text("id\ttext\na\twhy does ice float\nb\twhat do roots do\n")
        (tmp_path / "r.tsv").write_text("query_id\tdocument_id\n1\ta\n")
        files = [f"--{name}={tmp_path / name[0]}.tsv" for name in ("queries", "corpus", "relevant")]
        result = run("evaluate", tiny_student, *files)
        assert result.code == 0
        assert "1 queries, 2 documents" in result.out
        # The query's own words are in the corpus: nothing is closer.
        assert result.out.count("1.0000") == 5

    def test_wrong_usage(self, run, tmp_path, pairs_file, tiny_student):
        refused(run("evaluate", tiny_student, "--corpus", "c"), "--queries, --relevant missing; or give --pairs")
        refused(run("evaluate", tiny_student, "--pairs", pairs_file, "--corpus", "c"), "not both")
        refused(run("evaluate", tiny_student, "--pairs", tmp_path / "pair.jsonl"), "(did you mean 'pairs.jsonl'?)")
        refused(run("evaluate", tmp_path, "--pairs", pairs_file), "holds no model; a folder with modules.json or")
        refused(run("evaluate", f"{tiny_student}s", "--pairs", pairs_file), "no such folder (did you mean 'model'?)")
        refused(run("evaluate", tiny_student, "--pairs", pairs_file, "--columns", "a,b=c"), "'question,answer' or")

    def test_a_model_that_is_broken(self, run, tmp_path, pairs_file):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "config.json").write_text("{")
        (broken / "modules.json").write_text("[")
        result = run("evaluate", broken, "--pairs", pairs_file)
        refused(result, f"model: {broken} cannot be loaded as a model")


class TestInspect:
    def test_json_says_what_the_function_says(self, run, pairs_file, pairs, tiny_student, tiny_guide, guide):
        options = ["--data", pairs_file, "--batch-size", "16", "--batch", "2", "--margin", "0.01", "--device", "cpu"]
        result = run("inspect", "--guide", tiny_guide, "--student", tiny_student, *options, "--limit", "0", "--json")
        assert result.code == 0
        found = json.loads(result.out)
        from gist_fast.inspection import inspect_batch

        want = inspect_batch(
            pairs, lambda texts, *_: guide.encode(texts, convert_to_tensor=True), batch=2, batch_size=16, margin=0.01
        )
        assert (found["first_row"], found["last_row"]) == (17, 32)
        assert [(p["block"], p["row"], p["other_row"]) for p in found["pairs"]] == [
            (p.block, p.row, p.other_row) for p in want.dropped
        ]
        assert found["dropped"] == len(want.dropped) > 0
        assert found["blocks"]["ap"]["compared"] == 16 * 15
        first = found["pairs"][0]
        assert first["text"] == pairs[first["row"] - 1]["positive" if first["block"] == "pp" else "anchor"]
        assert -1 <= first["student"] <= 1
        assert first["guide"] > first["threshold"]

    def test_table_is_limited(self, run, pairs_file, tiny_guide):
        result = run("inspect", "--guide", tiny_guide, "--data", pairs_file, "--limit", "3")
        assert result.code == 0
        assert "Dropped pairs: 3 of " in result.out
        assert "student" not in result.out

    def test_a_prompt_changes_what_the_guide_sees(self, run, pairs_file, tiny_guide):
        options = ["inspect", "--guide", tiny_guide, "--data", pairs_file, "--json"]
        plain, prompted = (json.loads(run(*options, *more).out) for more in ([], ["--guide-prompt", "water ice: "]))
        assert plain["pairs"][0]["guide"] != prompted["pairs"][0]["guide"]

    def test_wrong_usage(self, run, pairs_file, tiny_guide, tmp_path):
        refused(run("inspect", "--data", pairs_file), "the data carry no column 'anchor_guide_embedding'")
        refused(
            run("inspect", "--data", pairs_file, "--guide", tiny_guide, "--batch", "2"),
            "batch: expected 1 to 1, the batches that 64 rows make",
        )
        refused(
            run("inspect", "--data", pairs_file, "--guide", tiny_guide, "--margin-strategy", "rel"),
            "margin_strategy: expected 'absolute' or 'relative', got 'rel'",
        )
        refused(run("inspect", "--data", pairs_file, "--guide", "./nowhere"), "guide: ./nowhere: no such folder")
        refused(run("inspect", "--data", tmp_path / "x.csv", "--guide", tiny_guide), "x.csv: no such file")
        refused(
            run("inspect", "--data", pairs_file, "--guide", tiny_guide, "--columns", "question,answer"),
            "no column 'question', named for anchor; it has 'anchor', 'positive'",
        )


class TestDemo:
    def test_options_are_passed_on(self, run, monkeypatch, tmp_path):
        seen = {}
        module = types.ModuleType("gist_fast.demo.run")
        module.run_demo = lambda output_dir, **options: seen.update(output_dir=output_dir, **options)
        monkeypatch.setitem(sys.modules, "gist_fast.demo.run", module)
        assert run("demo", "--output-dir", tmp_path, "--quick", "--seed", "3").code == 0
        console = seen.pop("console")
        assert callable(console.print)
        assert seen == {"output_dir": tmp_path, "quick": True, "seed": 3}


def test_columns_as_typed():
    assert parse_columns(None) is None
    assert parse_columns("question, answer") == ["question", "answer"]
    assert parse_columns("anchor=question,positive = answer") == {"anchor": "question", "positive": "answer"}
