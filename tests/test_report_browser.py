"""Reports in a real browser: they open with the network off, say nothing on the console, and read well on a phone, on a
wide screen, by day and by night."""

from __future__ import annotations

import math

import browser
import pytest
import torch
from datasets import Dataset

from gist_fast.inspection import inspect_batch
from gist_fast.report.inspection import inspection_page
from gist_fast.report.page import Section, Table, make_page, write_page
from gist_fast.report.training import FinishedTraining, training_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.chromium() is None, reason="no chromium (Debian: apt-get install chromium)"),
]


WIDE = {"Bench <b>": 1}
"""Pictures that are wider than a phone, by the page's title."""


@pytest.fixture(autouse=True, scope="module")
def _matplotlib():
    pytest.importorskip("matplotlib", reason="matplotlib (the extra [bench]) is not installed")


def training() -> str:
    """The report of a run with all that one can have: many metrics, long names, texts that would be markup."""
    logs: list[dict[str, float]] = []
    for step in range(10, 410, 10):
        decay = math.exp(-step / 150)
        logs.append(
            {
                "step": step,
                "loss": 1 + 3 * decay,
                "learning_rate": 2e-5 * (1 - step / 400),
                "grad_norm": 0.5 + decay,
                **{f"masked_{block}": 0.1 + 0.1 * decay for block in ("ap", "aa", "pp", "an_1", "an_2")},
                **{"positive_similarity": 1 - decay / 2, "hardest_negative_similarity": 0.75 - decay / 2},
                **{"pairs_per_second": 120_000 + step, "tokens_per_second": 2.5e6 + step, "process_memory_mib": 9000.0},
                **{"gpu_allocated_peak_mib": 70_000.0, "gpu_power_w": 650.0, "energy_per_pair_j": 0.0054},
            }
        )
        if step % 100 == 0:
            names = (
                "accuracy@1",
                "precision@10",
                "recall@10",
                "ndcg@10",
                "mrr@10",
                "map@100",
                "a_long_name_of_a_metric",
            )
            logs.append({"step": step} | {f"eval_cosine_{name}": 1 - decay for name in names})
            logs.append(
                {"step": step} | {f"eval_{name}_loss": 1 + decay for name in ("questions", "<script>", "x" * 40)}
            )
    return training_page(
        FinishedTraining(
            logs,
            {"steps": 400, "model": "/a/very/long/path/" + "deeper/" * 20},
            {"ndcg@10": 0.3},
            {"ndcg@10": 0.6},
            [("guide_prompts", {"anchor": "<script>alert(1)</script>", "positive": "x" * 200}, None), ("seed", 7, 42)],
            {"train": "<script>alert(2)</script>: " + "y" * 300, "versions": "torch 2.13.0, transformers 5.23.0"},
        )
    )


def plots() -> str:
    """What bench and profile draw: wide figures, double logarithms, stacked bars with hatches, wide tables."""
    from gist_fast.report.plots import figure, legend, line_styles, log_log, stacked_bars, to_svg

    wide = figure()
    axes = wide.subplots()
    sizes = [256, 1024, 4096, 16384]
    for place, style in enumerate(line_styles(7)):
        axes.plot(sizes, [(place + 1) * (size / 256) ** 2 / 50 for size in sizes], label=f"peer {place}", **style)
    axes.annotate("out of memory", (16384, 8.0), ha="right")
    axes.set_title("Time against the batch size")
    log_log(axes, "batch size B", "time (ms)")
    legend(axes)
    bars = figure(4.6, 3.5)
    parts = {f"part {place}": 1.0 + place for place in range(10)}
    stacked_bars(bars.subplots(), {"this run": parts, "the other": {"part 3": 4.0}})
    pictures = [to_svg(wide, "time by B", "As measured."), to_svg(bars, "a step's parts"), to_svg(bars, "again")]
    table = Table([f"column {place}" for place in range(20)], [list(range(1000, 1020))] * 3, "Wide")
    return make_page("Bench <b>", {"device": "a card"}, [Section("Times", "A text.", [*pictures, table])])


def inspection() -> str:
    """What a guide drops, of texts that would be markup, are long, have no space or read from right to left."""
    texts = [
        "<script>alert(1)</script>",
        "y" * 400,
        "word " * 100,
        "\u0645\u0631\u062d\u0628\u0627 " * 9,
        "1998",
        "short",
    ]
    columns = {"anchor": texts, "positive": [*texts[1:], texts[0]], "negative": [f"{text} ." for text in texts]}
    vectors = {text: [math.cos(k), math.sin(k), 1.0] for k, text in enumerate([*texts, *columns["negative"]])}

    def encode(texts: list[str], *_: object) -> torch.Tensor:
        return torch.tensor([vectors[text] for text in texts])

    found = inspect_batch(Dataset.from_dict(columns), encode, encode, near=0.5)
    return inspection_page(found, {"data": "d" * 200, "guide": "<b>a guide</b>"})


def bench() -> str:
    """What ``gist-fast bench`` writes of all its suites."""
    from fabricated import bench_results

    from gist_fast.bench.plots import page, pictures

    results = bench_results()
    return page(results, pictures(results))


def profile() -> str:
    """What ``gist-fast profile`` writes of a run on a card, with all the figures that there can be."""
    from fabricated import profiled

    from gist_fast.report.profile import report_page

    return report_page(profiled(), {"student": "a/student", "device": "a card"}, {"learning_rate": "1e-4"})


@pytest.fixture(scope="module", params=[training, plots, inspection, bench, profile])
def seen(request, tmp_path_factory) -> browser.Seen:
    folder = tmp_path_factory.mktemp("page")
    page = folder / "report.html"
    write_page(page, request.param())
    return browser.examine(page, folder)


def test_opens_in_all_views(seen):
    assert [(view["width"], view["scheme"]) for view in seen.views] == [(w, scheme) for w, _, scheme in browser.VIEWS]
    assert all(view["texts"] > 50 for view in seen.views)
    day, night = ({tuple(v["ground"]) for v in seen.views if v["scheme"] == scheme} for scheme in ("light", "dark"))
    assert day == {(255, 255, 255)}
    assert all(max(colour) < 64 for colour in night)


def test_says_nothing_and_asks_for_nothing(seen):
    assert seen.console == []
    assert set(seen.requests) == {"/views.html", "/page.html"}
    for view in seen.views:
        assert (view["requests"], view["scripts"]) == ([], 0)


def test_nothing_sticks_out(seen):
    for view in seen.views:
        assert view["scrollWidth"] == view["clientWidth"] == view["width"]
        assert view["sticksOut"] == []


def test_can_be_read(seen):
    for view in seen.views:
        assert view["faint"] == [], f"contrast below 4.5 in {view['scheme']}"
        assert view["small"] == [], "letters below 8.5 pixels"


def test_says_what_it_shows(seen):
    for view in seen.views:
        assert view["title"]
        assert view["headings"][0] == "H1"
        assert set(view["headings"][1:]) == {"H2"}
        assert len(view["ids"]) == len(set(view["ids"]))
        assert view["dangling"] == 0
        assert view["pictures"]
        assert all(picture["loaded"] and picture["name"] for picture in view["pictures"])


def test_pictures_fill_a_phone_and_only_wide_ones_scroll(seen):
    for view in seen.views:
        assert all(picture["width"] >= min(picture["shown"], 300) for picture in view["pictures"])
        if view["width"] == 360:
            scrolling = [picture for picture in view["pictures"] if picture["width"] > picture["shown"]]
            assert len(scrolling) == view["scrolling"].count("IMG") == WIDE.get(view["title"], 0)
        else:
            assert "IMG" not in view["scrolling"]


def test_opens_from_the_disk(tmp_path):
    page, day, night = tmp_path / "report.html", tmp_path / "day.png", tmp_path / "night.png"
    write_page(page, plots())
    browser.screenshot(page, day)
    browser.screenshot(page, night, dark=True)
    assert day.read_bytes()[:4] == night.read_bytes()[:4] == b"\x89PNG"
    assert day.read_bytes() != night.read_bytes()


def test_the_examination_sees_faults(tmp_path):
    """A page with one of each fault."""
    page = tmp_path / "report.html"
    write_page(
        page,
        """<!DOCTYPE html><html lang="en"><head><title>x</title><meta http-equiv="Content-Security-Policy"
        content="img-src 'self'"></head><body style="margin: 0"><div style="width: 2000px; color: #999">faint</div>
        <p id="a" style="font-size: 6px">small</p><img src="there.png" alt="">
        <img src="https://example.org/b.png" alt="">
        <svg id="a" viewBox="0 0 9 9"><use href="#none"/><text x="8">outside</text></svg></body></html>""",
    )
    seen = browser.examine(page, tmp_path)
    view = seen.views[0]
    assert view["scrollWidth"] > view["clientWidth"]
    assert "faint" in view["faint"]
    assert "small" in view["small"]
    assert any("2000px" in element for element in view["sticksOut"])
    assert "in a picture: outside" in view["sticksOut"]
    assert view["ids"] == ["a", "a"]
    assert view["dangling"] == 1
    assert any("example.org" in line for line in seen.console)
    assert "/there.png" in seen.requests
