"""The README holds: its Python runs, its commands run, its configuration is one, and its figures are those on file."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from gist_fast.cli.main import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STUDENT, GUIDE = "nreimers/MiniLM-L6-H384-uncased", "WhereIsAI/UAE-Large-V1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, monkeypatch, pairs, tiny_student, tiny_guide):
    """A folder with the files that the README speaks of, and stand-ins for the models it names."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train", pairs), ("test", pairs.select(range(16)))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{**row, "negative": pairs["positive"][k - 1]} for k, row in enumerate(pairs.select(range(16)))]
    (tmp_path / "triplets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, column in (("scored", "score"), ("labelled", "label")):
        lines = [f'"{row["anchor"]}","{row["positive"]}",{k % 2}\n' for k, row in enumerate(rows)]
        (tmp_path / f"{name}.csv").write_text(f"sentence1,sentence2,{column}\n" + "".join(lines))
    return lambda text: text.replace(STUDENT, str(tiny_student)).replace(GUIDE, str(tiny_guide))


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:40])
def test_python_runs(code, workplace):
    exec(compile(workplace(code), "README.md", "exec"), {"__name__": "readme"})


def test_commands_run(workplace, tmp_path):
    (config,) = blocks("yaml")
    (tmp_path / "config.yaml").write_text(workplace(config))
    commands = [line for block in blocks("bash") for line in block.splitlines() if line]
    for command in commands:
        program, *arguments = shlex.split(workplace(command))
        if program == "make":
            assert f"make {arguments[0]}" in (ROOT / ".ci" / "run").read_text().splitlines()
        else:
            assert program == "gist-fast"
            assert run(arguments) == 0, command
    assert (tmp_path / "runs" / "minilm" / "final" / "modules.json").exists()


def test_the_tables_are_those_of_the_results_on_file():
    from benchmarks.readme import written

    assert written(README) == README, "python -m benchmarks.readme writes them"


def test_every_figure_in_a_table_is_one_on_file():
    """Outside of the marks no table holds a number."""
    from benchmarks.readme import SECTIONS

    rest = README
    for name in SECTIONS:
        rest = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", "", rest, flags=re.DOTALL)
    tables = re.findall(r"^\|.*\n\|[-|: ]+\n((?:\|.*\n)+)", rest, flags=re.MULTILINE)
    assert tables
    assert [line for body in tables for line in body.splitlines() if re.search(r"\d", line)] == []


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
