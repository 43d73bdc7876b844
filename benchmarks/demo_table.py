"""The README's table of the demo, made from its report: ``python -m benchmarks.demo_table REPORT.json``.

With ``--keep`` the figures that the table is made of are stored under ``benchmarks/results/<device>/demo.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.loss_cpu import RESULTS
from benchmarks.machine import machine, measured_on

KEPT = ("texts", "scores", "gains", "seconds", "versions", "seed")


def table(results: dict) -> str:
    """Scores of the base student, the one trained without a guide and the one trained with it."""
    from gist_fast.demo.report import METRICS

    lines = [
        "| " + " | ".join(["student", *METRICS.values()]) + " |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    for student, scores in results["scores"].items():
        lines.append("| " + " | ".join([student, *(f"{scores[name]:.4f}" for name in METRICS)]) + " |")
    gains = [f"{gain['mean']:+.4f} ± {gain['error']:.4f} over *{name}*" for name, gain in results["gains"].items()]
    about, texts = results["machine"], results["texts"]
    return "\n".join(
        [
            *lines,
            "",
            f"{texts['test queries']} queries over {texts['test documents']:,} descriptions, "
            f"{texts['training pairs']:,} training pairs, seed {results['seed']}. nDCG@10 of the guided student, with "
            f"the standard error over queries: {', '.join(gains)}. {results['seconds']['all']:.0f} seconds in all. "
            + measured_on(about, "gist-fast demo", results["versions"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--keep", action="store_true", help="store the figures among the results")
    parser.add_argument("--device", default=f"cpu-{torch.get_num_threads()}-threads", help="the results' folder")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text())
    results = {"machine": machine(), **{key: report[key] for key in KEPT}}
    if arguments.keep:
        path = RESULTS / arguments.device / "demo.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
