"""What a launch multiplies, counted from its arguments; and launches that are timed give the same gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import torch
from gist_fast.kernels.chunks import Rectangle, make_plan

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.launches import Product, flops_of, library_seconds, products_of

PAIR = 2.0 * 128 * 128


def test_work_is_counted_by_tiles_and_dims() -> None:
    plain = Rectangle(block=0, x=0, y=700, rows=300, columns=600)
    square = Rectangle(block=1, x=0, y=0, rows=300, columns=300, excluded=0, symmetric=True)
    of_two = replace(square, y=300, mirror_block=2)

    def flops(rectangle: Rectangle, chunk_tiles: int = 64) -> Counter[Product]:
        found: Counter[Product] = Counter()
        plan = make_plan((rectangle,), chunk_tiles, 10**6)
        for batch in plan.batches:
            for each in batch.sets:
                where = {"table": plan.table, "start": each.start, "chunks": len(each.chunks)}
                found += products_of({**where, "dim": 64, "BLOCK_K": 16})
        return found

    assert flops(plain) == {Product(384, 64, 640): 15 * PAIR * 64}
    assert flops(square) == {Product(384, 64, 384): 6 * PAIR * 64}, "what is below the diagonal is not computed"
    assert sum(flops(square, 1).values()) == 6 * PAIR * 64, "a chunk above the diagonal is whole"
    assert flops(of_two) == {Product(384, 64, 384): 9 * PAIR * 64}, "rows and columns are others: all is computed"
    assert flops_of({"count": 3}) == 0, "nothing is multiplied"


def test_a_product_of_the_library_has_the_layout_that_is_asked_for(tmp_path, monkeypatch) -> None:
    seen = []
    product, multiply = Product(3, 5, 7, left_transposed=True, right_transposed=False), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append((a, b)) or multiply(a, b, out=out))
    assert library_seconds([product], Bench(tmp_path, "kernels", toy=True))[product] > 0
    a, b = seen[0]
    assert (a.shape, a.stride(), b.shape, b.stride()) == ((3, 5), (1, 3), (5, 7), (7, 1))


CODE = """
import torch
from benchmarks.gpu.launches import timed_launches, ways_to_add
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
assert found["forward"].launches == 1 and found["forward, symmetric"].launches == 1, found
library = [found["the library's products" + end] for end in ("", ", transposed")]
assert [work.launches for work in library] == [3, 1], found
assert sum(work.flops for work in library) == 2.0 * 150 * 150 * 48 * 4, found
assert ways_to_add(gradients) == ["aten.addmm.out"]
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
