"""How long mining takes, without the embedding: ``python -m benchmarks.mining [--keep]``.

Random embeddings in float16, as they are stored; each positive is near to its anchor. How many scores are computed and
sorted does not depend on the numbers. Beside ours stands sentence-transformers' ``mine_hard_negatives`` with the same
vectors and rules, where its matrix of scores fits. ``--keep`` stores the results under
``benchmarks/results/<device>/mining.json``, and puts their table into docs/mining.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from benchmarks.loss_cpu import RESULTS
from benchmarks.machine import command, machine, measured_on
from benchmarks.marks import put
from gist_fast.data.embedded_rows import read_as_stored
from gist_fast.guide_columns.files import as_vectors
from gist_fast.guide_columns.mine import MiningReport, mine_negatives

SIZES = ((20_000, 384), (100_000, 384), (100_000, 1024))
"""Pairs, each of two texts, and the guide's width."""
COMPARED = 20_000
"""Up to so many pairs sentence-transformers is timed too."""
NEGATIVES, MARGIN = 5, 0.05
DOCUMENT = Path(__file__).parent.parent / "docs" / "mining.md"


class Lookup:
    """A model of sentence-transformers, as far as mining goes, that knows the vectors already."""

    device = torch.device("cpu")

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self._vectors = vectors

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        """``[n, width]``, of norm 1."""
        found = np.stack([self._vectors[text] for text in texts]).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    encode_document = encode_query

    def similarity(self, a: Any, b: Any) -> torch.Tensor:
        """``[n, m]``"""
        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> torch.Tensor:
        """``[n]``"""
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


def pairs(rows: int, width: int) -> tuple[Dataset, Lookup]:
    """Distinct anchors and positives, with a guide's embeddings, and a model that knows them."""
    random = np.random.default_rng(0)
    anchors = random.standard_normal((rows, width), dtype=np.float32)
    positives = anchors + random.standard_normal((rows, width), dtype=np.float32)
    texts = {"anchor": [f"q{k}" for k in range(rows)], "positive": [f"d{k}" for k in range(rows)]}
    data, known = Dataset.from_dict(texts), {}
    for name, vectors in (("anchor", anchors), ("positive", positives)):
        stored = vectors.astype(np.float16)
        data = data.add_column(f"{name}_guide_embedding", as_vectors(stored))
        known |= dict(zip(texts[name], stored, strict=True)) if rows <= COMPARED else {}
    return read_as_stored(data), Lookup(known)


def measure(rows: int, width: int) -> dict[str, Any]:
    """One run of each, ours first."""
    data, model = pairs(rows, width)
    report = MiningReport()
    found: dict[str, Any] = {"pairs": rows, "width": width}
    found["seconds"] = _seconds(
        lambda: mine_negatives(data, negatives=NEGATIVES, relative_margin=MARGIN, report=report)
    )
    found["negatives"] = report.negatives
    if rows <= COMPARED:
        plain = data.select_columns(["anchor", "positive"]).with_format(None)
        found["theirs"] = _seconds(
            lambda: mine_hard_negatives(
                plain, model, num_negatives=NEGATIVES, relative_margin=MARGIN, output_format="n-tuple", verbose=False
            )
        )
    return found


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def table(results: dict[str, Any]) -> str:
    """Times by size."""
    rows = [
        f"| {2 * found['pairs']:,} | {found['width']} | {found['seconds']:.0f} s | "
        + (f"{found['theirs']:.0f} s" if "theirs" in found else "not measured")
        + f" | {found['negatives'] / found['pairs']:.1f} |"
        for found in results["sizes"]
    ]
    return "\n".join(
        [
            "| texts (half of them anchors) | guide's width | time | sentence-transformers | negatives a row |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "One run each. " + measured_on(results["machine"], results["command"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="store the results, in the place of earlier ones")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"command": command("benchmarks.mining"), "machine": machine(), "sizes": []}
    for rows, width in SIZES:
        results["sizes"].append(measure(rows, width))
        print(results["sizes"][-1], file=sys.stderr)
    if arguments.keep:
        path = RESULTS / f"cpu-{torch.get_num_threads()}-threads" / "mining.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
        DOCUMENT.write_text(put(DOCUMENT.read_text(), {"mining": table(results)}))
    print(table(results))


if __name__ == "__main__":
    main()
