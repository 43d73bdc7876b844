"""What a guide does to a batch and to the data, as a page, or as sections of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gist_fast.inspection.advice import advice
from gist_fast.inspection.batch import Inspection
from gist_fast.inspection.duplicates import MOST_ROWS, Copied, Duplicates, NearPair
from gist_fast.inspection.margins import MarginOutcome
from gist_fast.report.page import Picture, Section, Table, make_page
from gist_fast.report.plots import legend_below, line_styles, narrow, plain_numbers, to_svg

TEXT = 300
"""Characters of a text that are shown."""
PAIRS = 50
"""Pairs of each table."""
_LINES = 7
_BLOCKS = (
    "A block is what is compared: ap anchors with other positives, aa anchors with anchors, pp positives with "
    "positives, pa positives with other anchors, an_1 and on anchors with given negatives, pn_1 and on positives with "
    "those of other rows."
)


_MARGINS = (
    "Absolute: the threshold is the similarity t of the row's own anchor and positive, less the margin. Relative: "
    "t less |t| times the margin. A row without a negative teaches the student nothing."
)


def inspection_page(found: Inspection, facts: Mapping[str, str], duplicates: Duplicates | None = None) -> str:
    """The whole page.

    Args:
        found: of a batch.
        facts: names and values of what was looked at.
        duplicates: of more of the data than that batch, where they were looked for.

    Raises:
        InputError: matplotlib is not installed.
    """
    told = advice(found, duplicates)
    sections = [Section("What to do", "\n\n".join(told))] if told else []
    sections += batch_sections(found)
    sections.append(duplicates_section(duplicates or found.duplicates))
    return make_page("What the guide drops", facts, sections)


def batch_sections(found: Inspection, of: str = "", pairs: int = PAIRS) -> list[Section]:
    """What the guide dropped in a batch, and what each margin would drop.

    Args:
        of: what batch it is, where the page has several.
        pairs: how many dropped pairs to show.
    """
    sections = [
        Section(f"What the guide dropped{_in(of)}", _of_the_batch(found), [_blocks(found)]),
        Section(f"What each margin would drop{_in(of)}", _MARGINS, margin_parts(found.margins)),
    ]
    if found.dropped:
        sections.append(Section(f"Pairs that were dropped{_in(of)}", _of_the_pairs(found), [_pairs(found, pairs)]))
    return sections


def margin_parts(outcomes: Sequence[MarginOutcome]) -> list[Table | Picture]:
    """A picture and a table a strategy."""
    strategies = list(dict.fromkeys(outcome.strategy for outcome in outcomes))
    by_strategy = {name: [outcome for outcome in outcomes if outcome.strategy == name] for name in strategies}
    pictures = [_picture(name, found) for name, found in by_strategy.items() if len(found) > 1]
    return [*pictures, *(margin_table(name, found) for name, found in by_strategy.items())]


def margin_table(strategy: str, outcomes: Sequence[MarginOutcome]) -> Table:
    """The share of each block that each margin of a strategy would drop."""
    blocks = list(outcomes[0].compared)
    rows = []
    for outcome in outcomes:
        shares = [*map(outcome.share, [*blocks, None]), outcome.share_emptied]
        rows.append((f"{outcome.margin:g}", *(f"{share:.2%}" for share in shares)))
    return Table(("margin", *blocks, "all pairs", "rows without a negative"), rows, f"Dropped at a margin, {strategy}")


def duplicates_section(found: Duplicates, of: str = "") -> Section:
    """Texts that are the same, and those that are nearly the same."""
    text = (
        f"Among {found.rows:,} rows: {found.copied_texts:,} texts stand in more than one row, which concerns "
        f"{found.rows_with_copies:,} rows. Of different texts of different rows, {found.near_pairs:,} pairs have a "
        f"cosine similarity above {found.near:g} to the guide, which concerns {found.rows_with_near:,} rows. Such rows "
        "are false negatives of each other."
    )
    parts = []
    if found.copies:
        rows = [(copy.rows, clipped(copy.text), places(copy)) for copy in found.copies[:PAIRS]]
        parts.append(
            Table(("rows", "text", "row and column"), rows, f"The same text: {len(rows)} of {found.copied_texts:,}")
        )
    if found.pairs:
        near = near_rows(found.pairs[:PAIRS])
        head = ("similarity", "row", "text", "other row", "other text")
        parts.append(Table(head, near, f"Nearly the same: {len(near)} of {found.near_pairs:,}"))
    return Section(f"Texts that are the same{_in(of)}", text, parts)


def places(copy: Copied) -> str:
    """Where a text stands: the first rows, with their columns."""
    told = ", ".join(f"{row} {column}" for row, column in copy.places)
    return f"{told} and on" if len(copy.places) == MOST_ROWS else told


def near_rows(pairs: Sequence[NearPair], most: int = TEXT) -> list[tuple[str, ...]]:
    """Of each pair its similarity, and of both texts where they stand and what they say, at most `most` characters."""
    return [
        (
            f"{pair.similarity:.4f}",
            *(f"{pair.row} {pair.column}", clipped(pair.text, most)),
            *(f"{pair.other_row} {pair.other_column}", clipped(pair.other_text, most)),
        )
        for pair in pairs
    ]


def clipped(text: str, most: int = TEXT) -> str:
    """A text in one line, of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"


def _in(of: str) -> str:
    return f" in {of}" if of else ""


def _of_the_batch(found: Inspection) -> str:
    told = (
        f"{_BLOCKS} The guide drops a pair that it finds more similar than the row's own anchor and positive, less the "
        f"margin. Here it dropped {found.total_dropped:,} of {sum(found.compared.values()):,} pairs."
    )
    if found.easy is not None:
        told += (
            f" Of the others, the student already ranks {sum(found.easy.values()):,} below the row's own positive: "
            "these are easy, and hard drops them too."
        )
    return told


def _of_the_pairs(found: Inspection) -> str:
    told = "Those farthest above their threshold; in pp the texts are positives, else the first one is an anchor."
    if found.student_above is not None:
        told += (
            f" The student ranks {found.student_above:,} of the {found.total_dropped:,} dropped pairs above the row's "
            "own positive: kept as negatives, these would have weighed most."
        )
    return told


def _blocks(found: Inspection) -> Table:
    easy = found.easy
    rows = [
        (name, compared, found.counts[name], f"{found.share_dropped(name):.2%}", found.ties[name])
        + (() if easy is None else (easy[name],))
        for name, compared in found.compared.items()
    ]
    head = ("block", "pairs compared", "dropped", "share", "ties kept")
    return Table(head if easy is None else (*head, "easy"), rows, "By block")


def _pairs(found: Inspection, most: int) -> Table:
    with_student = found.student_above is not None
    head = ["block", "row", "text", "with", "other text", "guide", "threshold"]
    head += ["student", "its positive", "ranks"] if with_student else []
    rows = []
    for pair in found.dropped[:most]:
        row: list[object] = [pair.block, str(pair.row), clipped(pair.text)]
        row += [str(pair.other_row), clipped(pair.other_text), f"{pair.guide:.4f}", f"{pair.threshold:.4f}"]
        if with_student and pair.student is not None and pair.student_positive is not None:
            row += [f"{pair.student:.4f}", f"{pair.student_positive:.4f}", pair.student_ranks]
        rows.append(row)
    return Table(head, rows, f"{len(rows)} of {found.total_dropped:,}")


def _picture(strategy: str, outcomes: Sequence[MarginOutcome]) -> Picture:
    margins = [outcome.margin for outcome in outcomes]
    lines = {"all pairs": [100 * outcome.share() for outcome in outcomes]}
    for block in list(outcomes[0].compared)[: _LINES - 1]:
        lines[block] = [100 * outcome.share(block) for outcome in outcomes]
    picture, axes = narrow(list(lines))
    for (name, values), style in zip(lines.items(), line_styles(len(lines)), strict=True):
        axes.plot(margins, values, label=name, **style)
    axes.set_title(f"Dropped by margin, {strategy}", fontsize=11, loc="left")
    axes.set_xlabel("margin")
    axes.set_ylabel("share of the block (%)")
    axes.set_ylim(bottom=0)
    plain_numbers(axes.xaxis, axes.yaxis)
    legend_below(axes)
    first, last = outcomes[0], outcomes[-1]
    alt = (
        f"Share of pairs dropped by margin, {strategy}: from {first.share():.2%} of all pairs at {first.margin:g} to "
        f"{last.share():.2%} at {last.margin:g}."
    )
    return to_svg(picture, alt)
