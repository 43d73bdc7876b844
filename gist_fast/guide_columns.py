"""The guide's embeddings as columns of a dataset, so that training needs no guide in memory.

A frozen guide gives a text the same embedding in every step and epoch. Here each distinct text is encoded once; the
result stands in a memory-mapped Arrow file beside the dataset's own, named after all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets

from gist_fast.collator import SUFFIX, guide_prompt
from gist_fast.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DTYPES = {"float16": np.float16, "float32": np.float32}


def embed_guide(
    dataset: Dataset,
    guide: SentenceTransformer,
    columns: Sequence[str] | None = None,
    *,
    prompts: dict[str, str] | str | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    dtype: str = "float16",
    cache_dir: str | os.PathLike | None = None,
    show_progress_bar: bool = True,
) -> Dataset:
    """Add the guide's embeddings of the text columns to a dataset.

    Args:
        dataset: with columns of texts.
        guide: reads the raw texts with its own tokenizer.
        columns: the columns to embed, queries first; None for all columns of strings.
        prompts: one prompt for all columns, or by column; None for the guide's own (see
            `gist_fast.collator.guide_prompt`).
        batch_size: texts encoded at a time.
        max_length: tokens of a text that are read; None for the guide's own maximum.
        dtype: what is stored, ``"float16"`` or ``"float32"``.
        cache_dir: where the Arrow files lie; None for a folder in the cache of ``datasets``. A file is used again when
            texts, guide (weights, modules, tokenizer), prompt, maximum length and type
            are the same.
        show_progress_bar: whether to show one while encoding.

    Returns:
        The dataset with a column ``{column}_guide_embedding`` (numpy rows ``[G]``) for each column, rows in order.

    Raises:
        ValueError: the dataset is empty, lacks a column, holds a value that is no text, or already has embeddings of a
            column; the type is unknown.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: got {dtype!r}; one of {', '.join(map(repr, DTYPES))} would do.")
    if len(dataset) == 0:
        raise InputError("dataset: it has no rows.")
    if columns is None:
        columns = [c for c, f in dataset.features.items() if getattr(f, "dtype", None) in ("string", "large_string")]
    for column in columns:
        if column not in dataset.column_names:
            raise InputError(f"columns: the dataset has no {column!r}, only {', '.join(dataset.column_names)}.")
        if column + SUFFIX in dataset.column_names:
            raise InputError(f"columns: {column!r} has guide embeddings already; remove {column + SUFFIX!r} first.")

    folder = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "gist_fast"
    folder.mkdir(parents=True, exist_ok=True)
    weights = _fingerprint(guide)
    known: dict[str, dict[str, np.ndarray]] = {}
    parts = [dataset]
    for position, column in enumerate(columns):
        texts = list(dataset[column])
        _check_texts(texts, column)
        prompt = guide_prompt(guide, column, position, prompts)
        depends_on = [weights, prompt, str(max_length or guide.max_seq_length), dtype, column, *texts]
        path = folder / f"{_digest(depends_on)}.arrow"
        if not path.exists():
            embedded = known.setdefault(prompt, {})
            new = list(dict.fromkeys(t for t in texts if t not in embedded))
            vectors = _encode(guide, new, prompt, max_length, batch_size, show_progress_bar).astype(DTYPES[dtype])
            embedded.update(zip(new, vectors, strict=True))
            _write(path, column + SUFFIX, [embedded[t] for t in texts])
        parts.append(Dataset.from_file(str(path)))
    joined = concatenate_datasets(parts, axis=1)
    # Without the format, rows would come as Python lists, and without the type as float32.
    # The type by its name, because a saved dataset writes its format down as JSON.
    ours = [c for c in joined.column_names if c.endswith(SUFFIX)]
    return joined.with_format("numpy", columns=ours, output_all_columns=True, dtype=dtype)


def _encode(
    guide: SentenceTransformer, texts: list[str], prompt: str, max_length: int | None, batch_size: int, progress: bool
) -> np.ndarray:
    """``[len(texts), G]``, float32."""
    own = guide.max_seq_length
    try:
        if max_length is not None:
            guide.max_seq_length = max_length
        # An empty prompt, not None: with None a default prompt of the guide would come back in.
        return guide.encode(texts, prompt=prompt, batch_size=batch_size, show_progress_bar=progress)
    finally:
        guide.max_seq_length = own


def _check_texts(texts: list, column: str) -> None:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"dataset: row {row}, column {column!r} is {text!r}; a text would do.")


def _write(path: Path, name: str, rows: list[np.ndarray]) -> None:
    """An Arrow stream that ``datasets`` maps into memory; it appears under its name only when it is whole."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    width, kind = len(rows[0]), pa.from_numpy_dtype(rows[0].dtype)
    schema = pa.schema([(name, pa.list_(kind, width))])
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start in range(0, len(rows), 1024):
                values = pa.array(np.concatenate(rows[start : start + 1024]))
                writer.write_batch(pa.record_batch([pa.FixedSizeListArray.from_arrays(values, width)], schema=schema))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _fingerprint(guide: SentenceTransformer) -> str:
    """A digest of the guide's weights and of what it does to a text besides: its modules, its tokenizer, its width."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(guide.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(repr((guide, guide.truncate_dim)).encode())
    digest.update(_tokenizer_rules(guide.tokenizer).encode())
    return digest.hexdigest()


def _tokenizer_rules(tokenizer: Any) -> str:
    """How a tokenizer cuts a text. Only the fast ones can be written down whole; of others, what they print."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return repr((tokenizer, sorted(tokenizer.get_vocab().items())))
    rules = json.loads(backend.to_str())
    # Left over from the last call; the maximum length has its own place in the key.
    return json.dumps({name: rule for name, rule in rules.items() if name not in ("padding", "truncation")})


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        # Lengths, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
