"""``gist-fast profile``: where the time of a training step goes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gist_fast.cli.ctrl_c import CtrlC, interruptible
from gist_fast.cli.output import (
    Json,
    Report,
    check_report,
    expanded,
    note,
    only_results_on_stdout,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from gist_fast.pipeline.plan import RunPlan
    from gist_fast.profiling.run import Profile
    from gist_fast.report.page import Table


def profile(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration of gist-fast train.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to profile.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Steps to train before them.")] = 2,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", callback=expanded, help="Folder to write; by default <the file's name>-profile here."
        ),
    ] = None,
    report: Report = None,
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
            from gist_fast.config.load import load_config
            from gist_fast.pipeline.plan import prepare_profile
            from gist_fast.report.facts import changed_settings
            from gist_fast.report.profile import TRACE, profile_facts, write_folder

            folder = Path(scratch) / "run"
            # A configuration that names no folder can be profiled too.
            loaded = load_config(config, [*context.args, f"--training.output_dir={folder}"])
            plan = prepare_profile(loaded, steps=steps, warmup=warmup, folder=folder)
            trace = Path(scratch) / TRACE
            found = _run(plan, steps, warmup, trace, ctrl_c)
            facts = profile_facts(plan, found)
            # The folder is the scratch one, to which nothing was written.
            settings = {name: value for name, value, _ in changed_settings(plan.config) if name != "output_dir"}
            result = {"facts": facts, "settings": settings, **found.as_dict()}
            files = write_folder(found, result, trace, target)
        done += files
        if report is not None:
            from gist_fast.report.page import write_page
            from gist_fast.report.profile import report_page

            write_page(report, report_page(found, facts, settings), overwrite=overwrite)
            done.append(str(report))
    if as_json:
        print_json({**result, "files": done})
        return
    _print(found, plan, done)


def _check_places(target: Path, report: Path | None, overwrite: bool) -> None:
    """Raise `InputError` where the profile could not be written, before any work."""
    from gist_fast.report.profile import check_folder
    from gist_fast.runtime.errors import InputError

    check_report(report, overwrite)
    if report is not None:
        ours, theirs = target.resolve(), report.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise InputError(
                f"--report: expected a file outside of --output {target}, which is replaced as a whole, got {report}. "
                f"Name a file beside it, such as {target.with_name(target.name + '.html')}."
            )
    check_folder(target, overwrite)


def _run(plan: RunPlan, steps: int, warmup: int, trace: Path, ctrl_c: CtrlC) -> Profile:
    from transformers import PrinterCallback

    from gist_fast.pipeline.plan import make_trainer
    from gist_fast.profiling.run import profile_training

    trainer = make_trainer(plan)
    trainer.remove_callback(PrinterCallback)
    note(f"Training {warmup} steps to warm up, then {steps} under the profiler.")

    def on_step(step: int) -> None:
        ctrl_c.check()
        note(f"step {step} of {warmup + steps}{' (warm-up)' if step <= warmup else ''}")

    return profile_training(trainer, steps=steps, warmup=warmup, trace=trace, on_step=on_step)


def _print(found: Profile, plan: RunPlan, files: list[str]) -> None:
    from gist_fast.report.profile import busiest_table, machine_table, parts_table

    _print_table(parts_table(found))
    if plan.arguments.dataloader_num_workers:
        print("Texts are tokenised by dataloader workers; what a step waits for them is 'waiting for data'.")
    _print_table(machine_table(found))
    _print_table(busiest_table(found))
    for file in files:
        print(file)


def _print_table(table: Table) -> None:
    """A table of a report on stdout, its parts marked in the colours of the pictures where stdout shows colours."""
    from rich.text import Text

    from gist_fast.report.profile import COLOURS

    rows = [list(row) for row in table.rows]
    for row in rows if table.columns[0] == "region" and sys.stdout.isatty() else ():
        name = str(row[0])
        row[0] = Text.assemble(("■ ", COLOURS[name]) if name in COLOURS else "  ", name)
    print_table(table.caption, table.columns, rows, words=("region", "what", "kernel", "operator", "mostly in"))
