"""What a run on several devices is refused for, before its first step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from gist_fast import GISTTrainer, GISTTrainingArguments
from gist_fast.runtime.errors import InputError
from gist_fast.training.distributed_checks import check_batches, check_parallelism


def shard(rows: int, world: int, size: int = 4, split: bool = False, drop_last: bool = False) -> list[SimpleNamespace]:
    """Each rank's dataloader."""
    batches = BatchSampler(SequentialSampler(range(rows)), size, drop_last)
    return [
        SimpleNamespace(batch_sampler=BatchSamplerShard(batches, world, rank, split_batches=split, even_batches=False))
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rows", range(8, 33))
def test_ranks_run_out_together_or_are_refused(rows, split, world):
    loaders = shard(rows, world, split=split)
    steps = {len(list(loader.batch_sampler)) for loader in loaders}
    for loader in loaders:
        if len(steps) == 1:
            check_batches(loader)
        else:
            with pytest.raises(InputError, match=r"dataloader_drop_last: expected True, .* got False"):
                check_batches(loader)
        check_batches(shard(rows, world, split=split, drop_last=True)[0])


def test_fsdp(student, pairs, tmp_path):
    args = GISTTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", fsdp=True)
    with pytest.raises(InputError, match=r"^fsdp: .* Use DistributedDataParallel"):
        GISTTrainer(student, args, pairs)


def fake(**settings) -> SimpleNamespace:
    """What `check_parallelism` looks at of a trainer."""
    args = SimpleNamespace(n_gpu=settings.pop("gpus", 1))
    zero, axes = settings.pop("zero", None), settings.pop("axes", None)
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=zero))
    accelerator = SimpleNamespace(state=state, parallelism_config=axes)
    return SimpleNamespace(
        args=args, is_fsdp_enabled=False, is_deepspeed_enabled=zero is not None, accelerator=accelerator, **settings
    )


def test_deepspeed_and_model_parallelism(caplog):
    check_parallelism(fake(), gathers=True, caches=True)
    assert not caplog.records
    with pytest.raises(InputError, match=r"2 GPUs in one process: .* torchrun --nproc-per-node 2"):
        check_parallelism(fake(gpus=2), gathers=False, caches=True)
    with pytest.raises(InputError, match="once a backward pass"):
        check_parallelism(fake(zero=1), gathers=False, caches=True)
    with pytest.raises(InputError, match="stage 3"):
        check_parallelism(fake(zero=3), gathers=False, caches=False)
    check_parallelism(fake(zero=2), gathers=False, caches=False)
    assert "untested" in caplog.text
    axes = SimpleNamespace(tp_size=2, cp_size=1, sp_size=1)
    with pytest.raises(InputError, match="tp_size=2"):
        check_parallelism(fake(axes=axes), gathers=True, caches=True)
    check_parallelism(fake(axes=axes), gathers=False, caches=True)
