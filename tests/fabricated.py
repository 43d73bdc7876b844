"""Results of ``gist-fast bench`` and a profile as runs leave them, made up: for what shows them."""

from __future__ import annotations

from gist_fast.bench.results import OUT_OF_MEMORY, UNSUPPORTED, Results, Row
from gist_fast.bench.run import fits
from gist_fast.profiling.run import Profile
from gist_fast.profiling.trace import StepTimes, Work, regions
from gist_fast.runtime.profiler_regions import IDLE, NAMES, OTHER

SIZES = (256, 512, 1024, 2048, 4096, 8192)


def bench_results() -> Results:
    """All suites, with a competitor that runs out of memory, one that takes too long, and one that takes no part."""
    rows: list[Row] = []
    loss = {
        "gist_fast": 1.0,
        "gist_fast reference": 1.6,
        "plain": 1.8,
        "plain compiled": 1.5,
        "st GISTEmbedLoss": 400.0,
    }
    for size in SIZES:
        case = {"rows": size, "dtype": "float32"}
        for what, factor in loss.items():
            seconds = factor * (2e-3 + 4e-8 * size**2)
            row = Row("loss", case, size, what, memory=int(factor * size**1.5 * 100))
            if what.startswith("st") and size > 512:
                row.outcome, row.why = (
                    OUT_OF_MEMORY,
                    f"needs {size**2 / 1e5:.1f} GiB at least, by formula; 9.0 GiB are free, of which 80 % may be taken",
                )
            else:
                both = [seconds * x for x in (1.0, 1.02, 0.99, 1.01)]
                row.seconds = {"forward": [x / 2 for x in both], "backward": [x / 2 for x in both], "both": both}
                row.share = {"low": 0.9 / factor, "median": 0.95 / factor, "high": 1.0 / factor, "rounds": 4}
                if what != "gist_fast":
                    row.ratio = {"low": factor * 0.99, "median": factor, "high": factor * 1.01, "rounds": 4}
            rows.append(row)
        rows.append(Row("loss", case, size, "memeff", UNSUPPORTED, "it knows no guide model"))
    for suite, names in {
        "engine": ("gist_fast", "gist_fast, data order", "gist_fast, two passes", "st CachedGISTEmbed"),
        "guide": ("gist_fast", "gist_fast, known texts", "st encode"),
        "step": ("gist_fast", "gist_fast, guide columns", "st CachedGISTEmbed"),
    }.items():
        for size in (32, 64, 128):
            for place, what in enumerate(names):
                row = Row(suite, {"size": size}, size, what, memory=size * (place + 1) << 20)
                row.seconds = {"whole": [size * (1 + place) / 100 * x for x in (1.0, 1.1, 0.9)]}
                if what != "gist_fast":
                    row.ratio = {"low": 0.9 + place, "median": 1.0 + place, "high": 1.1 + place, "rounds": 3}
                rows.append(row)
    rows[-1] = Row(
        "step", {"size": 128}, 128, "st CachedGISTEmbed", "not run", "an iteration would take 9.0 s: no time left"
    )
    for what in ("gist-fast --version", "import sentence_transformers"):
        rows.append(Row("start", {"size": 0}, 0, what, seconds={"whole": [0.1, 0.11, 0.12]}, memory=20 << 20))
    about = {"device": "cpu-2-threads", "cpu": "A CPU of some name", "threads": 2, "platform": "Linux x86_64"}
    about |= {"python": "3.11.7", "torch": "2.13.0+cpu", "sentence-transformers": "6.2.0", "transformers": "5.24.0"}
    about |= {"gist_fast": "0.1.0", "commit": "abcdef0"}
    return Results(about, "gist-fast bench --report out.html", 230.0, rows, fits(rows))


def profiled() -> Profile:
    """Five steps on a card, each part of which took longer than the one before."""
    steps = []
    for number in range(3, 8):
        host = {name: 2.0 + place + number for place, name in enumerate((*NAMES, OTHER))}
        device = {name: 1.0 + place + number for place, name in enumerate((*NAMES, OTHER))} | {IDLE: 10.0}
        steps.append(StepTimes(number, sum(host.values()), host, device, dict.fromkeys(NAMES, 2)))
    figures = {
        "pairs_per_second": 12345.6,
        "gpu_power_w": 650.0,
        "energy_per_pair_j": 0.0054,
        "gpu_sm_clock_mhz": 1980.0,
    }
    walls = [step.wall_ms for step in steps]
    long = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int, float)" * 2
    return Profile(
        steps, regions(steps), walls, [900.0, 120.0], [512] * 5, [40_000] * 5, figures,
        [Work(long, 700, 80.0, "student forward"), Work("gemm", 300, 60.0, "student backward")],
    )  # fmt: skip
