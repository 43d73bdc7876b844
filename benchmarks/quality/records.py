"""What a run's record is called, and where the records are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import ARMS, Study

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality" / "runs.jsonl"
MARGINS = (-0.1, 0.0, 0.05)  # whose masks are held against the truth


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Records of a results file, by their keys."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["key"]: record for record in map(json.loads, lines)}


def key(of: dict[str, Any]) -> str:
    """What tells one run from another: its settings, whatever they are called."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def settings(study: Study, arm: str, seed: int, judge: str) -> dict[str, Any]:
    """All that a run depends on. ``base`` and ``guide`` are no arms but models as they come; ``mask`` trains nothing
    either, and holds the guide's masks against the truth."""
    data = {"data": study.data, "judge": judge}
    if arm in ("base", "guide"):
        return {**data, "arm": arm}
    setting = {"siblings": study.siblings, "setting": dataclasses.asdict(study.setting), "seed": seed}
    return {**data, **setting, "arm": {"mask": list(MARGINS)} if arm == "mask" else ARMS[arm].asdict()}
