"""A whole training step against sentence-transformers': ``python -m benchmarks.step [--batch N] [--rounds N]``.

Student and guide are all-MiniLM-L6-v2, of one size and with one tokenizer, so that both sides do the same work; texts
are documentation strings of mixed length, or the demo's short ones. Each side trains in its own trainer, in a process
of its own, so that the peak of its resident memory is its own too; they take turns. In each process a step of few pairs
comes first and is not timed: it brings up threads and libraries. Before all that, the losses of one batch are compared.
Of three rounds or more, seconds have quartiles and there are ratios. Results go to
``benchmarks/results/<device>/step.json``; ``--table`` prints the README's table from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import command, measured_on, quartiles, told
from gist_fast.bench.timing import LEAST_ROUNDS, Timing, log_quartiles
from gist_fast.runtime.memory import own_peak

RESULTS = Path(__file__).parent / "results"
TEMPERATURE = 0.05
SIDES = ("theirs", "ours", "ours_with_columns")
MINI_BATCH = 32
"""Rows of theirs at a time: its default."""
WARM_UP = 64
"""Pairs of the step that is not timed."""
NOT_MEASURED = "Not measured yet."


def pairs_of(texts: str, count: int) -> tuple[list[str], list[str]]:
    """Anchors and positives."""
    if texts == "docstrings":
        from benchmarks.texts import docstring_pairs

        anchors, positives = zip(*docstring_pairs(count), strict=True)
        return list(anchors), list(positives)
    from gist_fast.demo.texts import build_texts

    data = build_texts(train_pairs=count).train
    return list(data["anchor"]), list(data["positive"])


def train(side: str, batch: int, memory: float, cache: str, texts: str) -> dict[str, Any]:
    """One step of `batch` pairs, in this process, after one of `WARM_UP`.

    Returns:
        Its seconds from the first text to the updated weights, the peak of resident memory and that before, in bytes.
    """
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
    from transformers import TrainerCallback

    from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
    from gist_fast.demo.models import guide_path

    anchors, positives = pairs_of(texts, batch)
    data = Dataset.from_dict({"anchor": anchors, "positive": positives})
    student, guide = (SentenceTransformer(str(guide_path()), device="cpu") for _ in range(2))
    moments: list[float] = []
    columns = 0.0
    given: SentenceTransformer | None = guide
    if side == "ours_with_columns":
        start = time.perf_counter()
        data = embed_guide(data, guide, cache_dir=cache, show_progress_bar=False)
        columns = time.perf_counter() - start
        given = None

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    def trainer_of(data: Dataset) -> SentenceTransformerTrainer:
        """A trainer of one step, of all the data."""
        common: dict[str, Any] = {
            "output_dir": cache,
            "per_device_train_batch_size": len(data),
            "max_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        if side == "theirs":
            loss = CachedGISTEmbedLoss(student, guide, temperature=TEMPERATURE, mini_batch_size=MINI_BATCH)
            arguments = SentenceTransformerTrainingArguments(**common)
            return SentenceTransformerTrainer(student, arguments, data, loss=loss, callbacks=[Clock()])
        ours = GISTTrainingArguments(**common, temperature=TEMPERATURE, activation_memory=memory)
        return GISTTrainer(student, ours, data, guide=given, callbacks=[Clock()])

    trainer_of(data.select(range(min(WARM_UP, batch)))).train()
    moments.clear()
    trainer = trainer_of(data)
    before = _peak_bytes()
    trainer.train()
    logged = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return {
        "seconds": moments[1] - moments[0],
        "peak": _peak_bytes(),
        "before": before,
        "columns_seconds": columns,
        "loss": logged[-1],
    }


def check() -> dict[str, float]:
    """The losses of one small batch without dropout; ends the program unless they agree."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss

    from benchmarks.texts import docstring_pairs
    from gist_fast import losses
    from gist_fast.demo.models import guide_path

    model, guide = (SentenceTransformer(str(guide_path()), device="cpu").eval() for _ in range(2))
    values = []
    for kind in (CachedGISTEmbedLoss, losses.CachedGISTEmbedLoss):
        features = [model.preprocess(list(column)) for column in zip(*docstring_pairs(48), strict=True)]
        with torch.no_grad():
            values.append(kind(model, guide, temperature=TEMPERATURE, mini_batch_size=7)(features, None).item())
    if not abs(values[0] - values[1]) <= 1e-4 * abs(values[0]):
        raise SystemExit(f"wrong before fast: the loss is {values[1]}, sentence-transformers' {values[0]}")
    return {"theirs": values[0], "ours": values[1]}


def lengths(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Of each column's tokens: mean, and the 5, 25, 50, 75 and 95 per cent quantiles."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from gist_fast.demo.models import guide_path
    from gist_fast.losses.mini_batches import extents

    model = SentenceTransformer(str(guide_path()), device="cpu")
    told = {}
    for name, column in zip(("anchor", "positive"), pairs_of(arguments.texts, arguments.batch), strict=True):
        tokens = extents(model.preprocess(column))[:, 1]
        told[name] = [float(tokens.mean()), *np.quantile(tokens, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()]
    return told


def in_own_process(side: str, arguments: argparse.Namespace, cache: str) -> dict[str, Any]:
    """`train` in a fresh process."""
    started = [sys.executable, "-m", "benchmarks.step", "--side", side, "--batch", str(arguments.batch)]
    started += ["--memory", str(arguments.memory), "--cache", cache, "--texts", arguments.texts]
    done = subprocess.run(started, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(started)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, `--rounds` times."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    with tempfile.TemporaryDirectory() as cache:
        for number in range(arguments.rounds):
            for side in arguments.sides:
                print(f"round {number + 1}, {side} ...", file=sys.stderr)
                runs[side].append(in_own_process(side, arguments, cache))
    result: dict[str, Any] = {"batch": arguments.batch, "texts": arguments.texts}
    result |= {"activation_memory_gib": arguments.memory, "tokens": lengths(arguments), "runs": runs}
    if "theirs" in runs:
        theirs = Timing(tuple(run["seconds"] for run in runs["theirs"]))
        for side in (side for side in arguments.sides if side != "theirs"):
            result[f"speedup_{side}"] = quartiles(theirs, Timing(tuple(run["seconds"] for run in runs[side])))
    return result


def _peak_bytes() -> int:
    """Of this process. What the system counts at its end begins with what its parent held when it forked."""
    if sys.platform == "linux":
        return own_peak()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    if not results:
        return NOT_MEASURED
    rows = ["| one training step | seconds | against theirs | peak of resident memory |", "|---|---|---|---|"]
    names = {
        "theirs": "sentence-transformers' `CachedGISTEmbedLoss` in its trainer",
        "ours": "`GISTTrainer`, guide in the step",
        "ours_with_columns": "`GISTTrainer`, guide columns",
    }
    for _, part in sorted(results.items()):
        for side, runs in part["runs"].items():
            seconds = _seconds([run["seconds"] for run in runs])
            # Of fewer than three rounds the noise is not known, and a ratio says nothing.
            ratio = part.get(f"speedup_{side}") if len(runs) >= LEAST_ROUNDS else None
            against = told(ratio, rounds=len(runs)) if ratio else "-"
            peak = max(run["peak"] for run in runs) / 2**30
            rows.append(
                f"| B {part['batch']:,}, {part['texts']}: {names[side]} | {seconds} | {against} | {peak:.2f} GiB |"
            )
    measured = [
        f"B {part['batch']:,}, {part['texts']}, {len(next(iter(part['runs'].values())))} rounds: "
        + measured_on(part["machine"], part["command"])
        for _, part in sorted(results.items())
    ]
    return "\n".join([*rows, "", *measured])


def _seconds(rounds: list[float]) -> str:
    """Their median, and their quartiles where there are enough to have some."""
    low, median, high = map(math.exp, log_quartiles(rounds))
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(rounds) >= LEAST_ROUNDS else ""
    return f"{median:.{digits}f}{spread}"


def main() -> None:
    import torch

    from benchmarks.machine import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.5, help="GiB of activations that ours may keep")
    parser.add_argument(
        "--texts", choices=("docstrings", "demo"), default="docstrings", help="long and mixed, or short"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--device", default=f"cpu-{torch.get_num_threads()}-threads", help="the results' folder")
    parser.add_argument("--table", action="store_true", help="only print the table of the stored results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(train(arguments.side, arguments.batch, arguments.memory, arguments.cache, arguments.texts)))
        return
    path = RESULTS / arguments.device / "step.json"
    if not arguments.table:
        results = json.loads(path.read_text()) if path.exists() else {}
        about = {"command": command("benchmarks.step"), "machine": machine()}
        part = {**about, "check": check(), **compare(arguments)}
        results[f"batch_{arguments.batch:06d}_{arguments.texts}"] = part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
