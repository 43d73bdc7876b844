"""``gist-fast bench``: what this machine gets out of it, and against whom; of results: ``show`` and ``compare``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gist_fast.cli.ctrl_c import interruptible
from gist_fast.cli.output import Json, check_report, expanded, note, only_results_on_stdout, print_json, print_table
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import try_to_write, write_whole

if TYPE_CHECKING:
    from gist_fast.bench.compare import Change, Comparison
    from gist_fast.bench.results import Results
    from gist_fast.bench.suite import Suite
    from gist_fast.report.page import Picture

app = typer.Typer(invoke_without_command=True)
FOLDER = "gist-fast-bench"
PAGES = (".html", ".htm")


@app.callback()
def bench(
    context: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Any of loss, self, unguided, engine, guide, step, start, commas between; else all, and without a GPU "
            "all but self and unguided."
        ),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Batch sizes, commas between, of all suites but start; else each suite's own.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the embeddings of the suites loss, self, unguided.")] = "float32",
    seconds: Annotated[
        float | None, typer.Option(min=1, help="What to plan for; else 45, 225 or 1800, by the scale.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Results and plots go into a folder in there that is named after the device.")
    ] = Path(FOLDER),
    report: Annotated[
        Path | None, typer.Option(callback=expanded, help="Also write one self-contained page of HTML.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="small: within a minute; medium, the default: within five; large: half an hour.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --scale small.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the loss, the engine, the guide columns, a training step and the cold start, beside their peers.

    Everything is checked before it is timed. Ends within five minutes on two cores.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    _let_threads_sleep()
    given = _sizes(sizes)
    done: list[str] = []
    failed: Exception | None = None
    with only_results_on_stdout(), interruptible(done, sigterm=True) as ctrl_c:
        _check(device, dtype, seconds, report, overwrite)
        from gist_fast.bench.run import BUDGETS, run, suites_named
        from gist_fast.bench.suite import Scope
        from gist_fast.runtime.environment import best_device, device_name

        place, extent = device or best_device(), _scale(scale, quick)
        chosen = suites_named(suite, place)
        _check_looked_at(context, chosen)
        folder = output.expanduser() / device_name(place)
        try_to_write(folder, "--output", "name another folder")
        budget = seconds or BUDGETS[extent]
        results = run(
            chosen,
            Scope(given, place, dtype, extent),
            command=shlex.join(["gist-fast", *sys.argv[1:]]),
            budget=budget,
            say=note,
            keep=ctrl_c.check,
        )
        _check_timed(results, budget)
        try:
            _write(folder, results, report, overwrite, done)
        except Exception as error:
            if ctrl_c.came:
                raise
            failed = error  # what was measured is shown first
    if as_json:
        print_json(results.as_dict())
    else:
        _print(results)
    if failed is not None:
        raise failed


def _print(results: Results) -> None:
    from gist_fast.bench import tables
    from gist_fast.bench.run import SUITES

    for name in dict.fromkeys(row.suite for row in results.rows):
        title = f"{name}: {SUITES[name].title}" if name in SUITES else name
        print_table(title, *tables.suite_table(results, name))
        for line in tables.notes(results, name):
            print(line)
    if results.fits:
        print_table("How costs grow", *tables.fit_table(results))
    print_table("Measured on", ("what", "value"), list(tables.facts(results).items()))


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="The bench.json of a run.")],
    plots: Annotated[
        bool, typer.Option("--plots", help="Draw the plots that are missing beside the file; none is replaced.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(callback=expanded, help="Write one self-contained page of HTML.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report that is there.")] = False,
) -> None:
    """Print the tables of a run again; draw what it has no pictures of, as on a machine without matplotlib."""
    from gist_fast.bench.plots import page, pictures
    from gist_fast.bench.results import read
    from gist_fast.report.page import write_page
    from gist_fast.report.plots import check_matplotlib

    if plots:
        check_matplotlib("--plots")
    _check_report(report, overwrite)
    results = read(file)
    drawn = pictures(results) if plots or report is not None else {}
    if plots:
        _add_plots(file, drawn)
    if report is not None:
        write_page(report, page(results, drawn), overwrite=overwrite)
        note(f"report: {report}")
    _print(results)


@app.command("compare")
def compare(
    old: Annotated[Path, typer.Argument(help="The bench.json of one run.")],
    new: Annotated[Path, typer.Argument(help="That of a later one.")],
    everything: Annotated[bool, typer.Option("--all", help="Also what did not move.")] = False,
    as_json: Json = False,
) -> None:
    """Show what moved between two results, by how much, and against which noise."""
    from dataclasses import asdict

    from gist_fast.bench.compare import compare as compare_results
    from gist_fast.bench.results import read

    found = compare_results(read(old), read(new))
    if as_json:
        changes = [{**asdict(c), "moved": c.moved, "verdict": c.verdict} for c in found.changes]
        print_json({**asdict(found), "changes": changes})
        return
    _show(found, everything)


def _show(found: Comparison, everything: bool) -> None:
    from gist_fast.bench.compare import NOT_COMPARABLE, OUTCOME
    from gist_fast.bench.tables import amount, duration

    if found.facts:
        print_table("These differ between the two runs", ("what", "old", "new"), found.facts)
    outcomes = [change for change in found.changes if change.figure == OUTCOME]
    if outcomes:
        rows = [(*_place(c), c.old, c.new, "" if c.moved else NOT_COMPARABLE) for c in outcomes]
        print_table("Outcomes that changed", ("suite", "B", "what", "old", "new", ""), rows)
    figures = [change for change in found.changes if change.figure != OUTCOME]
    moved_rows = []
    for c in (change for change in figures if everything or change.moved):
        shown = amount if c.figure == "memory" else duration
        values = [x if isinstance(x, str) else shown(x) for x in (c.old, c.new)]
        noise = "-" if c.noise is None else f"{c.noise:.1%}"
        moved_rows.append((*_place(c), c.figure, *values, c.verdict, noise))
    if moved_rows:
        print_table("What moved", ("suite", "B", "what", "figure", "old", "new", "verdict", "noise"), moved_rows)
    print(f"{sum(c.moved for c in figures)} of {len(figures)} figures moved by more than their noise.")
    if outcomes:
        moved = sum(c.moved for c in outcomes)
        others = "; where there was no time, or nobody to measure, they are not comparable"
        print(f"{moved} of {len(outcomes)} changed outcomes moved{others if moved < len(outcomes) else ''}.")
    for word, labels in (("old", found.only_old), ("new", found.only_new)):
        if labels:
            print(f"only in the {word} results: {', '.join(labels)}.")


def _place(change: Change) -> tuple[str, str, str]:
    return change.suite, f"{change.size:,}" if change.size else "-", change.what


def _let_threads_sleep() -> None:
    """Have threads that wait sleep instead of spin, unless the user has said which.

    On a machine with other work the one that is waited for then gets the core; where they spin, all takes up to a
    hundred times as long. OpenMP reads this when torch is imported.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _sizes(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 2:
        raise typer.BadParameter(
            f"expected whole numbers from 2, such as 256,1024, got {text!r}.", param_hint="--sizes"
        )
    return sizes


def _scale(scale: str | None, quick: bool) -> str:
    from gist_fast.bench.suite import SCALES
    from gist_fast.functional.values import check_choice

    if scale is not None:
        check_choice("--scale", scale, SCALES)
        if quick and scale != "small":
            raise InputError(f"--quick means --scale small, and --scale {scale} was given; keep one of the two.")
    return "small" if quick else scale or "medium"


def _check(device: str | None, dtype: str, seconds: float | None, report: Path | None, overwrite: bool) -> None:
    """Refuse before anything is measured."""
    import math

    import torch

    from gist_fast.bench.cases import ITEM_SIZES
    from gist_fast.functional.values import check_choice

    check_choice("--dtype", dtype, tuple(ITEM_SIZES))
    if seconds is not None and not math.isfinite(seconds):
        raise InputError(f"--seconds: expected a number such as 60, got {seconds}.")
    if device is not None and device != "cpu" and not device.startswith("cuda"):
        raise InputError(f"--device: expected cpu or cuda, got {device!r}.")
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device: expected cpu, got {device!r}; this torch finds no GPU.")
    _check_report(report, overwrite)


def _check_looked_at(context: typer.Context, chosen: Sequence[Suite]) -> None:
    """Refuse an option that none of the suites looks at."""
    from gist_fast.bench.run import SUITES

    for option in ("sizes", "dtype"):
        if _is_given(context, option) and not any(option in suite.looks_at for suite in chosen):
            names = " nor ".join(suite.name for suite in chosen)
            others = ", ".join(name for name, suite in SUITES.items() if option in suite.looks_at)
            raise InputError(f"--{option}: says nothing to --suite {names}; leave it out, or name any of {others}.")


def _is_given(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _check_report(report: Path | None, overwrite: bool) -> None:
    # Anything else might be, or come to be, results or a plot: what was measured must not be lost to --overwrite.
    if report is not None and report.suffix.lower() not in PAGES and not report.is_dir():
        raise InputError(
            f"--report: expected a file that ends in {' or '.join(PAGES)}, such as {report.stem}.html, got {report}."
        )
    check_report(report, overwrite)


def _refuse_options(context: typer.Context) -> None:
    """Options before a command of ``bench`` are for measuring, and would say nothing."""
    for parameter in context.command.params:
        if _is_given(context, parameter.name or ""):
            command = context.invoked_subcommand
            raise InputError(
                f"{parameter.opts[0]}: is an option of gist-fast bench, and {command} measures nothing; leave it out, "
                f"or put it behind {command} if `gist-fast bench {command} --help` names it."
            )


def _check_timed(results: Results, budget: float) -> None:
    """Raise `InputError` where there is no figure at all."""
    from gist_fast.bench.results import NOT_RUN, UNSUPPORTED

    if any(row.seconds for row in results.rows):
        return
    row = next((row for row in results.rows if row.outcome != UNSUPPORTED), results.rows[0])
    why = f"{row.what} in the suite {row.suite} {row.outcome}: {row.why}"
    if any(row.outcome == NOT_RUN for row in results.rows):
        raise InputError(
            f"nothing was timed within the {budget:g} s that were planned ({why}); give a larger --seconds, "
            "smaller --sizes or fewer suites."
        )
    raise InputError(f"nothing was timed ({why}); give other --sizes or another --suite.")


def _write(folder: Path, results: Results, report: Path | None, overwrite: bool, done: list[str]) -> None:
    """Add each file that is in place to `done`."""
    from gist_fast.bench.plots import on_white, page, pictures
    from gist_fast.bench.results import plot_path, write_numbered

    drawn: dict[str, Picture] = {}
    try:
        path = write_numbered(folder, results)
        done.append(str(path))
        note(f"results: {path}")
        try:
            drawn = pictures(results)
        except InputError as error:
            note(f"no plots: {error}")
        for name, picture in drawn.items():
            write_whole(plot_path(path, name), on_white(picture.svg))
    except OSError as error:
        raise InputError(f"--output: {folder} cannot be written ({error.strerror or error}).") from error
    if drawn:
        done.append(_names(path, drawn))
        note(f"plots: {_names(path, drawn)}")
    if report is not None:
        from gist_fast.report.page import write_page

        write_page(report, page(results, drawn), overwrite=overwrite)
        done.append(str(report))
        note(f"report: {report}")


def _add_plots(path: Path, drawn: dict[str, Picture]) -> None:
    """Write those that are not there."""
    from gist_fast.bench.plots import on_white
    from gist_fast.bench.results import plot_path

    added = []
    for name, picture in drawn.items():
        try:
            write_whole(plot_path(path, name), on_white(picture.svg))
            added.append(name)
        except FileExistsError:
            continue
        except OSError as error:
            where, why = plot_path(path, name), error.strerror or error
            raise InputError(
                f"--plots: {where} cannot be written ({why}); copy {path} elsewhere and draw there."
            ) from error
    note(f"plots: {_names(path, added)}" if added else f"plots: {'all are there' if drawn else 'nothing to draw'}")


def _names(path: Path, drawn: Sequence[str] | dict[str, Picture]) -> str:
    return f"{path.with_name(path.stem)}-{{{','.join(drawn)}}}.svg"
