"""The benchmark of memory over a long run: a few steps of it, and what it makes of figures that are given."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import memory_growth

STORED = memory_growth.RESULTS / "cpu-2-threads" / "memory_growth.json"
DOC = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@pytest.fixture
def _newcomers_only() -> Iterator[None]:
    """Hide what other tests left alive."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_newcomers_only")
@pytest.mark.parametrize("mode", memory_growth.MODES)
def test_a_few_steps(mode, monkeypatch):
    monkeypatch.setattr(memory_growth, "EPOCH", 2)
    found = memory_growth.train(mode, steps=6, every=2)
    assert [entry["step"] for entry in found] == [2, 4, 6]
    assert all(entry["tensors_with_graph"] == 0 for entry in found)
    assert found[0]["tensors"] == found[2]["tensors"] > 0
    assert all(entry[name] > 0 for entry in found for name in ("process_memory", "tensor_bytes", "python_blocks"))


def test_growth_is_that_of_the_second_half():
    steps = range(100, 900, 100)
    found = [{"step": n, "process_memory": 5000 * min(n, 400) + 3 * n} for n in steps]
    assert memory_growth.growth(found) == pytest.approx(3)
    found[-2]["process_memory"] += 10**6
    assert memory_growth.growth(found) == pytest.approx(3)


def test_what_is_stored_is_flat_and_stands_in_the_documentation():
    results = json.loads(STORED.read_text())
    assert list(results["modes"]) == list(memory_growth.MODES)
    for found in results["modes"].values():
        assert found[-1]["step"] == 2000
        assert {entry["tensors_with_graph"] for entry in found} == {0}
        assert len({entry["tensors"] for entry in found}) == 1
    assert memory_growth.table(results) in DOC.read_text()
