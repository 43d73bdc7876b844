"""Who computes the loss: which competitor supports which case, why not, and what memory it takes at least.

====================  ==========================================================  ===================================
competitor            what it is                                                  cases
====================  ==========================================================  ===================================
gist_fast             ``guided_contrastive_loss(backend="auto")``                 all
gist_fast tiled       the same without Triton, tile by tile                       CUDA; elsewhere auto takes it
gist_fast reference   the same, every score in memory                             all
plain                 normalise, matmul, mask, ``cross_entropy``                  all
plain compiled        the same under ``torch.compile``                            all, where there is a compiler
st GISTEmbedLoss      sentence-transformers' own                                  a guide model; the block ap
st CachedGISTEmbed    its cached loss: row by row in mini-batches, both passes    as above
memeff                ``MemoryEfficientQwen3Loss``                                CUDA; no guide, or guided by itself
inf-cl                ``cal_flash_loss``                                          CUDA; no guide, block ap alone
====================  ==========================================================  ===================================

Memory by formula is a lower bound of what a forward and backward pass adds to the embeddings; it is there to leave out
what cannot fit, and never shown as measured.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gist_fast.bench.cases import ITEM_SIZES, TEMPERATURE, Embeddings, LossCase

if TYPE_CHECKING:
    from torch import Tensor

OURS = "gist_fast"
Loss = Callable[[Embeddings], "Tensor"]
CACHED_ROWS = 32
"""Rows of a mini-batch of the cached loss: its default."""


@dataclass(frozen=True)
class Peer:
    """One competitor.

    Args:
        obstacle: why it cannot compute a case, or None.
        make: the loss of a case. Where `whole`, it fills the gradients by itself.
        least_memory: bytes, a lower bound.
        compiled: for each size anew; where it can be, it is checked at the size that is measured, and at no other.
    """

    name: str
    obstacle: Callable[[LossCase], str | None]
    make: Callable[[LossCase], Loss]
    least_memory: Callable[[LossCase], float] = lambda case: 0.0
    whole: bool = False
    compiled: bool = False


def ours(case: LossCase, backend: Literal["auto", "triton", "tiled", "reference"] = "auto", **options: Any) -> Loss:
    from gist_fast.functional.function import guided_contrastive_loss

    options |= case.options
    return lambda e: guided_contrastive_loss(*e, backend=backend, **options)


def plain_matmul(case: LossCase) -> Loss:
    """What a good engineer writes in ten lines."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    margin, blocks = case.margin, case.blocks

    def loss(e: Embeddings) -> Tensor:
        a, p = normalize(e.anchors, dim=1), normalize(e.positives, dim=1)
        own = torch.eye(len(a), dtype=torch.bool, device=a.device)
        sides = {"ap": (a, p), "aa": (a, a), "pp": (p, p)}
        if e.guide_anchors is not None and e.guide_positives is not None:
            ga, gp = normalize(e.guide_anchors, dim=1), normalize(e.guide_positives, dim=1)
            guides = {"ap": (ga, gp), "aa": (ga, ga), "pp": (gp, gp)}
            threshold = (ga * gp).sum(1, keepdim=True) - margin
        scores = []
        for block in blocks:
            x, y = sides[block]
            mask = torch.zeros_like(own)
            if e.guide_anchors is not None:
                gx, gy = guides[block]
                mask = gx @ gy.T > threshold
            # The positive is never masked; a row's pair with itself always is.
            mask = mask & ~own if block == "ap" else mask | own
            scores.append((x @ y.T).masked_fill(mask, -torch.inf))
        logits = torch.cat(scores, 1) / TEMPERATURE
        wide = torch.promote_types(logits.dtype, torch.float32)
        return cross_entropy(logits.to(wide), torch.arange(len(a), device=a.device))

    return loss


def _tiled_obstacle(case: LossCase) -> str | None:
    return None if case.device.startswith("cuda") else "where there is no card, auto takes it for all but small batches"


def _compiled(case: LossCase) -> Loss:
    # One kernel or two are compiled: processes that stand by for more cost seconds, and outlive a competitor.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch

    return torch.compile(plain_matmul(case), dynamic=False)


def _compiler_missing(case: LossCase) -> str | None:
    if not case.device.startswith("cpu"):
        return None
    if platform.system() == "Windows":
        return None if shutil.which("cl") else "torch.compile needs a C++ compiler, and cl is not on the path"
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return None if found else "torch.compile needs a C++ compiler, and none of g++, clang++, c++ is on the path"


def _hand_through(*columns: Any) -> Any:
    """Gives out embeddings column by column, in the place of a model, whatever the features."""
    from torch import nn

    left = list(columns)

    class Module(nn.Module):
        def forward(self, features: dict) -> dict[str, Any]:
            return {"sentence_embedding": left.pop(0)}

    return Module()


def _st_loss(case: LossCase, name: str) -> Any:
    """A loss of sentence-transformers, made without models: it is given embeddings."""
    from sentence_transformers.sentence_transformer import losses

    from gist_fast.bench.models import tiny_model

    model = tiny_model()
    sides = {"contrast_anchors": "aa" in case.blocks, "contrast_positives": "pp" in case.blocks}
    return getattr(losses, name)(model, model, temperature=TEMPERATURE, margin=case.margin, **sides)


def sentence_transformers_gist(case: LossCase) -> Loss:
    loss = _st_loss(case, "GISTEmbedLoss")

    def run(e: Embeddings) -> Tensor:
        loss.model = _hand_through(e.anchors, e.positives)
        loss.guide = _hand_through(e.guide_anchors, e.guide_positives)
        return loss([{}, {}], None)

    return run


def _st_cached(case: LossCase) -> Loss:
    loss = _st_loss(case, "CachedGISTEmbedLoss")

    def run(e: Embeddings) -> Tensor:
        reps, guided = [[e.anchors], [e.positives]], [[e.guide_anchors], [e.guide_positives]]
        return loss.calculate_loss(reps, guided, with_backward=True)

    return run


def _memeff(case: LossCase) -> Loss:
    from memeff import MemoryEfficientQwen3Loss

    loss = MemoryEfficientQwen3Loss(
        temperature=TEMPERATURE,
        margin=-case.margin if case.guide == "self" else 2.0,  # 2: nothing is masked
        use_qq_negatives="aa" in case.blocks,
        use_dd_negatives="pp" in case.blocks,
        stable=False,
    )
    return lambda e: loss(e.anchors, e.positives)


def _inf_cl(case: LossCase) -> Loss:
    from inf_cl import cal_flash_loss
    from torch.nn.functional import normalize

    def loss(e: Embeddings) -> Tensor:
        a, p = normalize(e.anchors, dim=1), normalize(e.positives, dim=1)
        return cal_flash_loss(a, p, scale=1 / TEMPERATURE, head_dim=128).mean()

    return loss


def _missing(case: LossCase, module: str, *, cuda: bool = True) -> str | None:
    if cuda and not case.device.startswith("cuda"):
        return "runs on a CUDA device only"
    if importlib.util.find_spec(module) is None:
        return f"the package {module.replace('_', '-')} is not installed (pip install 'gist-fast[bench]')"
    return None


def _st_obstacle(case: LossCase) -> str | None:
    if case.guide != "model":
        return "it always has a guide model"
    if "ap" not in case.blocks:
        return "it always has the block ap"
    return _missing(case, "sentence_transformers", cuda=False)


def _memeff_obstacle(case: LossCase) -> str | None:
    if case.guide == "model":
        return "it knows no guide model"
    if "ap" not in case.blocks:
        return "it always has the block ap"
    return _missing(case, "memeff")


def _inf_cl_obstacle(case: LossCase) -> str | None:
    if case.guide != "none" or case.blocks != ("ap",):
        return "it knows the block ap without a guide alone"
    if case.width % 128:
        return f"D {case.width}: it takes multiples of 128"
    return _missing(case, "inf_cl")


def _scores(copies: float) -> Callable[[LossCase], float]:
    """So many times the scores of all blocks, four bytes each: cross_entropy is in float32 in all types."""
    return lambda case: copies * 4 * len(case.blocks) * case.rows**2


def _products(case: LossCase) -> float:
    """Nine tensors ``[B, B, D]`` for three blocks are alive when the forward pass of cosine_similarity ends."""
    return 3 * len(case.blocks) * float(case.rows) ** 2 * case.width * ITEM_SIZES[case.dtype]


def _cached_products(case: LossCase) -> float:
    return _products(case) * min(1.0, CACHED_ROWS / case.rows)


PEERS = {
    peer.name: peer
    for peer in (
        Peer(OURS, lambda case: None, ours),
        Peer("gist_fast tiled", _tiled_obstacle, lambda case: ours(case, "tiled")),
        Peer("gist_fast reference", lambda case: None, lambda case: ours(case, "reference"), _scores(3)),
        Peer("plain", lambda case: None, plain_matmul, _scores(3)),
        Peer("plain compiled", _compiler_missing, _compiled, _scores(2), compiled=True),
        Peer("st GISTEmbedLoss", _st_obstacle, sentence_transformers_gist, _products),
        Peer("st CachedGISTEmbed", _st_obstacle, _st_cached, _cached_products, whole=True),
        Peer("memeff", _memeff_obstacle, _memeff),
        Peer("inf-cl", _inf_cl_obstacle, _inf_cl),
    )
}
