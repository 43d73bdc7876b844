"""What a figure depends on: the machine, the versions, the commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import gist_fast


def machine() -> dict:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gist_fast": gist_fast.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
