"""A report as one HTML page that needs nothing else: no script, no request, light or dark as the reader's device.

``page.html.j2`` is the page; here is what goes into it, and how it comes onto the disk.
"""

from __future__ import annotations

import base64
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_fast.report.colours import THEME
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import try_to_write, write_whole

SENTENCE = 24
"""Letters from which on a cell asks for a column that a phone does not fold into single words."""
THIN_SPACE = "\u202f"
SHORT = 24
"""Characters of a cell that stay on one line."""
_NUMBER = re.compile(r"[+\-\u2212]?\d[\d\u202f]*(\.\d+)?(e[+-]?\d+)?\s?(%|\u00d7|[A-Za-zµ/]{1,8})?")
_SIZE = re.compile(r'<svg\b[^>]*\sviewBox="[\d.]+ [\d.]+ ([\d.]+) ')


@dataclass(frozen=True)
class Table:
    """A table.

    Numbers are right-aligned and shown to four figures (a column of numbers given as strings, with or without a unit,
    is aligned too); None is an en dash, a bool yes or no.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    prose: bool = False
    """Whether its columns are all texts, numbers among them or not, and stand to the left."""


@dataclass(frozen=True)
class Picture:
    """An SVG and what it shows, in words for those who do not see it."""

    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (plain text, a blank line between two), and tables and pictures in order."""

    title: str
    text: str = ""
    parts: Sequence[Table | Picture] = ()


def make_page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: The heading and the window's title.
        facts: Names and values at the top: what ran, where, with which versions.
        sections: In order.

    Raises:
        InputError: a row of a table has another length than its columns, a picture has no words for those who do not
            see it, or is no SVG with a ``viewBox``.
    """
    return _template().render(title=title, facts=facts, sections=[_section(section) for section in sections])


def check_path(path: Path, *, overwrite: bool = False) -> None:
    """Check, before the work whose report it is, that `write_page` could write there; nothing is left behind.

    Raises:
        InputError: there is a file already (and `overwrite` is False, or it is no report) or a folder, or no file can
            be written there.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the report's file, such as {path / 'report.html'}.")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; name another file for the report, or replace it with --overwrite.")
    if path.exists() and not _is_report(path):
        raise InputError(f"{path}: is no report of gist_fast, so it is not replaced; name another file for the report.")
    try_to_write(path.absolute().parent, str(path), "name another place for the report", path.name)


def _is_report(path: Path) -> bool:
    """Whether a file is a page that was written here, or empty."""
    with path.open("rb") as file:
        begin = file.read(4096)
    return not begin or b'<meta name="generator" content="gist_fast">' in begin


def write_page(path: Path, page: str, *, overwrite: bool = False) -> None:
    """Write `page` to `path`, whose folder is made where there is none: all of it or, where that fails, nothing.

    Raises:
        InputError: see `check_path`; or the disk refuses.
    """
    check_path(path, overwrite=overwrite)
    try:
        # Half of a surrogate pair, as in a file's name that is no UTF-8, is a ? in a page.
        write_whole(path, page.encode(errors="replace").decode(), overwrite=overwrite)
    except FileExistsError:
        raise InputError(f"{path}: exists; name another file for the report, or replace it with --overwrite.") from None
    except OSError as error:
        raise InputError(f"{path}: the report could not be written ({error.strerror or error}).") from error


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html.j2", globals={"theme": THEME})


def _section(section: Section) -> dict[str, Any]:
    """A section as the template takes it; pictures that follow one another stand side by side where there is room."""
    groups: list[dict[str, Any]] = []
    for kind, parts in itertools.groupby(section.parts, type):
        if kind is Picture:
            groups.append({"pictures": [_picture(part) for part in parts]})  # type: ignore[arg-type]
        else:
            groups += [{"table": _table(part, section.title)} for part in parts]  # type: ignore[arg-type]
    paragraphs = [" ".join(text.split()) for text in re.split(r"\n\s*\n", section.text) if text.strip()]
    return {"title": section.title, "paragraphs": paragraphs, "groups": groups}


def _picture(picture: Picture) -> dict[str, Any]:
    """As an image of data: it cannot act, load, or touch the page, and takes its colours from the device itself."""
    if not picture.alt.strip():
        raise InputError("picture: has no alt; say what it shows for those who do not see it.")
    size = _SIZE.search(picture.svg)
    if size is None:
        raise InputError("picture: expected an SVG with a viewBox, which gives its width.")
    place = picture.svg.index(">", size.start()) + 1
    svg = f"{picture.svg[:place]}<style>{THEME}</style>{picture.svg[place:]}"
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    # 72 units are an inch.
    return {"source": source, "alt": picture.alt, "caption": picture.caption, "inches": float(size[1]) / 72}


def _table(table: Table, title: str) -> dict[str, Any]:
    for number, row in enumerate(table.rows, 1):
        if len(row) != len(table.columns):
            raise InputError(
                f"table {table.caption or title!r}, row {number}: {len(row)} cells, {len(table.columns)} columns."
            )
    columns = [[row[place] for row in table.rows] for place in range(len(table.columns))]
    right = [not table.prose and _is_numeric(column) for column in columns]
    return {
        "label": table.caption or title,
        "caption": table.caption,
        "head": [
            (name, "number" if side else "text" if any(map(_is_sentence, column)) else "")
            for name, side, column in zip(table.columns, right, columns, strict=True)
        ],
        "rows": [
            [(shown(cell), _kind(cell, side, table.prose)) for cell, side in zip(row, right, strict=True)]
            for row in table.rows
        ],
    }


def _is_sentence(cell: object) -> bool:
    return isinstance(cell, str) and len(cell) > SENTENCE


def _kind(cell: object, right: bool, prose: bool) -> str:
    """The class of a cell: a number, or what is too short to be broken into lines on a phone."""
    if right or (not prose and _is_number(cell)):
        return "number"
    return "short" if not prose and len(shown(cell)) <= SHORT else ""


def _is_number(cell: object) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _is_numeric(cells: Sequence[object]) -> bool:
    """Whether a column holds numbers, and nothing else but gaps."""
    given = [cell for cell in cells if cell is not None]
    return bool(given) and all(
        _is_number(cell) or (isinstance(cell, str) and _NUMBER.fullmatch(cell)) for cell in given
    )


def shown(cell: object) -> str:
    """A cell as text: four figures of a number, thousands apart, and no exponent where a reader can do without."""
    if cell is None:
        return "\u2013"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return _grouped(f"{cell:,}") if abs(cell) >= 10_000 else str(cell)
    if isinstance(cell, float):
        return _grouped(f"{cell:,.0f}") if 999.95 <= abs(cell) < 1e15 else f"{cell:.4g}"
    return str(cell)


def _grouped(number: str) -> str:
    return number.replace(",", THIN_SPACE)
