"""Which sections and keys a configuration has, as frozen dataclasses and type hints."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any

_FILE = {"path": "file"}
_FILE_OR_NAME = {"path": "file or name"}
_COUNT: dict[str, Any] = {"bounds": {"at_least": 1, "whole": True}}
"""What `gist_fast.functional.values.check_number` is to hold a value to; so for the other settings with bounds."""
LEAST_TOKENS = 3
"""Below, nothing of a text would be read between the tokens that begin and end it; some tokenizers then cut nothing."""
_AT_LEAST_0, _ABOVE_0, _SHARE = {"at_least": 0}, {"above": 0}, {"at_least": 0, "below": 1}
_WHOLE, _SEED = {"at_least": 0, "whole": True}, {"at_least": 0, "below": 2**32, "whole": True}
_BOUNDS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    (_COUNT["bounds"], ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")),
    (_COUNT["bounds"], ("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor")),
    (_COUNT["bounds"], ("ddp_timeout", "ddp_bucket_cap_mb")),
    (_ABOVE_0, ("num_train_epochs", "logging_steps", "save_steps", "adam_epsilon")),
    (_AT_LEAST_0, ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_steps", "eval_delay")),
    (_SHARE, ("adam_beta1", "adam_beta2", "warmup_ratio")),
    (_WHOLE, ("dataloader_num_workers", "save_total_limit")),
    (_SEED, ("seed", "data_seed")),
    ({"at_least": -1, "whole": True}, ("max_steps",)),
)
"""Of the trainer's arguments: those that transformers would find out of range late, not at all, or without a name."""
NOT_OFFERED: dict[str, tuple[Any, str]] = {
    "neftune_noise_alpha": (None, "models of sentence-transformers do not say where noise would enter"),
    "label_smoothing_factor": (0.0, "there are no labels to smooth"),
    "train_sampling_strategy": ("random", "batches are chosen by batch_sampler"),
}
"""The trainer's arguments that would have no effect here, or fail: the only value of each, and why."""
PATH_ARGUMENTS = ("output_dir", "resume_from_checkpoint", "logging_dir")
"""Those of the trainer's arguments that are paths."""


@dataclass(frozen=True)
class ModelConfig:
    """A model to load."""

    path: str = field(metadata=_FILE_OR_NAME)
    """A sentence-transformers directory, or a name on the hub."""
    prompts: str | dict[str, str | dict[str, str]] | None = None
    """What to put before the texts in training: one text for all columns, or one a column; with several datasets also
    one a dataset, or a mapping of columns a dataset."""
    max_seq_length: int | None = field(default=None, metadata={"bounds": {"at_least": LEAST_TOKENS, "whole": True}})
    """Tokens after which a text is cut; None for the model's own."""
    revision: str | None = None
    trust_remote_code: bool = False
    model_kwargs: dict[str, Any] | None = None
    """Passed to transformers, as ``{attn_implementation: sdpa}``."""


@dataclass(frozen=True)
class LoraConfig:
    """An adapter to train in place of the student's own weights; see ``peft.LoraConfig``."""

    r: int = field(default=16, metadata={"bounds": {"at_least": 1, "below": 2**16, "whole": True}})
    """Rank of the added matrices."""
    alpha: int = field(default=32, metadata=_COUNT)
    """What they are scaled by is alpha / r."""
    dropout: float = field(default=0.0, metadata={"bounds": {"at_least": 0, "below": 1}})
    target_modules: list[str] | str | None = None
    """Names of the layers that get them, as they end, or ``all-linear``; None: those that peft knows for the kind of
    model."""


@dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """The student."""

    lora: LoraConfig | None = None
    """None: all weights are trained."""


@dataclass(frozen=True)
class GuideConfig(ModelConfig):
    """The guide."""

    columns: bool = False
    """Whether to embed all texts before the training begins, and then train without the guide in memory; see
    `gist_fast.embed_guide`."""


@dataclass(frozen=True)
class SourceConfig:
    """Texts to load; the arguments of `gist_fast.data.load_texts`."""

    path: str = field(metadata=_FILE_OR_NAME)
    split: str | None = None
    name: str | None = None
    columns: dict[str, str] | list[str] | None = None
    quoting: bool | None = None
    """Whether a cell may stand in double quotes; null: in a .csv file it may, in a .tsv file it may not."""
    streaming: bool = False
    """Whether to read the rows as they are needed, in their order; see `gist_fast.data.stream_texts`."""
    shuffle_buffer: int | None = field(default=None, metadata=_COUNT)
    """Rows of a stream that are held, to draw the next one among them; None: the order of the file."""

    @property
    def reading(self) -> dict[str, Any]:
        """How its rows are found and read, as arguments of `gist_fast.data.load_texts` and its like."""
        return {"split": self.split, "name": self.name, "quoting": self.quoting}


@dataclass(frozen=True)
class DataConfig:
    """What to train on, and what to take an evaluation loss on: a source, or several by name."""

    train: SourceConfig | dict[str, SourceConfig]
    eval: SourceConfig | dict[str, SourceConfig] | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure the student by, before, during and after training.

    Any of: retrieval (``queries``, ``corpus`` and ``relevant`` together, or ``pairs``), ``triplet``, ``sts`` and
    ``pair_classification``.
    """

    queries: str | None = field(default=None, metadata=_FILE)
    corpus: str | None = field(default=None, metadata=_FILE)
    relevant: str | None = field(default=None, metadata=_FILE)
    pairs: SourceConfig | None = None
    """Each anchor's positive is its relevant document; the positives together are the corpus."""
    triplet: SourceConfig | None = None
    """How often an anchor is closer to its positive than to its negative."""
    sts: SourceConfig | None = None
    """Pairs with a score (columns sentence1, sentence2, score): how well the similarity follows it."""
    pair_classification: SourceConfig | None = None
    """Pairs with a label (columns sentence1, sentence2, label), 1 or 0: how well the similarity tells them apart."""
    primary: str | None = None
    """Whose score is ``sequential_score``, where several are given: ``retrieval``, ``triplet``, ``sts`` or
    ``pair_classification``; None: the first of these that is given."""
    batch_size: int = field(default=64, metadata=_COUNT)
    before: bool = True
    """Whether to measure the student before training too."""


PRESET = "preset"
"""A key of the section ``loss`` that is no setting, but stands for several."""
SECTIONS: dict[str, Any] = {
    "student": StudentConfig,
    "guide": GuideConfig,
    "data": DataConfig,
    "loss": None,
    "training": None,
    "evaluation": EvaluationConfig,
}


@functools.cache
def argument_hints() -> dict[str, Any]:
    """Every field of `GISTTrainingArguments` that can be set, and its type."""
    from gist_fast.training.arguments import GISTTrainingArguments

    hints = typing.get_type_hints(GISTTrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(GISTTrainingArguments) if f.init}


def loss_settings() -> list[str]:
    """Those fields that the section ``loss`` takes: what `GISTTrainingArguments` adds, but for how texts are read
    and how a run is resumed."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    from gist_fast.training.arguments import OF_TEXTS

    others = {
        *OF_TEXTS,
        "resume_with_changes",
        *(f.name for f in dataclasses.fields(SentenceTransformerTrainingArguments)),
    }
    return [name for name in argument_hints() if name not in others]


def argument_bounds() -> dict[str, dict[str, Any]]:
    """The bounds of those fields that have some, as `gist_fast.functional.values.check_number` takes them."""
    from gist_fast.training.arguments import GISTTrainingArguments

    fields = dataclasses.fields(GISTTrainingArguments)
    known = {name: bounds for bounds, names in _BOUNDS for name in names}
    return {**known, **{f.name: f.metadata["bounds"] for f in fields if f.metadata.get("bounds")}}


@functools.cache
def known_paths() -> list[tuple[str, ...]]:
    """Every key that a configuration can have, as a path from the top."""
    paths = [("loss", name) for name in (*loss_settings(), PRESET)] + [("training", name) for name in argument_hints()]
    return paths + [(name, *path) for name, section in SECTIONS.items() for path in _paths_of(section)]


def _paths_of(cls: type | None) -> list[tuple[str, ...]]:
    hints = typing.get_type_hints(cls) if cls else {}
    return [(name, *path) for name, hint in hints.items() for path in [(), *_paths_of(dataclass_in(hint))]]


def hint_of(path: tuple[str, ...]) -> Any:
    """The type of the value at a path; None where there is none."""
    if path[0] in ("loss", "training"):
        return argument_hints().get(path[1]) if len(path) == 2 else None
    hint: Any = SECTIONS[path[0]]
    for key in path[1:]:
        below = dataclass_in(hint)
        hints = typing.get_type_hints(below) if below else {}
        # `data.train` may hold several sources, each under a name of the user's.
        hint = below if below is SourceConfig and path[0] == "data" and key not in hints else hints.get(key)
    return hint


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that a hint names, perhaps beside None."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((member for member in members if isinstance(member, type) and dataclasses.is_dataclass(member)), None)
