"""Check the imports of gist_fast against the contracts in pyproject.toml: ``python tests/arrows.py``.

The folder ``kernels/`` is installed as ``gist_fast.kernels``, which an editable install does with a finder of its own
that import-linter does not know. So a copy is checked in which it lies inside the package.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def whole_package() -> Iterator[Path]:
    """A folder that holds the package as it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "gist_fast", Path(folder) / "gist_fast", ignore=ignore)
        shutil.copytree(ROOT / "kernels", Path(folder) / "gist_fast" / "kernels", ignore=ignore)
        yield Path(folder)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a Python program for which the package is the one in `folder`."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def check(folder: Path) -> subprocess.CompletedProcess:
    """Run import-linter on the package in `folder`; its exit code is 0 where all contracts are kept."""
    program = "import sys; from importlinter.cli import lint_imports_command as main; sys.exit(main())"
    return run(folder, "-c", program, str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo")


if __name__ == "__main__":
    with whole_package() as folder:
        done = check(folder)
    print(done.stdout + done.stderr)
    sys.exit(done.returncode)
