"""``gist-fast train``: a configuration to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gist_fast.cli.output import (
    INTERRUPTED,
    Json,
    Report,
    check_report,
    note,
    only_results_on_stdout,
    print_facts,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from gist_fast.pipeline.plan import RunPlan


def train(
    context: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml", help="A YAML file with student, guide, data, loss, training, evaluation."
        ),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in output_dir.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete the run that output_dir holds, once the new one has saved something."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check files, columns, settings and models, print the plan, and leave.")
    ] = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a student under a guide.

    Any setting of the configuration can be given after it, as --training.learning_rate 1e-4, or --learning_rate 1e-4
    where only one section has it. The trained model is put in output_dir/final.

    Ctrl-C and SIGTERM finish the step, save a checkpoint and stop; --resume goes on from there.
    """
    with only_results_on_stdout():
        try:
            check_report(report, overwrite)
            from gist_fast.config.load import load_config
            from gist_fast.pipeline.plan import prepare

            plan = prepare(load_config(config, context.args), resume=resume, overwrite=overwrite)
        except KeyboardInterrupt:
            note("gist-fast: interrupted while getting ready; nothing was written.")
            raise typer.Exit(INTERRUPTED) from None
        if not dry_run:
            summary = _run(plan, overwrite=overwrite, report=report)
    if dry_run:
        _print_plan(plan, overwrite, as_json)
    elif as_json:
        print_json(summary)
    elif summary:
        _print_summary(summary)
    if not dry_run and report is not None and summary and summary["report"] is None:
        raise typer.Exit(2)


def _run(plan: RunPlan, *, overwrite: bool, report: Path | None) -> dict[str, Any]:
    """Train, save, and say how it went; a summary, empty in all processes but the first.

    Raises:
        typer.Exit: with 130 after Ctrl-C, with 143 after SIGTERM.
    """
    from gist_fast.pipeline.plan import make_trainer
    from gist_fast.pipeline.run_folder import kept_in
    from gist_fast.pipeline.train import train_and_save
    from gist_fast.training.stop_on_signal import TrainingStoppedError

    trainer = None
    try:
        trainer = make_trainer(plan)
        summary = train_and_save(plan, trainer, overwrite=overwrite)
        if report is not None and summary:
            from gist_fast.report.training import write_training_report

            summary["report"] = write_training_report(report, plan, trainer, summary, overwrite=overwrite)
        return summary
    except TrainingStoppedError as stopped:
        if trainer is not None and trainer.is_world_process_zero():
            note(f"gist-fast: {stopped}")
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        step = trainer.state.global_step if trainer is not None else 0
        when = f"after step {step}" if step else "before the first step"
        note(f"gist-fast: interrupted {when}; {kept_in(plan.output_dir)}")
        raise typer.Exit(INTERRUPTED) from None


def _print_plan(plan: RunPlan, overwrite: bool, as_json: bool) -> None:
    from gist_fast.pipeline.run_folder import written

    told: dict[str, Any] = {
        **plan.describe(),
        "resumes from": str(plan.checkpoint) if plan.checkpoint else None,
        "deletes": [path.name for path in written(plan.output_dir)] if overwrite else [],
        "settings": plan.config.arguments,
    }
    if as_json:
        print_json({name.replace(" ", "_"): value for name, value in told.items()})
        return
    settings = told.pop("settings")
    rows = [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in told.items() if value]
    rows += [(name, str(value)) for name, value in settings.items() if name != "output_dir"]
    print_table("All is well; this would be run", ("what", "value"), [(name, str(value)) for name, value in rows])


def _print_summary(summary: dict[str, Any]) -> None:
    scores = summary["evaluation"]
    if scores:
        before = scores["before"] or {}
        changes = [
            (metric, before.get(metric), after, f"{after - before[metric]:+.4f}" if metric in before else "-")
            for metric, after in scores["after"].items()
        ]
        print_table("Evaluation", ("metric", "before", "after", "change"), changes)
    shown = ("rows", "steps", "epochs", "seconds", "rows_per_second", "loss", "best_checkpoint", "model", "report")
    masked = {name: f"{value:.2%}" for name, value in summary["masked"].items()}
    print_facts("Training", {**{name: summary[name] for name in shown}, **masked})
    from gist_fast.pipeline.saved_model import SavedModel

    trusting = ", trust_remote_code=True" if SavedModel(summary["model"], "student").own_code else ""
    print(f'Load it: SentenceTransformer("{summary["model"]}"{trusting})')
