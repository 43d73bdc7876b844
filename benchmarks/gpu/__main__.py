"""The parts of benchmarks/gpu.sh. ``--toy`` runs them on a CPU in Triton's interpreter, at sizes that say nothing
about speed, so that the script itself is tested where there is no card.

Speed counts the *minimal* FLOPs of a square batch, in units of 2 B^2: 2 (D + G) forward and 8 D backward for the
blocks ap, aa and pp, whatever a plan really multiplies; and is given as a share of what a large matrix product of
torch's reaches in the same run. Times are device events, each taken after the L2 cache was overwritten: medians, with
their quartiles beside them. What others take over ours is given only where it is farther from 1 than both spread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("gist_fast.kernels") is None:
    # A checkout that was not installed: setup.py is what puts kernels/ there otherwise.
    _spec = importlib.util.spec_from_file_location(
        "gist_fast.kernels", ROOT / "kernels" / "__init__.py", submodule_search_locations=[str(ROOT / "kernels")]
    )
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["gist_fast.kernels"] = _module
    _spec.loader.exec_module(_module)

import torch  # noqa: E402
from benchmarks.gpu_candidates import compile_candidates  # noqa: E402
from benchmarks.gpu_check import LIMITS, checks, difference, plain_error  # noqa: E402
from benchmarks.gpu_processes import outcomes  # noqa: E402
from benchmarks.gpu_suites import peers, profile, suites  # noqa: E402
from torch import Tensor  # noqa: E402

from gist_fast import guided_contrastive_loss  # noqa: E402
from gist_fast.bench.timing import LEAST_ROUNDS, Stopwatch, log_quartiles  # noqa: E402

TEMPERATURE, MARGIN = 0.01, 0.05
FULL = {"batch": 32_768, "widths": (384, 768, 1024), "guide": 1024, "largest": 131_072, "matrix": 8192, "repeats": 5}
TOY = {"batch": 40, "widths": (24,), "guide": 16, "largest": 70, "matrix": 64, "repeats": 1}


class Bench:
    """Where a part runs, at what sizes, and where its results go."""

    def __init__(self, out: Path, part: str, toy: bool) -> None:
        self.out, self.part, self.toy = out, part, toy
        self.sizes = TOY if toy else FULL
        self.device = torch.device("cpu" if toy else "cuda")
        # The interpreter cannot multiply bfloat16.
        self.dtype = torch.float16 if toy else torch.bfloat16
        self.result: dict[str, Any] = {}
        self.stopwatch = Stopwatch(str(self.device))

    def write(self, **values: Any) -> None:
        """Add to the part's results, on disk at once."""
        self.result.update(values)
        path = self.out / "parts" / f"{self.part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.result, indent=1))

    def embeddings(self, batch: int, width: int, seed: int = 0) -> list[Tensor]:
        """Anchors and positives that resemble each other, ``[batch, width]`` each."""
        generator = torch.Generator(self.device).manual_seed(seed)
        anchors = torch.randn(batch, width, generator=generator, device=self.device, dtype=self.dtype)
        noise = torch.randn(batch, width, generator=generator, device=self.device, dtype=self.dtype)
        return [anchors, anchors + noise]

    def milliseconds(self, run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> list[float]:
        """Lower quartile, median and upper quartile of the time of `run`, with `before` untimed in front of it and
        nothing of use in the L2 cache."""
        times = []
        for _ in range(self.sizes["repeats"] + 2):
            before()
            times.append(1e3 * self.stopwatch(run))
        # The first two compile and warm up.
        return [math.exp(quartile) for quartile in log_quartiles(times[2:])]


def over(theirs: list[float], ours: list[float], repeats: int) -> float | None:
    """How many times as long as ours theirs takes, by medians; None where the two spread by more, or were timed too few
    times.

    They are timed one after the other, not in turns, so their spreads add up.
    """
    spread = math.log(theirs[2] / theirs[0]) + math.log(ours[2] / ours[0])
    ratio = theirs[1] / ours[1]
    return ratio if repeats >= LEAST_ROUNDS and spread < abs(math.log(ratio)) else None


def plain_loss(a: Tensor, p: Tensor, ga: Tensor, gp: Tensor) -> Tensor:
    """What a good engineer would write in ten lines: every score in memory."""
    a, p, ga, gp = (torch.nn.functional.normalize(x, dim=1) for x in (a, p, ga, gp))
    limit = (ga * gp).sum(1, keepdim=True) - MARGIN
    own = torch.arange(len(a), device=a.device)
    scores = []
    for x, y, gx, gy in ((a, p, ga, gp), (a, a, ga, ga), (p, p, gp, gp)):
        mask = gx @ gy.T > limit
        # The positive is never masked; a row's pair with itself always is.
        mask[own, own] = x is y
        scores.append((x @ y.T).masked_fill(mask, -torch.inf))
    return torch.nn.functional.cross_entropy(torch.cat(scores, 1) / TEMPERATURE, own)


def ours(mask_bits: str = "keep", held_bytes: int | None = None) -> Callable[..., Tensor]:
    """Our loss; with `held_bytes` 0 a guide's unit vectors are made chunk by chunk, as those of large batches are."""
    from gist_fast.functional.backends import triton

    whole = triton.HELD_BYTES

    def loss(a: Tensor, p: Tensor, ga: Tensor, gp: Tensor) -> Tensor:
        # For the backward pass that follows, too.
        triton.HELD_BYTES = whole if held_bytes is None else held_bytes
        return guided_contrastive_loss(
            a, p, ga, gp, temperature=TEMPERATURE, margin=MARGIN, backend="triton", mask_bits=mask_bits
        )

    return loss


def time_both(
    bench: Bench, loss: Callable[..., Tensor], width: int, fault: Callable[..., str | None] | None = None
) -> dict[str, Any]:
    """Milliseconds of the forward and of the backward pass of a loss in which `fault` (by default `wrong`) finds none;
    or why there are none."""
    batch = bench.sizes["batch"]
    leaves = [x.requires_grad_() for x in bench.embeddings(batch, width)]
    guide = bench.embeddings(batch, bench.sizes["guide"], seed=1)
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = [loss(*leaves, *guide)]

    def backward() -> None:
        torch.autograd.grad(kept[0], leaves)

    try:
        reason = (fault or wrong)(bench, loss, width)
        if reason is not None:
            return {"failed": reason}
        found = {"forward": bench.milliseconds(forward), "backward": bench.milliseconds(backward, before=forward)}
        medians = {f"{name}_ms": quartiles[1] for name, quartiles in found.items()}
        return {**medians, **{f"{name}_ms_quartiles": quartiles for name, quartiles in found.items()}}
    except Exception as error:
        return {"failed": _told(error)}
    finally:
        kept.clear()
        if not bench.toy:
            torch.cuda.empty_cache()


def with_rates(times: dict[str, Any], batch: int, width: int, guide: int, rate: float) -> dict[str, Any]:
    """Add TFLOP/s by the minimal count, and the share of `rate`."""
    if "failed" in times:
        return times
    unit = 2.0 * batch * batch
    work = {"forward": 2 * (width + guide) * unit, "backward": 8 * width * unit}
    for name, flops in work.items():
        times[f"{name}_tflops"] = flops / times[f"{name}_ms"] / 1e9
    both = sum(work.values()) / (times["forward_ms"] + times["backward_ms"]) / 1e9
    return {**times, "tflops": both, "share_of_matmul": both / rate}


def matmul_rate(bench: Bench) -> float:
    """TFLOP/s of a large product in the type of the embeddings."""
    n = bench.sizes["matrix"]
    a, b = torch.randn(2, n, n, device=bench.device).to(bench.dtype)
    return 2 * n**3 / bench.milliseconds(lambda: a @ b)[1] / 1e9


def environment(bench: Bench) -> None:
    import triton

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        except OSError:
            return ""
        return run.stdout.strip()

    commit, dirty = git("rev-parse", "HEAD"), git("status", "--porcelain")
    bench.write(
        device=device_name(bench.toy), commit=commit or "unknown", changed=bool(dirty), python=sys.version.split()[0],
        torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda, hip=torch.version.hip,
        matmul_tflops=matmul_rate(bench),
    )  # fmt: skip
    if not bench.toy:
        properties = torch.cuda.get_device_properties(0)
        bench.write(
            capability=list(torch.cuda.get_device_capability()), multiprocessors=properties.multi_processor_count,
            memory=properties.total_memory,
        )  # fmt: skip
    print(json.dumps(bench.result, indent=1))


def check(bench: Bench) -> None:
    """Losses and gradients against float64 of the same inputs, before anything is timed."""
    found = {check.name: check for check in checks(bench.toy)}
    errors: dict[str, float] = {}
    off: dict[str, float | str] = {}
    for name, error in outcomes({name: check.error for name, check in found.items()}, here=bench.toy):
        if isinstance(error, Exception):
            off[name] = shown = _told(error)
        else:
            errors[name], shown = error, f"{error:.1e}"
            if found[name].wrong(error):
                off[name] = error
        print(f"{shown}  {name}", flush=True)
        bench.write(relative_errors=errors, wrong=off)
    if off:
        raise SystemExit(f"wrong by more than rounding, or failed: {off}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def wrong(bench: Bench, loss: Callable[..., Tensor], width: int) -> str | None:
    """Why a competitor is not to be timed: at a ragged size of the width in question its result is not the reference's.

    In float32: at this temperature what others round to half types is far from the truth, and `check` has ours in all.
    """
    rows, guide = (20, 8) if bench.toy else (507, bench.sizes["guide"])
    error = difference(bench.device.type, torch.float32, loss, _exact, rows, 0, width, guide)
    return None if error <= LIMITS[torch.float32] else f"wrong: relative error {error:.1e} at B {rows}"


def _exact(*given: Tensor) -> Tensor:
    return guided_contrastive_loss(*given, temperature=TEMPERATURE, margin=MARGIN, backend="reference")


def speed(bench: Bench) -> None:
    rate = matmul_rate(bench)
    bench.write(matmul_tflops=rate, batch=bench.sizes["batch"], guide_width=bench.sizes["guide"], rows=[])
    competitors = {
        "triton": ours(),
        "triton recompute": ours("recompute"),
        "triton recompute, guide by chunks": ours("recompute", 0),
        "eager": plain_loss,
    }
    if not bench.toy:
        competitors |= {"torch.compile": torch.compile(plain_loss)}
    rows: list[dict[str, Any]] = []
    # Ours first for every width: if time runs out, it is the baselines that are missing.
    for names in (tuple(name for name in competitors if "triton" in name), ("torch.compile", "eager")):
        for width in bench.sizes["widths"]:
            for name in names:
                if name not in competitors:
                    continue
                times = time_both(bench, competitors[name], width)
                row = {"what": name, "width": width}
                row |= with_rates(times, bench.sizes["batch"], width, bench.sizes["guide"], rate)
                row |= to_ours(row, rows, bench.sizes["repeats"])
                rows.append(row)
                bench.write(rows=rows)
                print(json.dumps(row))


def to_ours(row: dict[str, Any], rows: list[dict[str, Any]], repeats: int) -> dict[str, float | None]:
    """What a row takes over ours of the same width, by part: None within the spread; nothing where one failed."""
    ours = next((r for r in rows if r["what"] == "triton" and r["width"] == row["width"]), None)
    if ours is None or "failed" in ours or "failed" in row:
        return {}
    parts = ("forward", "backward")
    return {f"{p}_over_ours": over(row[f"{p}_ms_quartiles"], ours[f"{p}_ms_quartiles"], repeats) for p in parts}


def changed_by_tuning(bench: Bench, loss: Callable[..., Tensor], width: int) -> str | None:
    """Why a tuned loss is not to be timed: at the size it was tuned for, gradients are not those of the default."""
    leaves = [x.requires_grad_() for x in bench.embeddings(bench.sizes["batch"], width)]
    guide = bench.embeddings(bench.sizes["batch"], bench.sizes["guide"], seed=1)
    found = []
    before = os.environ.pop("GIST_FAST_AUTOTUNE", None)
    for setting in (None, before):
        if setting is not None:
            os.environ["GIST_FAST_AUTOTUNE"] = setting
        found.append(torch.autograd.grad(loss(*leaves, *guide), leaves))
    error = max(((a - b).norm() / a.norm()).item() for a, b in zip(*found, strict=True))
    limit = LIMITS[bench.dtype]
    return None if error <= limit else f"wrong: a gradient differs by {error:.1e} from that of the default launches"


def tuned(bench: Bench) -> None:
    """The same with tuned launches, one width at a time, and what was chosen."""
    from gist_fast.kernels import tuning

    unfit = compile_candidates(bench.device, bench.dtype, toy=bench.toy)
    bench.write(do_not_fit=unfit)
    print(f"compiled what is tried; {len(unfit)} do not fit", flush=True)
    rate = matmul_rate(bench)
    rows: list[dict[str, Any]] = []
    for width in bench.sizes["widths"]:
        row = {"what": "triton tuned", "width": width}
        times = time_both(bench, ours(), width, changed_by_tuning)
        row |= with_rates(times, bench.sizes["batch"], width, bench.sizes["guide"], rate)
        rows.append(row)
        chosen = {key: str(config) for key, config in tuning._known.items()}
        bench.write(rows=rows, matmul_tflops=rate, chosen=chosen)
        print(json.dumps(row))


def memory(bench: Bench) -> None:
    """What a step adds to the embeddings at its peak, their gradients included, and what it is held to."""
    for bits in ("keep", "recompute"):
        batch, width = bench.sizes["largest"], bench.sizes["widths"][0]
        leaves = [x.requires_grad_() for x in bench.embeddings(batch, width)]
        guide = bench.embeddings(batch, bench.sizes["guide"], seed=1)
        if not bench.toy:
            bench.stopwatch = None  # and what it overwrites the L2 cache with
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        loss = ours(bits)(*leaves, *guide)
        if not bench.toy:
            forward = torch.cuda.max_memory_allocated() - before
        loss.backward()
        if not bench.toy:
            added = torch.cuda.max_memory_allocated() - before
            kept = {"keep": 8 * 10**9, "recompute": 10**9}[bits] > added
            bench.write(**{f"{bits}_forward_bytes": forward, f"{bits}_bytes": added, f"{bits}_as_promised": kept})
        bench.write(batch=batch, width=width, **{f"{bits}_loss": loss.item()})
        print(json.dumps(bench.result))
        del loss, leaves, guide


def sanitize(bench: Bench) -> None:
    """A small ragged case for a memory checker to watch."""
    for bits in ("keep", "recompute"):
        for width in (33, 200):
            bench.write(**{f"{bits}_{width}": plain_error(bench.device.type, bench.dtype, bits, 130, 7, width, 17)})
    print(bench.result)


def tests(bench: Bench) -> None:
    if importlib.util.find_spec("pytest") is None:
        bench.write(skipped="pytest is not installed; `check` has compared with float64")
        return
    import pytest

    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_triton_gpu.py")])
    bench.write(exit_code=int(code))
    raise SystemExit(int(code))


def device_name(toy: bool = False) -> str:
    if toy or not torch.cuda.is_available():
        return "interpreter"
    return torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-")


PARTS = {f.__name__: f for f in (environment, check, speed, memory, peers, suites, profile, tests, sanitize, tuned)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PARTS, "device"])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--toy", action="store_true", help="on the CPU, in the interpreter, at toy size")
    arguments = parser.parse_args()
    if arguments.what == "device":
        print(device_name())
    else:
        PARTS[arguments.what](Bench(arguments.out, arguments.what, arguments.toy))


if __name__ == "__main__":
    main()
