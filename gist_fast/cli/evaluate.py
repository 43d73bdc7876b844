"""``gist-fast evaluate``: a model's scores, and a baseline's beside them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gist_fast.cli.ctrl_c import interruptible
from gist_fast.cli.output import (
    Columns,
    Device,
    Json,
    Quoting,
    TrustRemoteCode,
    expanded,
    only_results_on_stdout,
    parse_columns,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from gist_fast.config.schema import EvaluationConfig

HOW = "--pairs, or --queries, --corpus and --relevant; --triplet; --sts; --pair-classification; --mteb"


def _file(help: str) -> Any:
    return typer.Option(callback=expanded, help=help)


def evaluate(
    model: Annotated[str, typer.Argument(help="A sentence-transformers folder, or a name on the hub.")],
    queries: Annotated[Path | None, _file("Retrieval. File of queries: columns id and text.")] = None,
    corpus: Annotated[Path | None, _file("File of documents: columns id and text, perhaps title.")] = None,
    relevant: Annotated[
        Path | None,
        _file("File of relevant documents: columns query_id and document_id, perhaps score (the grade); a row a pair."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="Instead of the three: anchors as queries, each with its positives as relevant documents."),
    ] = None,
    triplet: Annotated[str | None, typer.Option(help="Columns anchor, positive and negative.")] = None,
    sts: Annotated[str | None, typer.Option(help="Columns sentence1, sentence2 and score, a number.")] = None,
    pair_classification: Annotated[
        str | None, typer.Option(help="Columns sentence1, sentence2 and label, 1 where they belong together, else 0.")
    ] = None,
    mteb: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="A task of the package mteb, or file.py:Class for one of your own; repeat."),
    ] = None,
    columns: Columns = None,
    split: Annotated[
        str | None, typer.Option(help="Split of --pairs, --triplet, --sts or --pair-classification.")
    ] = None,
    quoting: Quoting = None,
    baseline: Annotated[str | None, typer.Option(help="Another model, to show beside this one.")] = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Retrieval: put before each query; else the model's own.")
    ] = None,
    corpus_prompt: Annotated[
        str | None, typer.Option(help="Retrieval: put before each document; else the model's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at a time.")] = 64,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure retrieval, triplets, likeness (STS), pair classification and tasks of mteb; any of them at once.

    Files are .jsonl, .csv, .tsv (each also .gz) or .parquet, with a header or keys as named at each option; saved
    datasets and names on the hub do too where no ids are needed. The names of BEIR's files (_id, query-id, corpus-id)
    are taken too.
    """
    with only_results_on_stdout(), interruptible() as ctrl_c:
        from gist_fast.evaluation.evaluators import load_tasks
        from gist_fast.evaluation.mteb_tasks import find_tasks, load_data
        from gist_fast.pipeline.evaluate import evaluate_models
        from gist_fast.pipeline.models import check_model

        files = {"--queries": queries, "--corpus": corpus, "--relevant": relevant}
        sources = {"pairs": pairs, "triplet": triplet, "sts": sts, "pair_classification": pair_classification}
        config = _config(files, sources, columns, split, quoting)
        if config is None and not mteb:
            raise typer.BadParameter(f"nothing to measure; give any of {HOW}.")
        if (query_prompt or corpus_prompt) and not (config and (config.pairs or config.queries)):
            raise typer.BadParameter("--query-prompt and --corpus-prompt go with --pairs or --queries.")
        names = {"model": model, **({"baseline": baseline} if baseline else {})}
        for role, name in names.items():
            check_model(name, role, trust_remote_code=trust_remote_code)
        tasks = None if config is None else load_tasks(config)
        mteb_tasks = find_tasks(mteb) if mteb else []
        load_data(mteb_tasks)
        results = evaluate_models(
            names,
            tasks,
            mteb_tasks,
            batch_size=batch_size,
            device=device,
            trust_remote_code=trust_remote_code,
            query_prompt=query_prompt,
            corpus_prompt=corpus_prompt,
            before_forward=ctrl_c.check,
        )
    sizes = {} if tasks is None else tasks.sizes
    if as_json:
        print_json({**sizes, **results})
        return
    measured = {task: f"{task} ({result['metric']})" for task, result in results["model"].get("mteb", {}).items()}
    rows = []
    for metric, value in results["model"]["metrics"].items():
        row = [measured.get(metric, metric), value]
        if baseline:
            other = results["baseline"]["metrics"][metric]
            row = [row[0], other, value, f"{value - other:+.4f}"]
        rows.append(row)
    shown = ", ".join(f"{count} {what.replace('_', ' ').replace('sts', 'STS')}" for what, count in sizes.items())
    title = f"{model}: {shown}" if shown else model
    print_table(title, ("metric", "baseline", "model", "change") if baseline else ("metric", "model"), rows)


def _config(
    files: dict[str, Path | None],
    sources: dict[str, str | None],
    columns: str | None,
    split: str | None,
    quoting: bool | None,
) -> EvaluationConfig | None:
    """What the options ask for, as a configuration would; None where they name no file."""
    from gist_fast.config.schema import EvaluationConfig, SourceConfig

    given = [name for name, source in sources.items() if source is not None]
    missing = [option for option, path in files.items() if path is None]
    if len(missing) < 3 and sources["pairs"] is not None:
        raise typer.BadParameter("give --pairs, or --queries, --corpus and --relevant, not both.")
    if 0 < len(missing) < 3:
        raise typer.BadParameter(f"{', '.join(missing)} missing; or give --pairs instead of all three.")
    if (columns or split or quoting is not None) and len(given) != 1:
        options = "--pairs, --triplet, --sts or --pair-classification"
        raise typer.BadParameter(
            f"--columns, --split and --quoting go with one of {options}; got {len(given)} of them."
        )
    if not given and missing:
        return None
    parsed = parse_columns(columns)
    read = {name: SourceConfig(sources[name] or "", split=split, columns=parsed, quoting=quoting) for name in given}
    named = {option[2:]: str(path) for option, path in files.items() if path is not None}
    return EvaluationConfig(**read, **named)  # type: ignore[arg-type]
