"""The kernels on a real GPU; everywhere else they are tested in the interpreter (`triton_interpreted.py`)."""

from __future__ import annotations

import pytest
import torch

from gist_fast import guided_contrastive_loss
from gist_fast.functional.backends import triton_obstacle

OBSTACLE = triton_obstacle("cuda", torch.bfloat16)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(OBSTACLE is not None or not torch.cuda.is_available(), reason=str(OBSTACLE)),
]
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def embeddings(
    rows: int, extra: int, width: int, guide: int, dtype: torch.dtype, offset: int = 0
) -> list[torch.Tensor]:
    """Student's and guide's; the guide's are a few directions, so that no comparison is near its threshold."""
    generator = torch.Generator().manual_seed(rows)
    student = [torch.randn(n, width, generator=generator) for n in (rows, rows + extra)]
    directions = torch.eye(guide)[:5]
    chosen = torch.randint(len(directions), (rows + extra,), generator=generator)
    guides = [directions[chosen[offset : offset + rows]], directions[chosen] + 0.5 * directions[chosen].roll(1, dims=1)]
    return [x.to("cuda", dtype) for x in (*student, *guides)]


def run(backend: str, tensors: list[torch.Tensor], **kwargs: object) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors[:2]]
    loss = guided_contrastive_loss(*leaves, *tensors[2:], backend=backend, margin=0.1, temperature=0.05, **kwargs)
    return [loss, *torch.autograd.grad(loss, leaves)]


def worst(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("bits", ["keep", "recompute"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("rows", "extra", "width", "guide"), [(252, 255, 64, 123), (507, 0, 385, 40), (65, 1, 1024, 768)]
)
def test_it_agrees_with_float64(rows: int, extra: int, width: int, guide: int, dtype: torch.dtype, bits: str) -> None:
    tensors = embeddings(rows, extra, width, guide, dtype, offset=extra // 2)
    exact = run("reference", [x.double() for x in tensors], offset=extra // 2)
    assert worst(run("triton", tensors, offset=extra // 2, mask_bits=bits), exact) < LIMITS[dtype]


def test_tf32_follows_torch_s_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = embeddings(300, 0, 512, 64, torch.float32)
    exact = run("reference", [x.double() for x in tensors])
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        errors.append(worst(run("triton", tensors), exact))
    assert errors[0] < 1e-4
    assert errors[0] < errors[1] < 2e-2


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("model", [0, 2])
def test_a_row_that_is_not_finite_makes_the_loss_nan(
    model: int, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    tensors = embeddings(300, 0, 512, 64, torch.float32)
    tensors[model][7, 3] = torch.inf
    assert run("triton", tensors)[0].isnan()


def test_a_compiled_step_can_be_captured_by_torch() -> None:
    tensors = embeddings(300, 0, 64, 32, torch.bfloat16)
    step = torch.compile(lambda *x: guided_contrastive_loss(*x, backend="triton"), mode="reduce-overhead")
    expected = guided_contrastive_loss(*tensors, backend="triton")
    for _ in range(4):
        torch.testing.assert_close(step(*tensors).clone(), expected)


@pytest.mark.parametrize("width", [64, 384])
def test_runs_are_bitwise_the_same(width: int) -> None:
    tensors = embeddings(3000, 500, width, 64, torch.bfloat16)
    first, second = (run("triton", tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_pairs_past_2_to_the_31_are_the_tiled_backend_s() -> None:
    tensors = embeddings(47_000, 0, 32, 16, torch.bfloat16)
    found, other = run("triton", tensors), run("tiled", tensors)
    assert worst(found, [x.double() for x in other]) < 3e-2


def test_a_compiled_step_has_no_graph_break() -> None:
    tensors = embeddings(100, 20, 64, 32, torch.float32)
    compiled = torch.compile(lambda *x: guided_contrastive_loss(*x, backend="triton"), fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), guided_contrastive_loss(*tensors, backend="triton"))


@pytest.mark.parametrize("bits", ["keep", "recompute"])
def test_a_step_can_be_captured_in_a_graph(bits: str) -> None:
    """After a warm-up; a replay computes with what then stands in the tensors."""
    tensors = embeddings(300, 20, 64, 32, torch.bfloat16)
    static = [x.clone() for x in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run("triton", static, mask_bits=bits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("triton", static, mask_bits=bits)
    others = embeddings(300, 20, 64, 32, torch.bfloat16, offset=1)
    others[:2] = [x.flip(0) for x in tensors[:2]]
    for given in (tensors, others):
        for place, x in zip(static, given, strict=True):
            place.copy_(x)
        graph.replay()
        for found, expected in zip(captured, run("triton", given, mask_bits=bits), strict=True):
            assert torch.equal(found, expected)


def test_auto_takes_it() -> None:
    tensors = embeddings(40, 0, 64, 32, torch.bfloat16)
    assert torch.equal(run("auto", tensors)[0], run("triton", tensors)[0])


@pytest.mark.parametrize("guide", [64, 1024, 4096])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32", "tf32"])
def test_copies_of_the_positive_stay_or_go_as_asked(kind: str, guide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == "tf32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    generator = torch.Generator().manual_seed(guide)
    anchors, guides = (torch.randn(300, n, generator=generator).to("cuda", dtype) for n in (64, guide))
    # Each positive stands there twice, all near their anchors, where sums that are cut off lose most.
    positives, guide_positives = (
        (x[:150] + 0.5 * torch.randn(150, n, generator=generator).to("cuda", dtype)).repeat(2, 1)
        for x, n in ((anchors, 64), (guides, guide))
    )
    guides[150:] = guides[:150]
    counts = []
    for ties in (False, True):
        _, stats = guided_contrastive_loss(
            anchors, positives, guides, guide_positives, backend="triton", contrast_anchors=False,
            contrast_positives=False, mask_ties=ties, return_stats=True,
        )  # fmt: skip
        counts.append(int(stats.masked[0]))
    assert counts[1] - counts[0] == 300
