"""What the parts of benchmarks/gpu.sh leave, put together: ``python benchmarks/gpu_results.py table --out FOLDER``.

Nothing but the standard library is needed, so that a part which ends badly is noted in a moment.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


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
    print(f"{'':36}{'D':>6}{'forward ms (quartiles)':>28}{'backward ms (quartiles)':>28}{'TFLOP/s':>9}{'share':>7}")
    for row in parts.get("speed", {}).get("rows", []) + parts.get("tuned", {}).get("rows", []):
        if "failed" in row:
            print(f"{row['what']:36}{row['width']:6}  {row['failed'][:70]}")
            continue
        print(
            f"{row['what']:36}{row['width']:6}{_spread(row['forward_ms_quartiles']):>28}"
            f"{_spread(row['backward_ms_quartiles']):>28}{row['tflops']:9.1f}{row['share_of_matmul']:7.1%}"
            f"{_over(row)}"
        )
    peak = parts.get("memory", {})
    for bits in ("keep", "recompute"):
        if f"{bits}_bytes" in peak:
            kept = "as promised" if peak[f"{bits}_as_promised"] else "MORE THAN PROMISED"
            print(f"memory at B {peak['batch']}, {bits}: {peak[f'{bits}_bytes'] / 1e9:.2f} GB, {kept}")
    for name, part in parts.items():
        print(f"{name}: {part.get('ended', part.get('skipped', 'ended well'))}")


def _spread(quartiles: list[float]) -> str:
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _over(row: dict[str, Any]) -> str:
    """Times over ours, where a row has them."""
    told = {name: row[f"{name}_over_ours"] for name in ("forward", "backward") if f"{name}_over_ours" in row}
    said = [f"{name} {'no difference seen' if ratio is None else f'{ratio:.2f}x ours'}" for name, ratio in told.items()]
    return f"  {', '.join(said)}" if said else ""


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
