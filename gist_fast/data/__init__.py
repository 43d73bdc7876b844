"""Files, saved directories and names on a hub to datasets of texts with known columns."""

from gist_fast.data.load import load_texts, stream_texts
from gist_fast.moved import names_in

__all__ = ["load_texts", "stream_texts"]

__getattr__ = names_in("gist_fast.data", "load", "names", "embedded_rows")
