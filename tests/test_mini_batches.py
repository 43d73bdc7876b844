"""Mini-batches of a column: each row once, hardly padded, and put back where it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.base.losses.gradcache import _create_minibatch

from gist_fast.losses.mini_batches import EXTENTS, MiniBatches, extents, positions_are_relative

LENGTHS = [3, 9, 1, 9, 4, 2, 7]


def padded(lengths, side="right"):
    """Features whose ids are the row's number, and 0 for padding."""
    width = max(lengths) + 2
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": mask * (torch.arange(len(lengths)) + 1)[:, None], "attention_mask": mask, "prompt_length": 1}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 60), st.booleans(), st.booleans())
def test_rows_come_back_where_they_were(lengths, max_tokens, sort, left):
    features = padded(lengths, "left" if left else "right")
    batches = MiniBatches(features, max_tokens=max_tokens, sort=sort, trim_left=True)
    parts = []
    for part, tokens in zip(batches, batches.tokens, strict=True):
        assert part["prompt_length"] == 1
        rows, width = part["input_ids"].shape
        assert tokens == rows * width
        assert rows == 1 or tokens <= max_tokens
        assert width == part["attention_mask"].sum(1).max(), "padding that could have been cut off"
        parts.append(part["input_ids"].max(1).values[:, None])
    whole = batches.restore(parts)
    assert whole.flatten().tolist() == list(range(1, len(lengths) + 1))
    for part, again in zip(parts, batches.split(whole), strict=True):
        assert torch.equal(part, again)


def test_sorting_spares_padding():
    tokens = [sum(MiniBatches(padded(LENGTHS), max_rows=2, sort=sort).tokens) for sort in (False, True)]
    assert tokens == [2 * 9 + 2 * 9 + 2 * 4 + 7, 2 * 9 + 2 * 7 + 2 * 3 + 1]


def test_padding_before_the_texts_stays_unless_positions_are_relative():
    features = padded(LENGTHS, "left")
    assert [p["input_ids"].shape[1] for p in MiniBatches(features, max_rows=3)] == [11, 11, 11]
    assert [p["input_ids"].shape[1] for p in MiniBatches(features, max_rows=3, trim_left=True)] == [9, 4, 1]


def test_some_rows_in_their_order():
    batches = MiniBatches(padded(LENGTHS), max_rows=2, rows=[6, 0, 2])
    assert batches.restore([p["input_ids"].max(1).values for p in batches]).tolist() == [7, 1, 3]


def test_a_part_is_a_copy():
    features = padded(LENGTHS)
    for sort in (False, True):
        for part in MiniBatches(features, max_rows=3, sort=sort):
            part["attention_mask"].zero_()
    assert features["attention_mask"].sum() == sum(LENGTHS)


def test_flattened_texts_are_cut_in_their_order():
    cuts = torch.tensor(np.cumsum([0, *LENGTHS]), dtype=torch.int32)
    total = int(cuts[-1])
    features = {
        "input_ids": torch.arange(total)[None],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": cuts,
        "cu_seq_lens_k": cuts,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
        "seq_idx": torch.repeat_interleave(torch.arange(7), torch.tensor(LENGTHS))[None].to(torch.int32),
    }
    assert extents(features).tolist() == [[0, n] for n in LENGTHS]
    by_rows, by_tokens = (MiniBatches(features, **limit) for limit in ({"max_rows": 3}, {"max_tokens": 13}))
    assert [p["input_ids"].flatten().tolist() for p in by_rows] == [
        list(range(13)),
        list(range(13, 28)),
        list(range(28, 35)),
    ]
    assert by_tokens.tokens == [13, 13, 9], "texts that need no padding were counted with some"
    for batches in (by_rows, by_tokens):
        for part, (begin, end) in zip(batches, batches.groups, strict=True):
            theirs = _create_minibatch(features, begin, end)
            assert part.keys() == theirs.keys()
            for name, value in theirs.items():
                assert torch.equal(torch.as_tensor(part[name]), torch.as_tensor(value)), name
        rows = torch.arange(7)
        assert torch.equal(batches.restore(batches.split(rows)), rows)


def test_extents_from_the_host_are_believed_and_never_reach_the_model():
    told = np.array([[0, 5]] * 7)
    batches = MiniBatches({**padded(LENGTHS), EXTENTS: told}, max_rows=3)
    assert all(EXTENTS not in p and p["input_ids"].shape[1] == 5 for p in batches)


@pytest.mark.parametrize("side", ["right", "left"])
def test_extents_of_padded_texts(side):
    ends = [(0, n) if side == "right" else (11 - n, 11) for n in LENGTHS]
    assert extents(padded(LENGTHS, side)).tolist() == [list(e) for e in ends]
    empty = padded([4])
    empty["attention_mask"].zero_()
    assert extents(empty).tolist() == [[0, 6]]


def test_which_models_have_relative_positions(student):
    assert not positions_are_relative(student)
    from transformers import ModernBertConfig, ModernBertModel

    tiny = ModernBertConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    assert positions_are_relative(ModernBertModel(tiny))
