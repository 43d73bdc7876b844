"""The README's tables, out of the files in ``benchmarks/results/<device>/``: ``python -m benchmarks.readme``.

Writes each between its marks, ``<!-- name -->`` and ``<!-- /name -->``; ``--check`` only says which differ, and ends
with 1 where one does. A section whose file is not there yet is empty.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bench_table, demo_table, loss_cpu, step
from gist_fast.bench.results import read

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
DEVICE = "cpu-2-threads"
"""Whose figures the README shows."""


def _json(table: Callable[[Any], str]) -> Callable[[Path], str]:
    return lambda path: table(json.loads(path.read_text()))


SECTIONS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "demo": ("demo.json", _json(demo_table.table)),
    "cpu": ("loss_cpu.json", _json(loss_cpu.table)),
    "bench": ("bench.json", lambda path: bench_table.table(read(path))),
    "step": ("step.json", _json(step.table)),
}
"""File of the results and what makes the section of it, by the section's name."""


def section(name: str, folder: Path = RESULTS / DEVICE) -> str:
    """What has to stand between the marks."""
    file, table = SECTIONS[name]
    return table(folder / file) if (folder / file).exists() else ""


def written(text: str, folder: Path = RESULTS / DEVICE) -> str:
    """The README with all its sections as the files have them."""
    for name in SECTIONS:
        found = section(name, folder)
        between = f"<!-- {name} -->\n{found}\n<!-- /{name} -->" if found else f"<!-- {name} -->\n<!-- /{name} -->"
        text, times = re.subn(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, new=between: new, text, flags=re.DOTALL
        )
        if times != 1:
            raise SystemExit(f"{README}: the marks of the section {name} stand there {times} times; once would do.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=DEVICE, help="the results' folder")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    old = README.read_text()
    new = written(old, RESULTS / arguments.device)
    if old == new:
        print(f"{README.name}: as the results have it")
    elif arguments.check:
        raise SystemExit(f"{README.name}: differs from the results; python -m benchmarks.readme writes it")
    else:
        README.write_text(new)
        print(f"{README.name}: written")


if __name__ == "__main__":
    main()
