"""What those settings of the loss may be that are a choice."""

from __future__ import annotations

from typing import Literal

MarginStrategy = Literal["absolute", "relative"]
Groups = Literal["anchor", "positive", "anchor_or_positive", "column"]
Scope = Literal["all", "own"]
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode = Literal["joint", "per_direction"]
Preset = Literal["gistembed", "qwen3", "gemini", "embeddinggemma", "gte", "mnrl"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
Backend = Literal["auto", "triton", "tiled", "reference"]
MaskBits = Literal["auto", "keep", "recompute"]
