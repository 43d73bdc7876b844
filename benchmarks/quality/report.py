"""The tables and the plot of ``docs/quality.md``, out of the results of `benchmarks.quality`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.marks import put
from benchmarks.quality.arms import STUDIES, Study, quick
from benchmarks.quality.records import ROOT, key, settings
from gist_fast.report.plots import MUTED, PALETTE, figure

DOCS = ROOT / "docs" / "quality.md"
PICTURE = DOCS.with_suffix(".png")
SEEDS = (0, 1, 2)
LEVEL = 0.95
Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and the interval by Student's t that holds it with 95 %; open where there is one."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = f" [{self.low:+.4f}, {self.high:+.4f}]" if math.isfinite(self.low) else ""
        return f"{self.mean:+.4f}{interval}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The difference of two samples, pair by pair."""
    from scipy.stats import t

    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, -math.inf, math.inf)
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half)


def runs(records: Records, study: Study, arm: str, seeds: Iterable[int], judge: str = "test") -> dict[int, Any]:
    """What is on file of an arm, by seed."""
    found = {seed: records.get(key(settings(study, arm, seed, judge))) for seed in seeds}
    return {seed: record for seed, record in found.items() if record is not None}


def over_seeds(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> Difference | None:
    """The difference of two arms over the seeds that both have."""
    both = sorted(ours.keys() & theirs.keys())
    return paired([ours[s]["ndcg"] for s in both], [theirs[s]["ndcg"] for s in both]) if both else None


def over_queries(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> Difference | None:
    """The same over queries, each with its mean over those seeds: would other queries say the same?"""
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    means = [
        [statistics.fmean(scores) for scores in zip(*(of[s]["by_query"] for s in both), strict=True)]
        for of in (ours, theirs)
    ]
    return paired(*means)


def score(of: Mapping[int, Any]) -> str:
    """Mean and standard deviation over seeds."""
    values = [record["ndcg"] for record in of.values()]
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def dropped(of: Mapping[int, Any]) -> str:
    """Share of the anchor-positive pairs that an arm did not count, in percent."""
    shares = [record["log"].get("masked_ap") for record in of.values()]
    known = [share for share in shares if share is not None]
    return f"{100 * statistics.fmean(known):.2f}" if known else ""


def study_table(
    records: Records, name: str, seeds: Sequence[int] = SEEDS, *, tiny: bool = False, judge: str = "test"
) -> str:
    """One study: its arms, and each one's difference from the control; empty where nothing is on file."""
    study = quick(STUDIES[name]) if tiny else STUDIES[name]
    of = {arm: runs(records, study, arm, seeds, judge) for arm in ("base", "guide", *study.arms)}
    if not any(of[arm] for arm in study.arms):
        return ""
    setting, control = study.setting, of[study.control]
    lines = [
        f"**{name}**: {study.about}. Batches of {setting.batch_size}, {setting.steps} steps, temperature "
        f"{setting.temperature:g}.",
        "",
        f"| arm | seeds | nDCG@10 | dropped of ap, % | less *{study.control}*, over seeds | the same, over queries |",
        "|---|---|---|---|---|---|",
    ]
    for arm, found in of.items():
        if not found:
            continue
        if arm in ("base", "guide"):
            title = {"base": "student before training", "guide": "the guide itself"}[arm]
            lines.append(f"| {title} | | {found[min(found)]['ndcg']:.4f} | | | |")
            continue
        differences = ["", ""]
        if arm != study.control:
            differences = [str(of_kind(found, control) or "") for of_kind in (over_seeds, over_queries)]
        lines.append(f"| {arm} | {len(found)} | {score(found)} | {dropped(found)} | {' | '.join(differences)} |")
    return "\n".join(lines)


QUESTIONS = (
    ("ap, guide", "ap, no guide"),
    ("four, guide", "four, no guide"),
    ("four, guide", "ap, guide"),
    ("ap, perfect mask", "ap, guide"),
    ("four, perfect mask", "four, guide"),
    ("ap, guide, ties", "ap, guide"),
    ("four, guide, ties", "four, guide"),
    ("four, guide, margin 0.05", "four, guide"),
    ("four, guide, margin -0.1", "four, guide"),
    ("four, guide, hard", "four, guide"),
    ("four, self-guided", "four, guide"),
    ("four, guide, sentence-transformers", "four, guide"),
)
"""Pairs of arms that answer a question of their own: what the first gains on the second."""


def question_table(records: Records, names: Iterable[str], seeds: Sequence[int] = SEEDS, judge: str = "test") -> str:
    """Differences of arms other than from the control."""
    lines = ["| study | arm | less | over seeds | over queries |", "|---|---|---|---|---|"]
    for name in names:
        for first, second in QUESTIONS:
            study = STUDIES[name]
            if first in study.arms and second in study.arms:
                ours, theirs = (runs(records, study, arm, seeds, judge) for arm in (first, second))
                if (difference := over_seeds(ours, theirs)) is not None:
                    lines.append(f"| {name} | {first} | {second} | {difference} | {over_queries(ours, theirs)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def mask_table(records: Records, names: Iterable[str], seeds: Sequence[int] = SEEDS, judge: str = "test") -> str:
    """The guide's masks of the anchor-positive block against the truth, averaged over seeds."""
    lines = [
        "| study | false negatives a row | margin | dropped, % of pairs | of the false negatives dropped, % | "
        "false negatives among the dropped, % | of the false negatives ties, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        found = runs(records, STUDIES[name], "mask", seeds, judge)
        for margin in next(iter(found.values()))["margins"] if found else ():
            shares = [
                statistics.fmean(record["margins"][margin][kind] for record in found.values())
                for kind in ("masked", "found", "right", "ties")
            ]
            rate = statistics.fmean(record["false_negatives"] for record in found.values())
            percent = " | ".join("" if math.isnan(share) else f"{100 * share:.1f}" for share in shares)
            lines.append(f"| {name} | {rate:.2f} | {float(margin):g} | {percent} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def tables(
    records: Records,
    names: Iterable[str] = tuple(STUDIES),
    seeds: Sequence[int] = SEEDS,
    *,
    tiny: bool = False,
    judge: str = "test",
) -> str:
    """All tables, in Markdown."""
    parts = [study_table(records, name, seeds, tiny=tiny, judge=judge) for name in names]
    if not tiny:
        parts += [question_table(records, names, seeds, judge), mask_table(records, names, seeds, judge)]
    return "\n\n".join(part for part in parts if part)


def sections(records: Records) -> dict[str, str]:
    """The generated parts of the document, by the name of the comments around them."""
    return {
        "studies": "\n\n".join(table for name in STUDIES if (table := study_table(records, name))),
        "questions": question_table(records, STUDIES),
        "masks": mask_table(records, STUDIES),
    }


def filled(text: str, records: Records) -> str:
    """A document with its generated parts made anew."""
    return put(text, sections(records))


def write(records: Records) -> None:
    """Make tables and picture of ``docs/quality.md`` anew."""
    DOCS.write_text(filled(DOCS.read_text(encoding="utf-8"), records), encoding="utf-8")
    draw(records, PICTURE)


def draw(records: Records, path: Path, seeds: Sequence[int] = SEEDS) -> None:
    """Each arm's difference from the control: one dot a seed, their mean, and its interval."""
    shown = [name for name, study in STUDIES.items() if _compared(records, study, seeds)]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    drawn = figure(5.2 * columns, 4.2 * rows)
    for axes, name in zip(drawn.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        _draw_study(axes, records, name, seeds)
    for axes in drawn.axes[len(shown) :]:
        axes.set_visible(False)
    drawn.suptitle("nDCG@10 less that of the anchor-positive block without a guide; 95 % over seeds", fontsize=12)
    drawn.savefig(path, metadata={"Software": None}, facecolor="white", dpi=100)


def _compared(records: Records, study: Study, seeds: Sequence[int]) -> list[str]:
    """The arms of a study that there is a difference from the control of."""
    control = runs(records, study, study.control, seeds)
    others = [arm for arm in study.arms if arm != study.control]
    return [arm for arm in others if runs(records, study, arm, seeds).keys() & control.keys()]


def _draw_study(axes: Any, records: Records, name: str, seeds: Sequence[int]) -> None:
    study = STUDIES[name]
    control = runs(records, study, study.control, seeds)
    places = []
    for arm in reversed(_compared(records, study, seeds)):
        found = runs(records, study, arm, seeds)
        difference = over_seeds(found, control)
        assert difference is not None
        # Blocks by colour and marker, both: either is enough to tell them apart.
        colour, marker = (PALETTE[0], "o") if arm.startswith("ap") else (PALETTE[1], "s")
        place = len(places)
        if math.isfinite(difference.low):
            axes.plot([difference.low, difference.high], [place, place], color=colour, linewidth=2)
        axes.plot(difference.mean, place, marker=marker, color=colour, markersize=7)
        each = [found[s]["ndcg"] - control[s]["ndcg"] for s in sorted(found.keys() & control.keys())]
        axes.plot(each, [place] * len(each), linestyle="", marker="|", color=MUTED, markersize=9)
        places.append(arm)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(places)), places, fontsize=8)
    axes.set_ylim(-0.6, max(len(places), 4) - 0.4)
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(name, fontsize=10)
    axes.grid(visible=False, axis="y")
