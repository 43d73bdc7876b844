"""The house's plots: matplotlib figures without pyplot, and the way from a figure to an SVG that follows the theme.

Draw with `PALETTE` (or leave the colour out: lines take it in order), `INK`, `MUTED` and `LINE`; on the page these
become CSS variables, so that the picture is light or dark as its page. Any other colour stays as it is.

    picture = figure()
    axes = picture.subplots()
    axes.plot(...)
    log_log(axes, "batch size B", "time (ms)")
    legend(axes)
    to_svg(picture, alt="Time against the batch size: ...")
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gist_fast.report.colours import LIGHT, SERIES
from gist_fast.report.page import Picture
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PALETTE = tuple(LIGHT[name] for name in SERIES)
INK, MUTED, LINE, PAPER = (LIGHT[name] for name in ("ink", "muted", "line", "paper"))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
"""With the colours, so that series can be told apart without seeing colours."""
NARROW = 4.6
"""Inches of a figure that a phone shows whole."""

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
_SAVED: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "gist_fast"}
# What matplotlib draws with where nobody chose a colour outside `figure`'s reach (legends, annotations).
_DEFAULTS = {"#000000": "ink", "#ffffff": "paper", "#cccccc": "line", "#b0b0b0": "line"}


def check_matplotlib(what: str = "--report") -> None:
    """Raise `InputError` where matplotlib is missing, saying what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(f'{what}: needs matplotlib; install it with: pip install "gist-fast[bench]"') from None


def figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """An empty figure in the house's style; axes made by its `subplots` or `add_subplot` have it too.

    Args:
        width: In inches. Up to 6 two stand side by side on a wide screen, and `NARROW` fits a phone; a wider one has a
            row of its own, and scrolls on a phone.
        height: In inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    check_matplotlib("a plot")
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    class HouseFigure(Figure):
        # The style is matplotlib's global state, which is the caller's: it is set only while axes are made.
        def add_subplot(self, *args: Any, **kwargs: Any) -> Any:
            from cycler import cycler

            with style.context(STYLE, after_reset=True):
                axes = super().add_subplot(*args, **kwargs)
                axes.set_prop_cycle(cycler(color=PALETTE))
                return axes

    with style.context(STYLE, after_reset=True):
        made = HouseFigure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(made)
    return made


def to_svg(figure: Figure, alt: str, caption: str = "") -> Picture:
    """The figure as a picture of a page.

    Args:
        figure: From `figure`.
        alt: What it shows, in a sentence, for those who do not see it.
        caption: Shown below it.

    Raises:
        InputError: `alt` is empty.
    """
    from matplotlib import style

    if not alt.strip():
        raise InputError("alt: is empty; say what the picture shows for those who do not see it.")
    file = io.StringIO()
    with style.context(_SAVED):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    return Picture(_themed(file.getvalue()), alt, caption)


def _themed(svg: str) -> str:
    """Known colours become CSS variables (with the colour for viewers without), the fonts the page's."""
    names = _DEFAULTS | {value: name for name, value in LIGHT.items() if name not in ("panel", "link")}

    def variable(match: re.Match[str]) -> str:
        name = names.get(match[0].lower())
        return f"var(--{name}, {match[0].lower()})" if name else match[0]

    # Only in the attributes of tags: a text that reads like one is left alone.
    def styled(match: re.Match[str]) -> str:
        found = re.sub(r"#[0-9a-fA-F]{6}\b", variable, match[0])
        found = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", found)
        return re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", found)

    def tag(match: re.Match[str]) -> str:
        # The ground of a hatch has its colour as an attribute, where a variable may not stand.
        found = re.sub(r'(?<=\s)(fill|stroke)="(#[0-9a-fA-F]{6})"', r'style="\1: \2"', match[0])
        return re.sub(r'(?<=\s)style="[^"]*"', styled, found)

    svg = re.sub(r"<[a-z][^>]*>", tag, svg)
    # Text without a colour of its own would be black.
    return re.sub(r'(<text )(?![^>]*fill:)([^>]*style=")', r"\1\2fill: var(--ink, " + INK + "); ", svg)


LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9.5, "labelcolor": INK}
_ABREAST = ((9, 4), (12, 3), (25, 2))
"""Letters of a legend's longest label, and how many columns a narrow figure then has room for."""


def legend(axes: Axes, **options: Any) -> None:
    """A legend without a frame; `options` are those of ``Axes.legend``."""
    axes.legend(**(LEGEND | options))


def narrow(labels: Sequence[str], height: float = 2.9) -> tuple[Figure, Axes]:
    """A figure that a phone shows whole, with room below for a legend of these labels; and its axes."""
    drawn = figure(NARROW, height + 0.2 * -(-len(labels) // _columns(labels)))
    return drawn, drawn.subplots()


def legend_below(axes: Axes, columns: int | None = None) -> None:
    """A legend below the figure, where it hides nothing; none where nothing has a label."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        options = {"loc": "outside lower center", "ncols": columns or _columns(labels), **LEGEND}
        axes.figure.legend(handles, labels, **options)  # type: ignore[union-attr]


def _columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return min(max(1, len(labels)), next((columns for letters, columns in _ABREAST if longest <= letters), 1))


def log_log(axes: Axes, xlabel: str = "", ylabel: str = "", *, base: int = 2) -> None:
    """Both axes logarithmic: sizes in powers of `base` along x, plain numbers (0.1, 10, 1k) along y."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log", base=base)
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(LogLocator(base=base, numticks=10))
    plain_numbers(axes.xaxis, axes.yaxis)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="minor", visible=False)


def plain_numbers(*sides: Axis) -> None:
    """Have axes (``axes.xaxis``, ``axes.yaxis``) show their numbers as `plain` does."""
    from matplotlib.ticker import FuncFormatter

    for side in sides:
        # Rounded: a tick at 0 may come as 1e-17.
        side.set_major_formatter(FuncFormatter(lambda value, _: plain(round(value, 15))))


def plain(value: float) -> str:
    """A number for an axis, to six figures: 1024, 16384, 0.5, 2M, 2.5e-5."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if factor <= abs(value) < 1e12:
            return f"{value / factor:.6g}{letter}"
    mantissa, exponent = f"{value:.5e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def stacked_bars(axes: Axes, bars: Mapping[str, Mapping[str, float]], *, columns: int = 3) -> None:
    """Horizontal bars in milliseconds, one a name, of parts end to end; a part has one colour and hatch in all bars.

    Args:
        axes: Where to.
        bars: For each bar its parts' lengths, by the parts' names. A part missing from a bar has no length there.
        columns: Of the legend.

    Raises:
        InputError: more than 14 parts, or a length below 0.
    """
    parts: list[str] = list(dict.fromkeys(part for lengths in bars.values() for part in lengths))
    if len(parts) > 2 * len(PALETTE):
        raise InputError(f"bars: {len(parts)} parts cannot be told apart; put the smallest ones together.")
    starts = dict.fromkeys(bars, 0.0)
    for place, part in enumerate(parts):
        lengths = [float(bar.get(part, 0.0)) for bar in bars.values()]
        if min(lengths, default=0.0) < 0:
            raise InputError(f"bars: {part!r} has a length below 0: {min(lengths)}.")
        axes.barh(
            list(bars),
            lengths,
            left=list(starts.values()),
            height=0.6,
            label=part,
            color=PALETTE[place % len(PALETTE)],
            edgecolor=PAPER,
            linewidth=0.8,
            hatch="///" if place >= len(PALETTE) else None,
        )
        starts = {name: start + length for (name, start), length in zip(starts.items(), lengths, strict=True)}
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms")
    axes.set_xlim(left=0)
    axes.margins(x=0)
    legend_below(axes, min(columns, len(parts)))


def line_styles(count: int) -> list[dict[str, Any]]:
    """Colour, line and marker for each of `count` series, as keywords of ``Axes.plot``; they repeat after seven."""
    options = itertools.cycle(zip(PALETTE, LINES, MARKERS, strict=True))
    styles = itertools.islice(options, count)
    return [{"color": color, "linestyle": line, "marker": marker} for color, line, marker in styles]
