"""Published objectives by name, each as the settings of the loss that it comes to.

`preset` gives the settings; those passed beside it win. In the YAML, ``loss: {preset: qwen3, ..}`` does the same.
What a paper leaves open is left at this package's default: the temperature of Qwen3-Embedding, Gemini Embedding and
EmbeddingGemma, and the Matryoshka dims, which depend on the student.
"""

from __future__ import annotations

from typing import Any, get_args

from gist_fast.functional.choices import Preset
from gist_fast.functional.loss_config import check_setting
from gist_fast.functional.values import check_choice

_GEMINI: dict[str, Any] = {
    "directions": ["query_to_doc"],
    "negatives_scope": "own",
    "groups": "anchor_or_positive",
}
PRESETS: dict[Preset, dict[str, Any]] = {
    # arXiv 2402.16829; sentence-transformers' GISTEmbedLoss.
    "gistembed": {"temperature": 0.01},
    # arXiv 2506.05176. The student's own scores mask, 0.1 above the positive's; a document that is the positive's text
    # counts nowhere; mined negatives are their own query's alone.
    "qwen3": {
        "self_guided": True,
        "margin": -0.1,
        "directions": ["query_to_doc", "query_to_query", "doc_to_doc"],
        "negatives_scope": "own",
        "groups": "positive",
    },
    # arXiv 2503.07891: rows with the same query or the same positive are no negatives of each other.
    "gemini": _GEMINI,
    # arXiv 2509.20354, without its distillation: the mined negative weighs exp(5 sim) more, and embeddings are spread.
    "embeddinggemma": {
        **_GEMINI,
        "hardness_mode": "hard_negatives",
        "hardness_strength": 5.0,
        "spread_out_weight": 1.0,
    },
    # arXiv 2308.03281.
    "gte": {
        "temperature": 0.01,
        "directions": ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"],
    },
    # sentence-transformers 6.2's MultipleNegativesRankingLoss, whose scale is 20.
    "mnrl": {"temperature": 0.05, "directions": ["query_to_doc"]},
}


def preset(name: Preset, **settings: Any) -> dict[str, Any]:
    """The settings of a published objective, as keyword arguments of the losses and of `GISTTrainingArguments`.

    Args:
        name: ``"gistembed"``, ``"qwen3"``, ``"gemini"``, ``"embeddinggemma"``, ``"gte"`` or ``"mnrl"``.
        settings: others, which win; what is no setting of a loss, as an argument of a trainer, is passed through.

    Raises:
        ValueError: there is no such preset, or a setting cannot have that value.
        TypeError: a setting is of a wrong type.

    Example:
        >>> preset("mnrl", temperature=0.02)
        {'temperature': 0.02, 'directions': ['query_to_doc']}
    """
    check_choice("preset", name, get_args(Preset))
    for key, value in settings.items():
        check_setting(key, value)
    found = {key: list(value) if isinstance(value, list) else value for key, value in PRESETS[name].items()}
    return {**found, **settings}
