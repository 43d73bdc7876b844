"""What stands beside figures: the commit, and whether what was measured is what that commit holds."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from gist_fast.runtime.environment import commit as _commit

FILES = (
    "gist_fast/__init__.py",
    "gist_fast/rule.py",
    "kernels/forward.py",
    "benchmarks/step.py",
    "benchmarks/results/a/bench.json",
    "docs/benchmarks.md",
)


def git(folder, *arguments: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", "-C", str(folder), *author, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("as committed\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "all")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "marked"),
    [
        (None, False),
        ("gist_fast/rule.py", True),
        ("kernels/forward.py", True),
        ("benchmarks/step.py", True),
        ("benchmarks/new.py", True),
        ("benchmarks/results/a/bench.json", False),
        ("benchmarks/results/b/bench.json", False),
        ("docs/benchmarks.md", False),
    ],
)
def test_changes_to_what_is_measured_or_measures_are_marked(checkout, changed, marked):
    if changed:
        (checkout / changed).parent.mkdir(exist_ok=True)
        (checkout / changed).write_text("changed\n")
    commit = git(checkout, "rev-parse", "--short", "HEAD")
    assert _commit(checkout / "gist_fast") == (f"{commit} with changes" if marked else commit)


def test_another_project_s_commit_is_not_told(checkout):
    installed = checkout / ".venv" / "gist_fast"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert _commit(installed) is None
