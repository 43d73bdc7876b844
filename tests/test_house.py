"""How the project is laid out: which wing imports which, how large files are, and what keeps its old name."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from arrows import ROOT, check, run, whole_package

from gist_fast.moved import MOVED, new_name

MOST_LINES = 450
LONGER_TESTS = {"test_bench_command", "test_cli_train", "test_guide_columns", "test_long_runs", "test_profiling"}
LONGER_TESTS |= {"test_report", "triton_interpreted"}
"""Files of tests that are longer still; none may be added."""

# Prints the circles of modules that import each other, and the modules that import the package's root.
_CIRCLES = """
import json, grimp
graph = grimp.build_graph("gist_fast", cache_dir=None)
reached = {name: graph.find_upstream_modules(name) for name in graph.modules}
circles = {tuple(sorted({name} | {o for o in reached[name] if name in reached[o]})) for name in reached}
found = [circle for circle in sorted(circles) if len(circle) > 1]
print(json.dumps([found, sorted(graph.find_modules_that_directly_import("gist_fast"))]))
"""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_a_wing_imports_only_from_the_wings_below_it():
    with whole_package() as folder:
        done = check(folder)
        assert done.returncode == 0, done.stdout + done.stderr
        # An arrow that goes up, for types alone, is found.
        module = folder / "gist_fast" / "data" / "names.py"
        module.write_text(module.read_text() + "if __debug__:\n    from gist_fast.losses import guide\n")
        done = check(folder)
    assert done.returncode == 1
    assert "gist_fast.data.names -> gist_fast.losses.guide" in done.stdout


def test_no_modules_import_each_other_in_a_circle():
    with whole_package() as folder:
        done = run(folder, "-c", _CIRCLES)
    assert done.returncode == 0, done.stderr
    circles, of_root = json.loads(done.stdout)
    assert circles == []
    # What the root offers stands in modules of its own, and the root imports them.
    assert of_root == []


def test_few_entries_lie_directly_in_the_package():
    entries = [path.name for path in (ROOT / "gist_fast").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 20, sorted(entries)


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in sources("gist_fast", "kernels", "benchmarks")}
    lengths |= {path: len(path.read_text().splitlines()) for path in sources("tests") if path.stem not in LONGER_TESTS}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize("old", [*sorted(MOVED), "gist_fast.backends.tiled"])
def test_a_module_that_moved_is_found_under_its_old_name(old):
    sys.modules.pop(old, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    new = new_name(old)
    assert module is importlib.import_module(new)
    assert [str(w.message) for w in caught if old in str(w.message)] == [f"{old} is now {new}"]


@pytest.mark.parametrize(
    ("package", "name"), [("config", "EvaluationConfig"), ("data", "text_columns"), ("evaluation", "load_sts")]
)
def test_a_package_that_was_a_module_still_has_its_names(package, name):
    module = importlib.import_module(f"gist_fast.{package}")
    assert getattr(module, name).__module__.startswith(f"gist_fast.{package}.")
    for wrong in ("no_such_name", "_load"):
        with pytest.raises(AttributeError, match=wrong):
            getattr(module, wrong)


def test_a_name_in_a_module_that_moved_is_found_in_a_new_process():
    program = "import gist_fast; from gist_fast.collator import GISTDataCollator; "
    program += "assert gist_fast.errors.InputError; print(GISTDataCollator.__module__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "gist_fast.training.collator\n", done.stderr
