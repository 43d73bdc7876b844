"""What to do about what an inspection found, a sentence a finding."""

from __future__ import annotations

from gist_fast.inspection.batch import Inspection
from gist_fast.inspection.duplicates import Duplicates


def advice(found: Inspection, duplicates: Duplicates | None = None) -> list[str]:
    """Sentences, perhaps none.

    Args:
        found: of a batch.
        duplicates: of more of the data than that batch, where they were looked for.
    """
    among = duplicates or found.duplicates
    told = []
    ties = sum(found.ties.values())
    if among.copied_texts:
        told.append(
            f"{_count(among.copied_texts, 'text stands', 'texts stand')} in more than one row: batch_sampler: "
            "no_duplicates keeps rows that share a text out of one batch."
        )
    if ties:
        told.append(
            f"{_count(ties, 'pair scores', 'pairs score')} exactly as high as the threshold, as another copy of the "
            f"positive does, and {'stays a negative' if ties == 1 else 'stay negatives'}: mask_ties: true drops such "
            "pairs too."
        )
    if among.near_pairs:
        told.append(
            f"{_count(among.near_pairs, 'pair of texts is', 'pairs of texts are')} nearly the same to the guide: a "
            "higher margin drops more of such pairs, and rows of one group (groups) never repel each other."
        )
    if found.rows_emptied:
        told.append(
            f"{_count(found.rows_emptied, 'row is', 'rows are')} left without any negative, and so nearly without "
            f"effect: a lower margin{', training without hard' if found.easy else ''} or a larger batch leaves some."
        )
    if not found.total_dropped and not told:
        told.append("The guide drops nothing here and finds no two texts the same: on such data it changes nothing.")
    return told


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
