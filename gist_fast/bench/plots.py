"""Plots of results: time and memory against B, the share of the matrix product's rate, and the page that holds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from gist_fast.bench.growth import Power
from gist_fast.bench.results import COUNTED, OUT_OF_MEMORY, Results, Row, ratio_of
from gist_fast.bench.run import SUITES
from gist_fast.bench.tables import facts, fit_table, notes, suite_table
from gist_fast.report import plots
from gist_fast.report.page import Picture, Section, Table, make_page

HEIGHT = 3.1
"""Inches of a plot, its legend not counted."""
CROSS = 0.08
"""How far apart crosses over the same size stand, of the axis' length."""
FEW_DECADES = 60
"""Within so much along an axis the powers of ten are too few to read a value off."""


def pictures(results: Results) -> dict[str, Picture]:
    """Every plot that the results have points for, by a name for its file.

    Raises:
        InputError: matplotlib is not installed.
    """
    found: dict[str, Picture] = {}
    for suite in dict.fromkeys(row.suite for row in results.rows if row.size):
        rows = [row for row in results.rows if row.suite == suite]
        for quantity, unit, of in (("time", "seconds", _seconds), ("memory", "memory added (MiB)", _mebibytes)):
            if any(of(row) for row in rows):
                found[f"{suite}-{quantity}"] = _against_size(results, suite, rows, quantity, unit, of)
        if any(row.share for row in rows):
            found[f"{suite}-share"] = _share(suite, rows)
    return found


def _seconds(row: Row) -> float | None:
    timing = row.timing() if row.outcome in COUNTED else None
    return timing.median if timing else None


def _mebibytes(row: Row) -> float | None:
    return row.memory / 2**20 if row.memory and row.outcome in COUNTED else None


def page(results: Results, drawn: dict[str, Picture]) -> str:
    """One HTML page."""
    sections = []
    for suite in dict.fromkeys(row.suite for row in results.rows):
        parts: list[Any] = [picture for name, picture in drawn.items() if name.startswith(f"{suite}-")]
        parts.append(Table(*suite_table(results, suite)))
        title = SUITES[suite].title if suite in SUITES else suite
        sections.append(Section(title, _text(suite, results), parts))
    if results.fits:
        text = (
            "The exponent of B in a power of it, with the interval in which it lies with 95 % if points scatter about "
            "a line (not shown where it is wider than 1); and from which B on the part that grows with the square is "
            "larger than the linear one."
        )
        sections.append(Section("How costs grow", text, [Table(*fit_table(results))]))
    return make_page("gist-fast bench", facts(results), sections)


def _text(suite: str, results: Results) -> str:
    text = (
        "Medians over rounds in which all take part. A ratio is the median of the ratios within rounds with its "
        "quartiles, and is given only where it is larger than their distance. Memory is what an "
        "iteration adds at its peak."
    )
    if any(row.share for row in results.rows if row.suite == suite):
        text += (
            " The rate is that of a large matrix product timed in the same rounds; work is counted as the least that "
            "the mathematics asks for, (8 D + 2 G) 2 B^2 FLOPs with all blocks and a guide model: who "
            "computes more gets no credit. A cross marks where memory ran out."
        )
    return "\n\n".join([text, *notes(results, suite)])


def _against_size(
    results: Results, suite: str, rows: Sequence[Row], quantity: str, unit: str, of: Callable[[Row], float | None]
) -> Picture:
    names = list(dict.fromkeys(row.what for row in rows if row.outcome == OUT_OF_MEMORY or of(row) is not None))
    grows = {
        fit["what"]: Power(**fit["power"])
        for fit in results.fits
        if (fit["suite"], fit["quantity"]) == (suite, quantity)
    }
    clear = {name: f"{name}, ~B^{power.exponent:.2f}" for name, power in grows.items() if power.clear}
    labels = {name: clear.get(name, name) for name in names}
    drawn, axes = plots.narrow(list(labels.values()), HEIGHT)
    said = []
    crosses: dict[int, int] = {}
    for name, style in zip(names, plots.line_styles(len(names)), strict=True):
        own = [row for row in rows if row.what == name]
        points = [(row.size, value) for row in own if (value := of(row)) is not None]
        label = labels[name]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
            said.append(f"{name} from {points[0][1]:.3g} at B {points[0][0]} to {points[-1][1]:.3g} at {points[-1][0]}")
        ran_out = next((row for row in own if row.outcome == OUT_OF_MEMORY), None)
        if ran_out is not None:
            # What it would have taken is not known: the cross is no point, it stands at the axis' end over the B that
            # did not fit, a second one there below the first.
            place = crosses.get(ran_out.size, 0)
            crosses[ran_out.size] = place + 1
            axes.plot(
                [ran_out.size], [1.0 - CROSS * place], transform=axes.get_xaxis_transform(), clip_on=False, marker="x",
                markersize=9, markeredgewidth=2.2, linestyle="none", color=style["color"],
                label=None if points else label,
            )  # fmt: skip
            said.append(f"{name} out of memory at B {ran_out.size}")
    plots.log_log(axes, "pairs" if suite == "guide" else "batch size B", unit)
    low, high = axes.get_ylim()
    if crosses:
        # Above the points there is room for what stands at the axis' end.
        high *= (high / low) ** (CROSS * max(crosses.values()))
        axes.set_ylim(low, high)
        _name_crosses(axes, crosses)
    if high < FEW_DECADES * low:
        from matplotlib.ticker import LogLocator

        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.set_title(f"{suite}: {quantity}", pad=14 if crosses else None)
    plots.legend_below(axes)
    alt = f"{unit} against size in the suite {suite}: {'; '.join(said) or 'no points'}."
    told = "; crosses: out of memory, which says nothing of how much" if crosses else ""
    return plots.to_svg(drawn, alt, f"{quantity.capitalize()} against size, both logarithmic{told}.")


def _name_crosses(axes: Any, crosses: dict[int, int]) -> None:
    """In words, beside the first that stands over a size: on that side of it on which there is room."""
    low, high = axes.get_xlim()
    for size in crosses:
        right = size * size < low * high  # both logarithmic
        axes.annotate(
            "out of memory", (size, 1.0), xycoords=("data", "axes fraction"), xytext=(8 if right else -8, 0),
            textcoords="offset points", ha="left" if right else "right", va="center", fontsize=9.5,
        )  # fmt: skip


def on_white(svg: str) -> str:
    """A picture for a file of its own: its ink is dark, and whoever shows it may not be light."""
    return re.sub(r"<svg\b[^>]*>", r'\g<0>\n <rect width="100%" height="100%" fill="white"/>', svg, count=1)


def _share(suite: str, rows: Sequence[Row]) -> Picture:
    names = list(dict.fromkeys(row.what for row in rows if row.share))
    drawn, axes = plots.narrow(names, HEIGHT)
    said = []
    for name, style in zip(names, plots.line_styles(len(names)), strict=True):
        points = [(row.size, ratio) for row in rows if row.what == name and (ratio := ratio_of(row.share))]
        sizes = [size for size, _ in points]
        axes.plot(sizes, [ratio.median for _, ratio in points], label=name, **style)
        low, high = ([getattr(ratio, end) for _, ratio in points] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        said.append(f"{name} {points[-1][1].median:.0%} at B {points[-1][0]}")
    axes.axhline(1.0, color=plots.MUTED, linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    plots.plain_numbers(axes.xaxis)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size B")
    axes.set_ylabel("share of the matrix product's rate")
    axes.set_title(f"{suite}: share of the roofline")
    plots.legend_below(axes)
    alt = f"Share of the rate of a large matrix product, by minimal FLOPs: {'; '.join(said)}."
    return plots.to_svg(drawn, alt, "By minimal FLOPs; the dashed line is a large matrix product. Bands: quartiles.")
