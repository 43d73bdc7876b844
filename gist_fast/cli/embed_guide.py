"""``gist-fast embed-guide``: a dataset with the guide's embeddings as columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gist_fast.cli.output import (
    INTERRUPTED,
    CacheDir,
    Columns,
    Device,
    Json,
    Overwrite,
    Prompts,
    Quiet,
    Quoting,
    Split,
    TrustRemoteCode,
    expanded,
    note,
    only_results_on_stdout,
    parse_columns,
    parse_prompts,
    print_facts,
    print_json,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from gist_fast.guide_columns import Report


def embed_guide(
    data: Annotated[str, typer.Argument(help="Texts: a file, a saved directory or a hub name.")],
    guide: Annotated[str, typer.Option(help="The guide model.")],
    output: Annotated[
        Path, typer.Option(callback=expanded, help="The folder to write, which gist-fast train takes as its data.")
    ],
    columns: Columns = None,
    split: Split = None,
    quoting: Quoting = None,
    prompt: Prompts = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens that the guide reads; else its own.")] = None,
    dtype: Annotated[str, typer.Option(help="What is stored: float16 or float32.")] = "float16",
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the guide reads at a time; else what suits its device.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts that it reads at a time, at most.")] = None,
    cache_dir: CacheDir = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Embed every text with the guide, once, and write the data with the embeddings as columns.

    Training on the result needs no guide. Embeddings are kept as they are made: what was stopped, killed or
    interrupted goes on from there when run again, and texts that were embedded before are not embedded again.

    Started by torchrun or accelerate launch, several processes share the work.
    """
    with only_results_on_stdout():
        from gist_fast.data.load import load_texts
        from gist_fast.data.save import check_folder, save_whole
        from gist_fast.guide_columns.files import cache_folder
        from gist_fast.pipeline.model_checks import check_length
        from gist_fast.pipeline.models import check_model, load_model
        from gist_fast.pipeline.saved_model import SavedModel

        check_model(guide, "guide", trust_remote_code=trust_remote_code)
        check_length("--max-length", max_length, SavedModel(guide, "guide"))
        check_folder(output, overwrite)
        cache_folder(cache_dir)
        dataset = load_texts(data, split=split, columns=parse_columns(columns), quoting=quoting)
        prompts = parse_prompts(prompt, dataset.column_names)
        from gist_fast.guide_columns import Report
        from gist_fast.guide_columns import embed_guide as add_columns
        from gist_fast.guide_columns.share import Team

        report = Report()
        try:
            team = Team()
            embedded = add_columns(
                dataset,
                load_model(guide, "guide", device=device or team.device, trust_remote_code=trust_remote_code),
                prompts=prompts,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                max_length=max_length,
                dtype=dtype,
                cache_dir=cache_dir,
                show_progress_bar=not quiet,
                report=report,
            )
            team.first(lambda: save_whole(embedded, output, show_progress_bar=not quiet))
            team.part()
        except KeyboardInterrupt:
            note(f"gist-fast: interrupted; {_kept(report)}")
            raise typer.Exit(INTERRUPTED) from None
    if team.rank > 0:
        return
    summary = _summary(embedded, output, report)
    if as_json:
        print_json(summary)
        return
    print_facts("Precomputed guide embeddings", summary)
    print(f"Train on it: data: {{train: {output}}}, without a guide")


def _kept(report: Report) -> str:
    if not report.folders:
        return "nothing was written."
    kept = f"{report.embedded} of {report.missing} texts embedded here" if report.missing else "all embeddings"
    return f"{kept} are kept in {report.folders[-1]}; the same command goes on from there."


def _summary(dataset: Dataset, output: Path, report: Report) -> dict[str, Any]:
    from gist_fast.data.names import guide_columns

    added = guide_columns(dataset)
    feature = dataset.features[added[0]]
    seconds = report.seconds
    return {
        "output": str(output),
        "rows": len(dataset),
        "columns": added,
        "width": feature.length,
        "dtype": feature.feature.dtype,
        "embedded": report.missing,
        "found": report.distinct - report.missing if report.columns else None,
        "texts_per_second": report.embedded / seconds if report.embedded else None,
        "tokens_per_second": report.tokens / seconds if report.tokens else None,
        "kept_in": [str(folder) for folder in report.folders],
    }
