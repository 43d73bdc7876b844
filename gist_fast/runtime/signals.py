"""Signals of this process: taken for a while, and given back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Mapping
from typing import Any


def take(numbers: Iterable[int], handler: Any) -> dict[int, Any]:
    """Handle these signals from now on; the handlers before, or nothing outside of the main thread, which alone can."""
    main = threading.current_thread() is threading.main_thread()
    return {number: signal.signal(number, handler) for number in numbers if main}


def give_back(before: Mapping[int, Any]) -> None:
    """Undo `take`. A handler that another library set, in C, is None to Python, which cannot give it back."""
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
