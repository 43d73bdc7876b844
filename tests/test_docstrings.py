"""The examples in docstrings run, and every class that users meet has one.

An example finds ready what a reader has at hand: ``student`` and ``guide``, two models, and ``pairs``, a dataset of
``anchor`` and ``positive``; beside them what its own module knows. It runs in an empty folder.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

PACKAGE = Path(__file__).parents[1] / "gist_fast"
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]

FUNCTIONS = {"guided_contrastive_loss", "embed_guide", "load_texts", "stream_texts"}
EXPORTING = [
    "",
    ".losses",
    ".data",
    ".guide_columns",
    ".evaluation",
    ".inspection",
    ".profiling",
    ".config",
    ".pipeline",
]
CLASSES = {
    ".evaluation.evaluators": ["Retrieval", "Tasks"],
    ".evaluation.scored_pairs": ["ScoredPairs"],
    ".functional.loss_config": ["LossConfig"],
    ".training.callbacks": ["DeviceCallback", "LogSource", "ThroughputCallback"],
    ".training.collator": ["GISTDataCollator", "GuideTokenizer"],
    ".training.no_duplicates_sampler": ["NoDuplicatesBatchSampler"],
    ".training.stop_on_signal": ["StopOnSignal"],
}


@pytest.fixture(scope="module")
def models(tiny_student: Path, tiny_guide: Path) -> dict[str, SentenceTransformer]:
    paths = {"student": tiny_student, "guide": tiny_guide}
    return {name: SentenceTransformer(str(path), device="cpu") for name, path in paths.items()}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_of)
def test_examples_run(path, models, pairs, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(module_of(path))
    runner = doctest.DocTestRunner()
    reports: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module):
        example.globs |= {**copy.deepcopy(models), "pairs": pairs}
        runner.run(example, out=reports.append)
    assert runner.tries > 0
    assert not runner.failures, "".join(reports)


def public() -> list[tuple[str, str]]:
    """The classes, and some functions, that users meet: home and name."""
    found = [(home, name) for home, names in CLASSES.items() for name in names]
    for home in EXPORTING:
        module = importlib.import_module(f"gist_fast{home}")
        objects = {name: getattr(module, name) for name in module.__all__}
        found += [(home, name) for name, value in objects.items() if inspect.isclass(value) or name in FUNCTIONS]
    return found


def test_what_users_meet_has_an_example() -> None:
    without = []
    for home, name in public():
        documented = getattr(importlib.import_module(f"gist_fast{home}"), name)
        if ">>> " not in (documented.__doc__ or ""):
            without.append(f"gist_fast{home}.{name}")
    assert not without
