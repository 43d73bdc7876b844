"""Models and texts for timing, made on the spot: weights are random, since no cost depends on them.

Lengths do matter, and follow those of short queries and paragraphs: log-normal, most of a dozen to a hundred tokens,
with a tail up to the maximum.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gist_fast.runtime.progress_bars import without_progress_bars

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MAX_TOKENS = 128
LAYERS = 2
WIDTHS = {"cpu": 128, "cuda": 384}
"""By the kind of device: a step of a few hundred texts takes about a second on two cores."""
HEAD_WIDTH = 64
_WORDS = 2000
_MEDIAN_WORDS = {"anchor": 12, "positive": 24}


def texts(count: int, role: str = "positive", seed: int = 0) -> list[str]:
    """`count` different texts of mixed length."""
    generator = random.Random(f"{role} {seed}")
    words = _vocabulary()
    made = []
    for number in range(count):
        length = max(3, min(MAX_TOKENS, round(generator.lognormvariate(0, 0.8) * _MEDIAN_WORDS[role])))
        made.append(" ".join([str(number), *generator.choices(words, k=length)]))
    return made


@functools.cache
def tiny_model() -> SentenceTransformer:
    """The smallest there is, for losses that want a model with a tokenizer and are given embeddings."""
    return build_model(layers=1, width=16, heads=1, seed=0)


def about(device: str) -> str:
    """What `build_model` makes, in words."""
    return f"BERT of {LAYERS} layers, width {_width(device)}, random weights, at most {MAX_TOKENS} tokens"


def _width(device: str) -> int:
    return WIDTHS[device.partition(":")[0]]


def build_model(
    layers: int = LAYERS, width: int | None = None, heads: int | None = None, seed: int = 0, device: str = "cpu"
) -> SentenceTransformer:
    """A fresh BERT with mean pooling in evaluation mode; models of one seed are equal."""
    width = width or _width(device)
    heads = heads or max(1, width // HEAD_WIDTH)
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel, BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *"0123456789", *(f"##{digit}" for digit in range(10)), *_vocabulary()]
    tokenizer = BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, do_lower_case=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = BertModel(
            BertConfig(
                vocab_size=len(pieces),
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                max_position_embeddings=MAX_TOKENS,
                # Wide enough that texts spread out; with the usual 0.02 all of them look alike.
                initializer_range=0.1,
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder)
        with without_progress_bars():
            bert.save_pretrained(parts)
            tokenizer.save_pretrained(parts)
            modules = [Transformer(str(parts), max_seq_length=MAX_TOKENS), Pooling(width)]
        return SentenceTransformer(modules=modules, device=device).eval()


@functools.cache
def _vocabulary() -> list[str]:
    generator = random.Random(0)
    words: set[str] = set()
    while len(words) < _WORDS:
        words.add("".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(3, 9))))
    return sorted(words)
