"""Plots of results: what a cross says, and what it does not."""

from __future__ import annotations

import re

import pytest
from fabricated import bench_results

pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
from gist_fast.bench import plots as pictures
from gist_fast.bench.results import NOT_RUN, OUT_OF_MEMORY, WRONG
from gist_fast.report import plots


@pytest.fixture
def drawn(monkeypatch):
    """Figures beside what is made of them."""
    figures = []
    made = plots.to_svg

    def to_svg(figure, alt, caption=""):
        figures.append((figure, alt, caption))
        return made(figure, alt, caption)

    monkeypatch.setattr(plots, "to_svg", to_svg)
    return figures


def test_who_ran_out_of_memory_stands_at_the_axis_end_and_is_no_point(drawn):
    results = bench_results()
    for row in results.rows:
        if row.what == "plain compiled" and row.size > 512:
            row.outcome, row.seconds, row.share, row.ratio = OUT_OF_MEMORY, {}, None, None
    picture = pictures.pictures(results)["loss-time"]
    axes = drawn[0][0].axes[0]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[1024], [1024]]
    # Of the axis, not of its values: the first at its end, the second below, neither where another's points are.
    assert [line.get_ydata()[0] for line in crosses] == pytest.approx([1.0, 1.0 - pictures.CROSS])
    assert all(line.get_transform() == axes.get_xaxis_transform() for line in crosses)
    highest = max(max(line.get_ydata()) for line in axes.lines if line not in crosses)
    assert axes.transLimits.transform((0, axes.transScale.transform((1, highest))[1]))[1] < 1.0 - pictures.CROSS
    assert len(re.findall(">out of memory<", picture.svg)) == 1
    assert "out of memory" not in pictures.pictures(bench_results())["engine-time"].svg


@pytest.mark.parametrize(("outcome", "sizes"), [(NOT_RUN, [32, 64, 128]), (WRONG, [32, 64])])
def test_memory_is_plotted_where_only_the_time_was_not_affordable(drawn, outcome, sizes):
    results = bench_results()
    last = next(row for row in results.rows if (row.suite, row.what, row.size) == ("step", "gist_fast", 128))
    last.outcome, last.seconds = outcome, {}
    results.fits = []
    pictures.pictures(results)
    lines = {
        figure.axes[0].get_title(): list(line.get_xdata())
        for figure, *_ in drawn
        for line in figure.axes[0].lines
        if line.get_label() == "gist_fast"
    }
    assert (lines["step: memory"], lines["step: time"]) == (sizes, [32, 64])


def test_a_file_of_its_own_is_white():
    svg = pictures.pictures(bench_results())["loss-share"].svg
    white = pictures.on_white(svg)
    # Behind all else.
    first = re.search(r"<svg\b[^>]*>\s*(<[^>]*>)", white)
    assert first is not None and first[1] == '<rect width="100%" height="100%" fill="white"/>'
    assert "white" not in svg
