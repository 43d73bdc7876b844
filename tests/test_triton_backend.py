"""The Triton backend: its numbers in the interpreter, and where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gist_fast.kernels.layout import TILE_WORDS

from gist_fast import guided_contrastive_loss
from gist_fast.functional import backends, operator
from gist_fast.functional.backends import dense, tiled, triton
from gist_fast.functional.backends.interface import GuidedRows, Problem
from gist_fast.functional.blocks import make_blocks
from gist_fast.functional.loss_config import LossConfig

pytest.importorskip("triton", reason="Triton is not installed on this platform")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


def run_interpreted(examples: int, which: str = "", marked: str = "not slow") -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", which, "-m", marked, str(here / "triton_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "GIST_FAST_TEST_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.longest
@pytest.mark.parametrize("which", ["chunks or width or dims", "not (chunks or width or dims)"])
def test_kernels_in_the_interpreter_agree_with_float64(which: str) -> None:
    """In two halves, which two workers share."""
    run_interpreted(1, which)


@pytest.mark.slow
def test_kernels_in_the_interpreter_agree_with_float64_in_more_cases() -> None:
    run_interpreted(6, marked="slow")


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("which", ["every_variant_agrees", "in_any_direction_agrees", "everything_agrees"])
def test_kernels_in_the_interpreter_agree_with_float64_at_length(which: str) -> None:
    run_interpreted(300, which)


def test_it_is_refused_by_name_on_a_cpu() -> None:
    if triton.interpreted():
        pytest.skip("this process interprets kernels")
    with pytest.raises(ValueError, match=r"'triton' cannot run here: .*cpu.*need a GPU"):
        backends.choose_backend("triton", "cpu", torch.float32)


def test_float64_is_an_obstacle_anywhere() -> None:
    assert "float64" in triton.obstacle(torch.device("cuda"), torch.float64)


@pytest.mark.parametrize(
    ("found", "complaint"),
    [({"capability": (7, 5)}, "7.5 is below 8.0"), ({"version": "3.5.1"}, "3.5.1 is older than 3.6")],
)
def test_what_is_too_old_is_an_obstacle(found: dict, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton as package

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    capabilities = {"cuda:0": (9, 0), "cuda:1": found.get("capability", (9, 0))}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    monkeypatch.setattr(package, "__version__", found.get("version", package.__version__))
    assert complaint in triton.obstacle(torch.device("cuda:1"), torch.bfloat16)


def test_of_two_gpus_each_is_asked_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors' own, whichever is the current one."""
    capabilities = {0: (7, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        triton, "obstacle", lambda device, dtype: None if capabilities[device.index] >= (8, 0) else "it is too old"
    )
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    for cached in (backends.triton_obstacle, backends._automatic):
        cached.cache_clear()
    found = [backends.choose_backend("auto", device, torch.bfloat16) for device in ("cuda:1", "cuda:0", "cuda")]
    assert found == ["triton", "tiled", "tiled"]
    for cached in (backends.triton_obstacle, backends._automatic):
        cached.cache_clear()


def test_mask_bytes_are_a_tile_s_worth_for_each_tile() -> None:
    blocks = make_blocks(130, (130, 400, 5), LossConfig(), 100)
    # ap: 2 x 4 tiles; aa: 2 x 2 and 2 of the diagonal; pp: 2 x 1 left, 2 x 2 + 2 square, 2 x 2 right; an_1: 2 x 1.
    # One mask serves all Matryoshka dims.
    assert triton.mask_bytes(blocks, 1) == triton.mask_bytes(blocks, 3) == 4 * TILE_WORDS * (8 + 6 + (2 + 6 + 4) + 2)


def test_mask_bytes_of_every_direction_and_anchors_of_all_ranks() -> None:
    every = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
    blocks = make_blocks(130, (400, 400, 300), LossConfig(directions=every), 100)
    # ap: 2 x 1 left, 2 x 2 square and as many of its columns, 2 x 2 right; aa: 2 x 2 + 2 square, 2 x 3 right; pp as
    # above; pa: 2 x 3 right, its square is ap's; an_1 and pn_1: 2 x 3 each.
    tiles = (2 + 8 + 4) + (6 + 6) + (2 + 6 + 4) + 6 + 6 + 6
    assert triton.mask_bytes(blocks, 1) == 4 * TILE_WORDS * tiles
    # Weighted, ap has other logits than pa: 2 x 4 each.
    weighted = LossConfig(directions=every, hardness_mode="in_batch_negatives", hardness_strength=1.0)
    tiles += 8 + 8 - (2 + 8 + 4) - 6
    assert triton.mask_bytes(make_blocks(130, (400, 400, 300), weighted, 100), 1) == 4 * TILE_WORDS * tiles


def test_bits_of_the_largest_batch_leave_room_in_8_gb() -> None:
    blocks = make_blocks(131_072, (131_072, 131_072), LossConfig())
    assert triton.mask_bytes(blocks, 1) < 6.5e9


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
    monkeypatch.setattr(dense, "PAIRS", 0)  # which a GPU does not take
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


@pytest.mark.usefixtures("cpu_for_gpu")
def test_an_error_that_tiled_meets_too_is_not_triton_s(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    plain = tiled.forward
    monkeypatch.setattr(triton, "forward", fail)
    monkeypatch.setattr(tiled, "forward", fail)
    a, p = torch.randn(5, 8), torch.randn(5, 8)
    with caplog.at_level("WARNING", "gist_fast"):
        with pytest.raises(RuntimeError, match="device-side assert"):
            guided_contrastive_loss(a, p)
        assert not caplog.records
        monkeypatch.setattr(tiled, "forward", plain)
        guided_contrastive_loss(a, p)
    assert len(caplog.records) == 1


@pytest.fixture
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU stands in for a GPU on which the forward pass runs and the backward pass does not."""

    def fail(*_: object) -> None:
        raise RuntimeError("PTX was compiled for another card")

    def forward(problem: Problem, keep_mask_bits: bool) -> GuidedRows:
        found = tiled.forward(problem, False)
        # Bits that `tiled` would choke on, or take for other masks.
        size = triton.mask_bytes(problem.blocks, 1) if keep_mask_bits and problem.masks else 0
        return found._replace(mask_bits=torch.full((size,), 255, dtype=torch.uint8))

    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "triton_obstacle", lambda *_: None)
    monkeypatch.setattr(backends, "_failures", {})
    monkeypatch.setattr(backends, "explain_choice", _choice)
    monkeypatch.setattr(dense, "PAIRS", 0)  # which a GPU does not take
    monkeypatch.setattr(operator, "_proven", set())
    monkeypatch.setattr(triton, "forward", forward)
    monkeypatch.setattr(triton, "backward", fail)
    backends._automatic.cache_clear()
    yield
    backends._automatic.cache_clear()


@pytest.mark.usefixtures("cpu_for_gpu")
@pytest.mark.parametrize("guide", ["own", "self", "none"])
@pytest.mark.parametrize("mask_bits", ["keep", "recompute"])
def test_a_failing_backward_launch_under_auto_falls_back_with_one_warning(
    guide: str, mask_bits: str, caplog: pytest.LogCaptureFixture
) -> None:
    def gradients(backend: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(n, 8, generator=generator).requires_grad_() for n in (20, 23, 4)]
        guides = [torch.randn(n, 6, generator=generator) for n in (20, 23, 4)] if guide == "own" else leaves
        guides = [None, None, ()] if guide == "none" else [*guides[:2], guides[2:]]
        temperature = torch.tensor(0.05, requires_grad=True)
        loss = guided_contrastive_loss(
            *leaves[:2], *guides[:2], leaves[2:], guides[2] or None, temperature, 0.0 if guide == "none" else -0.1,
            offset=2, backend=backend, mask_bits=mask_bits,
        )  # fmt: skip
        return list(torch.autograd.grad(loss, [*leaves, temperature]))

    with caplog.at_level("WARNING", "gist_fast"):
        found = [gradients("auto") for _ in range(2)]
    expected = gradients("tiled")
    for ours in found:
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert [r.getMessage() for r in caplog.records] == [
        "backend 'auto' falls back to 'tiled' on this GPU: Triton's kernels failed here "
        "(RuntimeError: PTX was compiled for another card)."
    ]
    with pytest.raises(RuntimeError, match="another card"):
        gradients("triton")


@pytest.mark.usefixtures("cpu_for_gpu")
def test_the_guide_is_let_go_once_a_backward_pass_of_its_kind_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(problem: Problem, *_: object) -> list[torch.Tensor]:
        return [torch.zeros_like(x) for x in (*problem.student, problem.temperature)]

    student, guide = ([torch.randn(n, 8) for n in (5, 6)] for _ in range(2))
    saved = []
    for backward in (run, triton.backward):  # that of the fixture, which fails
        monkeypatch.setattr(triton, "backward", backward)
        leaves = [x.clone().requires_grad_() for x in student]
        loss = guided_contrastive_loss(*leaves, *guide, mask_bits="keep")
        node = loss.grad_fn
        while not hasattr(node, "saved_tensors"):  # over what makes one number of the operator's
            node = node.next_functions[0][0]
        kept = node.saved_tensors
        saved.append(sum(any(x is g for g in guide) for x in kept))
        if backward is run:
            loss.backward()
        else:
            # Without the guide there is nothing to fall back with; and nothing is made up.
            with pytest.raises(RuntimeError, match="another card"):
                loss.backward()
    assert saved == [2, 0]


def _choice(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    reason = backends._failures.get((device, dtype))
    return ("tiled", reason) if reason else ("triton", "")


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("torch.set_float32_matmul_precision('high')", True),
    ],
)
def test_tf32_is_read_however_it_was_set(setting: str, wanted: bool) -> None:
    """In a process of its own: torch refuses to mix the older and the newer way."""
    code = (
        f"import torch\n{setting}\nfrom gist_fast.kernels.precision import multiplies_in_tf32\n"
        "print(multiplies_in_tf32())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout.strip(), found.returncode) == (str(wanted), 0), found.stderr


def test_the_loss_asks_for_nothing_but_torch() -> None:
    """A card is measured with the checkout and torch alone."""
    code = "import sys\nfor name in ('psutil', 'transformers', 'sentence_transformers', 'numpy', 'datasets'):\n"
    code += "    sys.modules[name] = None\nimport gist_fast.functional.function, gist_fast.functional.operator\n"
    code += "import gist_fast.functional.backends.tiled"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
