"""A progress bar over training steps."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback


class StepProgress(ProgressCallback):
    """transformers' bar, behind which the trainer puts its figures; what is logged at every step is not printed."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass
