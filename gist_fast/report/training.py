"""The report of a training run: what came of it, how it went step by step, and what it was started with.

The curves are drawn from the trainer's log history, which a checkpoint carries: the report of a resumed run is of the
whole run, not of its last part. What the guide drops is shown on a batch, as the student stands at the end.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.inspection import Inspection
from gist_fast.inspection.training import inspect_training
from gist_fast.report.facts import changed_settings, machine_facts
from gist_fast.report.inspection import batch_sections, duplicates_section
from gist_fast.report.log_series import Series, evaluations, masked_blocks, one, several
from gist_fast.report.page import Picture, Section, Table, make_page, shown, write_page
from gist_fast.report.plots import legend_below, line_styles, narrow, plain_numbers, to_svg
from gist_fast.runtime.errors import InputError, first_line

if TYPE_CHECKING:
    from gist_fast.pipeline.plan import RunPlan
    from gist_fast.training.trainer import GISTTrainer

logger = logging.getLogger(__name__)

MARKED = 40
"""Points of a line that get a marker each; more are a line alone."""
LINES_A_PICTURE = 7
PAIRS = 20
"""Dropped pairs that are shown of a batch."""
ROWS_SHOWN = 40
"""Evaluations in the table; of more, evenly spread ones."""

# Key of the log, title, label of the axis; of the machine's, in the table too, and what the numbers are multiplied by.
_STEPS = (
    ("loss", "Training loss", "loss (nats)"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("grad_norm", "Norm of the gradient", "norm, before clipping"),
)
_MACHINE = (
    ("pairs_per_second", "Throughput in rows", "rows a second", 1),
    ("tokens_per_second", "Throughput in tokens", "tokens a second", 1),
    ("gpu_allocated_peak_mib", "GPU memory in tensors, the most so far", "GPU memory (GiB)", 1 / 1024),
    ("process_memory_mib", "Main memory", "memory (GiB)", 1 / 1024),
    ("gpu_power_w", "Power of the cards", "power (W)", 1),
    ("energy_per_pair_j", "Energy a row", "energy (J)", 1),
)
_SIMILARITIES = {"positive_similarity": "its positive", "hardest_negative_similarity": "its most similar negative"}


@dataclass(frozen=True)
class FinishedTraining:
    """What a report tells of."""

    log_history: Sequence[Mapping[str, Any]]
    """The trainer state's."""
    outcome: Mapping[str, object] = field(default_factory=dict)
    """Name and value of what is known at the end: steps, seconds, the final loss."""
    before: Mapping[str, float] | None = None
    """The student's scores by metric before training, where they were taken."""
    after: Mapping[str, float] | None = None
    settings: Sequence[tuple[str, object, object]] = ()
    """Name, value and default of the settings that differ from it."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What ran, and where."""
    batches: Mapping[str, Inspection] = field(default_factory=dict)
    """What the guide drops in some rows of each training dataset; the name of one alone is empty."""


def training_page(run: FinishedTraining, title: str = "Training report") -> str:
    """The whole page.

    Raises:
        InputError: matplotlib is not installed.
    """
    sections = [_result(run), _steps(run.log_history), _guide(run.log_history), *_batches(run.batches)]
    sections += [_machine(run.log_history), _evaluation(run.log_history), _settings(run.settings)]
    return make_page(title, run.facts, [section for section in sections if section is not None])


def _result(run: FinishedTraining) -> Section:
    parts = []
    if run.after is not None:
        before = run.before or {}
        rows = []
        for metric in dict.fromkeys([*before, *run.after]):
            old, new = before.get(metric), run.after.get(metric)
            change = f"{new - old:+.4f}" if old is not None and new is not None else None
            rows.append((metric, *(None if score is None else f"{score:.4f}" for score in (old, new)), change))
        parts.append(Table(("metric", "before", "after", "change"), rows, "Scores of the student"))
    known = [(name, shown(value)) for name, value in run.outcome.items() if value is not None]
    if known:
        parts.append(Table(("what", "value"), known, "The run", prose=True))
    missing = run.after is not None and not run.before
    return Section("Result", "The student was not measured before training." if missing else "", parts)


def _steps(logs: Sequence[Mapping[str, Any]]) -> Section:
    found = [_lines(title, label, {"": series}) for key, title, label in _STEPS if (series := one(logs, key))]
    text = "Each point of the loss is the mean since the one before it." if found else "No step of this run was logged."
    return Section("Training, step by step", text, found)


def _guide(logs: Sequence[Mapping[str, Any]]) -> Section | None:
    parts = []
    # By dataset, where each has a loss of its own.
    for dataset, blocks in masked_blocks(logs).items():
        title = f"Pairs that the guide dropped{f' in {dataset}' if dataset else ''}"
        parts.append(_lines(title, "share of the block (%)", blocks, factor=100, bottom=0))
    similar = several(logs, _SIMILARITIES)
    if similar:
        parts.append(_lines("Similarity of an anchor", "cosine similarity", similar))
    if not parts:
        return None
    text = (
        "A block is what is compared: ap anchors with positives, aa anchors with anchors, pp positives with positives, "
        "an anchors with given negatives. The guide drops the pairs that it holds for more similar than the row's "
        "positive, less the margin."
    )
    return Section("What the guide did", text, parts)


def _batches(batches: Mapping[str, Inspection]) -> list[Section]:
    sections = []
    for name, found in batches.items():
        of = f"{len(found.rows)} rows{f' of {name}' if name else ''}, taken at random"
        sections += batch_sections(found, of, PAIRS)
        if found.duplicates.copied_texts or found.duplicates.near_pairs:
            sections.append(duplicates_section(found.duplicates, of))
    return sections


def _machine(logs: Sequence[Mapping[str, Any]]) -> Section | None:
    pictures: list[Table | Picture] = []
    rows: list[tuple[str, float | None, float, float | None]] = []
    for key, title, label, factor in _MACHINE:
        series = one(logs, key)
        if series is None:
            continue
        pictures.append(_lines(title, label, {"": series}, factor=factor))
        values = [factor * value for value in series.values if math.isfinite(value)]
        if values:
            rows.append((label, min(values), float(statistics.median(values)), max(values)))
    energy = one(logs, "gpu_energy_j")
    if energy is not None:
        rows.append(("energy in all (kJ)", None, sum(energy.values) / 1000, None))
    if not pictures:
        return None
    pictures.append(Table(("figure", "least", "median", "most"), rows, "Over the logs of the run"))
    return Section("Speed and machine", "Of all processes together; evaluation and saving not counted.", pictures)


def _evaluation(logs: Sequence[Mapping[str, Any]]) -> Section | None:
    losses, metrics = evaluations(logs)
    if not losses and not metrics:
        return None
    parts: list[Table | Picture] = []
    if losses:
        parts.append(_lines("Evaluation loss", "loss (nats)", losses))
    names = list(metrics)
    count = -(-len(names) // LINES_A_PICTURE)
    for number in range(count):
        chosen = {name: metrics[name] for name in names[number::count]}
        parts.append(_lines("Evaluation metrics", "score", chosen))
    found = {f"{name} loss".strip(): series for name, series in losses.items()} | metrics
    steps = sorted({step for series in found.values() for step in series.steps})
    chosen_steps = _spread(steps, ROWS_SHOWN)
    at = {name: dict(zip(series.steps, series.values, strict=True)) for name, series in found.items()}
    rows = [(step, *(at[name].get(step) for name in found)) for step in chosen_steps]
    few = "" if len(chosen_steps) == len(steps) else f"; {len(chosen_steps)} of {len(steps)} evaluations, evenly spread"
    parts.append(Table(("step", *found), rows, f"Evaluations by step{few}"))
    return Section("Evaluation on the way", "", parts)


def _settings(settings: Sequence[tuple[str, object, object]]) -> Section:
    if not settings:
        return Section("Settings", "All settings are the defaults.")
    rows = [(name, _told(value), _told(default)) for name, value, default in settings]
    return Section(
        "Settings", "Those that differ from the default.", [Table(("setting", "value", "default"), rows, prose=True)]
    )


def _told(value: object) -> object:
    """A setting as it would be typed: 2e-05 stays that, and no thousands are set apart."""
    return value if value is None or isinstance(value, (bool, str)) else str(value)


def _lines(
    title: str, label: str, lines: Mapping[str, Series], *, factor: float = 1, bottom: float | None = None
) -> Picture:
    """One picture of lines over the steps; a name each, empty where there is one line and the title says it all."""
    from matplotlib.ticker import MaxNLocator

    picture, axes = narrow([name for name in lines if name])
    for (name, series), style in zip(lines.items(), line_styles(len(lines)), strict=True):
        values = [factor * value for value in series.values]
        if len(values) > MARKED:
            style["marker"] = None
        elif len(lines) == 1:
            style["markersize"] = 4
        axes.plot(series.steps, values, label=name, **style)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    plain_numbers(axes.yaxis)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    if any(lines):
        legend_below(axes)
    return to_svg(picture, _alt(title, label, lines, factor))


def _alt(title: str, label: str, lines: Mapping[str, Series], factor: float) -> str:
    told = []
    for name, series in lines.items():
        first, last = (f"{factor * series.values[place]:.4g}" for place in (0, -1))
        at = f"at step {series.steps[0]}"
        run = f"{first} {at}" if len(series.steps) == 1 else f"from {first} {at} to {last} at step {series.steps[-1]}"
        told.append(f"{name}: {run}" if name else run)
    what = title if label == title.lower() else f"{title}, {label}"
    return f"{what}: {'; '.join(told)}."


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]


def write_training_report(
    path: Path, plan: RunPlan, trainer: GISTTrainer, summary: dict[str, Any], *, overwrite: bool
) -> str | None:
    """Where the page is; None where it could not be written, which takes nothing from the run itself.

    Args:
        summary: what `gist_fast.pipeline.train_and_save` returned.
    """
    scores = summary["evaluation"] or {}
    told = {name: name.replace("_", " ") for name in ("rows", "steps", "epochs", "best_checkpoint", "model")}
    told |= {"seconds": "seconds, evaluation and saving included"}
    if plan.checkpoint is None:
        told |= {"rows_per_second": "rows a second of that time", "loss": "loss, mean of all steps"}
    else:
        # The trainer's rate and mean are of the last part alone; the curves show the whole.
        told |= {"seconds": "seconds since resumed", "resumed_from": "resumed from"}
    facts = {name: str(value) for name, value in plan.describe().items() if value and name != "output_dir"}
    run = FinishedTraining(
        log_history=trainer.state.log_history,
        outcome={title: summary[name] for name, title in told.items()},
        before=scores.get("before"),
        after=scores.get("after"),
        settings=changed_settings(plan.config, eval_strategy=plan.arguments.eval_strategy),
        facts={**facts, **machine_facts(plan.arguments.device.type)},
        batches=_inspected(trainer),
    )
    try:
        write_page(path, training_page(run, f"Training of {Path(plan.config.student.path).name}"), overwrite=overwrite)
    except InputError as error:
        logger.info("gist-fast: %s The model is in %s.", error, summary["model"])
        return None
    return str(path)


def _inspected(trainer: GISTTrainer) -> dict[str, Inspection]:
    """What the guide drops in a batch of the data; nothing where that fails, which takes nothing from the report."""
    try:
        return inspect_training(trainer)
    except Exception as error:
        # A model that trains and cannot encode, or memory that is gone: the run is over, and its curves are at hand.
        logger.info("The report shows no batch of the data: %s", first_line(error))
        return {}
