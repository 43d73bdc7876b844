"""Timing and memory for the scripts here; the measuring itself is installed with the package (`gist_fast.bench`)."""

from __future__ import annotations

from gist_fast.bench.memory import peak_memory

from gist_fast.bench.timing import Timing, alternate

__all__ = ["Timing", "alternate", "peak_memory"]
