"""The key ``preset`` of the section ``loss``: the settings of a published objective, beneath those that are written."""

from __future__ import annotations

from gist_fast.config.schema import PRESET
from gist_fast.config.yaml_values import Entry, check
from gist_fast.functional.choices import Preset
from gist_fast.functional.presets import preset


def apply_preset(tree: Entry) -> None:
    """Put the settings that a preset names into ``loss``, but for those that ``loss`` or ``training`` say themselves.

    Raises:
        InputError: there is no such preset.
    """
    loss = tree.value.get("loss")
    if loss is None or not isinstance(loss.value, dict) or PRESET not in loss.value:
        return
    entry = loss.value.pop(PRESET)
    if (name := check(entry, Preset | None, f"loss.{PRESET}")) is None:
        return
    training = tree.value.get("training")
    beside = training.value if training is not None and isinstance(training.value, dict) else {}
    for setting, value in preset(name).items():
        if setting not in loss.value and setting not in beside:
            loss.value[setting] = Entry(value, f"{entry.where} (preset {name})", entry.base)
