"""Files, saved directories and names on a hub to datasets of texts with known columns."""

from gist_fast.data.load import load_texts, stream_texts

__all__ = ["load_texts", "stream_texts"]
