"""Files, saved directories and names on a hub to datasets of texts with known columns."""

from gist_fast.data.embedded_rows import read_as_stored, with_name, without_embeddings
from gist_fast.data.load import load_texts, stream_texts
from gist_fast.data.names import guide_columns, text_columns

__all__ = [
    "guide_columns",
    "load_texts",
    "read_as_stored",
    "stream_texts",
    "text_columns",
    "with_name",
    "without_embeddings",
]
