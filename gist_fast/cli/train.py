"""``gist-fast train``: a configuration to a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gist_fast.cli.output import Json, expanded, note, only_results_on_stdout, print_json, print_table

if TYPE_CHECKING:
    from sentence_transformers.base.evaluation import BaseEvaluator

    from gist_fast.config.load import ModelConfig, TrainConfig
    from gist_fast.data.named import Loaded
    from gist_fast.inspection import Inspection
    from gist_fast.training.arguments import GISTTrainingArguments
    from gist_fast.training.trainer import GISTTrainer

INTERRUPTED = 130


@dataclass
class _Plan:
    """All that a run needs short of the models: read and checked, nothing written."""

    config: TrainConfig
    arguments: GISTTrainingArguments
    checkpoint: Path | None
    train: Loaded
    eval: Loaded | None
    evaluator: BaseEvaluator | None
    models: dict[str, str]
    """Where student and guide are: ``folder``, ``cache`` or ``hub``."""

    @property
    def output_dir(self) -> Path:
        return self.config.output_dir


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
        bool, typer.Option("--overwrite", help="Delete the run that output_dir holds, once all is ready to start.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check files, columns, settings and models, print the plan, and leave.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            callback=expanded,
            help="At the end, also write one self-contained page of HTML: curves and tables.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a student under a guide.

    Any setting of the configuration can be given after it, as --training.learning_rate 1e-4, or --learning_rate 1e-4
    where only one section has it. The trained model is put in output_dir/final.

    Ctrl-C and SIGTERM finish the step, save a checkpoint and stop; --resume goes on from there.
    """
    with only_results_on_stdout():
        try:
            if report is not None:
                _check_report(report, overwrite=overwrite)
            plan = _make_plan(config, context.args, resume=resume, overwrite=overwrite)
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


def _check_report(path: Path, *, overwrite: bool) -> None:
    from gist_fast.report.page import check_path
    from gist_fast.report.plots import check_matplotlib

    check_matplotlib()
    check_path(path, overwrite=overwrite)


def _make_plan(path: Path, overrides: list[str], *, resume: bool, overwrite: bool) -> _Plan:
    from gist_fast.config.load import load_config
    from gist_fast.data.named import carries_guide
    from gist_fast.evaluation.evaluators import configured_evaluator
    from gist_fast.pipeline.datasets import check_run, load_sources
    from gist_fast.pipeline.models import check_lora, check_model
    from gist_fast.pipeline.run_folder import prepare_folder
    from gist_fast.runtime.errors import InputError
    from gist_fast.training.loss_checks import check_loss_settings, check_self_guiding

    config = load_config(path, overrides)
    checkpoint = prepare_folder(config.output_dir, resume=resume, overwrite=overwrite)
    more: dict[str, Any] = {}
    if config.arguments.get("resume_from_checkpoint"):
        raise InputError("training.resume_from_checkpoint: the command continues a run with --resume instead.")
    if (config.data.eval or config.evaluation) and "eval_strategy" not in config.arguments:
        # What to evaluate on was given, so evaluate.
        more["eval_strategy"] = "epoch"
    arguments = config.training_arguments(**more)
    models = {"student": check_model(config.student.path, "student")}
    if config.student.lora:
        check_lora()
    if config.guide:
        models["guide"] = check_model(config.guide.path, "guide")
    train_set = load_sources(config.data.train, "data.train", arguments.seed, endless=True)
    eval_set = None if config.data.eval is None else load_sources(config.data.eval, "data.eval", arguments.seed)
    carries = carries_guide(train_set)
    guided = bool(config.guide) or arguments.self_guided or (carries and not config.unguided)
    try:
        check_self_guiding(arguments, carries_embeddings=carries, without_guide=config.unguided)
        check_loss_settings(arguments, guided=guided, guide=config.guide is not None, width=None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: loss.{error}") from error
    check_run(arguments, train_set, eval_set)
    if config.guide and arguments.hard and _same_model(config.guide, config.student):
        raise InputError(
            f"{path}: loss.hard: the guide {config.guide.path} is the student as it comes, which decides by the same "
            "scores, so that hardly a negative is left; another guide would do, or hard: false."
        )
    if config.guide and carries:
        raise InputError(
            f"guide: {config.guide.path}, but the training data carry embeddings of a guide already, perhaps of "
            "another one; leave out 'guide', or train on data without those columns."
        )
    if config.guide is None and not config.unguided and not arguments.self_guided and not carries:
        raise InputError(
            f"{path}: 'guide' is missing, and the training data carry no embeddings of one; name a guide, or write "
            "'guide: null' to train without, or 'self_guided: true'."
        )
    return _Plan(
        config=config,
        arguments=arguments,
        checkpoint=checkpoint,
        train=train_set,
        eval=eval_set,
        evaluator=None if config.evaluation is None else configured_evaluator(config.evaluation),
        models=models,
    )


def _same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether both are the same files; a folder may be written in two ways."""
    paths = [Path(model.path).expanduser() for model in (one, other)]
    if all(path.exists() for path in paths):
        return paths[0].samefile(paths[1])
    return (one.path, one.revision) == (other.path, other.revision)


def _run(plan: _Plan, *, overwrite: bool, report: Path | None) -> dict[str, Any]:
    """Train, save, and say how it went; a summary, empty in all processes but the first.

    Raises:
        typer.Exit: with 130 after Ctrl-C, with 143 after SIGTERM.
    """
    trainer = None
    try:
        trainer, before = _make_trainer(plan)
        summary = _train(plan, trainer, before, overwrite=overwrite)
        if report is not None and summary:
            summary["report"] = _write_report(report, plan, trainer, summary, overwrite=overwrite)
        return summary
    except KeyboardInterrupt:
        step = trainer.state.global_step if trainer is not None else 0
        note(f"gist-fast: interrupted {f'after step {step}' if step else 'before the first step'}; {_kept(plan)}")
        raise typer.Exit(INTERRUPTED) from None


def _make_trainer(plan: _Plan) -> tuple[GISTTrainer, dict[str, float] | None]:
    """The trainer, and the student's scores before training."""
    import torch

    from gist_fast.evaluation.evaluators import evaluate
    from gist_fast.functional.loss_config import check_dims
    from gist_fast.pipeline.attention import Attention, choose_attention
    from gist_fast.pipeline.datasets import with_guide_columns
    from gist_fast.pipeline.models import add_lora, load_with_attention
    from gist_fast.training.trainer import GISTTrainer

    config = plan.config
    attention = choose_attention(plan.arguments.device.type, half=plan.arguments.half_precision is not None)
    student = load_with_attention(config.student.path, "student", attention, **_model_options(config.student))
    if config.student.max_seq_length:
        student.max_seq_length = config.student.max_seq_length
    if config.student.lora:
        add_lora(student, config.student.lora)
    # Before any text is embedded.
    check_dims(plan.arguments.matryoshka_dims, plan.arguments.matryoshka_weights, student.get_embedding_dimension())
    guide, train_set, eval_set = None, plan.train, plan.eval
    if config.guide:
        # Outside of the trainer's autocast, flash-attn would meet float32.
        how = Attention(None, "") if config.guide.columns else attention
        guide = load_with_attention(config.guide.path, "guide", how, **_model_options(config.guide))
        if config.guide.columns:
            train_set = with_guide_columns(train_set, guide, plan.arguments, "data.train")
            if eval_set is not None:
                eval_set = with_guide_columns(eval_set, guide, plan.arguments, "data.eval")
            guide = None
    trainer = GISTTrainer(
        model=student,
        args=plan.arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        guide=guide,
        guided=False if config.unguided else None,
        evaluator=plan.evaluator,
    )
    before = None
    if plan.evaluator is not None and config.evaluation and config.evaluation.before and plan.checkpoint is None:
        note("Measuring the student before training.")
        half = plan.arguments.half_precision
        # As the trainer will evaluate it: flash-attn knows no other type.
        with torch.autocast(plan.arguments.device.type, dtype=half, enabled=half is not None):
            before = evaluate(student, plan.evaluator)
    return trainer, before


def _model_options(model: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision:
        options["revision"] = model.revision
    if model.model_kwargs:
        options["model_kwargs"] = dict(model.model_kwargs)
    return options


def _train(plan: _Plan, trainer: GISTTrainer, before: dict[str, float] | None, *, overwrite: bool) -> dict[str, Any]:
    from gist_fast.data.named import count_rows
    from gist_fast.evaluation.evaluators import evaluate
    from gist_fast.pipeline.run_folder import FINAL, PART, clear_folder, clear_part, replace_folder
    from gist_fast.training.stop_on_signal import StopOnInterrupt

    first = trainer.is_world_process_zero()
    if overwrite:
        with trainer.args.main_process_first(desc="clearing output_dir"):
            gone = clear_folder(plan.output_dir) if first else []
        if gone:
            note(f"Deleted from {plan.output_dir}: {', '.join(gone)}.")
    if plan.checkpoint and first:
        note(f"Continuing from {plan.checkpoint}.")
    stop = StopOnInterrupt(trainer.args.world_size)
    trainer.add_callback(stop)
    with stop:
        outcome = trainer.train(resume_from_checkpoint=str(plan.checkpoint) if plan.checkpoint else None)
        state = trainer.state
        if stop.requested and state.global_step < state.max_steps:
            if first:
                note(f"gist-fast: stopped after step {state.global_step} of {state.max_steps}; {_kept(plan)}")
            raise typer.Exit(stop.exit_code)
        final = plan.output_dir / FINAL
        part = plan.output_dir / f"{FINAL}{PART}"
        with trainer.args.main_process_first(desc="making room for the model"):
            if first:
                clear_part(part)
        # Every process: a sharded model is gathered here. Only the first one writes.
        trainer.save_model(str(part))
        if not first:
            return {}
        replace_folder(part, final)
        if stop.requested:
            note(f"gist-fast: stopped after the last step; {_kept(plan)}")
            raise typer.Exit(stop.exit_code)
    after = None if plan.evaluator is None else evaluate(trainer.model, plan.evaluator)
    return {
        "model": str(final),
        "output_dir": str(plan.output_dir),
        "rows": count_rows(plan.train),
        "steps": state.global_step,
        "epochs": state.epoch,
        "seconds": outcome.metrics.get("train_runtime"),
        "rows_per_second": outcome.metrics.get("train_samples_per_second"),
        "loss": outcome.training_loss,
        "best_checkpoint": state.best_model_checkpoint,
        "resumed_from": str(plan.checkpoint) if plan.checkpoint else None,
        "masked": _last_masked(trainer),
        "evaluation": None if after is None else {"before": before, "after": after},
        "report": None,
    }


def _write_report(
    path: Path, plan: _Plan, trainer: GISTTrainer, summary: dict[str, Any], *, overwrite: bool
) -> str | None:
    """Where the report is; None where it could not be written, which takes nothing from the run itself."""
    from gist_fast.report.facts import changed_settings, machine_facts
    from gist_fast.report.page import write_page
    from gist_fast.report.training import FinishedTraining, training_page
    from gist_fast.runtime.errors import InputError

    scores = summary["evaluation"] or {}
    told = {name: name.replace("_", " ") for name in ("rows", "steps", "epochs", "best_checkpoint", "model")}
    told |= {"seconds": "seconds, evaluation and saving included"}
    if plan.checkpoint is None:
        told |= {"rows_per_second": "rows a second of that time", "loss": "loss, mean of all steps"}
    else:
        # The trainer's rate and mean are of the last part alone; the curves show the whole.
        told |= {"seconds": "seconds since resumed", "resumed_from": "resumed from"}
    facts = {name: str(value) for name, value in _what_runs(plan).items() if value and name != "output_dir"}
    run = FinishedTraining(
        log_history=trainer.state.log_history,
        outcome={shown: summary[name] for name, shown in told.items()},
        before=scores.get("before"),
        after=scores.get("after"),
        settings=changed_settings(plan.config, eval_strategy=plan.arguments.eval_strategy),
        facts={**facts, **machine_facts(plan.arguments.device.type)},
        batches=_inspected(trainer),
    )
    try:
        write_page(path, training_page(run, f"Training of {Path(plan.config.student.path).name}"), overwrite=overwrite)
    except InputError as error:
        note(f"gist-fast: {error} The model is in {summary['model']}.")
        return None
    return str(path)


def _inspected(trainer: GISTTrainer) -> dict[str, Inspection]:
    """What the guide drops in a batch of the data; nothing where that fails, which takes nothing from the report."""
    from gist_fast.inspection.training import inspect_training
    from gist_fast.runtime.errors import first_line

    try:
        return inspect_training(trainer)
    except Exception as error:
        # A model that trains and cannot encode, or memory that is gone: the run is over, and its curves are at hand.
        note(f"The report shows no batch of the data: {first_line(error)}")
        return {}


def _kept(plan: _Plan) -> str:
    from gist_fast.pipeline.run_folder import FINAL, checkpoints

    folder = plan.output_dir
    kept = [path.name for path in checkpoints(folder)[-1:]]
    hint = " (continue with --resume)" if kept else ""
    kept += [FINAL] if (folder / FINAL).is_dir() else []
    return f"{folder} holds {', '.join(kept) or 'no checkpoint'}{hint}."


def _last_masked(trainer: GISTTrainer) -> dict[str, float]:
    """The shares of pairs masked, by block, as logged last."""
    for logged in reversed(trainer.state.log_history):
        shares = {name: value for name, value in logged.items() if name.startswith("masked")}
        if shares:
            return shares
    return {}


def _print_plan(plan: _Plan, overwrite: bool, as_json: bool) -> None:
    from gist_fast.pipeline.run_folder import checkpoints

    told: dict[str, Any] = {
        **_what_runs(plan),
        "resumes from": str(plan.checkpoint) if plan.checkpoint else None,
        "deletes": [path.name for path in checkpoints(plan.output_dir)] if overwrite else [],
        "settings": plan.config.arguments,
    }
    if as_json:
        print_json({name.replace(" ", "_"): value for name, value in told.items()})
        return
    settings = told.pop("settings")
    rows = [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in told.items() if value]
    rows += [(name, str(value)) for name, value in settings.items() if name != "output_dir"]
    print_table("All is well; this would be run", ("what", "value"), [(name, str(value)) for name, value in rows])


def _what_runs(plan: _Plan) -> dict[str, Any]:
    """The models, the data and the size of the run."""
    from gist_fast.data.named import by_name, count_rows
    from gist_fast.evaluation.evaluators import evaluator_names
    from gist_fast.pipeline.datasets import describe

    config, arguments = plan.config, plan.arguments
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    an_epoch = sum(-(-(count_rows(dataset) or 0) // batch) for dataset in by_name(plan.train).values())
    steps = arguments.max_steps if arguments.max_steps > 0 else int(an_epoch * arguments.num_train_epochs)
    guide = f"{config.guide.path} ({plan.models['guide']})" if config.guide else "none"
    if arguments.self_guided:
        guide = "the student itself"
    elif config.guide is None and not config.unguided:
        guide = "its embeddings in the data"
    return {
        "student": f"{config.student.path} ({plan.models['student']})",
        "adapter": f"LoRA of rank {config.student.lora.r}" if config.student.lora else None,
        "guide": guide,
        "train": describe(config.data.train, plan.train),
        "eval": "none" if plan.eval is None or config.data.eval is None else describe(config.data.eval, plan.eval),
        "evaluator": "none" if plan.evaluator is None else evaluator_names(plan.evaluator),
        "rows a step": batch,
        "steps": steps,
        "device": str(arguments.device),
        "output_dir": str(plan.output_dir),
    }


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
    values = [(name, summary[name]) for name in shown if summary[name] is not None]
    rows = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in values]
    rows += [(name, f"{value:.2%}") for name, value in summary["masked"].items()]
    print_table("Training", ("what", "value"), [(name.replace("_", " "), value) for name, value in rows])
    typer.echo(f'Load it: SentenceTransformer("{summary["model"]}")')
