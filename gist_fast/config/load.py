"""The YAML of ``gist-fast train``, checked key by key.

```yaml
student: path/or/hub-name            # {path, prompts, max_seq_length, revision, trust_remote_code, lora, model_kwargs}
guide: path/or/hub-name              # the same, with columns in place of lora; null to train without a guide
data:
  train: pairs.jsonl                 # or {path, split, name, columns, quoting, streaming, shuffle_buffer}
  eval: held_out.jsonl               # or, as train too, several by name: {questions: a.jsonl, titles: {path: b.csv}}
loss: {temperature: 0.01, margin: 0.05, mini_batch_size: 32}
training: {output_dir: runs/first, learning_rate: 2e-5, per_device_train_batch_size: 256}
evaluation: {queries: queries.jsonl, corpus: corpus.jsonl, relevant: relevant.tsv, sts: scored.csv}
```

``loss`` and ``training`` take the fields of `gist_fast.GISTTrainingArguments`, ``loss`` those that concern the loss,
and ``preset``, the name of a published objective whose settings stand beneath those that are written.
Paths are relative to the file that they stand in, or to the working directory where typed on the command line.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.config.presets import apply_preset
from gist_fast.config.schema import (
    NOT_OFFERED,
    PATH_ARGUMENTS,
    SECTIONS,
    DataConfig,
    EvaluationConfig,
    GuideConfig,
    ModelConfig,
    SourceConfig,
    StudentConfig,
    argument_bounds,
    argument_hints,
    dataclass_in,
    hint_of,
    known_paths,
    loss_settings,
)
from gist_fast.config.yaml_values import Entry, check, read_argument, read_yaml
from gist_fast.data.text_files import suffix_of
from gist_fast.functional.values import check_number, one_of
from gist_fast.runtime.errors import InputError, nearest, shown
from gist_fast.runtime.files import expanded

if TYPE_CHECKING:
    from gist_fast.training.arguments import GISTTrainingArguments


@dataclass(frozen=True)
class TrainConfig:
    """A whole configuration.

    Example:
        >>> text = "student: s\\nguide: null\\ndata: {train: pairs.csv}\\ntraining: {output_dir: out}"
        >>> size = Path("run.yaml").write_text(text)
        >>> load_config("run.yaml", ["--learning_rate", "1e-5"]).arguments["learning_rate"]
        1e-05
    """

    student: StudentConfig
    data: DataConfig
    arguments: dict[str, Any]
    """What ``loss``, ``training`` and the models' prompts say of `GISTTrainingArguments`."""
    guide: GuideConfig | None = None
    unguided: bool = False
    """Whether ``guide: null`` was written, which asks for training without one."""
    evaluation: EvaluationConfig | None = None
    source: str = "configuration"
    """The file it was read from, for messages."""

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments["output_dir"])

    def training_arguments(self, **more: Any) -> GISTTrainingArguments:
        """The trainer's arguments; `more` wins over the configuration.

        Raises:
            InputError: the arguments refuse a value, or a combination of values.
        """
        from gist_fast.training.arguments import GISTTrainingArguments

        try:
            # A copy, as the arguments change what they are given.
            return GISTTrainingArguments(**{**copy.deepcopy(self.arguments), **more})
        except Exception as error:  # of whichever library reads the value
            raise InputError(f"training: {' '.join(str(error).split()) or type(error).__name__}") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a configuration, apply what the command line overrides, and check every key and type.

    Args:
        overrides: ``["--training.learning_rate", "1e-4", "--bf16", "--margin=0.1"]``; the section may be left out
            where the key is of one section only.

    Raises:
        InputError: naming the place, the key, what was expected and what came.
    """
    tree = read_yaml(Path(path))
    _known(tree, SECTIONS, "")
    apply_overrides(tree, overrides)
    apply_preset(tree)
    sections = tree.value
    for name in ("student", "data"):
        if name not in sections or sections[name].value is None:
            raise InputError(f"{path}: {name!r} is missing. Add {_EXAMPLES[name]}.")
    written = {name: entry for name, entry in sections.items() if entry.value is not None}
    student = _build(StudentConfig, written["student"], "student")
    guide = _build(GuideConfig, written["guide"], "guide") if "guide" in written else None
    return TrainConfig(
        student=student,
        guide=guide,
        unguided="guide" in sections and "guide" not in written,
        data=_build(DataConfig, written["data"], "data"),
        arguments=_arguments(tree, student, guide, str(path)),
        evaluation=_evaluation(written["evaluation"]) if "evaluation" in written else None,
        source=str(path),
    )


_TAKES_PATH = (StudentConfig, GuideConfig, SourceConfig)
"""What may be written as its path alone."""

_EXAMPLES = {
    "student": "'student: <path or hub name of a model>'",
    "data": "'data: {train: <file, folder or hub name>}'",
}


def apply_overrides(tree: Entry, arguments: Sequence[str]) -> None:
    """Set what ``--key value``, ``--key=value`` and ``--flag`` say, in the tree of entries."""
    waiting = list(arguments)
    while waiting:
        option = waiting.pop(0)
        if not option.startswith("--") or option == "--":
            raise InputError(
                f"unexpected {option!r}; after the configuration come settings, as in --learning_rate 1e-4."
            )
        option, equals, text = option.partition("=")
        path = _find(option, tree)
        # A value may start with one dash (-0.1), an option starts with two.
        if not equals and waiting and not waiting[0].startswith("--"):
            text = waiting.pop(0)
        elif not equals and bool in (hint := hint_of(path), *typing.get_args(hint)):
            text = "true"
        elif not equals:
            hint = "; for a traceback: gist-fast --debug train ..." if option == "--debug" else ""
            raise InputError(f"{option}: needs a value, as in {option} <value>{hint}.")
        _set(tree, path, read_argument(text, option))


def _set(tree: Entry, path: tuple[str, ...], entry: Entry) -> None:
    node = tree
    for depth, key in enumerate(path[:-1], 1):
        below = node.value.get(key)
        if below is None or below.value is None:
            below = node.value[key] = Entry({}, entry.where, entry.base)
        elif not isinstance(below.value, dict):
            # `student: name` is short for `student: {path: name}`.
            if dataclass_in(hint_of(path[:depth])) not in _TAKES_PATH:
                raise InputError(
                    f"{below.where}: {'.'.join(path[:depth])} is no mapping, so {entry.where} cannot be set."
                )
            below = node.value[key] = Entry({"path": below}, below.where, below.base)
        node = below
    node.value[path[-1]] = entry


def _find(option: str, tree: Entry) -> tuple[str, ...]:
    """The key that an option names, as a path from the top."""
    key = option[2:].replace("-", "_")
    known = known_paths()
    parts = tuple(key.split("."))
    if len(parts) == 1:
        if key in SECTIONS:
            return parts
        found = [path for path in known if path[-1] == key]
        if {("loss", key), ("training", key)} <= set(found):
            # The same setting: keep to where the file has it.
            written = tree.value.get("training")
            mine = "training" if written and isinstance(written.value, dict) and key in written.value else "loss"
            found = [path for path in found if path[0] not in ("loss", "training")] + [(mine, key)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{option}: could be {' or '.join('--' + '.'.join(path) for path in found)}; write which.")
    elif any(parts[: len(path)] == path for path in known):
        return parts
    names = ["--" + (path[-1] if len(parts) == 1 else ".".join(path)) for path in known]
    raise InputError(f"{option}: no such setting{nearest('--' + key, names)}.")


def _build(cls: type, entry: Entry, key: str) -> Any:
    """A dataclass from a mapping, or from the text that is short for ``{path: text}``."""
    hints = typing.get_type_hints(cls)
    if not isinstance(entry.value, dict):
        if cls not in _TAKES_PATH:
            raise InputError(f"{entry.where}: {key}: expected a mapping with {', '.join(hints)}, got {entry.value!r}.")
        path = check(entry, str, key)
        return cls(path=resolve_path(path, entry.base, name_allowed=True))
    _known(entry, hints, key)
    values = {}
    for f in dataclasses.fields(cls):
        below = entry.value.get(f.name)
        name = f"{key}.{f.name}"
        if below is None:
            if f.default is dataclasses.MISSING:
                raise InputError(f"{entry.where}: {name} is missing; it takes a path or a name.")
            continue
        nested = dataclass_in(hints[f.name])
        if nested is not None:
            optional = below.value is None and f.default is None
            build = _build_sources if cls is DataConfig else functools.partial(_build, nested)
            values[f.name] = None if optional else build(below, name)
            continue
        value = check(below, hints[f.name], name)
        if isinstance(value, str) and "path" in f.metadata:
            value = resolve_path(value, below.base, name_allowed=f.metadata["path"] == "file or name")
        if "bounds" in f.metadata and value is not None:
            check_number(f"{below.where}: {name}", value, **f.metadata["bounds"])
        if f.name == "target_modules" and value is not None and not value:
            raise InputError(f"{below.where}: {name}: expected names of layers, or 'all-linear', got nothing.")
        values[f.name] = value
    if values.get("shuffle_buffer") and not values.get("streaming"):
        raise InputError(f"{entry.value['shuffle_buffer'].where}: {key}.shuffle_buffer is for streaming: true.")
    return cls(**values)


def _build_sources(entry: Entry, key: str) -> SourceConfig | dict[str, SourceConfig]:
    """One source, or those of a mapping of names."""
    known = typing.get_type_hints(SourceConfig)
    if not isinstance(entry.value, dict) or any(name in known for name in entry.value):
        return _build(SourceConfig, entry, key)
    if not entry.value:
        raise InputError(f"{entry.where}: {key} is empty; it takes a path, or names and their paths.")
    for name, below in entry.value.items():
        # A name such as questions is not meant for quoting.
        near = nearest(name, known, cutoff=0.8)
        if near and not isinstance(below.value, dict):
            raise InputError(
                f"{below.where}: unknown key {name!r} in {key}{near}; known: {', '.join(known)}. (A dataset of that "
                f"name would be {name}: {{path: ...}}.)"
            )
    return {name: _build(SourceConfig, below, f"{key}.{name}") for name, below in entry.value.items()}


def _arguments(tree: Entry, student: ModelConfig, guide: ModelConfig | None, path: str) -> dict[str, Any]:
    """The checked values of ``loss`` and ``training``, and what the models' sections say of prompts and lengths."""
    hints, bounds = argument_hints(), argument_bounds()
    arguments: dict[str, Any] = {}
    for section, names in (("loss", loss_settings()), ("training", list(hints))):
        entry = tree.value.get(section)
        if entry is None or entry.value is None:
            continue
        if not isinstance(entry.value, dict):
            raise InputError(f"{entry.where}: {section}: expected a mapping, got {entry.value!r}.")
        _known(entry, names, section)
        for name, below in entry.value.items():
            if name in arguments:
                raise InputError(f"{below.where}: {name} stands under both loss and training; keep one.")
            value = check(below, hints[name], f"{section}.{name}")
            if isinstance(value, str) and name in PATH_ARGUMENTS:
                value = resolve_path(value, below.base, name_allowed=False)
            if name in NOT_OFFERED and value not in (None, NOT_OFFERED[name][0]):
                allowed, why = NOT_OFFERED[name]
                raise InputError(
                    f"{below.where}: {section}.{name}: expected {shown(allowed)}, got {shown(value)}; {why}."
                )
            if value is not None and name in bounds:
                # At once, and not when the loss is built, after the models were loaded.
                check_number(f"{below.where}: {section}.{name}", value, **bounds[name])
            arguments[name] = value
    if arguments.get("warmup_steps") and arguments.get("warmup_ratio") is not None:
        raise InputError(
            f"{path}: training.warmup_ratio: expected null with warmup_steps {arguments['warmup_steps']}, got "
            f"{arguments['warmup_ratio']}; keep one."
        )
    if arguments.get("output_dir") is None:
        raise InputError(f"{path}: training.output_dir is missing. Add 'training: {{output_dir: <folder>}}'.")
    for name, section, value in (
        ("prompts", "student", student.prompts),
        ("guide_prompts", "guide", guide and guide.prompts),
        ("guide_max_length", "guide", guide and guide.max_seq_length),
    ):
        if value is None:
            continue
        if arguments.get(name) is not None:
            raise InputError(f"{path}: training.{name} and the section {section} both say it; keep one.")
        arguments[name] = value
    return arguments


def _evaluation(entry: Entry) -> EvaluationConfig:
    config = _build(EvaluationConfig, entry, "evaluation")
    files = {name: getattr(config, name) for name in ("queries", "corpus", "relevant")}
    missing = [name for name, value in files.items() if value is None]
    if 0 < len(missing) < 3:
        lacking = ", ".join(missing)
        raise InputError(f"{entry.where}: evaluation lacks {lacking}; queries, corpus and relevant go together.")
    if not missing and config.pairs:
        raise InputError(f"{entry.where}: evaluation has queries, pairs, both for retrieval; keep one.")
    sources = ("pairs", "triplet", "sts", "pair_classification")
    given = [] if missing else ["retrieval"]
    given += ["retrieval" if name == "pairs" else name for name in sources if getattr(config, name) is not None]
    if not given:
        raise InputError(
            f"{entry.where}: evaluation needs queries, corpus and relevant, or pairs, or triplet, sts or "
            "pair_classification."
        )
    if config.primary is not None and config.primary not in given:
        raise InputError(
            f"{entry.value['primary'].where}: evaluation.primary: expected {one_of(given)}, got {config.primary!r}"
            f"{nearest(config.primary, given)}."
        )
    for name in sources:
        source = getattr(config, name)
        if source is not None and source.streaming:
            raise InputError(f"{entry.where}: evaluation.{name}.streaming: its texts are needed all at once.")
    return config


def resolve_path(text: str, base: Path, *, name_allowed: bool) -> str:
    """A path made absolute; where a hub name may stand too, what is not there and looks like one is left as it is."""
    path = os.path.normpath(base / expanded(text))
    like_a_path = text.startswith((".", "/", "~")) or "\\" in text or suffix_of(text) is not None or text.count("/") > 1
    return path if not name_allowed or like_a_path or os.path.exists(path) else text


def _known(entry: Entry, names: Iterable[str], key: str) -> None:
    """Refuse a key that is none of `names`."""
    names = list(names)
    for name, below in entry.value.items():
        if name in names:
            continue
        inside = f" in {key}" if key else ""
        at_home = [path[:-1] for path in known_paths() if path[-1] == name] if key in ("", "loss", "training") else []
        hint = f" (it belongs in {'.'.join(at_home[0])})" if at_home else nearest(name, names)
        known = f"; known: {', '.join(names)}" if len(names) < 20 else ""
        raise InputError(f"{below.where}: unknown key {name!r}{inside}{hint}{known}.")
