"""Candidates gathered from several ranks: loss and gradients are those of one process with the joined batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import assert_close

WORLD, ROWS = 2, 6


def columns(width: int, seed: int) -> list[torch.Tensor]:
    """Anchors, positives and one column of negatives of all ranks, ``[WORLD * ROWS, width]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(WORLD * ROWS, width, generator=generator) for _ in range(3)]


def one_rank(rank: int, folder: str, student_path: str, guide_path: str) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses as theirs

    from gist_fast import losses as ours

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        student, guide = (SentenceTransformer(path, device="cpu") for path in (student_path, guide_path))
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        results = {}
        for name, module in (("ours", ours), ("theirs", theirs)):
            loss = module.CachedGISTEmbedLoss(
                student, guide, temperature=0.1, mini_batch_size=ROWS, margin=0.05, gather_across_devices=True
            )
            leaves = [[x[own].clone().requires_grad_()] for x in columns(8, 0)]
            value = loss.calculate_loss(leaves, [[x[own]] for x in columns(5, 1)])
            value.backward()
            results[name] = [value.detach(), *(parts[0].grad for parts in leaves)]
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_gathered_candidates(tmp_path, tiny_student, tiny_guide):
    if os.name == "nt":
        pytest.skip("gloo's file rendezvous is not offered on Windows")
    mp.spawn(one_rank, (str(tmp_path), str(tiny_student), str(tiny_guide)), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    for results in ranks:
        assert_close(results["ours"], results["theirs"], 1e-5)

    from gist_fast import guided_contrastive_loss

    joined = [x.requires_grad_() for x in columns(8, 0)]
    guide = columns(5, 1)
    for rank, results in enumerate(ranks):
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        loss = guided_contrastive_loss(
            joined[0][own],
            joined[1],
            guide[0][own],
            guide[1],
            negatives=joined[2:],
            guide_negatives=guide[2:],
            temperature=0.1,
            margin=0.05,
            offset=rank * ROWS,
            backend="reference",
        )
        loss.backward()
        assert_close([results["ours"][0]], [loss.detach()], 1e-5)
    # Each rank's anchors get their own loss's gradient; a candidate gets the sum over all ranks' losses.
    for k, whole in enumerate(joined):
        gathered = torch.cat([results["ours"][1 + k] for results in ranks])
        assert_close([gathered], [whole.grad], 1e-5)
