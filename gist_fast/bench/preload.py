"""What the server behind `isolated` imports before it forks. Nothing may be computed here: threads die of it."""

import sentence_transformers.sentence_transformer.losses  # noqa: F401
import torch  # noqa: F401
from transformers import BertModel, BertTokenizer  # noqa: F401

import gist_fast.bench.isolated
import gist_fast.bench.models
import gist_fast.functional.backends.tiled
import gist_fast.functional.function
import gist_fast.losses  # noqa: F401
