"""One part of benchmarks/gpu.sh: ``python -m benchmarks.gpu PART --out FOLDER``. ``--toy`` runs it on a CPU in Triton's
interpreter, at sizes that say nothing about speed, so that the script itself is tested where there is no card.

Speed counts the *minimal* FLOPs of a square batch, in units of 2 B^2: 2 (D + G) forward and 6 D backward for the
blocks ap, aa and pp, whatever a configuration really multiplies; and is given as a share of what a large matrix product
of torch's reaches in the same rounds. Times are device events, each taken after the L2 cache was overwritten: medians,
with their quartiles beside them. What others take over ours is given only where it is farther from 1 than its spread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path

import torch

from benchmarks.gpu import ROOT
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import checks, plain_error
from benchmarks.gpu.interpreter import accept_newer_numpy, hurry
from benchmarks.gpu.launches import kernels
from benchmarks.gpu.processes import outcomes
from benchmarks.gpu.shapes import shapes
from benchmarks.gpu.small import small
from benchmarks.gpu.speed import memory, speed, tuned
from benchmarks.gpu.suites import peers, profile, suites
from gist_fast.bench.loss import matmul
from gist_fast.bench.results import WHOLE
from gist_fast.bench.timing import Stopwatch, time_iterations
from gist_fast.runtime.environment import device_name, machine


def environment(bench: Bench) -> None:
    """The card, the versions, the commit, and the rate of a large product in the type of the embeddings."""
    import triton

    parts, flops = matmul(bench.case(1, 1), bench.sizes["matrix"])
    product = time_iterations({WHOLE: parts}, stopwatch=Stopwatch(bench.device.type), most=5)[WHOLE].parts[WHOLE]
    about = machine(bench.device.type)
    if bench.toy:
        about["device"] = INTERPRETER
    about |= {"torch": torch.__version__, "triton": triton.__version__}
    about |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    bench.write(**about, matmul_tflops=flops / product.median / 1e12)
    if not bench.toy:
        count = torch.cuda.get_device_properties(0).multi_processor_count
        bench.write(capability=list(torch.cuda.get_device_capability()), multiprocessors=count)
    print(json.dumps(bench.result, indent=1))


def check(bench: Bench) -> None:
    """Losses and gradients against float64 of the same inputs, before anything is timed."""
    found = {check.name: check for check in checks(bench.toy)}
    errors: dict[str, float] = {}
    off: dict[str, float | str] = {}
    for name, error in outcomes({name: check.error for name, check in found.items()}, here=bench.toy):
        if isinstance(error, Exception):
            off[name] = shown = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            errors[name], shown = error, f"{error:.1e}"
            if found[name].wrong(error):
                off[name] = error
        print(f"{shown}  {name}", flush=True)
        bench.write(relative_errors=errors, wrong=off)
    if off:
        raise SystemExit(f"wrong by more than rounding, or failed: {off}")


def sanitize(bench: Bench) -> None:
    """A small ragged case for a memory checker to watch."""
    for bits in ("keep", "recompute"):
        for width in (33, 200):
            bench.write(**{f"{bits}_{width}": plain_error(bench.device.type, bench.dtype, bits, 130, 7, width, 17)})
    print(bench.result)


def tests(bench: Bench) -> None:
    """The tests that need a card."""
    if importlib.util.find_spec("pytest") is None:
        bench.write(skipped="pytest is not installed; `check` has compared with float64")
        return
    import pytest

    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_triton_gpu.py")])
    bench.write(exit_code=int(code))
    raise SystemExit(int(code))


INTERPRETER = "interpreter"
PARTS = {
    f.__name__: f
    for f in (environment, check, kernels, shapes, speed, memory, small, peers, suites, profile, tuned, tests, sanitize)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PARTS, "device"])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--toy", action="store_true", help="on the CPU, in the interpreter, at toy size")
    arguments = parser.parse_args()
    if arguments.what == "device":
        print(device_name("cuda") if torch.cuda.is_available() else INTERPRETER)
    else:
        bench = Bench(arguments.out, arguments.what, arguments.toy)
        if bench.toy:
            hurry()
            if mended := accept_newer_numpy():
                print(mended, flush=True)
                bench.write(interpreter=mended)
        PARTS[arguments.what](bench)


if __name__ == "__main__":
    main()
