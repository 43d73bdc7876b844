"""The loss that a trainer's arguments describe, checked as a whole before models are loaded and texts embedded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch

from gist_fast.data.named import by_name
from gist_fast.data.names import (
    GUIDE_SUFFIX,
    MARGIN,
    NO_TEXT,
    group_columns,
    groups_of,
    holds_texts,
    is_text_role,
    role_order,
)
from gist_fast.functional.backends import choose_backend
from gist_fast.runtime.errors import InputError
from gist_fast.training.column_checks import LABELS
from gist_fast.training.temperature_schedule import check_schedule

if TYPE_CHECKING:
    from datasets import Dataset

    from gist_fast.functional.loss_config import LossConfig
    from gist_fast.functional.loss_settings import LossSettings
    from gist_fast.training.arguments import GISTTrainingArguments

logger = logging.getLogger(__name__)


def check_loss_settings(arguments: GISTTrainingArguments, *, guided: bool, guide: bool, width: int | None) -> None:
    """Raise what the loss itself would, but now.

    Args:
        guided: whether there is a guide of any kind.
        guide: whether it is a model of its own.
        width: of the student's embeddings; None where it is not known yet.

    Raises:
        ValueError: an argument is out of range, or makes no sense together with another; or TypeError, of a wrong type.
    """
    config = arguments.loss_config(guided=guided)
    config.check_models(guide=guide, width=width)
    check_schedule(arguments)
    if config.backend != "auto":
        choose_backend(config.backend, arguments.device, arguments.half_precision or torch.float32)


def check_data(arguments: GISTTrainingArguments, key: str, columns: Sequence[str]) -> None:
    """Raise unless a dataset brings what the loss reads from it, and nothing that other settings alone read.

    Args:
        key: which dataset, for the message.
        columns: all of its columns.

    Raises:
        InputError: it lacks a column of groups or margins, or has one that the loss does not ask for; its negatives
            are not those that the loss is about.
    """
    texts = sorted(filter(is_text_role, columns), key=role_order)
    groups = group_columns(columns)
    if arguments.groups == "column":
        groups_of(texts, columns, key)
        groups = []
    for name, needed, setting in (
        *((name, False, "groups: 'column'") for name in groups),
        (MARGIN, arguments.row_margins, "row_margins: True"),
    ):
        if needed and name not in columns:
            raise InputError(
                f"{setting}, and {key} has no column {name!r}; its columns are {', '.join(columns)}. Add it, or name "
                f"the one that is meant under the data's 'columns' ({name}: ...)."
            )
        if not needed and name in columns:
            raise InputError(
                f"{key}: has a column {name!r}, and the loss does not ask for it. Set {setting}, or leave the column "
                "out of the data's 'columns'."
            )
    check_scopes_of(arguments, key, texts[2:])


def check_negatives(config: LossSettings, negatives: Mapping[str, Sequence[str]]) -> None:
    """Raise where the loss is about mined negatives, and no dataset that is trained on has any.

    Args:
        config: of the loss, or arguments that have its settings.
        negatives: of each dataset, by what it is called in the message, its columns of negatives.
    """
    if not negatives or any(negatives.values()):
        return
    where = " and ".join(negatives)
    known = ("negatives_scope", "all"), ("mask_negatives", True)
    for name, without in known:
        if (value := getattr(config, name)) != without:
            raise InputError(f"{name}: expected {without!r}, as {where} has no column of negatives, got {value!r}.")
    if config.hardness_mode == "hard_negatives":
        raise InputError(
            f"hardness_mode: expected 'in_batch_negatives', as {where} has no column of negatives, got "
            "'hard_negatives'."
        )


def check_scopes_of(config: LossSettings, where: str, negatives: Sequence[str]) -> None:
    """Raise where a dataset has negatives, but not a column for each scope.

    Args:
        where: what to call the dataset in the message.
        negatives: its columns of negatives.
    """
    scopes = config.negatives_scope
    if not isinstance(scopes, str) and len(scopes) != len(negatives) > 0:
        raise InputError(
            f"negatives_scope: expected {len(negatives)}, one for each column of negatives that {where} has, got "
            f"{len(scopes)}: {list(scopes)}."
        )


def check_datasets(train: Any, evaluation: Any, configs_of: Callable[[str], Sequence[LossConfig]]) -> None:
    """Raise where the datasets of a trainer, as far as they can be looked into, do not have the negatives or the groups
    that their losses are about.

    Args:
        train, evaluation: a dataset, several by name, or None.
        configs_of: of the guided losses that a dataset of that name has.
    """
    from datasets import Dataset

    for argument, source in (("train_dataset", train), ("eval_dataset", evaluation)):
        negatives_of: dict[int, tuple[LossConfig, dict[str, Sequence[str]]]] = {}
        all_known = True
        for name, dataset in by_name(source).items():
            if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
                all_known = False
                continue
            names = dataset.column_names
            texts = [c for c in names if c not in ("dataset_name", *LABELS) and holds_texts(dataset, c)]
            where = f"{argument}[{name!r}]" if name else argument
            for config in configs_of(name):
                if config.groups == "column" and len(texts) > 1:
                    groups_of(texts, names, where)
                check_scopes_of(config, where, texts[2:])
                check_missing_negatives(config, where, dataset, texts[2:])
                negatives_of.setdefault(id(config), (config, {}))[1][where] = texts[2:]
        if argument == "train_dataset" and all_known:
            for config, negatives in negatives_of.values():
                check_negatives(config, negatives)


def check_missing_negatives(config: LossSettings, where: str, dataset: Dataset, negatives: Sequence[str]) -> None:
    """Say how many rows have fewer negatives than others, and raise where the loss needs as many of each."""
    missing = {name: count for name in negatives if (count := _rows_without(dataset, name))}
    if not missing:
        return
    told = ", ".join(f"{name!r} in {count}" for name, count in missing.items())
    logger.info("%s: of %d rows, some have no negative: %s", where, len(dataset), told)
    scope = config.scopes_of(len(negatives))
    if not isinstance(scope, str):
        expected, setting = "'all' or 'own'", "negatives_scope"
    elif scope == "all" and config.gather_across_devices:
        expected, setting = "False", "gather_across_devices"
    elif scope == "all" and config.hardness_mode in ("in_batch_negatives", "hard_negatives"):
        expected, setting = "'all_negatives' or None", "hardness_mode"
    elif scope == "all" and config.pairs_positives_with_negatives:
        expected, setting = "no 'doc_to_doc'", "directions"
    else:
        return
    hint = " With negatives_scope: own it is possible." if scope == "all" else ""
    raise InputError(
        f"{setting}: expected {expected} where rows have different numbers of negatives, got "
        f"{getattr(config, setting)!r}; in {where} there is none in {told} rows.{hint}"
    )


def _rows_without(dataset: Dataset, column: str) -> int:
    tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=16384)
    return sum(pc.sum(pc.equal(table.column(column), NO_TEXT)).as_py() or 0 for table in tables)


def check_self_guiding(arguments: GISTTrainingArguments, *, carries_embeddings: bool, without_guide: bool) -> None:
    """Raise where the student is to guide itself and something else is to decide.

    Args:
        carries_embeddings: whether the training data carry a guide's embeddings.
        without_guide: whether training without any guide was asked for.

    Raises:
        ValueError: either is so.
    """
    for found, where in (
        (carries_embeddings, f"the dataset carries embeddings of a guide (columns ending in {GUIDE_SUFFIX})"),
        (without_guide, "training without any guide was asked for (guided=False, or 'guide: null' in a configuration)"),
    ):
        if arguments.self_guided and found:
            raise InputError(f"self_guided: expected False where {where}, got True. Leave out one of the two.")
