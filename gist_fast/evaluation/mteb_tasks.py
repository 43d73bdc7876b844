"""Tasks of the package mteb, by their names or from a user's file, and a model's scores on them."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.runtime.errors import InputError, nearest, nearest_file

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from sentence_transformers import SentenceTransformer

IN_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<name>\w*))?")
"""``path/to/file.py:ClassName``, or the path alone where the file defines one task."""


def find_tasks(names: Iterable[str]) -> list[AbsTask]:
    """The tasks of those names: mteb's own, or ``path/to/file.py:ClassName``.

    Raises:
        InputError: mteb is not installed, has no such task, or the file does not define it.
    """
    if importlib.util.find_spec("mteb") is None:
        raise InputError("the package mteb is not installed; pip install 'gist-fast[mteb]' brings it.")
    found: dict[str, AbsTask] = {}
    for name in names:
        task = _task_in_file(Path(match["path"]), match["name"]) if (match := IN_FILE.fullmatch(name)) else _known(name)
        same = found.setdefault(task.metadata.name, task)
        if type(same) is not type(task):
            raise InputError(f"mteb: {name}: another of these tasks is called {task.metadata.name!r} too; rename one.")
    return list(found.values())


def load_data(tasks: Iterable[AbsTask]) -> None:
    """Load what the tasks measure on, before anything is measured.

    Raises:
        InputError: a dataset is not to be had.
    """
    for task in tasks:
        for part in getattr(task.metadata, "tasks", None) or [task]:
            try:
                part.load_data()
            except MemoryError:
                raise
            except Exception as error:
                # Each way to a dataset has its own errors; the next step is the same for all.
                path = part.metadata.dataset.get("path")
                raise InputError(
                    f"mteb: {task.metadata.name}: its dataset {path!r} cannot be loaded ({_one_line(error)}); it must "
                    "be in the local cache, or the hub reachable."
                ) from error


def measure(
    model: SentenceTransformer, tasks: Sequence[AbsTask], *, batch_size: int = 64, show_progress_bar: bool = False
) -> dict[str, dict[str, Any]]:
    """The model's scores, by the names of the tasks.

    mteb's cache of results is left alone: it goes by a model's name, and a model trained anew keeps its name.

    Returns:
        For each task its ``main_score``, that score's name in ``metric``, and under ``scores`` all that mteb found, by
        split.
    """
    import mteb

    results = {}
    for task in tasks:
        with warnings.catch_warnings():
            # How mteb calls sentence-transformers is nothing that a user could change.
            warnings.filterwarnings("ignore", category=FutureWarning, module="mteb")
            (result,) = mteb.evaluate(
                model,
                task,
                cache=None,
                co2_tracker=False,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress_bar},
                show_progress_bar=show_progress_bar,
            ).task_results
        results[task.metadata.name] = {
            "metric": task.metadata.main_score,
            "main_score": float(result.get_score()),
            "scores": result.model_dump(mode="json")["scores"],
        }
    return results


def _known(name: str) -> AbsTask:
    import mteb

    try:
        return mteb.get_task(name)
    except KeyError:
        names = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False, exclude_private=False)]
        raise InputError(
            f"mteb: expected one of its {len(names)} tasks, or path/to/file.py:ClassName for one of your own, got "
            f"{name!r}{nearest(name, names)}."
        ) from None


def _task_in_file(path: Path, name: str | None) -> AbsTask:
    """The task that a class in a file defines."""
    from mteb.abstasks import AbsTask

    if not path.is_file():
        raise InputError(f"{path}: no such file{nearest_file(path)}.")
    # Under a name of its own, so that a file called as a package is takes nothing from that package.
    spec = importlib.util.spec_from_file_location(f"gist_fast_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: cannot be run ({type(error).__name__}: {_one_line(error)}).") from error
    tasks = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, AbsTask) and value.__module__ == module.__name__
    }
    if not tasks:
        raise InputError(f"{path}: defines no task, that is no class on top of one of mteb's AbsTask classes.")
    there = f"it defines {', '.join(tasks)}"
    if not name:
        if len(tasks) > 1:
            raise InputError(f"{path}: write {path}:ClassName to say which task; {there}.")
        name = next(iter(tasks))
    if name not in tasks:
        raise InputError(f"{path}: no task {name!r}{nearest(name, tasks)}; {there}.")
    try:
        return tasks[name]()
    except Exception as error:
        raise InputError(f"{path}: {name} cannot be made ({type(error).__name__}: {_one_line(error)}).") from error


def _one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, its lines joined."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."
