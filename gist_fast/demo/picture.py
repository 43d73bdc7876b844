"""The picture of a run: loss, share of pairs that the guide dropped, and nDCG on the way, over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gist_fast.demo.report import BASE, GUIDED, UNGUIDED, DemoReport
from gist_fast.report.plots import MUTED, figure, legend, line_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = dict(zip((GUIDED, UNGUIDED), line_styles(2), strict=True))
BLOCKS = {"masked_ap": "anchor - positive", "masked_aa": "anchor - anchor", "masked_pp": "positive - positive"}


def draw_run(report: DemoReport, path: Path) -> None:
    """Write the picture of `report` to `path` (PNG)."""
    from matplotlib.ticker import MaxNLocator

    drawn = figure(13, 4.2)
    loss, masked, quality = drawn.subplots(1, 3)
    _draw_losses(loss, report)
    _draw_masks(masked, report)
    _draw_quality(quality, report)
    for axes in (loss, masked, quality):
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    pairs, batch = report.texts["training pairs"], report.recipe["batch_size"]
    drawn.suptitle(f"gist-fast demo: {pairs} pairs, batches of {batch}, seed {report.seed}", fontsize=12)
    drawn.savefig(path, facecolor="white", dpi=120)


def _draw_losses(axes: Axes, report: DemoReport) -> None:
    # A guide takes negatives away, so its loss is a sum over fewer terms.
    axes.set_title("training loss (over fewer negatives with the guide)", fontsize=10)
    axes.set_ylabel("loss (nats)")
    for name, training in report.trainings.items():
        axes.plot(training.steps, training.losses, label=name, **STYLES[name] | {"marker": None})
    legend(axes, loc="upper right")


def _draw_masks(axes: Axes, report: DemoReport) -> None:
    axes.set_title("pairs that the guide dropped", fontsize=10)
    axes.set_ylabel("share of the block (%)")
    guided = report.trainings[GUIDED]
    for (key, label), style in zip(BLOCKS.items(), line_styles(len(BLOCKS)), strict=True):
        if key in guided.masked:
            values = [100 * share for share in guided.masked[key]]
            axes.plot(guided.steps[: len(values)], values, label=label, **style | {"marker": None})
    axes.set_ylim(bottom=0)
    if guided.masked:
        legend(axes)


def _draw_quality(axes: Axes, report: DemoReport) -> None:
    axes.set_title("retrieval on the dev texts while training", fontsize=10)
    axes.set_ylabel("nDCG@10")
    for name, training in report.trainings.items():
        axes.plot(training.dev_steps, training.dev_ndcg, label=name, **STYLES[name])
    before = report.trainings[GUIDED].dev_ndcg[0]
    axes.axhline(before, color=MUTED, linewidth=1, linestyle=":", label=BASE)
    legend(axes, loc="lower right")
