"""What a report says of a run beside its figures: on which machine, with which versions, with which settings."""

from __future__ import annotations

import dataclasses
import enum
import platform
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gist_fast.runtime import environment
from gist_fast.version import __version__

if TYPE_CHECKING:
    from gist_fast.config.load import TrainConfig

VERSIONS = ("torch", "triton", "sentence-transformers", "transformers")
_SECRET = re.compile(r"(^|_)(token|password|secret|key)$", re.IGNORECASE)


def machine_facts(device: str) -> dict[str, str]:
    """Names and values: the device by its type (``cuda``, ``cpu``), the system, and the versions."""
    import torch

    names = [gpu["name"] for gpu in environment.gpus(torch)] if device.startswith("cuda") else []
    threads = torch.get_num_threads()
    cpu = f"{threads} CPU thread{'' if threads == 1 else 's'}, {torch.backends.cpu.get_cpu_capability()}"
    cards = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    packages = {"gist_fast": __version__, "Python": platform.python_version(), **environment.versions(VERSIONS)}
    return {
        "device": f"{cards}; {cpu}" if cards else cpu if device == "cpu" else f"{device}; {cpu}",
        "system": platform.platform(),
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items() if version is not None),
    }


def changed_settings(config: TrainConfig, **more: object) -> list[tuple[str, object, object]]:
    """Name, value and default of what a configuration says other than the default.

    Args:
        config: As read. What is a secret by its name is shown as set, no more.
        more: Arguments of the trainer that were set without the configuration saying so.
    """
    from gist_fast.training.arguments import GISTTrainingArguments

    found = list(_changed("", GISTTrainingArguments, {**config.arguments, **more}))
    for name in ("student", "guide", "evaluation"):
        section = getattr(config, name)
        if section is not None:
            values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
            found += _changed(f"{name}.", type(section), values)
    return found


def _changed(prefix: str, of: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    for field in dataclasses.fields(of):
        if field.name not in values:
            continue
        value = plain_value(field.name, values[field.name])
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = None if made is dataclasses.MISSING else plain_value(field.name, made)
        if value != default:
            yield prefix + field.name, value, default


def plain_value(name: str, value: Any) -> Any:
    """A setting as numbers, strings, lists and mappings; a secret, by its name, as ``(set)``."""
    if value is not None and _SECRET.search(name):
        return "(set)"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        value = {field.name: item for field, item in fields if item != field.default}
    if isinstance(value, Mapping):
        return {str(key): plain_value(str(key), item) for key, item in value.items()}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple, set)):
        return [plain_value(name, item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
