"""``gist-fast mine``: pairs to rows with hard negatives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gist_fast.cli.ctrl_c import interruptible
from gist_fast.cli.output import (
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
    only_results_on_stdout,
    parse_columns,
    parse_prompts,
    print_facts,
    print_json,
)


def mine(
    data: Annotated[str, typer.Argument(help="Pairs: a file, a saved directory or a hub name.")],
    output: Annotated[
        Path, typer.Option(callback=expanded, help="The folder to write, which gist-fast train takes as its data.")
    ],
    guide: Annotated[
        str | None, typer.Option(help="The guide model; not needed where the data carry its embeddings.")
    ] = None,
    negatives: Annotated[int, typer.Option(min=1, help="How many for a row, at most.")] = 3,
    relative_margin: Annotated[
        float | None,
        typer.Option(help="A negative is less similar than the positive by this share of its similarity."),
    ] = 0.05,
    absolute_margin: Annotated[float | None, typer.Option(help="The same as a difference.")] = None,
    max_score: Annotated[float | None, typer.Option(help="The similarity that a negative has at most.")] = None,
    min_score: Annotated[float | None, typer.Option(help="The similarity that a negative has at least.")] = None,
    range_min: Annotated[int, typer.Option(min=0, help="How many of the nearest that are left to pass over.")] = 0,
    range_max: Annotated[
        int | None, typer.Option(min=1, help="How many of the nearest to look at; else by the number of negatives.")
    ] = None,
    no_relative_margin: Annotated[
        bool, typer.Option("--no-relative-margin", help="No share of the positive's similarity is kept away from.")
    ] = False,
    sampling: Annotated[
        str, typer.Option(metavar="top|random", help="Take the nearest of those that are left, or some at random.")
    ] = "top",
    seed: Annotated[int, typer.Option(min=0, help="Of what is random.")] = 0,
    columns: Columns = None,
    split: Split = None,
    quoting: Quoting = None,
    prompt: Prompts = None,
    cache_dir: CacheDir = None,
    replace_negatives: Annotated[
        bool, typer.Option("--replace-negatives", help="Leave out the columns of negatives that the data have.")
    ] = False,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Mine hard negatives for each row, out of the positives of all rows, by the guide.

    A negative is near to the anchor, but less similar than the anchor's least similar positive, by a margin
    (NV-Retriever; sentence-transformers' mine_hard_negatives has the same rules). Copies of an anchor's positives and
    of its own text are never taken. Rows for which too few are found get fewer.
    """
    with only_results_on_stdout(), interruptible(None) as ctrl_c:
        from tqdm import tqdm

        from gist_fast.data.load import load_texts
        from gist_fast.data.names import ANCHOR, GROUP_SUFFIX, GUIDE_SUFFIX, POSITIVE, text_columns
        from gist_fast.data.save import check_folder, save_whole
        from gist_fast.guide_columns.mine import MiningReport, MiningRules, mine_negatives
        from gist_fast.pipeline.models import check_model, load_model
        from gist_fast.runtime.environment import best_device

        rules = MiningRules(
            negatives=negatives,
            range_min=range_min,
            range_max=range_max,
            absolute_margin=absolute_margin,
            relative_margin=None if no_relative_margin else relative_margin,
            max_score=max_score,
            min_score=min_score,
            sampling=sampling,  # type: ignore[arg-type]  # checked there
            seed=seed,
        )
        if guide is not None:
            check_model(guide, "guide", trust_remote_code=trust_remote_code)
        check_folder(output, overwrite)
        dataset = load_texts(data, split=split, columns=parse_columns(columns), quoting=quoting)
        if replace_negatives:
            known = [name for name in text_columns(dataset) if name not in (ANCHOR, POSITIVE)]
            of_them = {*known, *(name + end for name in known for end in (GUIDE_SUFFIX, GROUP_SUFFIX))}
            dataset = dataset.remove_columns([name for name in dataset.column_names if name in of_them])
        report, place = MiningReport(), device or best_device()
        with tqdm(desc="Mining", unit="anchor", disable=quiet) as bar:

            def tell(done: int, total: int) -> None:
                ctrl_c.check()
                bar.total = total
                bar.update(done - bar.n)

            mined = mine_negatives(
                dataset,
                None
                if guide is None
                else load_model(guide, "guide", device=place, trust_remote_code=trust_remote_code),
                prompts=parse_prompts(prompt, dataset.column_names),
                cache_dir=cache_dir,
                device=place,
                report=report,
                on_progress=tell,
                show_progress_bar=not quiet,
                **vars(rules),
            )
        save_whole(mined, output, show_progress_bar=not quiet)
    summary = {"output": str(output), **report.as_dict()}
    if as_json:
        print_json(summary)
        return
    print_facts("Mined negatives", summary)
    print(f"Train on it: data: {{train: {output}}}, loss: {{groups: anchor_or_positive}}")
