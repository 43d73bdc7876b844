"""``gist-fast evaluate``: a model's retrieval scores, and a baseline's beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gist_fast.cli.output import Columns, Json, only_results_on_stdout, parse_columns, print_json, print_table

if TYPE_CHECKING:
    from gist_fast.evaluation import Retrieval


def evaluate(
    model: Annotated[str, typer.Argument(help="A sentence-transformers folder, or a name on the hub.")],
    queries: Annotated[Path | None, typer.Option(help="File of queries: columns id and text.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="File of documents: columns id and text.")] = None,
    relevant: Annotated[
        Path | None,
        typer.Option(help="File of relevant documents: columns query_id and document_id, perhaps score; a row a pair."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="Instead of the three: anchors as queries, each with its positives as relevant documents."),
    ] = None,
    columns: Columns = None,
    split: Annotated[str | None, typer.Option(help="Split of --pairs.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Another model, to show beside this one.")] = None,
    query_prompt: Annotated[str | None, typer.Option(help="Put before each query; else the model's own.")] = None,
    corpus_prompt: Annotated[str | None, typer.Option(help="Put before each document; else the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at a time.")] = 64,
    device: Annotated[str | None, typer.Option(help="cuda, cpu and so on; else the best there is.")] = None,
    as_json: Json = False,
) -> None:
    """Measure retrieval: nDCG@10, MRR@10, accuracy@1, recall@10 and MAP@100.

    Files are .jsonl, .csv, .tsv (each also .gz) or .parquet, with a header or keys as named at each option. The names
    of BEIR's files (_id, query-id, corpus-id) are taken too.
    """
    with only_results_on_stdout():
        from gist_fast.cli.models import check_model, load_model

        names = {"model": model, **({"baseline": baseline} if baseline else {})}
        for role, name in names.items():
            check_model(name, role)
        task = _task(queries, corpus, relevant, pairs, columns, split)
        from gist_fast.evaluation import evaluate as score
        from gist_fast.evaluation import make_evaluator

        results: dict[str, dict[str, Any]] = {}
        for role, name in names.items():
            evaluator = make_evaluator(
                task,
                batch_size=batch_size,
                query_prompt=query_prompt,
                corpus_prompt=corpus_prompt,
                show_progress_bar=True,
            )
            loaded = load_model(name, role, device=device)
            results[role] = {"name": name, "metrics": score(loaded, evaluator)}
    size = {"queries": len(task.relevant), "documents": len(task.corpus)}
    if as_json:
        print_json({**size, **results})
        return
    rows = []
    for metric, value in results["model"]["metrics"].items():
        row = [metric, value]
        if baseline:
            other = results["baseline"]["metrics"][metric]
            row = [metric, other, value, f"{value - other:+.4f}"]
        rows.append(row)
    title = f"{model}: {size['queries']} queries, {size['documents']} documents"
    print_table(title, ("metric", "baseline", "model", "change") if baseline else ("metric", "model"), rows)


def _task(
    queries: Path | None,
    corpus: Path | None,
    relevant: Path | None,
    pairs: str | None,
    columns: str | None,
    split: str | None,
) -> Retrieval:
    files = {"--queries": queries, "--corpus": corpus, "--relevant": relevant}
    missing = [option for option, path in files.items() if path is None]
    if pairs is not None:
        if len(missing) < 3:
            raise typer.BadParameter("give --pairs, or --queries, --corpus and --relevant, not both.")
        from gist_fast.data import load_texts
        from gist_fast.evaluation import retrieval_from_pairs

        return retrieval_from_pairs(load_texts(pairs, split=split, columns=parse_columns(columns)))
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)} missing; or give --pairs instead of all three.")
    if columns or split:
        raise typer.BadParameter("--columns and --split go with --pairs.")
    from gist_fast.evaluation import load_retrieval

    assert queries
    assert corpus
    assert relevant
    return load_retrieval(queries, corpus, relevant)
