"""Documents, docstrings and messages name modules, objects and files that exist."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from gist_fast.moved import new_name

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md")]
SOURCES = [path for folder in ("gist_fast", "kernels", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
DOTTED = re.compile(r"(?<![\w./-])gist_fast(?:\.[A-Za-z_]\w*)+(?!\w*[/-])")
IN_REPOSITORY = re.compile(r"(?<![\w./<>-])(?:gist_fast|kernels|benchmarks|tests|docs|recipes)/[\w./*-]*")
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]+))?\)")
FILES = {"gist_fast": ROOT / "gist_fast", "gist_fast.kernels": ROOT / "kernels"}


def file_of(module: str) -> Path | None:
    """The file of a module of the package; None where there is no such module."""
    for package in ("gist_fast.kernels", "gist_fast"):
        if module == package or module.startswith(package + "."):
            place = (
                FILES[package].joinpath(*module[len(package) + 1 :].split(".")) if module != package else FILES[package]
            )
            return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
    return None


@functools.cache
def names_in(path: Path) -> dict[str, ast.AST]:
    """What a module defines or imports, by name."""
    return dict(_named(ast.parse(path.read_text()).body))


def _named(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for one in statements:
        if isinstance(one, ast.ClassDef | ast.FunctionDef):
            yield one.name, one
        elif isinstance(one, ast.Import | ast.ImportFrom):
            yield from ((each.asname or each.name, one) for each in one.names)
        elif isinstance(one, ast.Assign):
            yield from (
                (name.id, one) for target in one.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            )
        elif isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            yield one.target.id, one
        elif isinstance(one, ast.If | ast.Try):
            yield from _named(one.body)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, something in one, or something in a class of one."""
    parts = name.split(".")
    last = max(n for n in range(1, len(parts) + 1) if file_of(".".join(parts[:n])) is not None)
    path, rest = file_of(".".join(parts[:last])), parts[last:]
    assert path is not None
    if not rest:
        return True
    defined = names_in(path).get(rest[0])
    if len(rest) > 1 and isinstance(defined, ast.ClassDef):
        return rest[1] in dict(_named(defined.body))
    return defined is not None or rest[0] in ("__path__", "__file__")


def test_names_of_the_package_resolve() -> None:
    wrong = {}
    for path in (*DOCUMENTS, *SOURCES):
        old = path.name == "moved.py" or ROOT / "tests" in path.parents
        names = {name for name in DOTTED.findall(path.read_text()) if not (old and new_name(name))}
        wrong[str(path.relative_to(ROOT))] = sorted(name for name in names if not resolves(name))
    assert not {path: names for path, names in wrong.items() if names}


def test_files_that_are_named_exist() -> None:
    wrong = {}
    for path in (*DOCUMENTS, *SOURCES):
        if ROOT / "tests" in path.parents:
            continue  # they make files up
        text = path.read_text()
        names = {name.rstrip(".") for name in IN_REPOSITORY.findall(text)}
        missing = {name for name in names if not any(ROOT.glob(name.rstrip("/")))}
        if path.suffix == ".md":
            links = [
                (path.parent / link if link else path, part) for link, part in LINK.findall(text) if "://" not in link
            ]
            missing |= {
                f"{to.name}#{part}" for to, part in links if not to.exists() or (part and part not in parts(to))
            }
        wrong[str(path.relative_to(ROOT))] = sorted(missing)
    assert not {path: names for path, names in wrong.items() if names}


def parts(document: Path) -> set[str]:
    """The headings of a document as links name them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_is_named_for_a_change_stands_in_its_file() -> None:
    """In the table of CONTRIBUTING.md the names after a file are of that file."""
    rows = re.findall(r"^\| (an? .*?|what .*?) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert len(rows) >= 9
    wrong = []
    for what, files in rows:
        file = None
        for name in re.findall(r"`([^`]+)`", files):
            if (ROOT / name).is_file():
                file = ROOT / name
            elif file is None or not _stands_in(file, name):
                wrong.append((what, file and file.name, name))
    assert not wrong


def _stands_in(file: Path, name: str) -> bool:
    if file.suffix != ".py":
        return name in file.read_text()
    first, _, attribute = name.partition(".")
    defined = names_in(file).get(first)
    if attribute:
        return isinstance(defined, ast.ClassDef) and attribute in dict(_named(defined.body))
    return defined is not None
