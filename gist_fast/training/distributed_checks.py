"""What a training run on several devices must not be: refused before its first step, on every rank alike."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import BatchSamplerShard

from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainer
    from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

INSTEAD = (
    "Use DistributedDataParallel, as torchrun and accelerate launch do without further settings; "
    "mini_batch_num_tokens and gradient_checkpointing save the memory"
)
OTHER_AXES = ("tp", "cp", "sp")
"""Kinds of parallelism in which ranks share rows or weights: tensor, context, sequence."""


def check_settings(args: Any) -> None:
    """Raise where the training arguments ask for FSDP: before anything is wrapped.

    Raises:
        ValueError: they do.
    """
    if getattr(args, "fsdp", None):
        _refuse_fsdp()


def check_parallelism(trainer: SentenceTransformerTrainer, gathers: bool, caches: bool) -> None:
    """Raise where the student would be trained in a way in which a guided loss fails, or in which it cannot be saved.

    Args:
        trainer: constructed.
        gathers: whether its loss gathers candidates.
        caches: whether its loss caches gradients.

    Raises:
        ValueError: FSDP; several GPUs in one process; DeepSpeed with gradient caching or with sharded weights;
            candidates gathered from ranks that are parts of one model.
    """
    if trainer.is_fsdp_enabled:  # by the settings of accelerate launch
        _refuse_fsdp()
    if trainer.args.n_gpu > 1:
        raise InputError(
            f"{trainer.args.n_gpu} GPUs in one process: DataParallel splits every mini-batch, and its copies draw "
            "other random numbers in a second forward pass. Start one process a GPU, with torchrun --nproc-per-node "
            f"{trainer.args.n_gpu}, or let it see one GPU alone (CUDA_VISIBLE_DEVICES=0)."
        )
    if trainer.is_deepspeed_enabled:
        if caches:
            raise InputError(
                "deepspeed: it reduces gradients once a backward pass, and a gradient-cached loss makes one a "
                "mini-batch (sentence-transformers issue 3173). A GISTEmbedLoss passed as the loss may work, untested. "
                f"{INSTEAD}."
            )
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        if getattr(plugin, "zero_stage", None) == 3:
            raise InputError(
                "deepspeed: ZeRO stage 3 shards the student's weights, which sentence-transformers' trainer cannot "
                f"save. Stages 1 and 2 may work, untested. {INSTEAD}."
            )
        logger.warning("DeepSpeed is untested with guided losses. %s.", INSTEAD)
    axes = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {axis: getattr(axes, f"{axis}_size", 1) for axis in OTHER_AXES}
    if gathers and any(size > 1 for size in sizes.values()):
        named = ", ".join(f"{axis}_size={size}" for axis, size in sizes.items() if size > 1)
        raise InputError(
            f"gather_across_devices: with {named}, ranks hold parts of one model and see the same rows, which would be "
            "gathered as if they were different ones. Use plain data parallelism."
        )


def check_batches(dataloader: DataLoader) -> None:
    """Raise where some ranks would have a batch in the last step and others none, and wait for them for ever.

    Raises:
        ValueError: they would.
    """
    shard = getattr(dataloader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.drop_last or shard.even_batches:
        return
    world, batches = shard.num_processes, len(shard.batch_sampler)
    what = None
    if not shard.split_batches:
        if batches % world:
            what = f"{batches} batches for {world} ranks leave {world - batches % world} of them without one"
    else:
        sampler: Any = getattr(shard.batch_sampler, "sampler", None)
        rows, size = len(sampler) if hasattr(sampler, "__len__") else 0, shard.batch_size
        if 0 < rows % size <= size - size // world:
            what = f"the last batch has {rows % size} rows, of which each rank but the last takes {size // world}"
    if what:
        raise InputError(
            f"dataloader_drop_last: expected True, because in the last step of an epoch {what}, got False. Or give a "
            "number of rows that leaves every rank at least one."
        )


def _refuse_fsdp() -> None:
    raise InputError(
        "fsdp: sentence-transformers' trainer writes the student's weights as they lie on one rank, and FSDP leaves "
        f"only a part of them there. {INSTEAD}."
    )
