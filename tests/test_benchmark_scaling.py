"""The figures of docs/many-devices.md: against arithmetic by hand, and against the blocks that the loss computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling import (
    Setup,
    backward_bytes,
    flops,
    forward_bytes,
    gathered_bytes,
    link_seconds,
    mask_bytes,
    received_bytes,
    table,
)
from gist_fast.functional.blocks import make_blocks
from gist_fast.functional.loss_config import LossConfig

DOC = Path(__file__).parents[1] / "docs" / "many-devices.md"


def test_by_hand():
    # 2**20 rows, 64 devices, D 768, G 1024: n = 2**14.
    s = Setup()
    assert flops(s) == 2**14 * 2**20 * (16 * 768 + 4 * 1024)
    assert mask_bytes(s) == 2**14 * (2**21 + 2**14 + 256) / 8
    assert gathered_bytes(s) == (2**20 * 768 * 2, 2**20 * 1024 * 2)
    assert forward_bytes(s) == 2 * (2**20 + 2**14) * (768 + 1024) * 2 + mask_bytes(s)
    assert backward_bytes(s) == (2**20 + 2**14) * 768 * (2 + 2 + 2 + 4) + mask_bytes(s) + 2**27
    assert received_bytes(s) == (2**20 * (768 + 1024) * 2 * 63 / 64, 2**20 * 768 * 4 * 63 / 64)
    # 8 nodes: seven eighths of 3.76 GB come in through eight adapters, slower than all of it over NVLink.
    total = 2**20 * (768 + 1024) * 2
    assert link_seconds(s, received_bytes(s)[0]) == pytest.approx(max(total * 63 / 64 / 450e9, total * 7 / 8 / 400e9))
    one_node = Setup(2**14, 8)
    assert link_seconds(one_node, 450e9) == 1.0


def test_against_the_blocks():
    s = Setup(rows=4 * 384, devices=4, student_width=5, guide_width=3)
    pairs = symmetric = 0
    blocks = make_blocks(s.own_rows, [s.own_rows, s.rows], LossConfig(), s.own_rows)
    for block in blocks:
        square = s.own_rows**2 if block.symmetric else 0
        symmetric += square
        pairs += block.rows * block.columns - square
    forward = (pairs + symmetric / 2) * 2 * (s.student_width + s.guide_width)
    backward = (3 * pairs + 1.5 * symmetric) * 2 * s.student_width
    assert flops(s) == forward + backward
    pytest.importorskip("triton")
    from gist_fast.functional.backends import triton as backend

    assert mask_bytes(s) == backend.mask_bytes(blocks, 1)


def test_uneven_rows_are_refused():
    with pytest.raises(ValueError, match="64 devices"):
        table(rows=1000)


def test_the_documents_table_is_the_scripts():
    assert table() in DOC.read_text()
