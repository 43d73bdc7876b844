"""A setting of the loss is declared once: arguments, losses, configuration and documentation follow it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
import typing
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from gist_fast import GISTTrainingArguments, guided_contrastive_loss
from gist_fast.config.schema import loss_settings
from gist_fast.functional.loss_config import LossConfig, check_setting, help_of
from gist_fast.functional.loss_settings import LossSettings
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss

ROOT = Path(__file__).parents[1]
SETTINGS = {f.name: f for f in fields(LossConfig)}
MOST_FILES = 5


def documented_table() -> list[str]:
    """What docs/variants.md must say of each setting."""
    hints = typing.get_type_hints(LossConfig)
    lines = ["| setting | default | values | what it does | source |", "|---|---|---|---|---|"]
    for f in fields(LossConfig):
        members = [m for m in typing.get_args(hints[f.name]) if m is not type(None)] or [hints[f.name]]
        choices = [str(c) for m in members for c in (typing.get_args(m) or [m]) if isinstance(c, str)]
        listed = [str(c) for m in members for item in typing.get_args(m) for c in typing.get_args(item)]
        bounds = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in f.metadata["bounds"].items())
        kinds = {bool: "true, false", float: "a number", list[int]: "a list of whole numbers", list[float]: "a list"}
        values = (
            ", ".join(choices)
            or ("a list of " + ", ".join(listed) if listed else "")
            or kinds.get(members[0], "a number") + (f" {bounds}" if bounds else "")
        )
        default = str(f.default).lower() if isinstance(f.default, bool) else "none" if f.default is None else f.default
        lines.append(f"| `{f.name}` | {default} | {values} | {f.metadata['help']} | {f.metadata['source']} |")
    return [line.replace("|t|", "abs(t)") for line in lines]


def test_the_documentation_says_of_each_setting_what_the_dataclass_says():
    found = (ROOT / "docs" / "variants.md").read_text().splitlines()
    missing = [line for line in documented_table() if line not in found]
    assert missing == [], "docs/variants.md lacks these lines:\n" + "\n".join(missing)


def test_few_files_name_a_setting():
    sources = [*(ROOT / "gist_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    naming = [str(p.relative_to(ROOT)) for p in sources if "margin_strategy" in p.read_text()]
    assert len(naming) <= MOST_FILES, naming


@pytest.mark.parametrize("kind", [GISTEmbedLoss, CachedGISTEmbedLoss])
def test_the_losses_take_every_setting_with_its_default(kind):
    shown = inspect.signature(kind).parameters
    assert {name: shown[name].default for name in SETTINGS} == {name: f.default for name, f in SETTINGS.items()}
    assert [n for n in shown if shown[n].kind is not inspect.Parameter.KEYWORD_ONLY and n in SETTINGS] == [
        f.name for f in fields(LossSettings) if not f.kw_only
    ]


def test_the_function_has_the_defaults_of_the_settings():
    shown = inspect.signature(guided_contrastive_loss).parameters
    common = shown.keys() & SETTINGS.keys()
    assert len(common) > 12
    assert {name: shown[name].default for name in common} == {name: SETTINGS[name].default for name in common}


def test_arguments_and_the_section_loss_have_every_setting():
    arguments = {f.name: f for f in fields(GISTTrainingArguments)}
    for f in fields(LossSettings):
        assert arguments[f.name].default == f.default and f.name in loss_settings()
        assert arguments[f.name].metadata["help"] == help_of(f.name)


def test_an_attribute_of_a_loss_is_its_setting(student, guide):
    loss = GISTEmbedLoss(student, guide, 0.05, "relative", mask_ties=True)
    assert (loss.margin_strategy, loss.mask_ties, loss.guided, loss.temperature) == ("relative", True, True, 0.05)
    loss.margin = 0.25
    assert loss.config.margin == loss.margin == 0.25
    with pytest.raises(ValueError, match="margin: expected a finite float, got inf"):
        loss.margin = float("inf")
    with pytest.raises(AttributeError):
        _ = loss.no_such_setting
    loss.learn_temperature = False
    for name, value, match in [
        ("guided", False, "margin_strategy: expected 'absolute' without a guide"),
        ("matryoshka_dims", [4096], "matryoshka_dims: expected at most"),
        ("learn_temperature", True, "learn_temperature: expected False, with which the loss was made, got True"),
        ("guide_cache", True, "guide_cache: expected False"),
    ]:
        with pytest.raises(ValueError, match=match):
            setattr(loss, name, value)
    assert loss.guided and loss.matryoshka_dims is None
    loss.config = replace(loss.config, hardness_mode="all_negatives", hardness_strength=3.0)
    assert loss.hardness_strength == 3.0


def test_a_config_is_frozen_and_can_be_copied():
    config = LossConfig(margin=0.1, matryoshka_dims=[8, 4])
    for name in ("hard", "hrad"):
        with pytest.raises(FrozenInstanceError, match=f"{name}: a LossConfig is frozen"):
            setattr(config, name, True)
    assert replace(config, hard=True).hard and not config.hard
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_config_passes_through_an_operator():
    config = LossConfig(margin=0.1, margin_strategy="relative", hardness_mode="all_negatives", hardness_strength=2.0)
    assert LossConfig.from_arguments(config.to_arguments()) == config
    declared = LossConfig.schema().split(", ")
    assert len(declared) == len(config.to_arguments())
    assert {"float margin", "str? hardness_mode", "bool mask_ties"} <= set(declared)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_value_is_refused_by_itself(name):
    if SETTINGS[name].name.startswith("matryoshka"):
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            LossConfig(**{"matryoshka_dims": [8], name: object()})
        return
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected .*, got <object"):
        check_setting(name, object())


def test_a_config_is_checked_before_torch_is_loaded():
    code = (
        "import sys; from gist_fast.functional.loss_config import LossConfig as C; C(margin=0.1); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split() and "gist_fast.functional.values" in done.stdout.split()


def test_every_field_has_help():
    assert all(dataclasses.is_dataclass(LossSettings) and f.metadata["help"] for f in SETTINGS.values())
