"""Other libraries' progress bars (loading weights, mapping datasets), kept out of our own output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """No bars of transformers and datasets in this context."""
    import datasets
    from transformers.utils import logging

    had = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had[0]:
            logging.enable_progress_bar()
        if had[1]:
            datasets.enable_progress_bars()
