"""The table of configurations and its checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gist_fast.kernels.config import (
    HALF,
    SINGLE,
    TABLE,
    Launch,
    choose_config,
    generation_of,
    notes,
)

GENERATIONS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")


def test_every_generation_has_both_sizes_and_says_what_each_was_chosen_on() -> None:
    assert set(TABLE) == {(generation, size) for generation in GENERATIONS for size in (HALF, SINGLE)}
    for generation in GENERATIONS:
        for size, note in notes(generation).items():
            measured = (generation, size) == ("sm_90", "2 bytes")
            assert ("Measured on an H200" if measured else "Not yet measured on a GPU") in note


def test_the_size_of_an_element_decides() -> None:
    assert [choose_config("sm_90", size) for size in (2, 4)] == [TABLE["sm_90", HALF], TABLE["sm_90", SINGLE]]


@pytest.mark.parametrize(
    ("capability", "generation"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
     ((10, 3), "sm_100"), ((12, 0), "sm_89")],
)  # fmt: skip
def test_capabilities_of_later_cards_find_a_generation(capability: tuple[int, int], generation: str) -> None:
    assert generation_of(*capability) == generation


def test_what_cannot_be_compiled_is_refused_where_it_is_written() -> None:
    with pytest.raises(ValueError, match=r"block_k: expected .*, got 48"):
        Launch(48, 4, 3)
    with pytest.raises(ValueError, match=r"warps: expected .*, got 3"):
        Launch(64, 3, 3)
    with pytest.raises(ValueError, match=r"columns: expected .*, got 16"):
        Launch(64, 4, 3, columns=16)
    with pytest.raises(ValueError, match=r"stages, group: expected .*; got 7 and 8"):
        Launch(64, 4, 7)
    with pytest.raises(ValueError, match=r"block_k: expected .*, got \[32, 64\]"):
        replace(TABLE["sm_90", HALF], forward=Launch(32, 4, 3))
    with pytest.raises(ValueError, match=r"got 7\.5"):
        generation_of(7, 5)
