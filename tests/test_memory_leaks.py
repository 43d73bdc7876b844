"""Training leaves nothing alive behind: after any number of steps, no tensor with a graph is left."""

from __future__ import annotations

import gc

import pytest
import torch

from gist_fast import GISTTrainer, GISTTrainingArguments


def tensors_with_graph() -> list[torch.Tensor]:
    """All tensors alive in this process that an operation made, and that hold the graph of it."""
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.grad_fn is not None]


@pytest.mark.parametrize("activation_memory", [0, 0.002, "auto"])
def test_no_graph_outlives_its_step(activation_memory, student, guide, pairs, tmp_path):
    """A BERT's pooler is computed and never trained: no backward pass frees what its graph holds."""
    arguments = GISTTrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, max_steps=20, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", activation_memory=activation_memory, mini_batch_size=4,
    )  # fmt: skip
    before = len(tensors_with_graph())
    GISTTrainer(model=student, guide=guide, args=arguments, train_dataset=pairs).train()
    assert len(tensors_with_graph()) == before
