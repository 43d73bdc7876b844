"""A progress bar over training steps, drawn by rich, with the loss beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from rich.console import Console


class StepProgress:
    """A context in which `callback` moves a bar on ``console``. On a console that is no terminal nothing is drawn."""

    def __init__(self, console: Console, name: str, steps: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=steps, loss="-")
        self.callback = _Steps(self)

    def step(self, done: int, loss: float | None) -> None:
        """`done` steps are behind us, the last of them with `loss`, where it is known."""
        fields: dict[str, Any] = {} if loss is None else {"loss": f"{loss:.3f}"}
        self._progress.update(self._task, completed=done, **fields)

    def __enter__(self) -> StepProgress:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()


class _Steps(TrainerCallback):
    """Hands the trainer's steps and losses on."""

    def __init__(self, progress: StepProgress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.step(state.global_step, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self._progress.step(state.global_step, (logs or {}).get("loss"))
