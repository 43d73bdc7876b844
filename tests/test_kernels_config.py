"""The table of configurations and its checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gist_fast.kernels.config import (
    HALF,
    NARROW,
    SINGLE,
    TABLE,
    Launch,
    Owned,
    Staged,
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


def test_narrow_embeddings_accumulate_in_registers_and_wide_ones_materialise_dlogits() -> None:
    assert [choose_config("sm_90", 2, dim).backward_method for dim in (1, NARROW, NARROW + 1, 8192)] == [
        "owned", "owned", "staged", "staged",
    ]  # fmt: skip
    assert choose_config("sm_90", 4, 64).block_k == TABLE["sm_90", SINGLE].block_k


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
        Staged(64, 4, 3, columns=16)
    with pytest.raises(ValueError, match=r"rows: expected .*, got 256"):
        Owned(64, 4, 2, rows=256)
    with pytest.raises(ValueError, match=r"slice_width: expected .*, got 96"):
        Owned(64, 4, 2, slice_width=96)
    with pytest.raises(ValueError, match=r"block_k: expected .*, got \[32, 64\]"):
        replace(TABLE["sm_90", HALF], forward=Launch(32, 4, 3))
    with pytest.raises(ValueError, match=r"backward_method: expected .*, got 'both'"):
        replace(TABLE["sm_90", HALF], backward_method="both")
    with pytest.raises(ValueError, match=r"got 7\.5"):
        generation_of(7, 5)
