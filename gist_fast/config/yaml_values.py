"""YAML to values that know where they were written, and the check of a value against a type hint.

The scalars are those of YAML 1.2: ``1e-4`` is a number, only ``true`` and ``false`` are truth values (``no`` is a text,
as in ``eval_strategy: no``), and there are no dates and no numbers in base 60.
"""

from __future__ import annotations

import enum
import json
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from gist_fast.runtime.errors import InputError, first_line, nearest, nearest_file, shown

MOST_CHOICES = 12
"""How many of a setting's choices an error lists."""


@dataclass
class Entry:
    """A value of a configuration; a mapping's values are entries again."""

    value: Any
    where: str
    """For messages: ``config.yaml, line 3`` or ``--learning_rate``."""
    base: Path
    """The folder that a relative path in it is relative to."""
    raw: str | None = None
    """What was typed, for a value from the command line: a number typed there may be meant as a text."""

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        return self.value


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _construct_int(_: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0) if node.value[:2] in ("0o", "0x") else int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(path: Path) -> Entry:
    """The mapping that a YAML file holds.

    Raises:
        InputError: with the line, where the file is missing, is no YAML, or holds no mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file{nearest_file(path)}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} is not UTF-8; write the file as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    entry = _parse(text, str(path), path.resolve().parent)
    if entry.value is None:
        raise InputError(f"{path}: is empty; it needs at least 'student', 'data' and 'training'.")
    if not isinstance(entry.value, dict):
        raise InputError(f"{path}: expected a mapping of sections, got {_shown(entry.value)}.")
    return entry


def read_argument(text: str, option: str) -> Entry:
    """A value typed on the command line: a scalar of YAML, or a list or mapping in brackets, or else a text.

    A prompt such as ``query: `` would be a mapping in a file, and ``a # b`` would end at its comment; here both are
    what was typed.
    """
    try:
        entry = _parse(text, option, Path.cwd())
    except InputError:
        entry = Entry(text, option, Path.cwd())
    bracketed = text.lstrip()[:1] in ("{", "[")
    if (isinstance(entry.value, (dict, list)) and not bracketed) or (
        isinstance(entry.value, str) and text.lstrip()[:1] not in ("'", '"')
    ):
        entry.value = text
    entry.raw, entry.where = text, option
    return entry


def _parse(text: str, name: str, base: Path) -> Entry:
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return Entry(None, name, base)
        _check_keys(node, name, set())
        return _entry(_Loader(""), node, name, base)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{name}{place}: not well-formed YAML ({error.problem}).") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{name}: not well-formed YAML ({next(iter(str(error).splitlines()), 'nested')}).") from error


def _entry(loader: _Loader, node: yaml.Node, name: str, base: Path) -> Entry:
    where = f"{name}, line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        try:
            return Entry(loader.construct_object(node, deep=True), where, base)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # Of an integer of more than 4,300 digits, or of a tag such as !!int before a text.
            raise InputError(f"{where}: not well-formed YAML ({first_line(error)}).") from error
    loader.flatten_mapping(node)
    entries = {}
    for key, value in node.value:
        entries[key.value] = _entry(loader, value, name, base)
        entries[key.value].where = f"{name}, line {key.start_mark.line + 1}"
    return Entry(entries, where, base)


def _check_keys(node: yaml.Node, name: str, seen: set[int]) -> None:
    """Refuse a key that is no word or stands twice, in every mapping below a node, merged ones (``<<``) included."""
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    keys: set[str] = set()
    for child in node.value:
        if not isinstance(child, tuple):
            _check_keys(child, name, seen)
            continue
        key, value = child
        where = f"{name}, line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where}: a key must be a word.")
        if key.value in keys:
            raise InputError(f"{where}: {key.value!r} is given twice; keep one.")
        keys.add(key.value)
        _check_keys(value, name, seen)


def check(entry: Entry, hint: Any, key: str) -> Any:
    """The entry's plain value, where it fits the type hint.

    Raises:
        InputError: naming the place, the key, what was expected and what came.
    """
    value = entry.plain()
    options = _options(hint)
    if any(_fits(value, option) for option in options):
        return value
    if entry.raw is not None and str in options and not isinstance(value, (dict, list)):
        return entry.raw
    near = ""
    choices = [choice for option in options for choice in _choices(option)]
    if isinstance(value, str) and choices:
        near = nearest(value, map(str, choices))
    elif isinstance(value, str) and any(typing.get_origin(option) is list for option in options):
        near = f" (write [{value}])"
    elif isinstance(value, str) and bool in options and value.lower() in ("yes", "no", "on", "off"):
        near = f" (write {'true' if value.lower() in ('yes', 'on') else 'false'})"
    elif isinstance(value, float) and value.is_integer() and int in options:
        near = f" (write {int(value)})"
    elif isinstance(value, (int, float, bool)) and str in options:
        near = " (quote it to make it a text)"
    raise InputError(f"{entry.where}: {key}: expected {describe(hint)}, got {_shown(value)}{near}.")


def describe(hint: Any) -> str:
    """A type hint in words: ``a number or null``."""
    words = list(dict.fromkeys(_describe(option) for option in _options(hint)))
    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _options(hint: Any) -> list[Any]:
    """The members of a union that a configuration can write."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [option for member in typing.get_args(hint) for option in _options(member)]
    else:
        members = [hint]
    if any(_is_enum(member) for member in members):
        # `SchedulerType | str` means the text of a member: the arguments turn it into one, or refuse.
        members = [member for member in members if member is not str]
    writable = [member for member in members if _writable(member)]
    # null last, where it reads best.
    return sorted(writable, key=lambda member: member is type(None))


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, enum.Enum)


def _writable(hint: Any) -> bool:
    plain = hint in (bool, int, float, str, type(None), dict, list, Any) or _is_enum(hint)
    return plain or typing.get_origin(hint) in (dict, list, tuple, typing.Literal, Mapping)


def _choices(hint: Any) -> list[Any]:
    if _is_enum(hint):
        return [member.value for member in hint]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else []


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint in (type(None), bool, str, dict, list):
        return isinstance(value, hint)
    if _is_enum(hint) or typing.get_origin(hint) is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in _choices(hint))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits_any(item, inner[0]) for item in value)
    return isinstance(value, dict) and all(
        isinstance(name, str) and _fits_any(item, inner[1]) for name, item in value.items()
    )


def _fits_any(value: Any, hint: Any) -> bool:
    return any(_fits(value, option) for option in _options(hint))


def _describe(hint: Any) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        type(None): "null",
        dict: "a mapping",
        list: "a list",
        Any: "anything",
    }
    if hint in words:
        return words[hint]
    if choices := _choices(hint):
        more = f" and {len(choices) - MOST_CHOICES} more" if len(choices) > MOST_CHOICES else ""
        return "one of " + ", ".join(repr(choice) for choice in choices[:MOST_CHOICES]) + more
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (list, tuple):
        return f"a list (each {describe(inner[0])})"
    return f"a mapping (each value {describe(inner[1])})" if inner else "a mapping"


def _shown(value: Any) -> str:
    """A value as it is written in YAML."""
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)
