"""What a run of the demo found: kept as numbers, shown as tables, and three queries before and after."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.evaluation.evaluators import Retrieval

if TYPE_CHECKING:
    from rich.console import Console

METRICS = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "accuracy@1": "accuracy@1"}
BASE, UNGUIDED, GUIDED = "base student", "trained without a guide", "trained with the guide"
SHOWN = 3  # results a query


@dataclass(frozen=True)
class Example:
    """One query: what it should find, what the base student and the trained one put first."""

    change: str
    query: str
    right: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    rank_before: int | None
    rank_after: int | None


@dataclass
class Training:
    """One training: its log, the dev scores on its way, and how long it took."""

    seconds: float
    steps: list[int]
    losses: list[float]
    masked: dict[str, list[float]]
    dev_steps: list[int]
    dev_ndcg: list[float]


@dataclass(frozen=True)
class Gain:
    """A difference of nDCG@10, query by query: its mean over the queries and the standard error of that mean."""

    mean: float
    error: float


@dataclass
class DemoReport:
    """Everything that a run of the demo measured.

    `scores` maps a model (``base student``, ``trained without a guide``, ``trained with the guide``, ``guide``) to its
    metrics (``ndcg@10``, ``mrr@10``, ``accuracy@1``) on the test texts. `gains` holds what the guided training gained
    on the base student and on the training without a guide. `seconds` holds the time of each phase.
    """

    quick: bool
    seed: int
    recipe: dict[str, Any]
    texts: dict[str, int]
    scores: dict[str, dict[str, float]]
    gains: dict[str, Gain]
    trainings: dict[str, Training]
    examples: list[Example]
    seconds: dict[str, float]
    versions: dict[str, str]
    model_path: str

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def choose_examples(
    task: Retrieval, before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]], seed: int
) -> list[Example]:
    """One query whose right answer moved up in the first ten, one where it stayed and one where it fell, drawn by seed.

    Args:
        task: The queries, documents and right answers.
        before: For each query its documents (ids), best first, of the base student.
        after: The same of the trained one.
        seed: Draws them.
    """
    kinds: dict[str, list[str]] = {"gained": [], "stayed": [], "lost": []}
    for query, right in task.relevant.items():
        old, new = (_rank(ranking[query], right) for ranking in (before, after))
        a, b = (rank if rank is not None and rank <= 10 else 11 for rank in (old, new))  # what a reader would see
        kinds["gained" if b < a else "lost" if b > a else "stayed"].append(query)
    examples = []
    for change, queries in kinds.items():
        if queries:
            query = random.Random(seed).choice(sorted(queries))
            right = task.relevant[query]
            examples.append(
                Example(
                    change,
                    task.queries[query],
                    tuple(sorted(task.corpus[d] for d in right)),
                    tuple(task.corpus[d] for d in before[query][:SHOWN]),
                    tuple(task.corpus[d] for d in after[query][:SHOWN]),
                    _rank(before[query], right),
                    _rank(after[query], right),
                )
            )
    return examples


def read_rankings(folder: Path, keep: int = 100) -> dict[str, list[str]]:
    """Document ids by query id, best first, from the predictions that ``InformationRetrievalEvaluator`` writes."""
    [path] = folder.glob("*_predictions_*.jsonl")
    rankings = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            rankings[row["query_id"]] = [hit["corpus_id"] for hit in row["results"][:keep]]
    return rankings


def paired_gain(task: Retrieval, before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]) -> Gain:
    """How nDCG@10 differs between two rankings of the same queries (document ids by query id, best first)."""
    changes = [_ndcg(after[q], right) - _ndcg(before[q], right) for q, right in task.relevant.items()]
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else math.inf
    return Gain(statistics.fmean(changes), error)


def _ndcg(ranking: Sequence[str], right: set[str], at: int = 10) -> float:
    """nDCG of one ranking, where every right document is as right as another."""
    found = sum(1 / math.log2(place + 1) for place, document in enumerate(ranking[:at], 1) if document in right)
    return found / sum(1 / math.log2(place + 1) for place in range(1, min(at, len(right)) + 1))


def _rank(ranking: Sequence[str], right: set[str]) -> int | None:
    """The place, from 1, of the first right document, or None where the ranking ends before it."""
    return next((place for place, document in enumerate(ranking, 1) if document in right), None)


def print_examples(console: Console, examples: Sequence[Example]) -> None:
    """The example queries, each as a small table of results before and after."""
    from rich.markup import escape
    from rich.table import Table

    for example in examples:
        title = f"{example.change}: [bold]{escape(example.query)}[/bold]  (right: {escape('; '.join(example.right))})"
        table = Table(title=title, title_justify="left", title_style="", expand=True)
        for name, rank in (("before", example.rank_before), ("after", example.rank_after)):
            table.add_column(f"{name} (right answer at {rank if rank is not None else '> 100'})", ratio=1)
        for old, new in zip(example.before, example.after, strict=True):
            table.add_row(*(_marked(text, example.right) for text in (old, new)))
        console.print(table)


def _marked(text: str, right: Sequence[str]) -> str:
    from rich.markup import escape

    return f"[bold green]* {escape(text)}[/bold green]" if text in right else f"  {escape(text)}"


def print_scores(console: Console, report: DemoReport) -> None:
    """The table before / after."""
    from rich.table import Table

    count = report.texts
    table = Table(
        title=f"{count['test queries']} test queries over {count['test documents']} descriptions, "
        "categories never trained on",
        title_justify="left",
    )
    table.add_column("model")
    for name in METRICS.values():
        table.add_column(name, justify="right")
    for model, scores in report.scores.items():
        style = "bold" if model == GUIDED else None
        table.add_row(model, *(f"{scores[metric]:.4f}" for metric in METRICS), style=style)
    console.print(table)


def print_ending(console: Console, report: DemoReport, picture: Path) -> None:
    """Where everything lies, and how the model is loaded."""
    for name, gain in report.gains.items():
        other = name if name == BASE else f"one {name}"
        console.print(
            f"nDCG@10 of the student {GUIDED}, against the {other}: {gain.mean:+.4f} "
            f"(standard error over the queries {gain.error:.4f})",
            soft_wrap=True,
        )
    console.print(f"picture of the run: {picture}", soft_wrap=True, markup=False)
    console.print(f"saved model: {report.model_path}   load it with", soft_wrap=True, markup=False)
    console.print("  from sentence_transformers import SentenceTransformer", markup=False, highlight=False)
    console.print(
        f"  model = SentenceTransformer({report.model_path!r})", soft_wrap=True, markup=False, highlight=False
    )
