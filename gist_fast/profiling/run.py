"""A few steps of a training run under torch's profiler, and what the machine took for them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as TorchProfile  # noqa: N812 - it is a class

from gist_fast.profiling.trace import (
    Region,
    StepTimes,
    Work,
    busiest,
    median_step,
    read_trace,
    regions,
    step_times,
    straightened,
    write_trace,
)
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.memory import gpu_memory_mib, process_memory_mib
from gist_fast.runtime.power import PowerMeter, power_meter
from gist_fast.runtime.profiler_regions import OPTIMIZER, step_name, within
from gist_fast.training.callbacks import LogSource, ThroughputCallback, added

if TYPE_CHECKING:
    from gist_fast.training.trainer import GISTTrainer


@dataclass(frozen=True)
class Profile:
    """What was seen in the profiled steps.

    Example:
        >>> from gist_fast import GISTTrainer, GISTTrainingArguments
        >>> arguments = GISTTrainingArguments(**profiling_arguments(steps=2, warmup=1, folder=Path("empty")))
        >>> trainer = GISTTrainer(student, arguments, pairs, guide=guide)
        >>> profile = profile_training(trainer, steps=2, warmup=1, trace=Path("trace.json.gz"))  # doctest: +ELLIPSIS
        {...}
        >>> profile.pairs
        [8, 8]
    """

    steps: list[StepTimes]
    parts: list[Region]
    measured_ms: list[float]
    """Wall time of each step by the process's own clock."""
    warmup_ms: list[float]
    """Wall time of the steps before, which the profiler did not watch."""
    pairs: list[int]
    """Rows of each step."""
    tokens: list[int]
    """That the student reads of them, padding left out."""
    machine: dict[str, float]
    """Figures under the names of `gist_fast.training.callbacks`, and ``gpu_sm_clock_mhz``, ``gpu_memory_clock_mhz``
    (means of one reading a step); those that the machine tells."""
    busiest: list[Work] = field(default_factory=list)
    """Kernels, or without a GPU the host's operators."""

    @property
    def median(self) -> StepTimes:
        return median_step(self.steps)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "median_step": self.median.step}


def profiling_arguments(steps: int, warmup: int, folder: Path) -> dict[str, Any]:
    """What a profiled run changes of its training arguments: as many steps as are asked for, and nothing kept.

    Args:
        folder: where the trainer may write; an empty temporary one.
    """
    return {
        "output_dir": str(folder),
        "max_steps": warmup + steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def profile_training(
    trainer: GISTTrainer,
    *,
    steps: int,
    warmup: int,
    trace: Path,
    meter: PowerMeter | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Profile:
    """Train `warmup` steps, then `steps` under the profiler.

    At the end of each step the host waits for the device, so that a step's work lies in the step.

    Args:
        trainer: with `profiling_arguments`; its student is trained.
        warmup: at least 1; in the last of them the profiler gets ready.
        trace: the file to write, ending in ``.json.gz``.
        meter: of the card; by default the one of the trainer's device.
        on_step: told the number of each step that is done, from 1.

    Raises:
        InputError: the data gave no step to profile.
    """
    device = trainer.args.device
    watch = _Watch(device, steps, warmup, meter or power_meter(device), on_step)
    with added(trainer, watch), contextlib.closing(watch):
        trainer.train()
    if len(watch.measured) <= warmup:
        raise InputError(f"data: it gave {len(watch.measured)} steps, and {warmup} are for warming up.")
    watch.profiler.export_chrome_trace(str(trace))
    recorded = read_trace(trace)
    events = straightened(recorded)
    if events != recorded:
        write_trace(events, trace)
    found = step_times(events)
    return Profile(
        steps=found,
        parts=regions(found),
        measured_ms=[1e3 * seconds for seconds in watch.measured[warmup:]],
        warmup_ms=[1e3 * seconds for seconds in watch.measured[:warmup]],
        pairs=watch.pairs[warmup:],
        tokens=watch.tokens[warmup:],
        machine=watch.machine(),
        busiest=busiest(events),
    )


class _Watch(LogSource):
    """Moves the profiler on at the end of each step, and counts; a `LogSource` in order to see the batches."""

    def __init__(
        self,
        device: torch.device,
        steps: int,
        warmup: int,
        meter: PowerMeter | None,
        on_step: Callable[[int], None] | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = TorchProfile(
            activities=activities, schedule=schedule(wait=warmup - 1, warmup=1, active=steps, repeat=1)
        )
        self.measured: list[float] = []
        self.pairs: list[int] = []
        self.tokens: list[int] = []
        self._device, self._steps, self._warmup, self._meter = device, steps, warmup, meter
        self._on_step, self._clock, self._running = on_step, clock, False
        self._counts = ThroughputCallback(clock)
        self._step, self._optimizer = contextlib.ExitStack(), contextlib.ExitStack()
        """The open regions of the step, and in it of the optimizer."""
        self._since = 0.0
        self._energy: list[tuple[float, float]] = []
        self._memory: list[float] = []
        self._power: list[float] = []
        self._clocks: list[Mapping[str, float]] = []

    def close(self) -> None:
        """However training ended: no region stays open, and no profiler running."""
        self._optimizer.close()
        self._step.close()
        if self._running:
            self.profiler.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counts.amounts()
        self.profiler.start()
        self._running = True
        self._step.enter_context(within(step_name(1)))
        self._since = self._clock()

    def count(self, inputs: Mapping[str, Any]) -> None:
        self._counts.count(inputs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer.enter_context(within(OPTIMIZER))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer.close()
        step = len(self.measured) + 1
        watched = step > self._warmup
        if watched and self._meter is not None:
            # While the device still works.
            self._clocks.append(self._meter.clocks_mhz())
            power = self._meter.power_watts()
            self._power += [] if power is None else [power]
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        self.measured.append(self._clock() - self._since)
        self._step.close()
        # From here to the end is part of no step.
        if step == self._warmup + self._steps:
            # Before the profiler puts its events in order, which takes its time.
            self._read_energy()
        self.profiler.step()
        done = self._counts.amounts()
        self.pairs.append(int(done["pairs"]))
        self.tokens.append(int(done["tokens"]))
        if watched:
            self._memory.append(process_memory_mib())
        if self._on_step is not None:
            self._on_step(step)
        if step == self._warmup:
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            self._read_energy()
        self._step.enter_context(within(step_name(step + 1)))
        self._since = self._clock()

    def amounts(self) -> dict[str, float]:
        return {}

    def figures(self, processes: Sequence[dict[str, float]]) -> dict[str, float]:
        return {}  # nothing for the trainer's log

    def _read_energy(self) -> None:
        joules = None if self._meter is None else self._meter.energy_joules()
        if joules is not None:
            self._energy.append((self._clock(), joules))

    def machine(self) -> dict[str, float]:
        """The figures of the profiled steps."""
        seconds = sum(self.measured[self._warmup :])
        pairs, tokens = (sum(amounts[self._warmup :]) for amounts in (self.pairs, self.tokens))
        figures = {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
        figures["process_memory_mib"] = max(self._memory)
        if self._device.type == "cuda":
            figures |= gpu_memory_mib(self._device)
        figures |= _of_card(self._energy, self._power, self._clocks, pairs)
        return figures


def _of_card(
    energy: Sequence[tuple[float, float]],
    power: Sequence[float],
    clocks: Sequence[Mapping[str, float]],
    pairs: int,
) -> dict[str, float]:
    """The card's figures out of its readings: `energy` (seconds, joules) before and after the profiled steps, power and
    clocks once a step."""
    figures = {}
    if len(energy) == 2:
        (begin, before), (end, after) = energy
        figures["gpu_energy_j"] = after - before
        if end > begin:
            figures["gpu_power_w"] = (after - before) / (end - begin)
        if pairs:
            figures["energy_per_pair_j"] = (after - before) / pairs
    elif power:
        figures["gpu_power_w"] = statistics.fmean(power)
    for name in ("sm", "memory"):
        readings = [reading[name] for reading in clocks if name in reading]
        if readings:
            figures[f"gpu_{name}_clock_mhz"] = statistics.fmean(readings)
    return figures
