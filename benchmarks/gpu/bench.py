"""Where a part of the benchmark runs, at what sizes, and where its results go."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gist_fast.bench.cases import LossCase
from gist_fast.bench.peers import OURS
from gist_fast.bench.results import FAILED, WRONG, Results
from gist_fast.bench.run import run
from gist_fast.bench.suite import Scope, Suite
from gist_fast.runtime.files import write_whole

FULL = {"batch": 32_768, "widths": (384, 1024), "guide": 1024, "largest": 131_072, "matrix": 8192}
TOY = {"batch": 40, "widths": (24,), "guide": 16, "largest": 70, "matrix": 64}


class Bench:
    """One part; `toy` is on the CPU, in Triton's interpreter, at sizes that say nothing about speed."""

    def __init__(self, out: Path, part: str, toy: bool) -> None:
        self.out, self.part, self.toy = out, part, toy
        self.sizes: dict[str, Any] = TOY if toy else FULL
        self.device = torch.device("cpu" if toy else "cuda")
        # The interpreter cannot multiply bfloat16.
        self.dtype = torch.float16 if toy else torch.bfloat16
        self.result: dict[str, Any] = {}

    def write(self, **values: Any) -> None:
        """Add to the part's results, on disk at once."""
        self.result.update(values)
        path = self.out / "parts" / f"{self.part}.json"
        write_whole(path, json.dumps(self.result, indent=1), overwrite=True)

    def case(self, rows: int, width: int) -> LossCase:
        """A case of the loss in this part's type, on its device."""
        dtype = str(self.dtype).removeprefix("torch.")
        return LossCase(rows, width, self.sizes["guide"], dtype, self.device.type)

    def measure(
        self,
        suites: Sequence[Suite],
        file: str,
        seconds: float,
        sizes: tuple[int, ...] = (),
        more: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Run suites of `gist_fast.bench`; what there is so far goes into `file` whenever a case is done.

        Args:
            seconds: their budget on a card, so many times as the environment's PATIENCE says.
            more: what to write beside the outcomes.
        """

        def keep(results: Results) -> None:
            write_whole(self.out / file, json.dumps(results.as_dict(), indent=1) + "\n", overwrite=True)
            outcomes = [f"{row.suite} {row.size} {row.what}: {row.outcome} {row.why}".strip() for row in results.rows]
            self.write(file=file, outcomes=outcomes, **more())

        scope = Scope((16, 24), "cpu") if self.toy else Scope(sizes, "cuda", "bfloat16")
        budget = 300.0 if self.toy else seconds * int(os.environ.get("PATIENCE", "1"))
        results = run(suites, scope, command="benchmarks/gpu.sh", budget=budget, rounds=7, say=print, keep=keep)
        off = [row for row in results.rows if row.what == OURS and row.outcome in (FAILED, WRONG)]
        if off:
            raise SystemExit(f"ours at {off[0].suite} {off[0].size}: {off[0].outcome} {off[0].why}")
