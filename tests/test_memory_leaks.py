"""Training leaves nothing alive behind: after any number of steps as many tensors are held as after the first ones.

Every text is cut to the same number of tokens, so all batches have one shape. Both counts are taken at the end of an
epoch. So the bytes that tensors hold are equal to the last one, unless something grows.

Dropout is on in all of this. The student is a BERT: its pooler is computed and of no use to the loss, so no backward
pass ever frees what the pooler's graph holds.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from benchmarks.memory_growth import alive
from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss, activation_memory, gradient_cache

pytestmark = pytest.mark.slow
ROWS, BATCH, TOKENS = 32, 8, 8
EPOCH = ROWS // BATCH
"""Steps before the first count: by then the optimizer has its state and the guide's memory every text."""
STEPS = 3 * EPOCH
PART = 0.00035
"""GiB: room for the activations of one of the four mini-batches of a step, beside those of a second pass."""


def dataloaders() -> int:
    """How many are alive; each has a sampler that knows of every row."""
    return sum(isinstance(x, DataLoader) for x in gc.get_objects())


@contextmanager
def newcomers_only() -> Iterator[None]:
    """Leave out what is alive already, as the modules are since before the first test."""
    gc.collect()
    gc.freeze()
    yield


class Census(TrainerCallback):
    """Counts what is alive at the end of the first epoch and of the last."""

    def __init__(self) -> None:
        self.found: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (EPOCH, STEPS):
            self.found.append({**alive(), "dataloaders": dataloaders()})

    def __getitem__(self, name: str) -> list[int]:
        return [found[name] for found in self.found]


@pytest.fixture(autouse=True)
def rows_of_one_length(student, guide) -> None:
    student.max_seq_length = guide.max_seq_length = TOKENS


@pytest.fixture
def data(pairs) -> Dataset:
    return pairs.select(range(ROWS))


@pytest.fixture
def census(student, guide, data, tmp_path):
    """Train by the given arguments, and count. What else is given goes to the trainer."""

    def count(arguments: dict[str, Any] | None = None, **given: Any) -> Census:
        counted = Census()
        settings: dict[str, Any] = {
            "per_device_train_batch_size": BATCH, "mini_batch_size": BATCH // 2, "max_steps": STEPS,
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        }  # fmt: skip
        given.setdefault("train_dataset", data)
        if "loss" not in given:
            given.setdefault("guide", guide)
        arguments = GISTTrainingArguments(str(tmp_path), **{**settings, **(arguments or {})})
        with newcomers_only():
            trainer = GISTTrainer(model=student, args=arguments, callbacks=[counted], **given)
            trainer.train()
            counted.found.append({**alive(), "dataloaders": dataloaders()})
        assert trainer.state.global_step == STEPS
        return counted

    return count


def check(counted: Census) -> None:
    """No graph at any time, after the training neither; of other tensors as many as after the first epoch."""
    assert counted["tensors_with_graph"] == [0, 0, 0]
    for name in ("tensors", "tensor_bytes", "dataloaders"):
        after_one, after_three, _ = counted[name]
        assert after_one == after_three > 0


ARGUMENTS = {
    "no activations kept": {"activation_memory": 0},
    "some activations kept": {"activation_memory": PART},
    "all activations kept": {"activation_memory": "auto"},
    "mini-batches by tokens": {"mini_batch_size": None, "mini_batch_num_tokens": 3 * TOKENS},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2, "mini_batch_size": 2},
    "learnt temperature": {"learn_temperature": True},
    "scheduled temperature": {"temperature_schedule": "linear", "temperature_end": 0.05},
    "guide cache": {"guide_cache": True},
    "Matryoshka dims": {"matryoshka_dims": [32, 16]},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "half precision": {"bf16": True},
    "no duplicates": {"batch_sampler": "no_duplicates"},
    "never logged": {"logging_strategy": "no"},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_with_arguments(arguments, census):
    check(census(arguments))


def test_part_means_some_activations_and_not_all(census, monkeypatch):
    shares, embed = [], gradient_cache.GradientCache.embed

    def watched(cache):
        found = embed(cache)
        shares.append(cache.kept)
        return found

    monkeypatch.setattr(gradient_cache.GradientCache, "embed", watched)
    census(ARGUMENTS["some activations kept"])
    assert min(shares) > 0 and max(shares) < 1


def test_self_guided(census):
    check(census({"self_guided": True}, guide=None))


def test_embeddings_of_the_guide_in_the_data(census, data, guide, tmp_path):
    with_columns = embed_guide(data, guide, cache_dir=tmp_path / "embeddings", show_progress_bar=False)
    check(census(train_dataset=with_columns, guide=None))


def test_negatives(census, data):
    # Texts of their own: a batch that held some of them twice would have fewer for the guide to read than another one.
    check(census(train_dataset=data.add_column("negative", [f"not: {text}" for text in data["positive"]])))


@pytest.mark.parametrize("memory", [0, PART, "auto"])
def test_lora(memory, census, student):
    peft = pytest.importorskip("peft")
    student.requires_grad_(False)
    layers = ["query", "value"]
    student.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, lora_dropout=0.1, target_modules=layers))
    check(census({"activation_memory": memory}))


def test_several_losses(census, student, guide, data):
    """Two datasets in turn, each with a loss of its own."""
    half = ROWS // 2
    losses = {
        "kept": CachedGISTEmbedLoss(student, guide, mini_batch_size=BATCH // 2, activation_memory="auto"),
        "other": MultipleNegativesRankingLoss(student),
    }
    sets = {"kept": data.select(range(half)), "other": data.select(range(half, ROWS))}
    check(census({"multi_dataset_batch_sampler": "round_robin"}, loss=losses, train_dataset=sets))


@pytest.mark.parametrize("memory", [0, "auto"])
def test_evaluation_in_between(memory, census, data):
    """By the loss of an evaluation dataset, and by an evaluator."""
    evaluator = EmbeddingSimilarityEvaluator(data["anchor"], data["positive"], [k / ROWS for k in range(ROWS)])
    arguments = {"activation_memory": memory, "eval_strategy": "steps", "eval_steps": EPOCH // 2, "eval_on_start": True}
    check(census(arguments, eval_dataset=data, evaluator=evaluator))


def test_checkpoints_in_between(census):
    check(census({"save_strategy": "steps", "save_steps": EPOCH // 2, "save_total_limit": 1}))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "MatryoshkaLoss"])
@pytest.mark.parametrize("cached", [False, True], ids=["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_losses_that_are_given(cached, nested, census, student, guide):
    kept = {"activation_memory": "auto", "mini_batch_size": BATCH // 2} if cached else {}
    loss: Any = (CachedGISTEmbedLoss if cached else GISTEmbedLoss)(student, guide, **kept)
    check(census(loss=MatryoshkaLoss(student, loss, [32, 16]) if nested else loss))


@pytest.mark.parametrize("cached", [False, True], ids=["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_a_loss_that_is_never_backpropagated(cached, student, guide, data):
    """As where a step fails between the two passes."""
    kept = {"activation_memory": "auto", "mini_batch_size": BATCH // 2} if cached else {}
    loss = (CachedGISTEmbedLoss if cached else GISTEmbedLoss)(student, guide, **kept)
    with newcomers_only():
        value = loss([student.preprocess(data[name][:BATCH]) for name in ("anchor", "positive")])
        assert value.requires_grad
        del value
        assert alive()["tensors_with_graph"] == 0


def test_the_census_sees_a_leak(census, monkeypatch):
    """A hook that hands on the very tensor that it was given, as counting once did."""

    @contextmanager
    def leaking(model: Any, device: Any) -> Iterator[activation_memory.Kept]:
        kept = activation_memory.Kept()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            yield kept

    monkeypatch.setattr(gradient_cache, "measure_kept", leaking)
    counted = census()
    for name in ("tensors_with_graph", "tensors", "tensor_bytes"):
        after_one, after_three, _ = counted[name]
        assert 0 < after_one < after_three
