"""A dataset to a folder, all of it or nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from gist_fast.data.text_files import suffix_of
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import PREVIOUS, try_to_write, written_folder
from gist_fast.runtime.progress_bars import without_progress_bars

if TYPE_CHECKING:
    from datasets import Dataset

_MARKERS = ("state.json", "dataset_info.json")


def check_folder(output: Path, overwrite: bool) -> None:
    """Raise `InputError` where a dataset may not go to `output`, or cannot; nothing is changed."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: expected a folder, or a name that is free, got the file {output}.")
    if suffix_of(output) is not None:
        raise InputError(f"--output: expected the name of a folder, got {output}, as which a file would be read.")
    place = output.absolute()
    try_to_write(place.parent, "--output", "choose another folder", f"{place.name}{PREVIOUS}")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not all((output / marker).is_file() for marker in _MARKERS):
        raise InputError(f"--output: {output} holds other things than a saved dataset; choose another folder.")
    if not overwrite:
        raise InputError(f"--output: {output} already holds a dataset; replace it with --overwrite, or choose another.")


def save_whole(dataset: Dataset, output: Path, *, show_progress_bar: bool = True) -> None:
    """``save_to_disk``, beside its place first, and moved there when it is whole."""
    hidden = contextlib.nullcontext() if show_progress_bar else without_progress_bars()
    with hidden, written_folder(output) as part:
        dataset.save_to_disk(str(part))
