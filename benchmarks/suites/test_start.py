"""The cold start of the command and of imports."""

from __future__ import annotations

from collections.abc import Iterator

from gist_fast.bench.start import StartCase, StartSuite


def cases(scale: str, device: str) -> Iterator[tuple[str, str]]:
    chosen = StartSuite().competitors(StartCase())
    for name in chosen[:1] if scale == "tiny" else chosen:
        yield name.replace(" ", "_"), name


def test_start(measured, measure):
    measure(StartSuite(), StartCase(), measured, "whole")
