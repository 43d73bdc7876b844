"""The README's tables, out of the files in ``benchmarks/results/<device>/``: ``python -m benchmarks.readme``.

Writes each between its marks, ``<!-- name -->`` and ``<!-- /name -->``; ``--check`` only says whether they differ, and
ends with 1 where they do. Whose figures the README shows stands in it, as ``<!-- figures of cpu-2-threads -->``, and
``--device`` makes it another's. A section that this device has no file for stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bench_table, demo_table, loss_cpu, step
from benchmarks.marks import put
from gist_fast.bench.results import read

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
DEVICE = re.compile(r"(?<=<!-- figures of )\S+(?= -->)")
"""Whose figures a README shows."""


def _json(table: Callable[[Any], str]) -> Callable[[Path], str]:
    return lambda path: table(json.loads(path.read_text()))


SECTIONS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "demo": ("demo.json", _json(demo_table.table)),
    "cpu": ("loss_cpu.json", _json(loss_cpu.table)),
    "bench": ("bench.json", lambda path: bench_table.table(read(path))),
    "growth": ("growth.json", lambda path: bench_table.growth(read(path))),
    "step": ("step.json", _json(step.table)),
}
"""File of the results and what makes the section of it, by the section's name."""


def device_of(text: str) -> str:
    """Whose figures this README shows."""
    found = DEVICE.findall(text)
    if len(found) != 1:
        raise SystemExit(f"{README}: <!-- figures of DEVICE --> stands there {len(found)} times; expected once.")
    return found[0]


def missing(folder: Path) -> list[str]:
    """The sections that a device has no results of."""
    return [name for name, (file, _) in SECTIONS.items() if not (folder / file).exists()]


def section(name: str, folder: Path) -> str:
    """What has to stand between the marks."""
    file, table = SECTIONS[name]
    return table(folder / file)


def written(text: str, device: str | None = None, results: Path = RESULTS) -> str:
    """The README with its sections as the files of a device have them, by default of the one that it names."""
    folder = results / (device or device_of(text))
    text = DEVICE.sub(lambda _: folder.name, text)
    absent = missing(folder)
    try:
        return put(text, {name: None if name in absent else section(name, folder) for name in SECTIONS})
    except ValueError as error:
        raise SystemExit(f"{README}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="the results' folder; by default the one that the README names")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    old = README.read_text()
    device = arguments.device or device_of(old)
    if len(missing(RESULTS / device)) == len(SECTIONS):
        raise SystemExit(f"--device: {RESULTS / device} holds no results; benchmarks/cpu.sh writes some.")
    new = written(old, device)
    for name in missing(RESULTS / device):
        print(f"{README.name}: the section {name} stays as it is; {device} has no {SECTIONS[name][0]}")
    if old == new:
        print(f"{README.name}: as the results have it")
    elif arguments.check:
        raise SystemExit(f"{README.name}: differs from the results; python -m benchmarks.readme writes it")
    else:
        README.write_text(new)
        print(f"{README.name}: written")


if __name__ == "__main__":
    main()
