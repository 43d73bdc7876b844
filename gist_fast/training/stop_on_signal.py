"""Ctrl-C or SIGTERM while training: finish the step, save a checkpoint, stop.

A second Ctrl-C stops at once, where there is one process. Several processes get their signals at different steps, and
one that stopped alone would leave the others waiting. So after each step they agree whether any of them was asked to
stop. That is one number over gloo, on the host, and only where there are several.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from gist_fast.runtime.signals import give_back, take

_STOPPING = b": stopping after the step that is running, with a checkpoint."
_AGAIN = b" Ctrl-C again stops at once, without one."


class TrainingStoppedError(Exception):
    """A run ended early at a signal. The message says after which step, and what is kept."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number
        """The shell's code of an end by that signal: 130 after Ctrl-C, 143 after SIGTERM."""


class StopOnSignal(TrainerCallback):
    """A callback of any trainer of transformers, and the context in which it takes SIGINT and SIGTERM.

    A run that was stopped goes on with ``trainer.train(resume_from_checkpoint=True)``.

    Example:
        >>> from gist_fast import GISTTrainer, GISTTrainingArguments
        >>> stop = StopOnSignal()
        >>> args = GISTTrainingArguments("run", max_steps=4, report_to="none")
        >>> trainer = GISTTrainer(student, args, pairs, guide=guide, callbacks=[stop])
        >>> with stop:  # doctest: +ELLIPSIS
        ...     signal.raise_signal(signal.SIGTERM)  # as Ctrl-C or a scheduler does at any moment
        ...     outcome = trainer.train()
        {'train_runtime': ...}
        >>> stop.exit_code, trainer.state.global_step
        (143, 1)

    Args:
        processes: how many processes train together; the trainer's own number once training begins.
    """

    def __init__(self, processes: int = 1) -> None:
        self.signal = 0
        """The number of the signal that asked this process or another one to stop; 0 where none did."""
        self.processes = processes
        self._before: dict[int, Any] = {}
        self._group: Any = None

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self.signal != 0

    @property
    def exit_code(self) -> int:
        """The shell's code of an end by that signal: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signal

    def __enter__(self) -> StopOnSignal:
        self.signal = 0
        self._before = take((signal.SIGINT, signal.SIGTERM), self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        give_back(self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # torchrun passes on what the terminal has sent to all already, and kills those that take too long.
            if number == signal.SIGINT and self.processes == 1:
                raise KeyboardInterrupt
            return
        self.signal = number
        name = b"Ctrl-C" if number == signal.SIGINT else b"SIGTERM"
        again = _AGAIN if number == signal.SIGINT and self.processes == 1 else b""
        # Not print: the signal may have come in the middle of a write to the same stream.
        os.write(2, b"\n" + name + _STOPPING + again + b"\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.processes = args.world_size
        if self.processes > 1 and self._group is None:
            # A group of its own: the flag then needs no accelerator, and mixes with no collective of the training.
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.processes > 1:
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
            self.signal = int(flag)
        if self.requested:
            control.should_training_stop = True
            control.should_save = True
            # An evaluation would make the user wait, and save_strategy "best" would let it decide on the saving.
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        # The trainer ends the epoch when it stops inside one; the step's end has saved already.
        if self.requested and control.should_training_stop and state.global_step < state.max_steps:
            control.should_evaluate = False
            control.should_save = False
        return control
