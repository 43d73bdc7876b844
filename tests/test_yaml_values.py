"""YAML that is odd is told apart in one line, whatever the library underneath would raise."""

from __future__ import annotations

import pytest

from gist_fast.config.yaml_values import Entry, check, read_yaml
from gist_fast.runtime.errors import InputError


def message(tmp_path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(str(path))
    return said.removeprefix(str(path))


@pytest.mark.parametrize(("text", "says"), [
    ("a:\n  b: " + "9" * 5000, ", line 2: not well-formed YAML (Exceeds the limit (4300 digits)"),
    ("a: {<<: {[1]: 2}, b: 1}", ", line 1: a key must be a word."),
    ("a: 1\nb:\n  <<: [{c: 1}, {{x: y}: 2}]", ", line 3: a key must be a word."),
    ("a: [1, {[1]: 2}]", ", line 1: a key must be a word."),
    ("a: [{b: 1, b: 2}]", ", line 1: 'b' is given twice; keep one."),
    ("a: {<<: {b: 1, b: 2}}", ", line 1: 'b' is given twice; keep one."),
    ("a: !!int abc", ", line 1: not well-formed YAML (invalid literal for int()"),
    ("a: !!timestamp 3", ", line 1: not well-formed YAML ("),
    ("a: !!bool x", ", line 1: not well-formed YAML ("),
    ("a: &x {b: *x}", ": not well-formed YAML (maximum recursion"),
])  # fmt: skip
def test_what_is_wrong(tmp_path, text, says):
    assert message(tmp_path, text).startswith(says)


def test_merged_mappings_still_merge(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}\ne: {<<: [*a, {f: 4}]}\n")
    merged = {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}, "e": {"b": 1, "c": 2, "f": 4}}
    assert read_yaml(path).plain() == merged


@pytest.mark.parametrize("value", [10**400, -(10**5000), float("inf"), float("nan")], ids=["400", "5000", "inf", "nan"])
def test_what_is_no_number_that_a_machine_has(tmp_path, value):
    with pytest.raises(InputError, match=r"c\.yaml, line 1: margin: expected a number, got "):
        check(Entry(value, "c.yaml, line 1", tmp_path), float, "margin")
