"""Reports: the page is whole, safe and readable; the plots follow the theme; the train report tells what was logged."""

from __future__ import annotations

import html.parser
import itertools
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from browser import pictures_of

from gist_fast.config.load import load_config
from gist_fast.report.colours import DARK, LIGHT, SERIES, THEME
from gist_fast.report.facts import changed_settings, machine_facts
from gist_fast.report.log_series import Series, evaluations, masked_blocks, one
from gist_fast.report.page import Picture, Section, Table, check_path, make_page, shown, write_page
from gist_fast.report.training import FinishedTraining, training_page
from gist_fast.runtime.errors import InputError

EVIL = "<script>alert(1)</script> & \"<img src=x onerror='alert(2)'>"
SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 331.2 216">
<defs><clipPath id="clip"><rect width="9" height="9"/></clipPath><path id="dot" d="M0 0"/></defs>
<use xlink:href="#dot" clip-path="url(#clip)" style="fill: url(#clip); stroke: #000000"/></svg>"""


class Tree(html.parser.HTMLParser):
    """The page's elements in order, as (tag, attributes), and the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def one_section(*parts, text="") -> Tree:
    return Tree(make_page("A report", {}, [Section("A section", text, parts)]))


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one_colour: str, other: str) -> float:
    low, high = sorted((luminance(one_colour), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_template_is_installed_with_the_package():
    """Of files that are no modules, a wheel holds those that setup.py names."""
    root = Path(__file__).parent.parent
    (pattern,) = re.findall(r'"gist_fast.report": \["([^"]*)"\]', (root / "setup.py").read_text())
    others = [path for path in (root / "gist_fast" / "report").iterdir() if path.is_file() and path.suffix != ".py"]
    assert others and others == list((root / "gist_fast" / "report").glob(pattern))


class TestPage:
    def test_names_itself_and_fits_a_phone(self):
        tree = Tree(make_page("Bench & co", {"device": "a card"}, [Section("One"), Section("Two", "a\n\nb\nc")]))
        assert tree.all("html") == [{"lang": "en"}]
        assert tree.texts["title"] == tree.texts["h1"] == ["Bench & co"]
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in tree.all("meta")
        assert (tree.texts["dt"], tree.texts["dd"]) == (["device"], ["a card"])
        assert tree.texts["h2"] == ["One", "Two"]
        assert tree.texts["p"] == ["a", "b c"]

    def test_no_text_becomes_markup(self):
        parts = [Table([EVIL], [[EVIL]], EVIL), Picture(SVG, EVIL, EVIL)]
        page = make_page(EVIL, {EVIL: EVIL}, [Section(EVIL, EVIL, parts)])
        tree = Tree(page)
        assert not tree.all("script")
        assert [image["alt"] for image in tree.all("img")] == [EVIL]
        assert not [name for _, attributes in tree.elements for name in attributes if name.startswith("on")]
        for tag in ("h1", "h2", "dt", "dd", "p", "th", "td", "caption", "figcaption"):
            assert tree.texts[tag] == [EVIL], tag
        assert tree.texts["title"] == [EVIL]
        assert [a["aria-label"] for a in tree.all("div") if "aria-label" in a] == [EVIL]

    def test_asks_for_nothing_and_may_run_nothing(self):
        page = make_page("t", {}, [Section("s", "https://example.org", [Picture(SVG, "alt")])])
        tree = Tree(page)
        loads = [v for _, attributes in tree.elements for k, v in attributes.items() if k in ("src", "href", "srcset")]
        assert loads
        assert all(value and value.startswith(("#", "data:")) for value in loads)
        assert not re.search(r"@import|url\((?!#)", page)
        [policy] = [a["content"] for a in tree.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
        assert policy is not None and "default-src 'none'" in policy and "script-src" not in policy

    def test_cells(self):
        rows = [[1, 2.5, "1.50 ms", "a"], [None, 12345.678, None, 3], [-7, float("nan"), "12 ms", True]]
        tree = one_section(Table(["i", "f", "t", "mixed"], rows))
        assert tree.texts["td"] == [
            *("1", "2.5", "1.50 ms", "a"),
            *("\u2013", "12\u202f346", "\u2013", "3"),
            *("-7", "nan", "12 ms", "yes"),
        ]
        right, short = {"class": "number"}, {"class": "short"}
        assert tree.all("th") == [{"scope": "col"} | right] * 3 + [{"scope": "col"}]
        assert tree.all("td") == [right, right, right, short, *[right] * 7, short]
        long = one_section(Table(["what"], [["x" * 24], ["x" * 25]]))
        assert long.all("td") == [short, {}]
        prose = one_section(Table(["what", "value"], [["a", 1], ["b", "2"]], prose=True))
        assert prose.all("td") == [{}] * 4

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0"),
            (1e-7, "1e-07"),
            (0.123456, "0.1235"),
            (999.94, "999.9"),
            (999.96, "1\u202f000"),
            (1234.5, "1\u202f234"),
            (-98765.4, "-98\u202f765"),
            (9999, "9999"),
            (16384, "16\u202f384"),
            (float("inf"), "inf"),
            (False, "no"),
            ("16384", "16384"),
        ],
    )
    def test_numbers_as_a_reader_wants_them(self, value, text):
        assert shown(value) == text

    def test_a_wide_table_scrolls_in_a_box_of_its_own(self):
        tree = one_section(Table(["a"], [[1]], "Times"))
        assert {"class": "scroll", "role": "region", "tabindex": "0", "aria-label": "Times"} in tree.all("div")

    def test_a_row_of_another_length_is_refused(self):
        with pytest.raises(InputError, match=r"table 'Times', row 2: 1 cells, 2 columns"):
            one_section(Table(["a", "b"], [[1, 2], [3]], "Times"))

    @pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
    def test_contrast(self, colours):
        for text in ("ink", "muted", "link"):
            for ground in ("paper", "panel"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for series in SERIES:
            assert contrast(colours[series], colours["paper"]) >= 3, series
        assert LIGHT.keys() == DARK.keys()


class TestPictures:
    def test_each_is_an_image_of_its_own(self):
        page = make_page(
            "t", {}, [Section("a", "", [Picture(SVG, "x"), Picture(SVG, "y")]), Section("b", "", [Picture(SVG, "z")])]
        )
        tree = Tree(page)
        assert [image["alt"] for image in tree.all("img")] == ["x", "y", "z"]
        assert not [attributes for _, attributes in tree.elements if "id" in attributes]
        # As it was drawn, with the colours of the page.
        for svg in pictures_of(page):
            assert svg.replace(f"<style>{THEME}</style>", "") == SVG != svg
            assert Tree(svg).all("use") == Tree(SVG).all("use")

    def test_says_what_it_shows(self):
        tree = one_section(Picture(SVG, "Loss falls from 3 to 2.", "the caption"))
        [image] = tree.all("img")
        assert image["alt"] == "Loss falls from 3 to 2."
        assert tree.texts["figcaption"] == ["the caption"]
        assert "--inches: 4.60" in (image["style"] or "")
        with pytest.raises(InputError, match="no alt"):
            one_section(Picture(SVG, " "))

    @pytest.mark.parametrize(
        "inside",
        [
            "<script>alert(1)</script>",
            "<foreignObject/>",
            '<rect onclick="alert(1)"/>',
            '<image href="https://example.org/a.png"/>',
            '<image href="data:text/html,x"/>',
            '<a href="javascript:alert(1)"/>',
            '<rect style="fill: url(https://example.org/a)"/>',
        ],
    )
    def test_what_acts_or_loads_is_shut_in_an_image(self, inside):
        """Of which a browser runs and loads nothing."""
        page = make_page("t", {}, [Section("s", "", [Picture(SVG.replace("</svg>", f"{inside}</svg>"), "alt")])])
        assert inside not in page and inside in pictures_of(page)[0]
        assert [tag for tag, _ in Tree(page).elements if tag in ("svg", "script", "image", "rect", "a")] == []
        assert "example.org" not in page and "alert" not in page

    def test_what_is_no_svg_is_refused(self):
        for given in ("<rect>", "<svg>", "no picture"):
            with pytest.raises(InputError, match="expected an SVG with a viewBox"):
                one_section(Picture(given, "alt"))

    def test_pictures_in_a_row_stand_together(self):
        parts = [Picture(SVG, "a"), Picture(SVG, "b"), Table(["x"], [[1]]), Picture(SVG.replace("331.2", "504"), "c")]
        tree = one_section(*parts)
        assert sum(a.get("class") == "pictures" for a in tree.all("div")) == 2
        assert [a.get("class") for a in tree.all("figure")] == [None, None, "wide"]


class TestWriting:
    def test_writes_once(self, tmp_path):
        path = tmp_path / "made" / "report.html"
        check_path(path)
        assert not path.parent.exists()
        write_page(path, "ä")
        assert path.read_bytes() == "ä".encode()
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        for refuse in (check_path, lambda p: write_page(p, "b")):
            with pytest.raises(InputError, match="exists; name another file for the report"):
                refuse(path)
        assert path.read_text(encoding="utf-8") == "ä"
        with pytest.raises(InputError, match="is no report of gist_fast, so it is not replaced"):
            write_page(path, "b", overwrite=True)
        path.write_text(make_page("Old", {}, []))
        write_page(path, "b", overwrite=True)
        assert path.read_text() == "b"
        assert list(path.parent.iterdir()) == [path]

    def test_a_file_that_came_meanwhile_stays(self, tmp_path, monkeypatch):
        from gist_fast.report import page

        path = tmp_path / "report.html"
        monkeypatch.setattr(page, "check_path", lambda path, overwrite: path.write_text("another's"))
        with pytest.raises(InputError, match="exists"):
            write_page(path, "mine")
        assert path.read_text() == "another's"
        assert list(tmp_path.iterdir()) == [path]

    def test_places_that_will_not_do(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="is a folder"):
            check_path(tmp_path, overwrite=True)
        with pytest.raises(InputError, match="is a file, not a folder"):
            check_path(tmp_path / "file" / "deeper" / "report.html")

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that even root cannot write to")
    def test_a_folder_that_takes_no_file(self):
        with pytest.raises(InputError, match="/proc cannot be written to"):
            check_path(Path("/proc/report.html"))

    def test_nothing_is_left_where_writing_fails(self, tmp_path, monkeypatch):
        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"could not be written \(No space left"):
            write_page(tmp_path / "report.html", "x")
        assert not list(tmp_path.iterdir())


class TestPlots:
    @pytest.fixture(autouse=True)
    def matplotlib(self):
        return pytest.importorskip("matplotlib", reason="matplotlib (the extra [bench]) is not installed")

    def test_colours_follow_the_theme(self):
        from gist_fast.report.plots import PALETTE, figure, legend, log_log, stacked_bars, to_svg

        drawn = figure(4.6, 3)
        axes = drawn.subplots()
        for colour in PALETTE:
            axes.plot([256, 1024], [1, 16], color=colour, label=EVIL)
        axes.text(300, 4, ' style="#0072B2; font: 1px x" ')
        log_log(axes, "B", "ms")
        legend(axes)
        stacked_bars(drawn.add_subplot(), {"a": {f"part {place}": 1.0 for place in range(8)}})
        svg = to_svg(drawn, "alt").svg
        assert "<pattern" in svg
        for name in (*SERIES, "ink", "line"):
            assert f"var(--{name}, {LIGHT[name]})" in svg
        # No colour is left that the theme does not know, and none was changed in a text.
        styles = re.findall(r'<[a-z][^>]*?style="([^"]*)"', svg)
        bare = [style for style in styles if re.search(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", style))]
        assert not bare
        assert not re.search(r'<[a-z][^>]*? (fill|stroke)="#', svg)
        assert "#0072B2; font: 1px x" in svg
        texts = re.findall(r"<text [^>]*>", svg)
        assert texts
        assert all("fill: var(--" in text and "system-ui" in text and "DejaVu" not in text for text in texts)
        assert "<script>" not in svg
        Tree(make_page("t", {}, [Section("s", "", [to_svg(drawn, "alt")])]))

    def test_leaves_matplotlib_as_it_was(self, matplotlib):
        from gist_fast.report.plots import figure, stacked_bars, to_svg

        code = (
            "import sys; from gist_fast.report.plots import figure, to_svg; f = figure(); f.subplots().plot([1, 2]); "
            "to_svg(f, 'x'); print('matplotlib.pyplot' in sys.modules)"
        )
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed.strip() == "False"
        before = dict(matplotlib.rcParams)
        drawn = figure()
        stacked_bars(drawn.subplots(), {"a": {"x": 1.0}})
        to_svg(drawn, "alt")
        assert dict(matplotlib.rcParams) == before

    def test_pays_no_heed_to_the_users_own_style(self, matplotlib):
        from gist_fast.report.plots import figure, to_svg

        def draw():
            drawn = figure()
            drawn.subplots().plot([1, 2])
            return to_svg(drawn, "alt").svg

        plain = draw()
        with matplotlib.rc_context({"axes.facecolor": "red", "axes.grid": False, "svg.fonttype": "path"}):
            assert draw() == plain

    def test_the_same_figure_gives_the_same_file(self):
        from gist_fast.report.plots import figure, to_svg

        drawn = figure()
        drawn.subplots().plot([1, 2])
        assert to_svg(drawn, "alt").svg == to_svg(drawn, "alt").svg
        with pytest.raises(InputError, match="alt: is empty"):
            to_svg(drawn, "")

    def test_bars_lie_end_to_end(self):
        from gist_fast.report.plots import figure, stacked_bars

        axes = figure().subplots()
        stacked_bars(axes, {"one": {"student": 3.0, "guide": 2.0}, "two": {"guide": 1.0, "loss": 0.5}})
        bars = [[(patch.get_x(), patch.get_width()) for patch in container] for container in axes.containers]
        assert [container.get_label() for container in axes.containers] == ["student", "guide", "loss"]
        assert bars == [[(0, 3), (0, 0)], [(3, 2), (0, 1)], [(5, 0), (1, 0.5)]]
        with pytest.raises(InputError, match="'guide' has a length below 0"):
            stacked_bars(axes, {"one": {"guide": -1.0}})
        with pytest.raises(InputError, match="15 parts"):
            stacked_bars(axes, {"one": {str(part): 1.0 for part in range(15)}})

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.0, "0"), (16384, "16384"), (0.30000000000000004, "0.3"), (2.5e-5, "2.5e-5"), (2e6, "2M"),
         (131072, "131.072k"), (-1e-10, "-1e-10"), (1e13, "1e13")],
    )  # fmt: skip
    def test_numbers_of_an_axis(self, value, text):
        from gist_fast.report.plots import plain

        assert plain(value) == text

    def test_says_what_to_install(self, monkeypatch):
        from gist_fast.report.plots import check_matplotlib, figure

        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(InputError, match=r'--report: needs matplotlib; .*pip install "gist-fast\[bench\]"'):
            check_matplotlib()
        with pytest.raises(InputError, match="needs matplotlib"):
            figure()


LOGS = [
    {"step": 2, "loss": 3.0, "learning_rate": 1e-3, "grad_norm": 2.0, "masked_ap": 0.25, "masked_an_1": 0.5},
    {"step": 4, "loss": 2.0, "learning_rate": 5e-4, "grad_norm": 1.0, "masked_ap": 0.5, "pairs_per_second": 80.0},
    {"step": 4, "eval_q_loss": 2.5, "eval_q_runtime": 1.0, "eval_cosine_ndcg@10": 0.25},
    {"step": 4, "eval_titles_loss": 1.5, "eval_titles_samples_per_second": 9.0},
    {"step": 6, "loss": float("nan"), "pairs_per_second": 100.0, "gpu_energy_j": 2000.0, "gpu_power_w": 300.0},
    # A resumed run evaluates again what was cut off.
    {"step": 4, "eval_q_loss": 2.25, "eval_cosine_ndcg@10": 0.375},
    {"step": 6, "train_runtime": 9.0, "train_loss": 2.5},
]


class TestLogs:
    def test_series(self):
        assert one(LOGS, "learning_rate") == Series((2, 4), (1e-3, 5e-4))
        assert one(LOGS, "eval_q_loss") == Series((4,), (2.25,))
        assert one(LOGS, "nothing") is None
        assert one([{"step": 3, "loss": 1.0}, {"step": 2, "loss": 2.0}], "loss") == Series((2, 3), (2.0, 1.0))

    def test_evaluations(self):
        losses, metrics = evaluations(LOGS)
        assert losses == {"q": Series((4,), (2.25,)), "titles": Series((4,), (1.5,))}
        assert metrics == {"ndcg@10": Series((4,), (0.375,))}
        assert evaluations([{"step": 1, "eval_loss": 1.0}]) == ({"": Series((1,), (1.0,))}, {})

    def test_masked_by_dataset(self):
        assert masked_blocks(LOGS) == {"": {"ap": Series((2, 4), (0.25, 0.5)), "an_1": Series((2,), (0.5,))}}
        two = [{"step": 1, "my_set_masked_ap": 0.5, "other_masked_aa": 0.25, "masked": 1.0}]
        assert masked_blocks(two) == {"my_set": {"ap": Series((1,), (0.5,))}, "other": {"aa": Series((1,), (0.25,))}}


class TestTrainingReport:
    @pytest.fixture(autouse=True)
    def _matplotlib(self):
        pytest.importorskip("matplotlib", reason="matplotlib (the extra [bench]) is not installed")

    def tables(self, page: str) -> dict[str, list[str]]:
        """The cells of each table by its caption, or else its section's title."""
        found = {}
        for section in re.findall(r"<section>.*?</section>", page, re.DOTALL):
            for label, body in re.findall(r'aria-label="([^"]*)">(.*?)</table>', section, re.DOTALL):
                found[label] = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", body)
        return found

    def alts(self, page: str) -> list[str]:
        return re.findall(r'<img [^>]*alt="([^"]*)"', page)

    def test_tells_all_that_was_logged(self):
        run = FinishedTraining(
            LOGS,
            {"steps": 6, "best checkpoint": None},
            {"ndcg@10": 0.125},
            {"ndcg@10": 0.375, "mrr@10": 0.5},
            [("learning_rate", 1e-3, 5e-5), ("prompts", {"a": "q: "}, None)],
            {"device": "a card"},
        )
        page = training_page(run)
        tree, tables = Tree(page), self.tables(page)
        assert tree.texts["h2"] == [
            *("Result", "Training, step by step", "What the guide did", "Speed and machine", "Evaluation on the way"),
            "Settings",
        ]
        assert tables["Scores of the student"] == [
            *("metric", "before", "after", "change"),
            *("ndcg@10", "0.1250", "0.3750", "+0.2500"),
            *("mrr@10", "\u2013", "0.5000", "\u2013"),
        ]
        assert tables["The run"] == ["what", "value", "steps", "6"]
        assert tables["Evaluations by step"] == [
            *("step", "q loss", "titles loss", "ndcg@10"),
            *("4", "2.25", "1.5", "0.375"),
        ]
        assert tables["Settings"][3:] == [
            "learning_rate",
            "0.001",
            "5e-05",
            "prompts",
            "{&#39;a&#39;: &#39;q: &#39;}",
            "\u2013",
        ]
        machine = tables["Over the logs of the run"]
        assert machine[4:8] == ["rows a second", "80", "90", "100"]
        assert machine[-4:] == ["energy in all (kJ)", "\u2013", "2", "\u2013"]
        assert self.alts(page) == [
            "Training loss, loss (nats): from 3 at step 2 to nan at step 6.",
            "Learning rate: from 0.001 at step 2 to 0.0005 at step 4.",
            "Norm of the gradient, norm, before clipping: from 2 at step 2 to 1 at step 4.",
            "Pairs that the guide dropped, share of the block (%): "
            "ap: from 25 at step 2 to 50 at step 4; an_1: 50 at step 2.",
            "Throughput in rows, rows a second: from 80 at step 4 to 100 at step 6.",
            "Power of the cards, power (W): 300 at step 6.",
            "Evaluation loss, loss (nats): q: 2.25 at step 4; titles: 1.5 at step 4.",
            "Evaluation metrics, score: ndcg@10: 0.375 at step 4.",
        ]

    def test_what_the_guide_drops_in_a_batch_of_each_dataset(self):
        from datasets import Dataset

        from gist_fast.inspection import inspect_batch

        vectors = {"a": [1.0, 0.0], "<b>": [0.9, 0.1], "c": [0.0, 1.0]}

        def encode(texts, *_):
            import torch

            return torch.tensor([vectors[text] for text in texts])

        data = Dataset.from_dict({"anchor": ["a", "a", "c"], "positive": ["c", "<b>", "c"]})
        found = inspect_batch(data, encode, encode, margins=[0.0, 0.5])
        page = training_page(FinishedTraining(LOGS, batches={"first": found, "": found}))
        tree, tables = Tree(page), self.tables(page)
        assert not tree.all("b")
        titles = tree.texts["h2"]
        start = titles.index("What the guide dropped in 3 rows of first, taken at random")
        assert titles[start - 1] == "What the guide did"
        assert titles[start + 1 : start + 5] == [
            "What each margin would drop in 3 rows of first, taken at random",
            "Pairs that were dropped in 3 rows of first, taken at random",
            "Texts that are the same in 3 rows of first, taken at random",
            "What the guide dropped in 3 rows, taken at random",
        ]
        assert tables["By block"][5:8] == ["ap", "6", str(found.counts["ap"])]
        assert tables["Dropped at a margin, relative"][:6] == [
            *("margin", "ap", "aa", "pp", "all pairs", "rows without a negative"),
        ]
        assert "&lt;b&gt;" in tables[f"{found.total_dropped} of {found.total_dropped}"]

    def test_a_line_goes_through_its_points(self):
        run = FinishedTraining([{"step": step, "loss": 10.0 - step} for step in (2, 4, 6)])
        page = training_page(run)
        # The only path of three points in the first series' colour.
        [path] = re.findall(r'd="(M [^"]*)"[^>]*style="fill: none; stroke: var\(--blue', pictures_of(page)[0])
        points = [tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", path)]
        assert len(points) == 3
        (x0, y0), (x1, y1), (x2, y2) = points
        assert x1 - x0 == pytest.approx(x2 - x1) and x1 > x0
        # Down the page is down.
        assert y1 - y0 == pytest.approx(y2 - y1) and y1 > y0

    def test_shares_are_drawn_in_percent(self):
        page = training_page(FinishedTraining([{"step": 1, "masked_ap": 0.5}, {"step": 2, "masked_ap": 1.0}]))
        ticks = re.findall(r"<text [^>]*>([^<]*)</text>", "".join(pictures_of(page)))
        assert {"0", "100"} <= set(ticks)

    def test_one_step_and_nothing_else(self):
        page = training_page(FinishedTraining([{"step": 1, "loss": 2.5}]))
        assert self.alts(page) == ["Training loss, loss (nats): 2.5 at step 1."]
        assert Tree(page).texts["h2"] == ["Result", "Training, step by step", "Settings"]

    def test_no_step_logged(self):
        page = training_page(FinishedTraining([{"step": 1, "train_runtime": 1.0}]))
        assert "No step of this run was logged." in page
        assert not self.alts(page)

    def test_many_evaluations_and_metrics(self):
        logs = [{"step": step} | {f"eval_m{place}": step / 100 for place in range(8)} for step in range(1, 101)]
        page = training_page(FinishedTraining(logs))
        cells = self.tables(page)["Evaluations by step; 40 of 100 evaluations, evenly spread"]
        steps = [int(step) for step in cells[9::9]]
        assert (len(steps), steps[0], steps[-1]) == (40, 1, 100)
        assert {later - earlier for earlier, later in itertools.pairwise(steps)} == {2, 3}
        assert len(self.alts(page)) == 2

    def test_a_long_run_stays_small(self):
        logs = [{"step": step, "loss": 1 / step, "masked_ap": 0.1 + step % 7 / 100} for step in range(1, 5001)]
        assert len(training_page(FinishedTraining(logs))) < 400_000


class TestSettings:
    def test_those_that_differ(self, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text(
            yaml.safe_dump(
                {
                    "student": {"path": str(tmp_path), "model_kwargs": {"token": "hf_secret", "dtype": "float32"}},
                    "guide": None,
                    "data": {"train": "a.jsonl"},
                    "loss": {"temperature": 0.01, "margin": 0.05},
                    "training": {"output_dir": "out", "hub_token": "hf_secret", "learning_rate": 5e-5, "seed": 7},
                    "evaluation": {"pairs": "b.jsonl", "before": False},
                }
            )
        )
        settings = changed_settings(load_config(path), eval_strategy="epoch")
        found = {name: (value, default) for name, value, default in settings}
        # What was written down as the default already is (temperature, learning_rate) is no change.
        assert found == {
            "output_dir": (str(tmp_path / "out"), None),
            "eval_strategy": ("epoch", "no"),
            "hub_token": ("(set)", None),
            "seed": (7, 42),
            "margin": (0.05, 0.0),
            "student.path": (str(tmp_path), None),
            "student.model_kwargs": ({"token": "(set)", "dtype": "float32"}, None),
            "evaluation.pairs": ({"path": str(tmp_path / "b.jsonl")}, None),
            "evaluation.before": (False, True),
        }

    def test_the_machine(self):
        import torch

        facts = machine_facts("cpu")
        assert f"torch {torch.__version__}" in facts["versions"]
        assert f"{torch.get_num_threads()} CPU thread" in facts["device"]


class TestCommand:
    """``gist-fast train --report``."""

    @pytest.fixture
    def config(self, tmp_path, pairs, tiny_student, tiny_guide):
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        path = tmp_path / "config.yaml"
        training = {"output_dir": "out", "num_train_epochs": 1, "per_device_train_batch_size": 16, "use_cpu": True}
        path.write_text(
            yaml.safe_dump(
                {
                    "student": str(tiny_student),
                    "guide": str(tiny_guide),
                    "data": {"train": "pairs.jsonl", "eval": {"first": "pairs.jsonl", "<b>": "pairs.jsonl"}},
                    "training": {**training, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2},
                    "evaluation": {"pairs": "pairs.jsonl"},
                }
            )
        )
        return path

    def test_the_report_of_a_resumed_run_is_of_the_whole_run(self, run_command, config, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib (the extra [bench]) is not installed")
        first = run_command("train", config, "--max_steps", "2", "--json")
        assert first.code == 0, first.err
        assert json.loads(first.out)["report"] is None
        report = tmp_path / "out" / "report.html"
        second = run_command("train", config, "--max_steps", "4", "--resume", "--report", report, "--json")
        assert second.code == 0, second.err
        summary = json.loads(second.out)
        assert summary["report"] == str(report)
        page = report.read_text(encoding="utf-8")
        tree = Tree(page)
        assert not tree.all("b")
        assert re.search(r"Training loss, loss \(nats\): from [\d.]+ at step 1 to [\d.]+ at step 4\.", page)
        assert re.search(r"Throughput in rows, rows a second: from [\d.]+ at step 1 to ", page)
        assert re.search(r"Evaluation loss, loss \(nats\): &lt;b&gt;: .*; first: ", page)
        after = summary["evaluation"]["after"]["ndcg@10"]
        assert f"<td>ndcg@10</td><td>\u2013</td><td>{after:.4f}</td>" in re.sub(r' class="(number|short)"', "", page)
        assert "The student was not measured before training." in page
        # The trainer's own rate and mean loss are of the part after the resumption.
        assert f"<td>resumed from</td><td>{summary['resumed_from']}</td>" in page
        assert "seconds since resumed" in page and "mean of all steps" not in page
        # 16 rows make 16 * 15 pairs.
        assert "What the guide dropped in 16 rows, taken at random" in tree.texts["h2"]
        assert ["ap", "240"] in [tree.texts["td"][k : k + 2] for k in range(len(tree.texts["td"]))]
        facts = dict(zip(tree.texts["dt"], tree.texts["dd"], strict=True))
        assert facts["train"].endswith("pairs.jsonl: 64 rows of anchor, positive")
        assert facts["rows a step"] == "16"

    def test_what_would_fail_at_the_end_fails_before_it_begins(self, run_command, config, tmp_path, monkeypatch):
        report = tmp_path / "report.html"
        report.write_text("mine")
        result = run_command("train", config, "--report", report)
        assert (result.code, result.out) == (2, "")
        assert result.err.splitlines()[-1].startswith(f"gist-fast: {report}: exists; name another file")
        result = run_command("train", config, "--report", report / "deeper.html")
        assert result.code == 2 and "is a file, not a folder" in result.err
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = run_command("train", config, "--report", tmp_path / "other.html")
        assert result.code == 2
        assert 'pip install "gist-fast[bench]"' in result.err.splitlines()[-1]
        assert report.read_text() == "mine"
        assert not (tmp_path / "out").exists()

    def test_a_batch_that_cannot_be_looked_at_costs_its_section_alone(self, run_command, config, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib", reason="matplotlib (the extra [bench]) is not installed")

        def fails(*_, **__):
            raise RuntimeError("out of memory\nand more")

        monkeypatch.setattr("gist_fast.inspection.training.inspect_rows", fails)
        report = tmp_path / "r.html"
        result = run_command("train", config, "--max_steps", "1", "--report", report, "--json")
        assert result.code == 0, result.err
        assert "The report shows no batch of the data: out of memory\n" in result.err
        assert "taken at random" not in report.read_text()

    def test_a_disk_that_fails_at_the_end_costs_the_report_alone(self, run_command, config, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib", reason="matplotlib (the extra [bench]) is not installed")
        from gist_fast.runtime import files

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "put", full)
        result = run_command("train", config, "--max_steps", "1", "--report", tmp_path / "r.html", "--json")
        assert result.code == 2
        assert "the report could not be written (No space left on device). The model is in " in result.err
        summary = json.loads(result.out)
        assert summary["report"] is None
        assert (Path(summary["model"]) / "modules.json").is_file()
        assert not (tmp_path / "r.html").exists()
