"""A training run cut down to the steps that are profiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from gist_fast.pipeline.plan import RunPlan, prepare
from gist_fast.profiling.run import profiling_arguments
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from gist_fast.config.load import TrainConfig


def prepare_profile(config: TrainConfig, *, steps: int, warmup: int, folder: Path) -> RunPlan:
    """As `gist_fast.pipeline.prepare`, for `gist_fast.profiling.profile_training`: nothing is evaluated or saved.

    Args:
        folder: where the trainer may write, an empty one. The run's own folder is not even looked at: it may hold a
            run, or not exist.

    Raises:
        InputError: several processes were started, or as `prepare` says.
    """
    config = dataclasses.replace(config, arguments={**config.arguments, "output_dir": str(folder)})
    plan = prepare(config)
    if plan.arguments.world_size > 1:
        raise InputError(f"profile: expected one process, got {plan.arguments.world_size}; start it without torchrun.")
    arguments = config.training_arguments(**profiling_arguments(steps, warmup, folder))
    return dataclasses.replace(plan, arguments=arguments, eval=None, evaluator=None)
