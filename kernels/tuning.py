"""Opt-in tuning: with ``GIST_FAST_AUTOTUNE=1``, a shape's first call times the candidates and keeps the fastest.

Results are kept on disk, a file a key, under ``GIST_FAST_CACHE`` (else the user's cache folder). The key holds all
that the answer depends on: device, library versions, the kernels' own source, types, dims and the class of size.
A file is replaced as a whole, so that a reader never sees half of one; what cannot be read, or answers another
question, counts as absent; and what cannot be written is only lost for the next process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gist_fast.kernels.config import Config, Launch

logger = logging.getLogger(__name__)

SWITCH = "GIST_FAST_AUTOTUNE"
FOLDER = "GIST_FAST_CACHE"
_FORWARD, _MASKS = ("forward", "forward_symmetric"), ("masks", "masks_symmetric")
FIELDS = {
    "forward": _FORWARD,
    "guided forward": (*_MASKS, *_FORWARD),
    "backward": ("dlogits", "dlogits_symmetric"),
    "recompute": (*_MASKS, "dlogits", "dlogits_symmetric"),
}
"""The launches that are tried for each direction; ``recompute`` is a backward pass that decides the masks again."""
_known: dict[str, Config] = {}


def enabled() -> bool:
    """Whether the user asked for tuning."""
    return os.environ.get(SWITCH, "0").lower() in ("1", "true", "yes", "on")


def make_key(
    direction: str,
    *,
    device: str,
    versions: tuple[str, ...],
    dtypes: tuple[str, ...],
    dims: tuple[int, ...],
    rows: int,
    pairs: int,
    variant: str = "",
) -> str:
    """What a configuration was tuned for, as text. Sizes count by their power of two."""
    sizes = [rows.bit_length(), pairs.bit_length()]
    return json.dumps([direction, device, *versions, _source(), *dtypes, *dims, *sizes, variant])


def tuned(key: str, default: Config, direction: str, seconds: Callable[[Config], float]) -> Config:
    """The configuration for a key: known in this process, on disk, or found now.

    Args:
        default: where the search begins.
        direction: a key of `FIELDS`: which launches are tried. ``"recompute"`` keeps to the default's step.
        seconds: times a configuration; may raise, as one that does not fit the device does.
    """
    if key not in _known:
        found = _read(key, default.block_k if direction == "recompute" else None)
        if found is None:
            found = _search(default, direction, seconds)
            _write(key, found)
        _known[key] = found
    return _known[key]


def candidates(config: Config, field: str) -> Iterator[Config]:
    """Configurations that differ from `config` in the shape of one launch."""
    launch = getattr(config, field)
    shapes = [{"warps": warps, "stages": stages, "columns": 128} for warps in (4, 8) for stages in (2, 3, 4)]
    # Twice the programs on a multiprocessor, for half as much again from the L2 cache.
    shapes += [{"warps": 4, "stages": stages, "columns": 64} for stages in (2, 3, 4)]
    shapes.append({"descriptors": True})
    for shape in shapes:
        changed = replace(launch, **shape)
        if changed != launch:
            yield replace(config, **{field: changed})


def other_steps(config: Config) -> list[int]:
    """The steps that are tried instead of the configuration's."""
    return [step for step in (config.block_k // 2, config.block_k * 2) if 16 <= step <= 128]


def with_step(config: Config, block_k: int) -> Config:
    """The configuration with another step in all its launches."""
    launches = {name: replace(launch, block_k=block_k) for name, launch in config.launches().items()}
    return replace(config, **launches)


def recall(key: str, default: Config) -> Config:
    """What this process found for a key, or the default; nothing is tried."""
    return _known.get(key, default)


def _search(default: Config, direction: str, seconds: Callable[[Config], float]) -> Config:
    """One launch after the other, each to its best with the others as they are by then."""
    best, least = default, seconds(default)

    def challenge(config: Config) -> None:
        nonlocal best, least
        try:
            took = seconds(config)
        except Exception as error:  # Too much shared memory, too many registers: not for this device.
            logger.debug("tuning: %s fails: %s", config, error)
            return
        if took < least:
            best, least = config, took

    if direction != "recompute":
        for step in other_steps(default):
            challenge(with_step(best, step))
    for field in FIELDS[direction]:
        for config in candidates(best, field):
            challenge(config)
        challenge(replace(best, **{field: replace(getattr(best, field), group=16)}))
    logger.info("tuning: %.3f ms by %s", 1e3 * least, best)
    return best


def folder() -> Path:
    """Where tuned configurations are kept."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gist_fast"


def _path(key: str) -> Path:
    return folder() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read(key: str, step: int | None = None) -> Config | None:
    """What is on disk for a key; where `step` is given, only if it has that step."""
    try:
        stored = json.loads(_path(key).read_text(encoding="utf-8"))
        if stored["key"] != key:
            return None
        config = _parse(stored["config"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return config if step in (None, config.block_k) else None


def _parse(stored: dict[str, Any]) -> Config:
    launches = {name: Launch(**value) for name, value in stored.items() if isinstance(value, dict)}
    return Config(**{**stored, **launches})


def _write(key: str, config: Config) -> None:
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump({"key": key, "config": asdict(config)}, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("tuning: %s cannot be written (%s); the next process will tune again.", path, error)


@functools.cache
def _source() -> str:
    """A digest of the kernels: tuned on other code, an answer is worth nothing."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
