"""Other libraries' progress bars (loading weights, mapping datasets), kept out of our own output."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """No bars of transformers and datasets in this context; the latter need not be there for measurements alone."""
    from transformers.utils import logging

    had = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _without_those_of_datasets():
            yield
    finally:
        if had:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _without_those_of_datasets() -> Iterator[None]:
    if importlib.util.find_spec("datasets") is None:
        yield
        return
    import datasets

    had = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had:
            datasets.enable_progress_bars()
