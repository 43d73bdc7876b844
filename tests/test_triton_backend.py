"""The Triton backend: its numbers in the interpreter, and where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gist_fast.kernels.layout import TILE_WORDS

from gist_fast import backends, guided_contrastive_loss
from gist_fast.backends import triton
from gist_fast.blocks import make_blocks

pytest.importorskip("triton", reason="Triton is not installed on this platform")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


def run_interpreted(examples: int) -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(here / "triton_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "GIST_FAST_TEST_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_kernels_in_the_interpreter_agree_with_float64() -> None:
    run_interpreted(examples=25)


@pytest.mark.slow
def test_kernels_in_the_interpreter_agree_with_float64_at_length() -> None:
    run_interpreted(examples=500)


def test_it_is_refused_by_name_on_a_cpu() -> None:
    if triton.interpreted():
        pytest.skip("this process interprets kernels")
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*cpu.*need a GPU"):
        backends.choose_backend("triton", "cpu", torch.float32)


def test_float64_is_an_obstacle_anywhere() -> None:
    assert "float64" in triton.obstacle("cuda", torch.float64)


@pytest.mark.parametrize(
    ("found", "complaint"),
    [({"capability": (7, 5)}, "7.5 is below 8.0"), ({"version": "3.5.1"}, "3.5.1 is older than 3.6")],
)
def test_what_is_too_old_is_an_obstacle(found: dict, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton as package

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: found.get("capability", (9, 0)))
    monkeypatch.setattr(package, "__version__", found.get("version", package.__version__))
    assert complaint in triton.obstacle("cuda", torch.bfloat16)


def test_mask_bytes_are_a_tile_s_worth_for_each_tile() -> None:
    blocks = make_blocks(130, (400, 5), offset=100, contrast_anchors=True, contrast_positives=True)
    # ap: 2 x 4 tiles; aa: 2 x 2 and 2 of the diagonal; pp: 2 x 1 left, 2 x 2 + 2 square, 2 x 2 right; an_1: 2 x 1.
    assert triton.mask_bytes(blocks) == 4 * TILE_WORDS * (8 + 6 + (2 + 6 + 4) + 2)


def test_bits_of_the_largest_batch_leave_room_in_8_gb() -> None:
    blocks = make_blocks(131_072, (131_072,), offset=0, contrast_anchors=True, contrast_positives=True)
    assert triton.mask_bytes(blocks) < 6.5e9


def test_a_failing_launch_under_auto_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "triton_obstacle", lambda *_: None)
    monkeypatch.setattr(backends, "_failures", {})
    # A CPU stands in for the GPU: what is chosen there must be Triton for once.
    monkeypatch.setattr(backends, "explain_choice", lambda device, dtype: _choice(device, dtype))
    monkeypatch.setattr(triton, "forward", fail)
    backends._automatic.cache_clear()
    a, p = torch.randn(5, 8), torch.randn(5, 8)
    with caplog.at_level("WARNING", "gist_fast"):
        losses = [guided_contrastive_loss(a, p, a, p) for _ in range(3)]
    assert torch.equal(losses[0], guided_contrastive_loss(a, p, a, p, backend="tiled"))
    assert torch.equal(losses[0], losses[2])
    assert [r.getMessage() for r in caplog.records] == [
        "backend 'auto' falls back to 'tiled' on this GPU: Triton's kernels failed here "
        "(RuntimeError: out of resource: shared memory)."
    ]
    with pytest.raises(RuntimeError, match="out of resource"):
        guided_contrastive_loss(a, p, a, p, backend="triton")
    backends._automatic.cache_clear()


def _choice(device: str, dtype: torch.dtype) -> tuple[str, str]:
    reason = backends._failures.get((device, dtype))
    return ("tiled", reason) if reason else ("triton", "")
