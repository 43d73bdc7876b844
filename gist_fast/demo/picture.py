"""The picture of a run: loss, share of pairs that the guide dropped, and nDCG on the way, over the steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.demo.report import BASE, GUIDED, UNGUIDED, DemoReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with any colour vision; markers and line styles say the same again.
STYLES: dict[str, dict[str, Any]] = {
    GUIDED: {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    UNGUIDED: {"color": "#D55E00", "linestyle": "--", "marker": "s"},
}
BLOCKS = {
    "masked_ap": ("anchor - positive", "#0072B2", "-"),
    "masked_aa": ("anchor - anchor", "#009E73", "--"),
    "masked_pp": ("positive - positive", "#CC79A7", ":"),
}


def draw_run(report: DemoReport, path: Path) -> None:
    """Write the picture of `report` to `path` (PNG)."""
    # Not pyplot: its state is the caller's, and it would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 4.2), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    loss, masked, quality = figure.subplots(1, 3)
    _draw_losses(loss, report)
    _draw_masks(masked, report.trainings[GUIDED].steps, report.trainings[GUIDED].masked)
    _draw_quality(quality, report)
    for axes in (loss, masked, quality):
        axes.set_xlabel("training step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    pairs, batch = report.texts["training pairs"], report.recipe["batch_size"]
    figure.suptitle(f"gist-fast demo: {pairs} pairs, batches of {batch}, seed {report.seed}", fontsize=12)
    figure.savefig(path)


def _draw_losses(axes: Axes, report: DemoReport) -> None:
    # A guide takes negatives away, so its loss is a sum over fewer terms.
    axes.set_title("training loss (over fewer negatives with the guide)", fontsize=10)
    axes.set_ylabel("loss (nats)")
    for name, training in report.trainings.items():
        style = STYLES[name] | {"marker": None}
        axes.plot(training.steps, training.losses, label=name, linewidth=1.8, **style)
    axes.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_masks(axes: Axes, steps: list[int], masked: Mapping[str, list[float]]) -> None:
    axes.set_title("pairs that the guide dropped", fontsize=10)
    axes.set_ylabel("share of the block (%)")
    for key, (label, color, line) in BLOCKS.items():
        if key in masked:
            values = [100 * share for share in masked[key]]
            axes.plot(steps[: len(values)], values, label=label, color=color, linestyle=line, linewidth=1.8)
    axes.set_ylim(bottom=0)
    if masked:
        axes.legend(fontsize=8, frameon=False)


def _draw_quality(axes: Axes, report: DemoReport) -> None:
    axes.set_title("retrieval on the dev texts while training", fontsize=10)
    axes.set_ylabel("nDCG@10")
    for name, training in report.trainings.items():
        axes.plot(training.dev_steps, training.dev_ndcg, label=name, linewidth=1.8, **STYLES[name])
    before = report.trainings[GUIDED].dev_ndcg[0]
    axes.axhline(before, color="0.5", linewidth=1, linestyle=":", label=BASE)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
