"""The section ``data`` of a configuration to datasets: one, several by name, or a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from gist_fast.config.schema import LEAST_TOKENS
from gist_fast.data.load import load_texts, stream_texts
from gist_fast.data.named import by_name, columns_by_dataset, count_rows
from gist_fast.data.names import text_columns
from gist_fast.data.per_column import check_lengths, check_names, value_for
from gist_fast.runtime.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from sentence_transformers import SentenceTransformer

    from gist_fast.config.schema import SourceConfig
    from gist_fast.data.named import Loaded
    from gist_fast.training.arguments import GISTTrainingArguments

    Sources: TypeAlias = SourceConfig | Mapping[str, SourceConfig]

BY_COLUMN = ("router_mapping", "prompts", "guide_prompts", "max_length", "guide_max_length")
"""Arguments that may be given by column or by dataset."""


def load_sources(sources: Sources, key: str, seed: int = 0, *, endless: bool = False) -> Loaded:
    """Load what ``data.train`` or ``data.eval`` names.

    Args:
        key: that name, for messages.
        seed: of the order in which a stream with a shuffle buffer comes.
        endless: whether a stream begins anew where it ends. A run of a given number of steps is then one epoch of it,
            and is resumed where it was; in a second epoch the trainer could not tell how long the first was.

    Raises:
        InputError: of several datasets one is to be streamed, or `gist_fast.data` refuses one.
    """
    if not isinstance(sources, Mapping):
        return _load(sources, seed, endless)
    from datasets import DatasetDict

    streaming = [name for name, source in sources.items() if source.streaming]
    if streaming:
        raise InputError(
            f"{key}.{streaming[0]}.streaming: one of several datasets cannot be streamed, because batches would no "
            "longer be of one dataset each; leave it out (a saved directory takes no memory either), or put all rows "
            "into one file and stream that."
        )
    return DatasetDict({name: _load(source, seed, endless) for name, source in sources.items()})


def _load(source: SourceConfig, seed: int, endless: bool) -> Dataset | IterableDataset:
    if not source.streaming:
        return load_texts(source.path, columns=source.columns, **source.reading)
    stream = stream_texts(source.path, columns=source.columns, **source.reading)
    if endless:
        stream = stream.repeat(None)
    # After that, so that each time the order is another one.
    return stream.shuffle(seed=seed, buffer_size=source.shuffle_buffer) if source.shuffle_buffer else stream


def with_guide_columns(data: Loaded, guide: SentenceTransformer, arguments: GISTTrainingArguments, key: str) -> Loaded:
    """The datasets with embeddings of the guide; see `gist_fast.embed_guide`.

    Raises:
        InputError: it is a stream; maximum lengths differ by column.
    """
    from datasets import Dataset, DatasetDict

    from gist_fast.guide_columns import embed_guide

    length = arguments.guide_max_length
    if isinstance(length, Mapping):
        raise InputError(
            "guide_max_length: expected one number, because with guide.columns all texts have one maximum length, got "
            f"{dict(length)}."
        )
    embedded = {}
    for name, dataset in by_name(data).items():
        if not isinstance(dataset, Dataset):
            raise InputError(f"guide.columns: {key} is a stream, whose texts are not known beforehand; leave it out.")
        asked = arguments.guide_prompts
        columns = dataset.column_names
        prompts = None if asked is None else {c: value_for(asked, c, name or None) or "" for c in columns}
        embedded[name] = embed_guide(
            dataset,
            guide,
            # Of negatives that it has nothing to say about it reads none.
            columns=None if arguments.mask_negatives else text_columns(dataset)[:2],
            prompts=prompts,
            max_length=length,
            show_progress_bar=not arguments.disable_tqdm,
        )
    return DatasetDict(embedded) if isinstance(data, Mapping) else embedded[""]


def describe(sources: Sources, data: Loaded) -> str:
    """One line about what was loaded."""
    told = []
    named = dict(sources) if isinstance(sources, Mapping) else {"": sources}
    for name, dataset in by_name(data).items():
        rows = count_rows(dataset)
        size = "a stream" if rows is None else f"{rows} rows"
        prefix = f"{name}: " if name else ""
        told.append(f"{prefix}{named[name].path}: {size} of {', '.join(dataset.column_names or [])}")
    return "; ".join(told)


def check_run(arguments: GISTTrainingArguments, train: Loaded, evaluation: Loaded | None) -> None:
    """Refuse settings that do not go with the data.

    Raises:
        InputError: a stream without ``max_steps`` or with a batch sampler; a prompt or a maximum length for a column or
            a dataset that does not exist; a variant of the loss that reads a column which is not there.
    """
    from sentence_transformers.base.sampler import BatchSamplers

    from gist_fast.training.loss_checks import check_data, check_negatives

    if count_rows(train) is None:
        if arguments.max_steps <= 0:
            raise InputError(
                "data.train.streaming: the length of a stream is not known, so training.max_steps must say when to "
                "stop (in place of num_train_epochs)."
            )
        if arguments.batch_sampler != BatchSamplers.BATCH_SAMPLER:
            sampler = getattr(arguments.batch_sampler, "value", arguments.batch_sampler)
            raise InputError(
                f"training.batch_sampler: {sampler} chooses among all rows, and a stream shows them one after the "
                "other; leave out the one or data.train.streaming."
            )
    for key, data in (("data.train", train), ("data.eval", evaluation)):
        negatives = {}
        for name, dataset in by_name(data).items():
            if dataset.column_names is not None:
                full = f"{key}.{name}" if name else key
                check_data(arguments, full, dataset.column_names)
                negatives[full] = text_columns(dataset)[2:]
        if data is train:
            check_negatives(arguments, negatives)
    columns = columns_by_dataset(train, evaluation)
    for name in BY_COLUMN:
        check_names(f"training.{name}", getattr(arguments, name), columns)
        if name.endswith("max_length"):
            check_lengths(f"training.{name}", getattr(arguments, name))
            _check_least(f"training.{name}", getattr(arguments, name))


def _check_least(name: str, setting: Any) -> None:
    """Raise `InputError` where a maximum length leaves no token of a text."""
    if isinstance(setting, Mapping):
        for key, value in setting.items():
            _check_least(f"{name}.{key}", value)
    elif setting is not None and setting < LEAST_TOKENS:
        raise InputError(
            f"{name}: expected at least {LEAST_TOKENS}, as the tokens that begin and end a text count, got {setting}."
        )
