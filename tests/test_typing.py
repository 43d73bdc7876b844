"""What type checkers and editors know of the package: mypy on a user's script, and signatures for completion."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

ROOT = Path(__file__).parents[1]
PACKAGED = ("gist_fast", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")

SCRIPT = """\
from typing import assert_type

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor, randn

from gist_fast import GISTTrainer, GISTTrainingArguments, GuidedContrastiveStats, embed_guide, guided_contrastive_loss
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss

model = SentenceTransformer("student")
x = randn(2, 3)

GISTTrainingArguments("out", temperature=0.1, learning_rate=1e-5, hardness_mode=None)
GISTTrainingArguments("out", temprature=0.1)  # error: "temprature"
GISTTrainingArguments("out", temperature="warm")  # error: expected "float"
GISTTrainingArguments("out", contrast_anchors=None)  # error: expected "bool"
GISTTrainingArguments("out", learning_rate="1e-5")  # error: expected "float"

assert_type(guided_contrastive_loss(x, x), Tensor)
assert_type(guided_contrastive_loss(x, x, x, x, [x], [x], margin=x, reduction="none"), Tensor)
assert_type(guided_contrastive_loss(x, x, x, x, return_stats=True), tuple[Tensor, GuidedContrastiveStats])
assert_type(guided_contrastive_loss(x, x, return_stats=True)[1].masked_share, dict[str, float])
guided_contrastive_loss(x, x, temprature=0.1)  # error: "temprature"
guided_contrastive_loss(x, x, backend="cuda")  # error: No overload
guided_contrastive_loss(x, [x])  # error: No overload
guided_contrastive_loss(x, x, return_stats=True, temprature=0.1)  # error: "temprature"
guided_contrastive_loss(x)  # error: No overload

loss = GISTEmbedLoss(model, None, guided=False, mask_ties=True)
GISTEmbedLoss(model, model, temprature=0.1)  # error: "temprature"
GISTEmbedLoss(model, model, margin_strategy="none")  # error: expected "Literal['absolute', 'relative']"
GISTEmbedLoss(model, model, hard="yes")  # error: expected "bool"
CachedGISTEmbedLoss(model, model, mini_batch_size=8, activation_memory="auto")
CachedGISTEmbedLoss(model, model, mini_batch=8)  # error: "mini_batch"
CachedGISTEmbedLoss(model, model, mini_batch_size="8")  # error: expected "int"

data = Dataset.from_dict({"anchor": ["a"], "positive": ["b"]})
embed_guide(data, model, ["anchor"], prompts={"anchor": "query: "})
embed_guide(data, model, column="anchor")  # error: "column"
embed_guide(data, model, batch_size="8")  # error: expected "int | None"

trainer = GISTTrainer(model, GISTTrainingArguments("out"), data, loss=loss, evaluator=None, callbacks=[])
assert_type(trainer.args, GISTTrainingArguments)
GISTTrainer(model, callbacks=3)  # error: expected "list[TrainerCallback] | None"
GISTTrainer(model, guide="guide")  # error: expected "SentenceTransformer | None"
"""

# Large parts of the libraries that say nothing of the types above. Without them mypy takes a quarter of the time.
SETTINGS = """\
[mypy]
[mypy-datasets.*]
ignore_missing_imports = true
[mypy-transformers.models.*,transformers.generation.*,transformers.pipelines.*,torch._inductor.*,torch._dynamo.*,\
torch.distributed.*,torch.fx.*,torch.export.*,torch.onnx.*,torch.ao.*,torch._functorch.*,torch._export.*,\
torch._higher_order_ops.*,peft.*,huggingface_hub.*,numpy.*,sympy.*,pydantic.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages: what the wheel of this one holds."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in PACKAGED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(site)]
    subprocess.run(build, cwd=source, check=True, timeout=120)
    (wheel,) = site.glob("gist_fast-*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_the_wheel_carries_all_packages_and_the_mark_of_typed_ones(site: Path) -> None:
    assert (site / "gist_fast" / "py.typed").exists()
    for folder, installed in ((ROOT / "gist_fast", "gist_fast"), (ROOT / "kernels", "gist_fast/kernels")):
        there = {path.relative_to(site / installed) for path in (site / installed).rglob("*.py")}
        assert {path.relative_to(folder) for path in folder.rglob("*.py")} <= there


@pytest.mark.slow
def test_mypy_finds_the_wrong_lines_of_a_users_script(site: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir=cache", "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not ran.stderr
    errors: dict[int, str] = {}
    for line in ran.stdout.splitlines():
        if found := re.match(r"script\.py:(\d+): error: (.*)", line):
            errors[int(found[1])] = errors.get(int(found[1]), "") + found[2]
    expected = {
        number: line.partition("# error: ")[2]
        for number, line in enumerate(SCRIPT.splitlines(), 1)
        if "# error: " in line
    }
    assert errors.keys() == expected.keys(), ran.stdout
    for number, words in expected.items():
        assert words in errors[number]


def test_what_type_checkers_see_of_the_loss_is_what_it_takes() -> None:
    from gist_fast.functional import function

    taken = get_type_hints(function.guided_contrastive_loss)
    parameters = inspect.signature(function.guided_contrastive_loss).parameters
    seen = get_type_hints(function.LossArguments)
    assert seen.keys() <= parameters.keys()
    assert {name: taken[name] for name in seen} == seen
    tensors = {"anchors", "positives", "guide_anchors", "guide_positives", "negatives", "guide_negatives"}
    assert parameters.keys() - seen.keys() == {*tensors, "return_stats"}


def test_what_type_checkers_see_of_the_losses_are_their_settings() -> None:
    from gist_fast.functional.keywords import LossKeywords
    from gist_fast.functional.loss_config import LossConfig

    by_name = [f.name for f in fields(LossConfig) if f.kw_only or f.name == "guided"]
    declared, seen = get_type_hints(LossConfig), get_type_hints(LossKeywords)
    assert seen.keys() == set(by_name)
    # Any sequence is taken where a configuration has a list.
    assert {name: str(kind).replace("collections.abc.Sequence", "list") for name, kind in seen.items()} == {
        name: str(declared[name]) for name in by_name
    }


def test_all_arguments_of_the_trainer_are_offered_for_completion() -> None:
    from sentence_transformers import SentenceTransformerTrainer

    from gist_fast import GISTTrainer

    theirs, ours = (
        list(inspect.signature(trainer).parameters) for trainer in (SentenceTransformerTrainer, GISTTrainer)
    )
    assert ours[: len(theirs)] == theirs
    assert {"evaluator", "callbacks", "guide", "guided"} <= set(ours)


def test_an_editor_completes_arguments_of_the_trainer() -> None:
    jedi = pytest.importorskip("jedi")
    code = "from gist_fast import GISTTrainer\nGISTTrainer(eva"
    offered = {each.name for each in jedi.Script(code, project=jedi.Project(ROOT)).complete()}
    assert {"evaluator=", "eval_dataset="} <= offered
