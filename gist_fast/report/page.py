"""A report as one HTML page that needs nothing else: no script, no request, light or dark as the reader's device."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gist_fast.report.inline_svg import inline
from gist_fast.report.style import CSS
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import try_to_write, write_whole

# A page that may load nothing and run nothing, whatever a text in it says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
SENTENCE = 24
"""Letters from which on a cell asks for a column that a phone does not fold into single words."""
THIN_SPACE = "\u202f"
SHORT = 24
"""Characters of a cell that stay on one line."""
_NUMBER = re.compile(r"[+\-\u2212]?\d[\d\u202f]*(\.\d+)?(e[+-]?\d+)?\s?(%|\u00d7|[A-Za-zµ/]{1,8})?")


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
            see it, is no SVG, or would run a script or load something.
    """
    numbers = iter(range(1, 1 << 30))
    body = "\n".join(_section(section, numbers) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{CSS}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
{_facts(facts)}{body}
</main>
</body>
</html>
"""


def check_path(path: Path, *, overwrite: bool = False) -> None:
    """Check, before the work whose report it is, that `write_page` could write there; nothing is left behind.

    Raises:
        InputError: there is a file already (and `overwrite` is False) or a folder, or no file can be written there.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the report's file, such as {path / 'report.html'}.")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; name another file for the report, or replace it with --overwrite.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{path}: {folder} is a file, not a folder; name another place for the report.")
    try:
        try_to_write(folder)
    except OSError as error:
        raise InputError(
            f"{path}: {folder} cannot be written to ({error.strerror or error}); name another place for the report."
        ) from None


def write_page(path: Path, page: str, *, overwrite: bool = False) -> None:
    """Write `page` to `path`, whose folder is made where there is none: all of it or, where that fails, nothing.

    Raises:
        InputError: see `check_path`; or the disk refuses.
    """
    check_path(path, overwrite=overwrite)
    try:
        write_whole(path, page, overwrite=overwrite)
    except FileExistsError:
        raise InputError(f"{path}: exists; name another file for the report, or replace it with --overwrite.") from None
    except OSError as error:
        raise InputError(f"{path}: the report could not be written ({error.strerror or error}).") from error


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    rows = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{rows}</dl>\n'


def _section(section: Section, numbers: Iterator[int]) -> str:
    paragraphs = [part for part in re.split(r"\n\s*\n", section.text.strip()) if part.strip()]
    text = "".join(f"<p>{html.escape(' '.join(paragraph.split()))}</p>\n" for paragraph in paragraphs)
    parts = []
    pictures: list[str] = []
    for part in section.parts:
        if isinstance(part, Picture):
            pictures.append(_picture(part, next(numbers)))
            continue
        parts += _row_of(pictures)
        pictures = []
        parts.append(_table(part, section.title))
    parts += _row_of(pictures)
    return f"<section>\n<h2>{html.escape(section.title)}</h2>\n{text}{''.join(parts)}</section>"


def _row_of(pictures: list[str]) -> list[str]:
    """Pictures that follow one another stand side by side where there is room."""
    return [f'<div class="pictures">\n{"".join(pictures)}</div>\n'] if pictures else []


def _picture(picture: Picture, number: int) -> str:
    svg, inches = inline(picture.svg, picture.alt, f"picture-{number}")
    caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>" if picture.caption else ""
    kind = ' class="wide"' if inches > 6 else ""
    return f'<figure{kind}>\n<div class="scroll">{svg}</div>\n{caption}</figure>\n'


def _table(table: Table, title: str) -> str:
    for number, row in enumerate(table.rows, 1):
        if len(row) != len(table.columns):
            raise InputError(
                f"table {table.caption or title!r}, row {number}: {len(row)} cells, {len(table.columns)} columns."
            )
    columns = [[row[place] for row in table.rows] for place in range(len(table.columns))]
    right = [not table.prose and _is_numeric(column) for column in columns]
    head = "".join(
        f'<th scope="col"{_aligned(side) or _wide(column)}>{html.escape(name)}</th>'
        for name, side, column in zip(table.columns, right, columns, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f"<td{_kind(cell, side, table.prose)}>{html.escape(shown(cell))}</td>"
            for cell, side in zip(row, right, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    label = html.escape(table.caption or title, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">\n<table>{caption}\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n"
    )


def _aligned(right: bool) -> str:
    return ' class="number"' if right else ""


def _wide(cells: Sequence[object]) -> str:
    return ' class="text"' if any(isinstance(cell, str) and len(cell) > SENTENCE for cell in cells) else ""


def _kind(cell: object, right: bool, prose: bool) -> str:
    """The class of a cell: a number, or what is too short to be broken into lines on a phone."""
    if right or (not prose and _is_number(cell)):
        return _aligned(True)
    return ' class="short"' if not prose and len(shown(cell)) <= SHORT else ""


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
