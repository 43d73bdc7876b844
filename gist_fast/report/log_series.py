"""The trainer's log history as series over steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MASKED = re.compile(r"(?:(?P<dataset>.+)_)?masked_(?P<block>ap|aa|pp|an(?:_\d+)?)")
_TIMES = ("_runtime", "_samples_per_second", "_steps_per_second", "_preparation_time")
"""How the trainer's own figures about an evaluation's time end."""

Logs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """Values of one key of the log, at rising steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


def one(logs: Logs, key: str) -> Series | None:
    """The values of `key`; None where it was never logged.

    A step that was logged twice, as an evaluation repeated after a resumption is, counts as logged last.
    """
    found = {
        int(log["step"]): float(log[key])
        for log in logs
        if "step" in log and isinstance(log.get(key), (int, float)) and not isinstance(log.get(key), bool)
    }
    return Series(tuple(sorted(found)), tuple(found[step] for step in sorted(found))) if found else None


def several(logs: Logs, names: Mapping[str, str]) -> dict[str, Series]:
    """The series of those of the keys that were logged, by the name that `names` has for each."""
    series = {name: one(logs, key) for key, name in names.items()}
    return {name: found for name, found in series.items() if found is not None}


def masked_blocks(logs: Logs) -> dict[str, dict[str, Series]]:
    """The share of pairs masked by dataset and block; the dataset's name is empty where one loss serves all."""
    found: dict[str, dict[str, Series]] = {}
    for key in _keys(logs):
        named = _MASKED.fullmatch(key)
        series = one(logs, key) if named else None
        if named and series is not None:
            found.setdefault(named["dataset"] or "", {})[named["block"]] = series
    return found


def evaluations(logs: Logs) -> tuple[dict[str, Series], dict[str, Series]]:
    """What evaluations found: losses by dataset (an empty name where there is one), and the other metrics by name.

    How long they took is left out, and the ``cosine_`` that sentence-transformers puts before a metric.
    """
    keys = [key for key in _keys(logs) if key.startswith("eval_") and not key.endswith(_TIMES)]
    losses = {key: key.removeprefix("eval_").removesuffix("loss").rstrip("_") for key in keys if key.endswith("_loss")}
    metrics = {key: key.removeprefix("eval_").removeprefix("cosine_") for key in keys if key not in losses}
    return several(logs, losses), several(logs, metrics)


def _keys(logs: Logs) -> list[str]:
    """In the order in which they first came."""
    return list(dict.fromkeys(key for log in logs for key in log))
