"""What a run's logs say beside the loss: how fast it goes, and what it takes of the machine.

Both callbacks count on the host while steps run and wait for nothing; figures are made when the training loss is
logged. `gist_fast.GISTTrainer` has them by default, adds up the processes' amounts, and puts the figures into the log
itself, so that they reach the progress bar, TensorBoard, the log history and all else that the trainer reports to. In
another trainer they add what they know to the log of their own process: `DeviceCallback` all but the energy a pair,
`ThroughputCallback` nothing, because it is not told of the batches.

``docs/long-runs.md`` says what each figure means.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback

from gist_fast.losses.mini_batches import EXTENTS
from gist_fast.runtime.memory import gpu_memory_mib, process_memory_mib
from gist_fast.runtime.power import PowerMeter, power_meter

LOG_DIGITS = 6
_IDS = "_input_ids"
_COMBINED: dict[str, Callable[[Iterable[float]], float]] = {
    "gpu_allocated_peak_mib": max,
    "gpu_reserved_peak_mib": max,
    "process_memory_mib": sum,
    "gpu_power_w": sum,
    "gpu_energy_j": sum,
}
"""The device's figures, and what all processes together have of each."""
_ON_THE_BAR = {"pairs_per_second": "pairs/s", "tokens_per_second": "tokens/s", "masked_ap": "masked ap"}


@contextlib.contextmanager
def added(trainer: Trainer, callback: TrainerCallback) -> Iterator[None]:
    """A callback of the trainer in this context, and no longer."""
    trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.remove_callback(callback)


class LogSource(TrainerCallback):
    """A callback with figures for the log of the training loss.

    Example:
        >>> from gist_fast import GISTTrainer
        >>> class Batches(LogSource):
        ...     seen = 0
        ...     def count(self, inputs):
        ...         self.seen += 1
        ...     def amounts(self):
        ...         return {"batches": self.seen}
        ...     def figures(self, processes):
        ...         return {"batches": sum(process["batches"] for process in processes)}
        >>> trainer = GISTTrainer(student, train_dataset=pairs, guide=guide, callbacks=[Batches()])
    """

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Take note of a batch, as the trainer's ``training_step`` gets it."""

    def amounts(self) -> dict[str, float]:
        """This process's amounts since the last call; they start again."""
        raise NotImplementedError

    def figures(self, processes: Sequence[dict[str, float]]) -> dict[str, float]:
        """Figures out of what `amounts` gave in every process."""
        raise NotImplementedError

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """In a trainer that does not ask: add the figures of this process."""
        if logs is None or "loss" not in logs or self._asked:
            return
        figures = rounded(self.figures([self.amounts()]))
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    _asked = False

    def asked(self) -> dict[str, float]:
        """`amounts`, for a trainer that puts the figures into its log itself."""
        self._asked = True
        return self.amounts()


class ThroughputCallback(LogSource):
    """Pairs and tokens a second.

    Example:
        >>> ThroughputCallback().figures([{"pairs": 64, "tokens": 1000, "seconds": 2}])
        {'pairs_per_second': 32.0, 'tokens_per_second': 500.0}
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: float | None = None
        self._mark = 0.0
        self._reset()

    def _reset(self) -> None:
        self._pairs, self._tokens, self._paused = 0, 0, 0.0
        self._tokens_on_device: int | Tensor = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = self._mark = self._clock()
        self._reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark = self._clock()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = self._clock()
        self._paused += now - self._mark
        self._mark = now

    on_save = on_evaluate

    def count(self, inputs: Mapping[str, Any]) -> None:
        columns = [key.removesuffix(_IDS) for key in inputs if key.endswith(_IDS)]
        for place, column in enumerate(columns):
            rows, tokens = _rows_and_tokens(inputs, column)
            self._pairs += rows if place == 0 else 0
            if isinstance(tokens, Tensor):
                # Added up where they are; nothing waits before the log does.
                self._tokens_on_device = self._tokens_on_device + tokens
            else:
                self._tokens += tokens

    def amounts(self) -> dict[str, float]:
        now = self._clock()
        elapsed = 0.0 if self._since is None else now - self._since - self._paused
        tokens = self._tokens + int(self._tokens_on_device)
        amounts = {"pairs": float(self._pairs), "tokens": float(tokens), "seconds": elapsed}
        self._since = self._mark = now
        self._reset()
        return amounts

    def figures(self, processes: Sequence[dict[str, float]]) -> dict[str, float]:
        # All processes take the same steps, so the slowest one's time is the time of all.
        seconds = max(process["seconds"] for process in processes)
        pairs, tokens = (sum(process[name] for process in processes) for name in ("pairs", "tokens"))
        if seconds <= 0 or pairs == 0:
            return {}
        return {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}


class DeviceCallback(LogSource):
    """Memory, and on an NVIDIA card power and energy.

    Args:
        meter: the card's; by default found when training begins.

    Example:
        >>> from sentence_transformers import SentenceTransformerTrainer
        >>> trainer = SentenceTransformerTrainer(student, train_dataset=pairs, callbacks=[DeviceCallback()])
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, meter: PowerMeter | None = None) -> None:
        self._clock = clock
        self._meter = meter
        self._device = torch.device("cpu")
        self._pairs = 0
        self._since, self._energy = 0.0, None  # type: tuple[float, float | None]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._device = args.device
        if self._meter is None:
            self._meter = power_meter(self._device)
        self._start()

    def _start(self) -> None:
        self._pairs = 0
        self._since = self._clock()
        self._energy = None if self._meter is None else self._meter.energy_joules()

    def count(self, inputs: Mapping[str, Any]) -> None:
        first = next((key.removesuffix(_IDS) for key in inputs if key.endswith(_IDS)), None)
        if first is not None:
            self._pairs += _rows_and_tokens(inputs, first)[0]

    def amounts(self) -> dict[str, float]:
        amounts = {"process_memory_mib": process_memory_mib(), "pairs": float(self._pairs)}
        if self._device.type == "cuda":
            amounts |= gpu_memory_mib(self._device)
        if self._meter is not None:
            before, since = self._energy, self._since
            power = self._meter.power_watts()
            self._start()
            if before is not None and self._energy is not None:
                amounts["gpu_energy_j"] = self._energy - before
                power = amounts["gpu_energy_j"] / (self._since - since) if self._since > since else power
            if power is not None:
                amounts["gpu_power_w"] = power
        self._pairs = 0
        return amounts

    def figures(self, processes: Sequence[dict[str, float]]) -> dict[str, float]:
        figures = {}
        for name, combine in _COMBINED.items():
            # A sum without one of the cards would look like a sum.
            if all(name in process for process in processes):
                figures[name] = combine(process[name] for process in processes)
        pairs = sum(process["pairs"] for process in processes)
        if "gpu_energy_j" in figures and pairs:
            figures["energy_per_pair_j"] = figures["gpu_energy_j"] / pairs
        return figures


def gathered_figures(sources: Iterable[TrainerCallback], processes: int) -> dict[str, float]:
    """The figures of all `LogSource` among the callbacks; every process must call it."""
    figures: dict[str, float] = {}
    for source in sources:
        if isinstance(source, LogSource):
            figures |= source.figures(of_all_processes(source.asked(), processes))
    return rounded(figures)


def of_all_processes(amounts: dict[str, float], processes: int) -> list[dict[str, float]]:
    """What every process passes to this function; every process must call it."""
    if processes == 1:
        return [amounts]
    from accelerate.utils import gather_object

    return gather_object([amounts])


def mean_over_processes(figures: dict[str, float], processes: int) -> dict[str, float]:
    """The mean of every figure over the processes that have it; every process must call it."""
    every = of_all_processes(figures, processes)
    names = dict.fromkeys(name for one in every for name in one)
    found = {name: [one[name] for one in every if name in one] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, LOG_DIGITS) for name, value in figures.items()}


def show_on_bar(callbacks: Iterable[TrainerCallback], logs: Mapping[str, float]) -> None:
    """Put the figures that one watches behind the trainer's progress bar, where it has one."""
    shown = {label: f"{logs[name]:.3g}" for name, label in _ON_THE_BAR.items() if name in logs}
    for callback in callbacks:
        bar = getattr(callback, "training_bar", None) if isinstance(callback, ProgressCallback) else None
        if bar is not None and shown:
            bar.set_postfix(shown, refresh=False)


def _rows_and_tokens(inputs: Mapping[str, Any], column: str) -> tuple[int, int | Tensor]:
    """Rows of a column of a batch, and the student's tokens in them: a 0-d tensor where only the device knows."""
    spans = inputs.get(f"{column}_{EXTENTS}")
    ends = inputs.get(f"{column}_cu_seq_lens_q")
    mask = inputs.get(f"{column}_attention_mask")
    ids = inputs[column + _IDS]
    if spans is not None:
        # Where each text begins and ends in its row, which the collator of `gist_fast.GISTTrainer` knows.
        return len(spans), int((spans[:, 1] - spans[:, 0]).sum())
    if mask is None:
        # Nothing padded: one row after another where they are flattened.
        return ids.shape[0] if ends is None else ends.numel() - 1, ids.numel()
    tokens = mask.sum()
    return mask.shape[0], int(tokens) if mask.device.type == "cpu" else tokens
