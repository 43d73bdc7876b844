"""Work in several processes: each outcome under its name, and what fails costs no other its result."""

from __future__ import annotations

import functools
import math
import os

import pytest

from benchmarks.gpu.processes import outcomes


@pytest.mark.parametrize("here", [True, False])
def test_every_work_has_its_outcome(here: bool) -> None:
    work = {"two": functools.partial(math.sqrt, 4), "none": functools.partial(math.sqrt, -1)}
    found = dict(outcomes(work, here=here))
    assert found["two"] == 2
    assert isinstance(found["none"], ValueError)


def test_a_process_that_dies_is_an_outcome() -> None:
    ((name, error),) = outcomes({"dies": functools.partial(os._exit, 3)}, here=False)
    assert name == "dies"
    assert isinstance(error, Exception)
