"""Planning an epoch of batches without duplicates: ``python -m benchmarks.batches [--rounds N]``.

Pairs of distinct questions and passages that repeat as in Zipf's law, the most frequent one in about seven of ten
batches. Every plan is checked before it is timed; ours is timed from the texts to the last batch, as is theirs, each
with a new sampler. Results go to ``benchmarks/results/<device>/batches.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler as TheirSampler

from benchmarks.machine import machine, quartiles
from gist_fast.bench.timing import Stopwatch, Timing, time_iterations
from gist_fast.runtime.memory import peak_memory
from gist_fast.training.no_duplicates_sampler import NoDuplicatesBatchSampler

RESULTS = Path(__file__).parent / "results"
BATCH = 1024
WORDS = ("the", "of", "and", "water", "is", "why", "capital", "on", "planets", "they", "one", "melts", "had", "some")


def zipf_pairs(rows: int, passages: int, most: int, seed: int = 0) -> tuple[Dataset, np.ndarray]:
    """Pairs, and the number of each pair's passage; the most frequent passage is expected `most` times."""
    ranks, shift = np.arange(1, passages + 1), 1.0
    while rows * (1 / (1 + shift)) / (1 / (ranks + shift)).sum() > most:
        shift *= 1.05
    weights = 1 / (ranks + shift)
    rng = np.random.default_rng(seed)
    which = rng.choice(passages, size=rows, p=weights / weights.sum())
    filler = [" ".join(rng.choice(WORDS, size=length)) for length in rng.integers(8, 90, size=997)]
    table = pa.table(
        {
            "anchor": [f"question {k} {filler[k % 997][:60]}" for k in range(rows)],
            "positive": [f"passage {k} {filler[k % 997]}" for k in which.tolist()],
        }
    )
    return Dataset(table), which


def plan(make: Callable[[], DefaultBatchSampler]) -> list[list[int]]:
    return list(make())


def check(batches: list[list[int]], which: np.ndarray, name: str) -> int:
    """The rows placed; raise where a row or a text stands twice."""
    rows = np.concatenate([np.asarray(batch) for batch in batches])
    if len(np.unique(rows)) != len(rows):
        raise SystemExit(f"{name}: a row stands in two batches")
    for k, batch in enumerate(batches):
        if len(np.unique(which[batch])) != len(batch):
            raise SystemExit(f"{name}: batch {k} holds a text twice")
    return len(rows)


def samplers(dataset: Dataset) -> dict[str, Callable[[], DefaultBatchSampler]]:
    def arguments() -> dict:
        return {"batch_size": BATCH, "drop_last": False, "generator": torch.Generator(), "seed": 1}

    return {
        "ours": lambda: NoDuplicatesBatchSampler(dataset, **arguments()),
        "no_duplicates": lambda: TheirSampler(dataset, **arguments()),
        "no_duplicates_hashed": lambda: TheirSampler(dataset, precompute_hashes=True, **arguments()),
    }


def seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Of each call, once a round."""
    parts = {name: {"whole": call} for name, call in calls.items()}
    found = time_iterations(parts, stopwatch=Stopwatch(), most=rounds, least=rounds)
    return {name: timed.parts["whole"] for name, timed in found.items()}


def against_sentence_transformers(rows: int, rounds: int) -> dict:
    """A size that theirs can do."""
    dataset, which = zipf_pairs(rows, rows // 3, most=int(0.7 * rows / BATCH))
    made = samplers(dataset)
    placed = {name: check(plan(make), which, name) for name, make in made.items()}
    times = seconds({name: partial(plan, make) for name, make in made.items()}, rounds)
    return {
        "rows": rows,
        "batch": BATCH,
        "rows_placed": placed,
        "rows_that_no_plan_can_place": int(np.maximum(0, np.bincount(which) - -(-rows // BATCH)).sum()),
        "seconds": {name: timing.median for name, timing in times.items()},
        "speedup_over_no_duplicates": quartiles(times["no_duplicates"], times["ours"]),
        "speedup_over_no_duplicates_hashed": quartiles(times["no_duplicates_hashed"], times["ours"]),
    }


def a_million(rows: int, rounds: int, most: float, hashed: bool = False) -> dict:
    """Ours alone, at full size; `most` is how many times as often as there are batches the most frequent text comes."""
    dataset, which = zipf_pairs(rows, rows // 3, most=int(most * rows / BATCH))
    made = samplers(dataset)
    batches: list[list[int]] = []
    memory = peak_memory(lambda: batches.extend(plan(made["ours"])))
    times = [n for n in np.bincount(which).tolist() if n]
    results = {
        "rows": rows,
        "batch": BATCH,
        "batches": len(batches),
        "distinct_passages": len(times),
        "most_frequent_in_rows": max(times),
        "rows_placed": check(batches, which, "ours"),
        "rows_that_no_plan_can_place": int(sum(max(0, n - len(batches)) for n in times)),
        "peak_memory": memory,
        "seconds": list(seconds({"ours": partial(plan, made["ours"])}, rounds)["ours"].rounds),
        "seconds_of_a_later_epoch": _later_epoch(made["ours"]()),
    }
    if hashed:
        start = time.perf_counter()
        batches = plan(made["no_duplicates_hashed"])
        results["seconds_no_duplicates_hashed"] = time.perf_counter() - start
        results["rows_placed_no_duplicates_hashed"] = check(batches, which, "no_duplicates_hashed")
        results["batches_no_duplicates_hashed"] = len(batches)
    return results


def _later_epoch(sampler: DefaultBatchSampler) -> float:
    """The texts are read by then."""
    list(sampler)
    sampler.set_epoch(1)
    start = time.perf_counter()
    list(sampler)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of each comparison")
    parser.add_argument("--rows", type=int, default=1_000_000, help="pairs of the full size")
    parser.add_argument("--rows-theirs", type=int, default=20_000, help="pairs of the size that is compared")
    parser.add_argument("--hashed", action="store_true", help="time theirs with hashes at the full size too, once")
    parser.add_argument("--device", default=f"cpu-{torch.get_num_threads()}-threads", help="the results' folder")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    logging.getLogger("gist_fast").setLevel(logging.ERROR)  # what is left out stands in the results
    results: dict = {"machine": machine()}
    for name, run in {
        "sentence_transformers": partial(against_sentence_transformers, arguments.rows_theirs, arguments.rounds),
        "all_placeable": partial(a_million, arguments.rows, arguments.rounds, 0.7, arguments.hashed),
        "some_not_placeable": partial(a_million, arguments.rows, arguments.rounds, 3.0),
    }.items():
        print(f"{name} ...", file=sys.stderr)
        results[name] = run()
    path = RESULTS / arguments.device / "batches.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
