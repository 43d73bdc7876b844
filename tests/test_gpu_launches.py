"""What a launch multiplies, counted from its arguments; and launches that are timed give the same gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.gpu.launches import flops_of

PAIR = 2.0 * 128 * 128


def test_work_is_counted_by_tiles_and_dims() -> None:
    plain = {"row_tiles": 3, "column_tiles": 5, "x": object(), "dim": 64, "guide_dim": 32, "SYMMETRIC": False}
    assert flops_of(plain) == 15 * PAIR * 96
    assert flops_of({**plain, "guide_dim": None}) == 15 * PAIR * 64
    assert flops_of({**plain, "x": None, "dim": None}) == 15 * PAIR * 32
    square = {**plain, "column_tiles": 3, "SYMMETRIC": True, "chunk_row": 4, "chunk_column": 4}
    assert flops_of(square) == 6 * PAIR * 96
    assert flops_of({**square, "chunk_column": 8}) == 9 * PAIR * 96, "a chunk above the diagonal is whole"
    assert flops_of({"count": 3}) == 0, "nothing is multiplied"


CODE = """
import torch
from benchmarks.gpu.launches import timed_launches
from gist_fast import guided_contrastive_loss
x = [torch.randn(150, 40, generator=torch.Generator().manual_seed(k)) for k in range(4)]
def gradients():
    leaves = [a.clone().requires_grad_() for a in x[:2]]
    guided_contrastive_loss(*leaves, *x[2:], backend="triton").backward()
    return [a.grad for a in leaves]
plain = gradients()
with timed_launches(False) as found:
    timed = gradients()
assert all(torch.equal(a, b) for a, b in zip(plain, timed))
assert found["forward"].launches == 1 and found["forward, symmetric"].launches == 2, found
assert found["the library's products"].flops == 2.0 * 150 * 150 * 48 * 4, found
print("the same")
"""


@pytest.mark.slow
def test_timing_changes_no_result_and_sees_every_launch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.stdout == "the same\n", done.stderr[-2000:]


@pytest.mark.slow
def test_shapes_run_in_the_interpreter(tmp_path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "shapes", "--toy", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "parts" / "shapes.json").read_text()
    assert "descriptors" in text and "rror" not in text
