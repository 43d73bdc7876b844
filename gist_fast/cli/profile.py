"""``gist-fast profile``: where the time of a training step goes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gist_fast.cli.ctrl_c import CtrlC, interruptible
from gist_fast.cli.output import Json, expanded, note, only_results_on_stdout, print_json

if TYPE_CHECKING:
    from gist_fast.cli.train import _Plan
    from gist_fast.profiling.run import Profile
    from gist_fast.report.page import Table

TRACE, FIGURES = "trace.json.gz", "profile.json"
_OURS = {TRACE, FIGURES, *(f"{name}.{ending}" for name in ("steps", "steps-device") for ending in ("svg", "png"))}
"""All that a folder of a profile may hold."""


def profile(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration of gist-fast train.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to profile.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Steps to train before them.")] = 2,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            callback=expanded,
            help="Folder to write; by default <the file's name>-profile here.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="OUT.html", callback=expanded, help="Also write all of it as one HTML page."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier profile in DIR, and an earlier report.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a few steps under torch's profiler and show where their time goes.

    As gist-fast train would run them, settings after the configuration included, but that nothing is evaluated, saved
    or reported: the run's own folder is not touched. Written are a table, a picture (SVG and PNG), all figures (JSON)
    and a trace for https://ui.perfetto.dev or chrome://tracing.
    """
    target = Path(f"{config.stem}-profile") if output is None else output
    done: list[str] = []
    with only_results_on_stdout(), interruptible(done, sigterm=True) as ctrl_c:
        with tempfile.TemporaryDirectory(prefix="gist-fast-profile-") as scratch:
            _check_places(target, report, overwrite)
            plan = _make_plan(config, context.args, steps, warmup, Path(scratch))
            found = _run(plan, steps, warmup, Path(scratch) / TRACE, ctrl_c)
            facts = _facts(plan, found, config)
            result = {"facts": facts, "settings": _settings(plan), **found.as_dict()}
            files = _write(found, result, Path(scratch) / TRACE, target)
        done += files
        if report is not None:
            from gist_fast.report.page import write_page
            from gist_fast.report.profile import report_page

            write_page(report, report_page(found, facts, result["settings"]), overwrite=overwrite)
            done.append(str(report))
    if as_json:
        print_json({**result, "files": done})
        return
    _print(found, plan, done)


def _check_places(target: Path, report: Path | None, overwrite: bool) -> None:
    """Raise `InputError` where the profile could not be written, before any work."""
    from gist_fast.report.page import check_path
    from gist_fast.report.plots import check_matplotlib
    from gist_fast.runtime.errors import InputError

    if report is not None:
        check_matplotlib()
        check_path(report, overwrite=overwrite)
        ours, theirs = target.resolve(), report.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise InputError(
                f"--report: {report} lies in the way of --output {target}, a folder that is replaced as a whole; a "
                f"file beside it, such as {target.with_name(target.name + '.html')}, would do."
            )
    if target.exists() and not target.is_dir():
        raise InputError(f"--output: {target} is a file; a folder that does not exist yet would do.")
    held = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    strange = [name for name in held if name not in _OURS]
    if strange:
        raise InputError(f"--output: {target} holds {strange[0]}, which is no profile's; name a folder of its own.")
    if held and not overwrite:
        raise InputError(f"--output: {target} holds a profile; give --overwrite to replace it, or another --output.")
    _probe(target)


def _part(target: Path) -> Path:
    """Where a profile is written before it is put in place."""
    from gist_fast.pipeline.run_folder import PART

    return target.with_name(f".{target.name}.{os.getpid()}{PART}")


def _probe(target: Path) -> None:
    """Raise `InputError` unless a folder of files can really be made beside `target`; nothing is left behind."""
    from gist_fast.runtime.errors import InputError

    part = _part(target.resolve())
    there = next(folder for folder in part.parents if folder.exists())
    probe = there / part.name
    try:
        # Rights alone do not tell: a disk can be full or read-only, a name too long, and /proc lets nobody write.
        probe.mkdir()
        (probe / FIGURES).write_text(" ")
    except OSError as error:
        raise InputError(
            f"--output: {target} cannot be written ({there}: {error.strerror or error}); name another folder."
        ) from None
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _make_plan(config: Path, overrides: list[str], steps: int, warmup: int, scratch: Path) -> _Plan:
    from gist_fast.cli.train import _make_plan
    from gist_fast.profiling.run import profiling_arguments
    from gist_fast.runtime.errors import InputError

    # The run's own folder is not even looked at: it may hold a run, or not exist.
    folder = scratch / "run"
    plan = _make_plan(config, [*overrides, f"--training.output_dir={folder}"], resume=False, overwrite=False)
    if plan.arguments.world_size > 1:
        raise InputError(
            f"profile: {plan.arguments.world_size} processes were started; one can be profiled, so start it without "
            "torchrun."
        )
    arguments = plan.config.training_arguments(**profiling_arguments(steps, warmup, folder))
    return dataclasses.replace(plan, arguments=arguments, eval=None, evaluator=None)


def _run(plan: _Plan, steps: int, warmup: int, trace: Path, ctrl_c: CtrlC) -> Profile:
    from transformers import PrinterCallback

    from gist_fast.cli.train import _make_trainer
    from gist_fast.profiling.run import profile_training

    trainer, _ = _make_trainer(plan)
    trainer.remove_callback(PrinterCallback)
    note(f"Training {warmup} steps to warm up, then {steps} under the profiler.")

    def on_step(step: int) -> None:
        ctrl_c.check()
        note(f"step {step} of {warmup + steps}{' (warm-up)' if step <= warmup else ''}")

    return profile_training(trainer, steps=steps, warmup=warmup, trace=trace, on_step=on_step)


def _facts(plan: _Plan, found: Profile, config: Path) -> dict[str, str]:
    """What was profiled, where and with which versions."""
    from gist_fast.report.facts import machine_facts

    arguments, half = plan.arguments, plan.arguments.half_precision
    return {
        "configuration": str(config),
        "student": plan.config.student.path,
        "guide": plan.config.guide.path if plan.config.guide else ("none" if plan.config.unguided else "in the data"),
        "pairs a step": str(round(sum(found.pairs) / len(found.pairs))),
        "steps": f"{len(found.steps)}, after {len(found.warmup_ms)} to warm up",
        "computes in": "float32" if half is None else str(half).removeprefix("torch."),
        "dataloader workers": str(arguments.dataloader_num_workers),
        **machine_facts(arguments.device.type),
    }


def _settings(plan: _Plan) -> dict[str, Any]:
    """What was set other than by default, the folder that nothing was written to left out."""
    from gist_fast.report.facts import changed_settings

    return {name: value for name, value, _ in changed_settings(plan.config) if name != "output_dir"}


def _write(found: Profile, result: dict[str, Any], trace: Path, target: Path) -> list[str]:
    """Put the profile in place, all of it or nothing; the paths written."""
    from gist_fast.report.profile import save_pictures
    from gist_fast.runtime.errors import InputError
    from gist_fast.runtime.files import replace_folder

    target = target.resolve()
    part = _part(target)
    try:
        part.mkdir(parents=True)
        shutil.move(trace, part / TRACE)
        (part / FIGURES).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        try:
            save_pictures(found, part)
        except InputError as error:
            note(f"No picture: {error}.")
        replace_folder(part, target)
    except OSError as error:
        raise InputError(f"--output: {target} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(str(path) for path in target.iterdir())


def _print(found: Profile, plan: _Plan, files: list[str]) -> None:
    from gist_fast.report.profile import busiest_table, machine_table, parts_table

    _print_table(parts_table(found))
    if plan.arguments.dataloader_num_workers:
        typer.echo("Texts are tokenised by dataloader workers; what a step waits for them is 'waiting for data'.")
    _print_table(machine_table(found))
    _print_table(busiest_table(found))
    for file in files:
        typer.echo(file)


def _print_table(table: Table) -> None:
    """A table of a report on stdout, its parts marked in the colours of the pictures where stdout shows colours."""
    from rich.console import Console
    from rich.table import Table as Printed
    from rich.text import Text

    from gist_fast.cli.output import PIPE_WIDTH
    from gist_fast.report.profile import COLOURS

    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    console.print(Text(table.caption, style="bold"), soft_wrap=True)
    printed = Printed(header_style="bold")
    words = ("part", "what", "kernel", "operator", "mostly in")
    for name in table.columns:
        printed.add_column(name, justify="left" if name in words else "right", overflow="fold")
    for row in table.rows:
        cells = [Text("-" if cell is None else str(cell)) for cell in row]
        name = str(row[0])
        if table.columns[0] == "part" and sys.stdout.isatty():
            cells[0] = Text.assemble(("■ ", COLOURS[name]) if name in COLOURS else "  ", name)
        printed.add_row(*cells)
    console.print(printed)
