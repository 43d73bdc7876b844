"""What a guide does to data: the pairs it drops, what each margin would drop, and the texts that it finds the same."""

from gist_fast.inspection.batch import DroppedPair, Encode, Inspection, inspect_batch, inspect_rows
from gist_fast.inspection.duplicates import Copied, Duplicates, NearPair, find_duplicates
from gist_fast.inspection.margins import MARGINS, MarginOutcome, check_margins

LADDER = MARGINS
"""Its earlier name."""

__all__ = [
    "LADDER",
    "MARGINS",
    "Copied",
    "DroppedPair",
    "Duplicates",
    "Encode",
    "Inspection",
    "MarginOutcome",
    "NearPair",
    "check_margins",
    "find_duplicates",
    "inspect_batch",
    "inspect_rows",
]
