"""Half precision by the trainer's own switches: encoders and the products of the loss in it, all else in float32."""

from __future__ import annotations

import pytest
import torch

from gist_fast import GISTTrainer, GISTTrainingArguments
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss, base


def arguments(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 16,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "temperature": 0.1,
        "mini_batch_num_tokens": 100,
    }
    return GISTTrainingArguments(**{**defaults, **kwargs})


@pytest.fixture
def seen(monkeypatch):
    """The types in which embeddings enter the loss, and that of the loss."""
    types = []
    function = base.guided_contrastive_loss

    def watched(anchors, positives, guide_anchors, *rest, **kwargs):
        result = function(anchors, positives, guide_anchors, *rest, **kwargs)
        types.append((anchors.dtype, guide_anchors.dtype, result[0].dtype))
        return result

    monkeypatch.setattr(base, "guided_contrastive_loss", watched)
    return types


@pytest.mark.parametrize("memory", [0.0, "auto"])
def test_bfloat16_training(memory, student, guide, pairs, seen, tmp_path):
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    losses = []
    for bf16 in (False, True):
        student.load_state_dict(before)
        torch.manual_seed(0)
        trainer = GISTTrainer(student, arguments(tmp_path, bf16=bf16, activation_memory=memory), pairs, guide=guide)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    full, half = (torch.float32,) * 3, (torch.bfloat16, torch.float16, torch.float32)
    assert seen == [full] * 3 + [half] * 3
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    assert all(p.dtype is torch.float32 and p.grad is None for p in student.parameters())
    assert all(p.dtype is torch.float32 for p in guide.parameters())


def test_a_type_that_was_set_is_left(student, guide, pairs, tmp_path):
    loss = GISTEmbedLoss(student, guide)
    loss.compute_dtype = torch.float16
    GISTTrainer(student, arguments(tmp_path, bf16=True), pairs, loss=loss)
    assert loss.compute_dtype is torch.float16


@pytest.mark.parametrize("kind", [GISTEmbedLoss, CachedGISTEmbedLoss])
def test_float16_with_loss_scaling(kind, student, guide, pairs):
    """A scaler's factor reaches every gradient once, and none is lost below float16's smallest number."""
    student.eval()
    loss = kind(student, guide, temperature=0.1)
    columns = [list(pairs[c])[:16] for c in ("anchor", "positive")]
    results = []
    for dtype in (None, torch.float16):
        student.zero_grad()
        loss.compute_dtype = dtype
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=dtype is not None)
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype is not None):
            value = loss([student.preprocess(c) for c in columns], None)
        scaler.scale(value).backward()
        scale = scaler.get_scale()
        results.append({n: p.grad / scale for n, p in student.named_parameters() if p.grad is not None})
    largest = max(g.abs().max() for g in results[0].values())
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert (results[1][name] - expected).abs().max() <= 0.02 * largest, name
