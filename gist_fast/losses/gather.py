"""Candidates of all ranks for the anchors of one: the guided loss over a batch that several devices hold together.

Each rank compares its own anchors with everybody's positives and negatives. The gradient by a candidate is the sum of
what all ranks' losses say of it and goes back to the rank that embedded it, where it meets the gradient by that rank's
own anchors. DistributedDataParallel then averages over the ``W`` ranks, so that the student gets

    1/W * sum over ranks r of d loss_r = d (1/W * sum over ranks r of loss_r),

which is the gradient of the mean over all ``N`` rows of the joined batch where ranks hold equally many. Where they do
not, the loss of a rank with ``n`` rows is multiplied by ``n * W / N``: then the same holds, and so does the mean of the
ranks' losses that the trainer logs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gist_fast.functional.blocks import ANCHORS
from gist_fast.functional.checks import FLOATS
from gist_fast.runtime.errors import InputError

logger = logging.getLogger(__name__)

HALF_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

FACTS = (
    "number of columns",
    "width of the student's embeddings",
    "type of the student's embeddings",
    "number of the guide's columns",
    "width of the guide's embeddings",
    "type of the guide's embeddings",
)
"""What must be the same on all ranks, in the order of `_facts`."""


@dataclass(frozen=True)
class Gathered:
    """The columns of a batch, candidates of all ranks, in the order of the ranks."""

    student: tuple[Tensor, ...]
    """This rank's anchors ``[n, D]``, or all ranks' with this rank's first, ``[N, D]``; then the candidates of each
    column, ``[N, D]``."""
    guide: tuple[Tensor, ...]
    """The same of the guide; empty without one."""
    offset: int
    """Candidates of each column that come before this rank's own."""
    weight: float
    """What this rank's mean loss is multiplied by: ``n * W / N``, which is 1.0 where all ranks hold equally many."""
    largest: int
    """Rows of the rank that holds most."""
    groups: tuple[Tensor | None, ...] = ()
    """Of each column that has groups: those of the positives ``[N]``, for which the anchors' stand too, and of the
    candidates of the others."""


def gather_candidates(
    student: Sequence[Tensor],
    guide: Sequence[Tensor],
    guide_dtype: str | None = None,
    groups: Sequence[Tensor | None] = (),
    own: Sequence[int] = (),
    *,
    anchors: bool = False,
) -> Gathered:
    """Gather all columns but the anchors, or all of them, from all ranks; the student's with gradient. Every rank must
    call it.

    Embeddings travel in the type they have. Gradients are summed over the ranks in float32 at least, and rounded to the
    embeddings' type once.

    Args:
        student: anchors, positives, negatives .., ``[n, D]`` each; `n` may differ between ranks, and in columns of
            `own`.
        guide: the guide's embeddings of the same texts, or of the first columns alone, ``[n, G]``; or empty.
        guide_dtype: ``"float16"`` or ``"bfloat16"`` rounds the guide's embeddings first, this rank's anchors too, so
            that both sides of every comparison were rounded alike; None leaves them as they are.
        groups: of this rank's rows in each column, ``[n]``, or None on all ranks.
        own: columns that no other rank needs, which stay as they are.
        anchors: whether other ranks need the anchors.

    Raises:
        ValueError: on every rank, where one of them has no row, or where the ranks' batches differ in their number of
            columns, width or type.
    """
    if guide_dtype is not None:
        guide = [x.to(HALF_TYPES[guide_dtype]) for x in guide]
    if not is_distributed():
        _say_alone()
        return Gathered(tuple(student), tuple(guide), 0, 1.0, len(student[0]), tuple(groups))
    rank, world = dist.get_rank(), dist.get_world_size()
    of_all = [[x for k, x in enumerate(columns) if k not in own] for columns in (student, guide)]
    rows = [theirs[0] for theirs in _agreed(_facts(*of_all), student[0].device)]
    stay = set(own) if anchors else {ANCHORS, *own}
    # All columns are under way before the first is waited for. Joining them into one message would save their
    # latency, some tens of microseconds, and copy everything that was gathered once more.
    gathered_guide = {k: _start_gather(x.detach(), rows) for k, x in enumerate(guide) if k not in stay}
    # The anchors' groups are those of their positives' rows.
    moving_groups = [k for k, x in enumerate(groups) if x is not None and k not in own]
    gathered_groups = {k: _start_gather(groups[k], rows) for k in moving_groups}  # type: ignore[arg-type]
    moving = [k for k in range(len(student)) if k not in stay]
    found = dict(zip(moving, _GatherWithGrad.apply(rows, *(student[k] for k in moving)), strict=True))
    found_guide = {k: arrive() for k, arrive in gathered_guide.items()}
    offset = sum(rows[:rank])
    for columns, given in ((found, student), (found_guide, guide)):
        if ANCHORS in columns:
            # The loss is of the first ones.
            others = columns[ANCHORS][:offset], columns[ANCHORS][offset + rows[rank] :]
            columns[ANCHORS] = torch.cat([given[ANCHORS], *others])
    return Gathered(
        tuple(found.get(k, x) for k, x in enumerate(student)),
        tuple(found_guide.get(k, x) for k, x in enumerate(guide)),
        offset=offset,
        weight=rows[rank] * world / sum(rows),
        largest=max(rows),
        groups=tuple(gathered_groups[k]() if k in gathered_groups else x for k, x in enumerate(groups)),
    )


def is_distributed() -> bool:
    """Whether there is another rank to gather from."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_batches_agree(features: Sequence[dict[str, Any]]) -> None:
    """Raise on every rank where one of them came without a text, or with another number of columns than the others.

    Before any encoder runs, since those may stop at an empty batch, and the other ranks would wait for ever.
    """
    if not is_distributed():
        return
    tensors = [v for f in features for v in f.values() if isinstance(v, Tensor) and v.ndim]
    if not tensors:
        return
    ids = [f.get("input_ids", f.get("attention_mask")) for f in features]
    empty = any(isinstance(x, Tensor) and x.numel() == 0 for x in ids)
    everyone = _exchange([int(not empty), len(features)], tensors[0].device)
    _refuse_empty([r for r, theirs in enumerate(everyone) if not theirs[0]])
    _refuse_difference("number of columns", [theirs[1] for theirs in everyone])


@functools.cache
def _say_alone() -> None:
    logger.warning("gather_across_devices is on, but this process is alone; the candidates are those of its own batch.")


class _GatherWithGrad(torch.autograd.Function):
    """Columns ``[n, D]`` of each rank to ``[N, D]``; one node for all columns, so that they travel together."""

    @staticmethod
    def forward(ctx: Any, rows: list[int], *columns: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = rows
        started = [_start_gather(column, rows) for column in columns]
        return tuple(column() for column in started)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        started = [_start_reduce(g, ctx.rows) for g in gradients]
        return (None, *(column() for column in started))


def _start_gather(column: Tensor, rows: list[int]) -> Callable[[], Tensor]:
    """From ``[n, D]`` on each rank, a function that waits and returns ``[N, D]``."""
    most = max(rows)
    # Collectives move equally many rows a rank; the padding is cut off on arrival.
    sent = _padded(column, most).contiguous()
    received = sent.new_empty(len(rows) * most, *sent.shape[1:])
    work = _all_gather(received, sent, async_op=True)

    def arrive() -> Tensor:
        work.wait()
        assert len(sent) == most  # bound, so that it stays until it was read
        if all(n == most for n in rows):
            return received
        return torch.cat([part[:n] for part, n in zip(received.split(most), rows, strict=True)])

    return arrive


def _start_reduce(gradient: Tensor, rows: list[int]) -> Callable[[], Tensor]:
    """From ``[N, D]`` on each rank, a function that waits and returns the sum over ranks of this rank's ``[n, D]``."""
    most, own = max(rows), rows[dist.get_rank()]
    # A sum over many ranks in bfloat16 would lose most of its small terms: each is less than a unit of the last place
    # of the candidate's own gradient.
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if not all(n == most for n in rows):
        wide = torch.cat([_padded(part, most) for part in wide.split(rows)])
    wide = wide.contiguous()
    total = wide.new_empty(most, *wide.shape[1:])
    work = _collective("reduce_scatter_single", "reduce_scatter_tensor")(total, wide, async_op=True)

    def arrive() -> Tensor:
        work.wait()
        assert wide.shape[0] == len(rows) * most  # bound, so that it stays until it was read
        return total[:own].to(gradient.dtype)

    return arrive


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _facts(student: Sequence[Tensor], guide: Sequence[Tensor]) -> list[int]:
    """What ranks must know of each other; all but the first number must be the same everywhere."""
    rows = {len(x) for x in (*student, *guide)}
    if len(rows) != 1:
        # Never seen from a batch of texts. -1 tells the others.
        rows = {-1}
    facts = [rows.pop()]
    for columns in (student, guide):
        width = columns[0].shape[-1] if columns else 0
        facts += [len(columns), width, FLOATS.index(columns[0].dtype) if columns else -1]
    return facts


def _agreed(mine: list[int], device: torch.device) -> list[list[int]]:
    """Every rank's facts.

    Raises:
        ValueError: a rank has no rows, or the facts differ otherwise.
    """
    everyone = _exchange(mine, device)
    _refuse_empty([r for r, theirs in enumerate(everyone) if theirs[0] == 0])
    if bad := [r for r, theirs in enumerate(everyone) if theirs[0] < 0]:
        raise InputError(f"gather_across_devices: the columns of rank {_listed(bad)} differ in their number of rows.")
    for k, name in enumerate(FACTS, start=1):
        values: list[Any] = [theirs[k] for theirs in everyone]
        if name.startswith("type"):
            values = ["none" if v < 0 else str(FLOATS[v]).removeprefix("torch.") for v in values]
        _refuse_difference(name, values)
    return everyone


def _refuse_empty(ranks: list[int]) -> None:
    if ranks:
        raise InputError(
            f"gather_across_devices: rank {_listed(ranks)} of {dist.get_world_size()} has an empty batch; each rank "
            "needs a row in every step. Set dataloader_drop_last=True, or give more rows."
        )


def _refuse_difference(name: str, values: list[Any]) -> None:
    if len(set(values)) > 1:
        raise InputError(
            f"gather_across_devices: the {name} differs between ranks: {_listed(values)} on ranks 0 to "
            f"{len(values) - 1}. Batches of one step must come from datasets of the same columns and from the same "
            "models. Else set gather_across_devices=False."
        )


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


@torch.compiler.disable
def _exchange(mine: list[int], device: torch.device) -> list[list[int]]:
    """Every rank's numbers. Waits for the other ranks' hosts, but not for the work that is queued on the device."""
    # On a stream of its own, since reading the answer would else wait for the encoders.
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
        theirs = torch.empty(dist.get_world_size(), len(mine), dtype=torch.int64, device=device)
        _all_gather(theirs, torch.tensor([mine], dtype=torch.int64, device=device))
        return theirs.tolist()


def _all_gather(received: Tensor, sent: Tensor, async_op: bool = False) -> Any:
    return _collective("all_gather_single", "all_gather_into_tensor")(received, sent, async_op=async_op)


def _collective(name: str, old_name: str) -> Any:
    """A function of torch.distributed, which renamed it in 2.13."""
    return getattr(dist, name, None) or getattr(dist, old_name)
