"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")]
INTERRUPTED = 130
"""The exit code after Ctrl-C."""
PIPE_WIDTH = 120
"""Columns of a table where stdout is no terminal."""


def expanded(path: Path | None) -> Path | None:
    """A path that was given, with ~ as the home directory; a shell leaves it alone in ``--report=~/run.html``."""
    try:
        return path and path.expanduser()
    except RuntimeError:
        raise typer.BadParameter(f"expected a path below an existing home directory, got {str(path)!r}.") from None


def check_report(path: Path | None, overwrite: bool) -> None:
    """Raise `InputError` where a report could not be written, before any work."""
    if path is not None:
        from gist_fast.report.page import check_path
        from gist_fast.report.plots import check_matplotlib

        check_matplotlib()
        check_path(path, overwrite=overwrite)


def replace_what_cannot_be_encoded() -> None:
    """Have stdout and stderr write a ? for a character that they cannot encode, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and isinstance(stream, io.TextIOWrapper):
            # A file whose descriptor has become a pipe's refuses it, and stays as it is.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="replace")


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Send what libraries print meanwhile to stderr; the trainer's logs, among others, go to stdout by themselves."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_json(result: Any) -> None:
    """The result, alone, on stdout; null for a float that is no finite number, because JSON has none."""
    text = json.dumps(_finite(result), ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(_finite(result), indent=2)  # escaped, so that nothing is lost
    print(text)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], words: Sequence[str] | None = None
) -> None:
    """A table on stdout; numbers stand to the right, floats with four digits.

    Args:
        words: the columns that stand to the left, where numbers come as texts.
    """
    from rich import console as rich
    from rich.table import Table
    from rich.text import Text

    class Console(rich.Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would exit with 1: which code it is, is said elsewhere

    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    # A title of the table's own would be folded to the table's width.
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(header_style="bold")
    for place, name in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[place], (int, float)) or row[place] is None for row in rows)
        numbers = numbers if words is None else name not in words
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        # Text, not str: square brackets in a user's texts are no markup.
        table.add_row(*(value if isinstance(value, Text) else Text(_cell(value)) for value in row))
    console.print(table)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """A table of names and values on stdout, but for those that are None; floats with four digits."""
    rows = []
    for name, value in facts.items():
        if value is not None:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            rows.append((name.replace("_", " "), ", ".join(shown) if isinstance(shown, list) else str(shown)))
    print_table(title, ("what", "value"), rows)


def parse_columns(text: str | None) -> dict[str, str] | list[str] | None:
    """``question,answer`` or ``anchor=question,positive=answer`` as `gist_fast.data.load_texts` takes them."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    named = ["=" in part for part in parts]
    if all(named):
        return {name.strip(): column.strip() for name, _, column in (part.partition("=") for part in parts)}
    if any(named) or not all(parts):
        raise typer.BadParameter(
            f"expected 'question,answer' or 'anchor=question,positive=answer', got {text!r}.", param_hint="--columns"
        )
    return parts


def parse_prompts(given: list[str] | None, columns: list[str]) -> dict[str, str] | str | None:
    """Each ``TEXT`` for all columns, or ``column=TEXT``, as `gist_fast.embed_guide` takes them."""
    from gist_fast.runtime.errors import InputError

    if not given:
        return None
    parts = [text.partition("=") for text in given]
    named = [bool(equals) and name in columns for name, equals, _ in parts]
    if all(named):
        return {name: text for name, _, text in parts}
    if len(given) > 1:
        raise InputError(
            f"--prompt: expected one for all columns, or COLUMN=TEXT with a column of {', '.join(columns)}, got "
            f"{len(given)}, of which {given[named.index(False)]!r} is for no column."
        )
    name, equals, _ = parts[0]
    if equals and name.isidentifier():
        raise InputError(
            f"--prompt: expected COLUMN=TEXT with a column of {', '.join(columns)}, got {given[0]!r}. Where that is a "
            "prompt for all columns, give it for each of them."
        )
    return given[0]


Device = Annotated[str | None, typer.Option("--device", help="cuda, cpu and so on; else the best there is.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a model. Read it first.")
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="OUT.html", callback=expanded, help="Also write all of it as one HTML page."),
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", help="Which column is which: anchor=question,positive=answer, or names in that order."),
]
Split = Annotated[str | None, typer.Option("--split", help="Split of the data.")]
Quoting = Annotated[
    bool | None,
    typer.Option(
        "--quoting/--no-quoting", help="Whether a cell may stand in double quotes; by default in CSV alone, not in TSV."
    ),
]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", help="Put before each text for the guide; or one a column, as anchor=TEXT. Else the guide's own."
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        callback=expanded,
        help="Where embeddings are kept for the next time; else the cache of datasets.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the dataset that output holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Do not tell how far it is.")]
