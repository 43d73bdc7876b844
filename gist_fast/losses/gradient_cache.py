"""Gradient caching (arXiv 2101.06983) with as few second forward passes as memory allows.

The loss needs all embeddings of a batch at once, the student's backward pass only those of one mini-batch. So the
batch is embedded in mini-batches, the loss gives the gradient by the embeddings, and then each mini-batch carries its
share of that into the student: from the activations of its first pass where these were kept, else by a second
pass with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import RandContext
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gist_fast.losses.activation_memory import ActivationMemory, measure_kept
from gist_fast.losses.mini_batches import MiniBatches
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.profiler_regions import STUDENT_BACKWARD, STUDENT_FORWARD, STUDENT_FORWARD_AGAIN, named, within


@dataclass
class _MiniBatch:
    """One mini-batch between its first pass and its backward pass."""

    column: int
    group: int
    random_state: RandContext | None  # before the first pass; None without gradients
    embedding: Tensor | None = None  # [b, D], with its graph, where that is kept


class GradientCache:
    """The embeddings of one batch, and the way of their gradient into the student.

    Args:
        model: the student, perhaps wrapped (DistributedDataParallel, torch.compile).
        columns: of the batch.
        memory: for activations; its budget is asked for once a batch.
        show_progress_bar: whether to show one over the mini-batches of each pass.
    """

    def __init__(
        self,
        model: nn.Module,
        columns: Sequence[MiniBatches],
        memory: ActivationMemory,
        show_progress_bar: bool = False,
    ) -> None:
        self._model = model
        self._columns = columns
        self._memory = memory
        self._progress = show_progress_bar
        self._mini_batches: list[_MiniBatch] = []
        self._device = next(model.parameters()).device
        # The hook of a backward pass runs outside of the autocast that the forward pass ran in.
        kind = self._device.type
        self._autocast: dict[str, Any] = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    @named(STUDENT_FORWARD)
    def embed(self) -> list[Tensor]:
        """The student's embeddings of each column, ``[B, D]``; leaves that require a gradient, if gradients are on."""
        with_grad = torch.is_grad_enabled()
        groups = [(c, g) for c, column in enumerate(self._columns) for g in range(len(column))]
        left = _Budget(self._memory, self._columns, self._memory.budget(self._model, self._device) if with_grad else 0)
        # The reducer of DistributedDataParallel is started by the forward pass of the last mini-batch.
        reducer = _reducer(self._model)
        if with_grad and reducer is not None and reducer.static_graph:
            raise InputError(
                "model: DistributedDataParallel with static_graph=True counts on one backward pass a step, and a "
                "gradient-cached loss makes one a mini-batch. Use static_graph=False."
            )
        never = None if reducer is None else groups[-1]
        embeddings: list[list[Tensor]] = [[] for _ in self._columns]
        graphless = True
        for c, g in tqdm(groups, desc="Embed mini-batches", disable=not self._progress):
            features, tokens = self._columns[c][g], self._columns[c].tokens[g]
            mini_batch = _MiniBatch(c, g, RandContext(*features.values()) if with_grad else None)
            keep = with_grad and (c, g) != never and left.likely_fits(tokens)
            if keep:
                if graphless:
                    # A weight that autocast cast without a graph must not be met again where one is needed.
                    torch.clear_autocast_cache()
                graphless = False
                with measure_kept(self._model, self._device) as kept, _without_reduction(self._model):
                    embedding = self._embedding(features)
                keep = left.take(tokens, kept.bytes)
            else:
                graphless = True
                with torch.no_grad():
                    embedding = self._embedding(features)
                left.leave(tokens)
            if keep:
                mini_batch.embedding = embedding
            # What is not kept goes now, not when the next one has been computed.
            embedding = embedding.detach()
            embeddings[c].append(embedding)
            self._mini_batches.append(mini_batch)
        joined = [column.restore(found) for column, found in zip(self._columns, embeddings, strict=True)]
        return [x.requires_grad_(with_grad) for x in joined]

    @property
    def kept(self) -> float:
        """Of the mini-batches embedded, the share whose activations were kept."""
        return sum(each.embedding is not None for each in self._mini_batches) / max(1, len(self._mini_batches))

    @named(STUDENT_BACKWARD)
    def backward(self, gradients: Sequence[Tensor], scale: Tensor | float = 1.0) -> None:
        """Add to the student's gradients, once.

        Args:
            gradients: of the loss by what `embed` returned, ``[B, D]`` each.
            scale: multiplies them; 0-d.

        Raises:
            RuntimeError: called a second time.
        """
        if not self._mini_batches:
            raise RuntimeError(
                "Trying to go backward through a gradient-cached loss a second time; its activations are gone. Compute "
                "the loss again."
            )
        split = [column.split(g) for column, g in zip(self._columns, gradients, strict=True)]
        # In one order, whatever was kept: otherwise the weights would depend, by rounding, on the memory that was free.
        mini_batches, self._mini_batches = self._mini_batches, []
        last_trainable = None
        reduced = _reducer(self._model) is None
        torch.clear_autocast_cache()
        with torch.enable_grad(), torch.autocast(**self._autocast):
            progress = tqdm(mini_batches, desc="Backward mini-batches", disable=not self._progress)
            for k, mini_batch in enumerate(progress):
                last = k == len(mini_batches) - 1
                with nullcontext() if last else _without_reduction(self._model):
                    embedding = self._embedding_of(mini_batch)
                    if not embedding.requires_grad:  # frozen, as one route of a Router may be
                        continue
                    gradient = split[mini_batch.column][mini_batch.group]
                    embedding.backward(_scaled(gradient, scale, embedding.dtype))
                reduced, last_trainable = reduced or last, mini_batch
            if not reduced and last_trainable is not None:
                # What was due to start the reduction is frozen: start it with nothing to add.
                embedding = self._embedding_of(last_trainable)
                embedding.backward(torch.zeros_like(embedding))

    def _embedding_of(self, mini_batch: _MiniBatch) -> Tensor:
        """``[b, D]`` with its graph: the kept one, or by a second pass."""
        if mini_batch.embedding is not None:
            embedding, mini_batch.embedding = mini_batch.embedding, None
            return embedding
        assert mini_batch.random_state is not None
        with within(STUDENT_FORWARD_AGAIN), mini_batch.random_state:
            return self._embedding(self._columns[mini_batch.column][mini_batch.group])

    def _embedding(self, features: dict[str, Any]) -> Tensor:
        return self._model(features)["sentence_embedding"]


class _Budget:
    """What of a batch's budget for activations is left, while its mini-batches are embedded one by one."""

    def __init__(self, memory: ActivationMemory, columns: Sequence[MiniBatches], budget: int) -> None:
        tokens = [n for column in columns for n in column.tokens]
        self._memory = memory
        self._left: float = budget
        self._largest = max(tokens)
        self._to_come = sum(tokens)
        self._all_kept = True

    def likely_fits(self, tokens: int) -> bool:
        """Whether a mini-batch of so many tokens is likely to fit."""
        return self._fits(self._memory.estimate(tokens))

    def take(self, tokens: int, kept: int) -> bool:
        """Whether the `kept` bytes of a mini-batch fit; they are taken if so."""
        self._memory.observe(tokens, kept)
        if not self._fits(kept):
            self.leave(tokens)
            return False
        self._left -= kept
        self._to_come -= tokens
        return True

    def leave(self, tokens: int) -> None:
        """A mini-batch is not kept."""
        self._all_kept = False
        self._to_come -= tokens

    def _fits(self, needed: float) -> bool:
        # While a second pass is to be expected, memory for its activations stays free.
        no_second_pass = self._all_kept and self._memory.estimate(self._to_come) <= self._left
        return needed + (0.0 if no_second_pass else self._memory.estimate(self._largest)) <= self._left


def _scaled(gradient: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """`gradient` times `scale` in `dtype`, multiplied in float32 at least: float16 knows no small gradients."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * scale).to(dtype)


def _reducer(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper that sums gradients over ranks, if it is to do so in this step."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) and inner.require_backward_grad_sync else None


def _without_reduction(model: nn.Module) -> AbstractContextManager:
    """Gradients add up on this rank alone."""
    wrapper = _reducer(model)
    return nullcontext() if wrapper is None else wrapper.no_sync()
