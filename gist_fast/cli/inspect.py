"""``gist-fast inspect``: which pairs of a batch the guide drops, with their texts."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gist_fast.cli.output import Columns, Json, only_results_on_stdout, parse_columns, print_json, print_table

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from gist_fast.inspection import Encode


def inspect(
    data: Annotated[str, typer.Option(help="Texts: a file, a saved directory or a hub name.")],
    guide: Annotated[
        str | None, typer.Option(help="The guide model; not needed where the data carry its embeddings.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="A student, to show its similarities beside the guide's.")] = None,
    columns: Columns = None,
    split: Annotated[str | None, typer.Option(help="Split of the data.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 64,
    batch: Annotated[int, typer.Option(help="Which batch, in the order of the data; the first is 1.")] = 1,
    margin: Annotated[float, typer.Option(help="Taken off the threshold, as in training.")] = 0.0,
    margin_strategy: Annotated[str, typer.Option(help="absolute or relative.")] = "absolute",
    guide_prompt: Annotated[str | None, typer.Option(help="Put before each text for the guide; else its own.")] = None,
    guide_max_length: Annotated[int | None, typer.Option(min=1, help="Tokens that the guide reads.")] = None,
    student_prompt: Annotated[str | None, typer.Option(help="Put before each text for the student.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows of the table, and pairs of the JSON; 0 for all.")] = 20,
    device: Annotated[str | None, typer.Option(help="cuda, cpu and so on; else the best there is.")] = None,
    as_json: Json = False,
) -> None:
    """Show which pairs of one batch the guide drops as false negatives.

    A pair is dropped where the guide finds it closer than the row's own anchor and positive (less the margin). The
    blocks: ap, anchor with other positives; aa, with other anchors; pp, positive with other positives; an_1 and on,
    anchor with negatives. The pairs farthest above their threshold come first. Rows count from 1.
    """
    with only_results_on_stdout():
        from gist_fast.cli.models import check_model
        from gist_fast.data import load_texts

        for role, name in (("guide", guide), ("student", student)):
            if name is not None:
                check_model(name, role)
        dataset = load_texts(data, split=split, columns=parse_columns(columns))
        from gist_fast.inspection import inspect_batch

        found = inspect_batch(
            dataset,
            None if guide is None else _guide(guide, guide_prompt, guide_max_length, device),
            None if student is None else _student(student, student_prompt, device),
            batch=batch,
            batch_size=batch_size,
            margin=margin,
            margin_strategy=margin_strategy,
        )
    shown = found.dropped[: limit or None]
    blocks = {
        name: {"compared": compared, "dropped": found.dropped_in(name), "share": found.share_dropped(name)}
        for name, compared in found.compared.items()
    }
    if as_json:
        pairs: list[dict[str, Any]] = [asdict(pair) for pair in shown]
        print_json(
            {
                "first_row": found.first_row,
                "last_row": found.last_row,
                "dropped": len(found.dropped),
                "share": found.share_dropped(),
                "blocks": blocks,
                "pairs": pairs,
            }
        )
        return
    print_table(
        f"Rows {found.first_row} to {found.last_row} of {data}",
        ("block", "pairs compared", "dropped", "share"),
        [(name, counts["compared"], counts["dropped"], f"{counts['share']:.2%}") for name, counts in blocks.items()],
    )
    if not found.dropped:
        typer.echo("The guide drops no pair of this batch.")
        return
    head = ["block", "row", "with", "text", "other text", "guide", "threshold"]
    print_table(
        f"Dropped pairs: {len(shown)} of {len(found.dropped)}",
        [*head, "student"] if student else head,
        [
            (pair.block, pair.row, pair.other_row, pair.text, pair.other_text, pair.guide, pair.threshold)
            + ((pair.student,) if student else ())
            for pair in shown
        ],
    )


def _guide(name: str, prompt: str | None, max_length: int | None, device: str | None) -> Encode:
    """The guide, reading texts as it does in training; loaded at its first use, after the cheaper checks."""
    from gist_fast.cli.models import load_model
    from gist_fast.collator import guide_prompt

    @functools.cache
    def model() -> SentenceTransformer:
        loaded = load_model(name, "guide", device=device)
        if max_length is not None:
            loaded.max_seq_length = max_length
        return loaded

    def encode(texts: list[str], column: str, position: int) -> Any:
        own = guide_prompt(model(), column, position, prompt)
        # An empty prompt, not None, for which encode would take the model's default one.
        return model().encode(texts, prompt=own, convert_to_tensor=True, show_progress_bar=False)

    return encode


def _student(name: str, prompt: str | None, device: str | None) -> Encode:
    from gist_fast.cli.models import load_model

    model = functools.cache(lambda: load_model(name, "student", device=device))

    def encode(texts: list[str], column: str, position: int) -> Any:
        return model().encode(texts, prompt=prompt, convert_to_tensor=True, show_progress_bar=False)

    return encode
