"""``gist-fast inspect``: which pairs of a batch the guide drops, with their texts, and which texts are the same."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gist_fast.cli.ctrl_c import CtrlC, interruptible
from gist_fast.cli.output import (
    Columns,
    Device,
    Json,
    Quoting,
    Report,
    Split,
    TrustRemoteCode,
    check_report,
    note,
    only_results_on_stdout,
    parse_columns,
    print_json,
    print_table,
)
from gist_fast.functional.loss_config import help_of

if TYPE_CHECKING:
    from datasets import Dataset

    from gist_fast.inspection import Duplicates, Encode, Inspection

CELL = 240
"""Characters of a text in a table of the terminal."""
BATCH = "batch"


def _as_in_training(setting: str, *names: str) -> Any:
    """An option that is a setting of the loss, with its help."""
    return typer.Option(*names, help=f"As in training. {help_of(setting)}")


def inspect(
    data: Annotated[str, typer.Option(help="Texts: a file, a saved directory or a hub name.")],
    guide: Annotated[
        str | None, typer.Option(help="The guide model; not needed where the data carry its embeddings.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="A student, to show its similarities beside the guide's.")] = None,
    columns: Columns = None,
    split: Split = None,
    quoting: Quoting = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 64,
    batch: Annotated[int, typer.Option(help="Which batch, in the order of the data; the first is 1.")] = 1,
    margin: Annotated[float, _as_in_training("margin")] = 0.0,
    margin_strategy: Annotated[str, _as_in_training("margin_strategy")] = "absolute",
    mask_ties: Annotated[bool, _as_in_training("mask_ties", "--mask-ties")] = False,
    groups: Annotated[str | None, _as_in_training("groups")] = None,
    no_mask_negatives: Annotated[
        bool, typer.Option("--no-mask-negatives", help="The guide drops no mined negatives: mask_negatives: false.")
    ] = False,
    negatives_scope: Annotated[
        str, typer.Option(metavar="all|own|LIST", help=f"As in training. {help_of('negatives_scope')}")
    ] = "all",
    row_margins: Annotated[bool, _as_in_training("row_margins", "--row-margins")] = False,
    no_contrast_anchors: Annotated[
        bool, typer.Option("--no-contrast-anchors", help="Anchors are not compared: contrast_anchors: false.")
    ] = False,
    no_contrast_positives: Annotated[
        bool, typer.Option("--no-contrast-positives", help="Positives are not compared: contrast_positives: false.")
    ] = False,
    directions: Annotated[
        str | None, typer.Option(metavar="D,D,...", help=f"As in training. {help_of('directions')}")
    ] = None,
    hard: Annotated[bool, _as_in_training("hard", "--hard")] = False,
    margins: Annotated[
        str | None, typer.Option(metavar="M,M,...", help="Margins to try besides; by default -0.1 to 0.2 in 7 steps.")
    ] = None,
    duplicates: Annotated[
        str,
        typer.Option(
            metavar="batch|all|N",
            help="Where to look for texts that are the same: the batch, all rows, or the first N.",
        ),
    ] = BATCH,
    near: Annotated[
        float, typer.Option(help="Texts of a higher cosine similarity to the guide are nearly the same.")
    ] = 0.95,
    guide_prompt: Annotated[str | None, typer.Option(help="Put before each text for the guide; else its own.")] = None,
    guide_max_length: Annotated[int | None, typer.Option(min=1, help="Tokens that the guide reads.")] = None,
    student_prompt: Annotated[str | None, typer.Option(help="Put before each text for the student.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Rows of a table, and entries of a list in JSON; 0 for all.")] = 20,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    report: Report = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
    as_json: Json = False,
) -> None:
    """Show which pairs of one batch the guide drops as false negatives, what other margins would drop, and duplicates.

    A pair is dropped where the guide finds it closer than the row's own anchor and positive (less the margin). The
    blocks: ap, anchor with other positives; aa, anchor with other anchors; pp, positive with other positives; pa,
    positive with other anchors; an_1 and on, anchor with negatives; pn_1 and on, positive with negatives. The pairs
    farthest above their threshold come first. Rows count from 1.
    """
    done: list[str] = []
    with only_results_on_stdout(), interruptible(None if report is None else done) as ctrl_c:
        from gist_fast.data.load import load_texts
        from gist_fast.pipeline.model_checks import check_length
        from gist_fast.pipeline.models import check_model, reader
        from gist_fast.pipeline.saved_model import SavedModel

        tried = _margins(margins)
        rows = _duplicate_rows(duplicates)
        roles = parse_columns(columns)
        _check_beside(roles, groups, row_margins)
        if hard and student is None:
            raise typer.BadParameter("--hard goes by the student's ranking; give --student too.")
        check_report(report, overwrite)
        for role, name in (("guide", guide), ("student", student)):
            if name is not None:
                check_model(name, role, trust_remote_code=trust_remote_code)
        if guide is not None:
            check_length("--guide-max-length", guide_max_length, SavedModel(guide, "guide"))
        dataset = load_texts(data, split=split, columns=roles, quoting=quoting)
        from gist_fast.inspection import inspect_batch
        from gist_fast.inspection.advice import advice
        from gist_fast.report.inspection import PAIRS
        from gist_fast.runtime.environment import best_device

        make = functools.partial(
            reader, device=device, trust_remote_code=trust_remote_code, before_forward=ctrl_c.check
        )
        read = None if guide is None else make(guide, "guide", guide_prompt, max_length=guide_max_length)
        # A page shows its own number of pairs, whatever the terminal shows.
        most = None if limit == 0 else max(limit, PAIRS if report is not None else 0)
        found = inspect_batch(
            dataset,
            read,
            None if student is None else make(student, "student", student_prompt),
            batch=batch,
            batch_size=batch_size,
            margin=margin,
            margin_strategy=margin_strategy,
            margins=tried,
            near=near,
            most=most,
            mask_ties=mask_ties,
            groups=groups,
            mask_negatives=not no_mask_negatives,
            negatives_scope=negatives_scope.split(",") if "," in negatives_scope else negatives_scope,
            row_margins=row_margins,
            contrast_anchors=not no_contrast_anchors,
            contrast_positives=not no_contrast_positives,
            directions=None if directions is None else [name.strip() for name in directions.split(",")],
            hard=hard,
        )
        place = device or best_device()
        same = None
        if duplicates != BATCH:
            options = {"near": near, "rows": rows, "most": most, "device": place}
            same = _find_duplicates(dataset, read, ctrl_c, options)
        told = advice(found, same)
        if report is not None:
            from gist_fast.report.facts import machine_facts
            from gist_fast.report.inspection import inspection_page
            from gist_fast.report.page import write_page

            asked = {
                "mask_ties": mask_ties, f"groups {groups}": groups, "row_margins": row_margins, "hard": hard,
                "mask_negatives: false": no_mask_negatives,
                f"negatives_scope {negatives_scope}": negatives_scope != "all",
            }  # fmt: skip
            facts = {
                "data": data,
                "rows": f"{found.first_row} to {found.last_row} of {len(dataset)}",
                "guide": guide or "its embeddings in the data",
                "student": student,
                "margin": f"{margin:g}, {margin_strategy}",
                "variants": ", ".join(name for name, given in asked.items() if given),
                **machine_facts(place),
            }
            ctrl_c.check()
            said = {name: fact for name, fact in facts.items() if fact}
            write_page(report, inspection_page(found, said, same), overwrite=overwrite)
            done.append(str(report))
    if as_json:
        print_json({**_as_dict(found, same, limit or None), "advice": told, "report": report and str(report)})
        return
    _print(found, same or found.duplicates, data, limit or None, told)
    if report is not None:
        print(str(report))


def _margins(text: str | None) -> list[float]:
    from gist_fast.inspection.margins import MARGINS, check_margins
    from gist_fast.runtime.errors import InputError, shown

    if text is None:
        return list(MARGINS)
    try:
        margins = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--margins: expected numbers such as 0,0.05,0.1, got {shown(text)}.") from None
    return check_margins(margins, "--margins")


def _check_beside(roles: dict[str, str] | list[str] | None, groups: str | None, row_margins: bool) -> None:
    """Refuse a group or a margin a row that would be read and ignored, and options that lack theirs."""
    from gist_fast.data.names import GROUP, GROUP_SUFFIX, MARGIN, POSITIVE, is_group_role

    named = roles if isinstance(roles, dict) else {}
    of_groups = [role for role in named if is_group_role(role)]
    by_column = groups == "column"
    if by_column and not {GROUP, POSITIVE + GROUP_SUFFIX}.intersection(of_groups):
        raise typer.BadParameter(f"--groups column needs a column to read; give --columns {GROUP}=COLUMN.")
    options = [(role, by_column, "--groups column") for role in of_groups]
    for role, wanted, option in (*options, (MARGIN, row_margins, "--row-margins")):
        if role in named and not wanted:
            raise typer.BadParameter(
                f"{role}={named[role]} would be ignored; give {option} too, or leave it out.", param_hint="--columns"
            )
        if wanted and role not in named:
            raise typer.BadParameter(f"{option} needs a column to read; give --columns {role}=COLUMN.")


def _duplicate_rows(text: str) -> int | None:
    """How many rows to look at; None for all, or where it is the batch."""
    from gist_fast.runtime.errors import InputError, shown

    if text in (BATCH, "all"):
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= 2):
        raise InputError(f"--duplicates: expected batch, all, or a number of rows of at least 2, got {shown(text)}.")
    return int(text)


def _find_duplicates(dataset: Dataset, guide: Encode | None, ctrl_c: CtrlC, options: dict[str, Any]) -> Duplicates:
    from tqdm.auto import tqdm

    from gist_fast.inspection import find_duplicates

    rows = options["rows"]
    note("Comparing the texts of all rows." if rows is None else f"Comparing the texts of the first {rows} rows.")
    with tqdm(desc="Comparing", unit="tile", disable=None, file=sys.stderr) as bar:

        def on_progress(done: int, tiles: int) -> None:
            ctrl_c.check()
            bar.total = tiles
            bar.update(done - bar.n)

        return find_duplicates(dataset, guide, on_progress=on_progress, **options)


def _as_dict(found: Inspection, same: Duplicates | None, limit: int | None) -> dict[str, Any]:
    among = asdict(same or found.duplicates)
    return {
        "first_row": found.first_row,
        "last_row": found.last_row,
        "dropped": found.total_dropped,
        "share": found.share_dropped(),
        "rows_without_a_negative": found.rows_emptied,
        "student_above": found.student_above,
        "blocks": _blocks(found),
        "pairs": [asdict(pair) for pair in found.dropped[:limit]],
        "margins": [
            {
                "strategy": outcome.strategy,
                "margin": outcome.margin,
                "share": outcome.share(),
                "blocks": {block: outcome.share(block) for block in outcome.compared},
                "rows_without_a_negative": outcome.rows_emptied,
            }
            for outcome in found.margins
        ],
        "duplicates": {
            **among,
            "copies": among["copies"][:limit],
            "pairs": among["pairs"][:limit],
        },
    }


def _blocks(found: Inspection) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "compared": compared,
            "dropped": found.dropped_in(name),
            "share": found.share_dropped(name),
            "ties": found.ties[name],
            **({} if found.easy is None else {"easy": found.easy[name]}),
        }
        for name, compared in found.compared.items()
    }


def _print(found: Inspection, same: Duplicates, data: str, limit: int | None, told: list[str]) -> None:
    from gist_fast.report.inspection import clipped, margin_table, near_rows, places

    head = ["block", "pairs compared", "dropped", "share", *(["easy"] if found.easy is not None else [])]
    blocks = [
        (name, block["compared"], block["dropped"], f"{block['share']:.2%}", block.get("easy"))[: len(head)]
        for name, block in _blocks(found).items()
    ]
    print_table(f"Rows {found.first_row} to {found.last_row} of {data}", head, blocks)
    _print_dropped(found, limit, functools.partial(clipped, most=CELL))
    for strategy in dict.fromkeys(outcome.strategy for outcome in found.margins):
        table = margin_table(strategy, [outcome for outcome in found.margins if outcome.strategy == strategy])
        print_table(table.caption, table.columns, table.rows)
    if same.copies:
        copies = [(copy.rows, clipped(copy.text, CELL), places(copy)) for copy in same.copies[:limit]]
        title = f"Texts of more than one row: {len(copies)} of {same.copied_texts}, among {same.rows} rows"
        print_table(title, ("rows", "text", "row and column"), copies)
    if same.pairs:
        pairs = near_rows(same.pairs[:limit], CELL)
        title = (
            f"Nearly the same (above {same.near:g}): {len(pairs)} of {same.near_pairs} pairs, among {same.rows} rows"
        )
        print_table(title, ("guide", "row", "text", "with", "other text"), pairs)
    for sentence in told:
        print(sentence)


def _print_dropped(found: Inspection, limit: int | None, shown: Callable[[str], str]) -> None:
    if not found.total_dropped:
        print("The guide drops no pair of this batch.")
        return
    head = ["block", "row", "with", "text", "other text", "guide", "threshold", "student", "ranks"]
    width = len(head) if found.student_above is not None else head.index("student")
    rows = []
    for pair in found.dropped[:limit]:
        numbers = (pair.guide, pair.threshold, pair.student, pair.student_ranks)
        rows.append((pair.block, pair.row, pair.other_row, shown(pair.text), shown(pair.other_text), *numbers)[:width])
    print_table(f"Dropped pairs: {len(rows)} of {found.total_dropped}", head[:width], rows)
    if found.student_above is not None:
        print(
            f"The student ranks {found.student_above} of the {found.total_dropped} dropped pairs above the row's own "
            "positive."
        )
