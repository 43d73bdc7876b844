"""Ctrl-C while training: finish the step, save a checkpoint, stop; a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FIRST = (
    b"\nCtrl-C: stopping after the step that is running, with a checkpoint. Ctrl-C again stops at once, without one.\n"
)


class StopOnInterrupt(TrainerCallback):
    """A callback, and the context in which SIGINT is taken by it.

    With several processes the default action stays: they get the signal at different steps, and one that stops would
    leave the others waiting in a collective operation.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.requested = False
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if self.enabled:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come in the middle of a write to the same stream.
        os.write(2, _FIRST)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.requested:
            control.should_training_stop = True
            control.should_save = True
            # An evaluation would make the user wait, and save_strategy "best" would let it decide on the saving.
            control.should_evaluate = False
        return control
