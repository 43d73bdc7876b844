"""What the parts of benchmarks/gpu.sh leave, put together: ``python -m benchmarks.gpu.results table --out FOLDER``.

No torch is needed, so that a part which ends badly is noted in a moment.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from gist_fast.bench.timing import Ratio, log_quartiles


def ended(out: Path, part: str, code: int) -> None:
    """Note how a part ended, and put all parts so far into results.json."""
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}.json"
    result = _read(path)
    if code:
        log = out / f"{part}.log"
        result["ended"] = "out of time" if code in (124, 137) else f"exit code {code}"
        result["log"] = log.read_text(errors="replace")[-2000:] if log.exists() else ""
    path.write_text(json.dumps(result, indent=1))
    parts = {p.stem: _read(p) for p in sorted(folder.glob("*.json"))}
    (out / "results.json").write_text(json.dumps(parts, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """What a part wrote; one that was stopped in the middle of writing costs nobody else anything."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"damaged": path.read_text(errors="replace")[-2000:]}


def table(out: Path) -> None:
    """Print what results.json holds."""
    parts = json.loads((out / "results.json").read_text())
    about = parts.get("environment", {})
    print(f"\n{about.get('device')}, torch {about.get('torch')}, Triton {about.get('triton')}, {about.get('commit')}")
    print(f"matmul: {about.get('matmul_tflops', 0):.1f} TFLOP/s")
    for part in ("speed", "tuned"):
        file = out / parts.get(part, {}).get("file", "")
        if file.is_file():
            _speed(json.loads(file.read_text()))
    peak = parts.get("memory", {})
    for bits in ("keep", "recompute"):
        if f"{bits}_bytes" in peak:
            kept = "as promised" if peak[f"{bits}_as_promised"] else "MORE THAN PROMISED"
            print(f"memory at B {peak['batch']}, {bits}: {peak[f'{bits}_bytes'] / 1e9:.2f} GB, {kept}")
    for name, part in parts.items():
        print(f"{name}: {part.get('ended', part.get('skipped', 'ended well'))}")


def _speed(results: dict[str, Any]) -> None:
    """Times and shares of a file of `gist_fast.bench`."""
    print(f"{'':40}{'D':>6}{'forward ms (quartiles)':>28}{'backward ms (quartiles)':>28}  {'share':18}time to ours")
    for row in results["rows"]:
        head = f"{row['what']:40}{row['case']['width']:6}"
        if not row["seconds"]:
            print(f"{head}  {row['outcome']}: {row['why'][:70]}")
            continue
        times = "".join(f"{spread(row['seconds'][part]):>28}" for part in ("forward", "backward"))
        share = "{median:.0%} ({low:.0%} to {high:.0%})".format(**row["share"]) if row["share"] else "-"
        print(f"{head}{times}  {share:18}{Ratio(**row['ratio']) if row['ratio'] else ''}".rstrip())


def spread(seconds: list[float]) -> str:
    """Milliseconds, median and quartiles."""
    low, median, high = (1e3 * math.exp(quartile) for quartile in log_quartiles(seconds))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["ended", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part")
    parser.add_argument("--code", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.what == "ended":
        ended(arguments.out, arguments.part, arguments.code)
    else:
        table(arguments.out)


if __name__ == "__main__":
    main()
