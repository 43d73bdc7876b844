"""What the server behind `isolated` imports before it forks. Nothing may be computed here: threads die of it."""

import sentence_transformers  # noqa: F401
import torch  # noqa: F401

import gist_fast.backends.tiled
import gist_fast.bench.isolated
import gist_fast.function
import gist_fast.losses  # noqa: F401
