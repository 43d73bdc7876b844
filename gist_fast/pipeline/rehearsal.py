"""The start of a training run, tried on a stand-in: what it refuses is refused before a model is loaded.

Settings are refused in many places: by the trainer, by what makes the optimizer and its schedule, by torch, by packages
that are not there, and some by the first step only. So none of these rules is written down here again. A trainer is
made of the very arguments, its batches are counted on the very data, and it makes one step with a tiny model and a few
short texts. Where that fails, it is tried again without one setting after the other, to name the one that is to blame.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import string
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, has_length

from gist_fast.config.schema import argument_hints, loss_settings
from gist_fast.data.named import by_name
from gist_fast.data.names import is_text_role
from gist_fast.runtime.errors import InputError, WrongInput, shown
from gist_fast.runtime.progress_bars import without_progress_bars
from gist_fast.training.resume import random_state_kept
from gist_fast.training.resume_checks import known_early, run_settings
from gist_fast.training.trainer import GISTTrainer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.evaluation import BaseEvaluator

    from gist_fast.config.load import TrainConfig
    from gist_fast.data.named import Loaded
    from gist_fast.training.arguments import GISTTrainingArguments

ROWS, LETTERS, TOKENS = 4, 16, 32
"""Of what the stand-in is trained on: rows of a dataset, letters of a text; and the tokens that it reads at most."""


def rehearse(
    arguments: GISTTrainingArguments,
    train: Loaded,
    evaluation: Loaded | None,
    evaluator: BaseEvaluator | None,
    *,
    guide: bool,
    unguided: bool,
    checkpoint: Path | None = None,
) -> int | None:
    """Start a run, its models excepted, and leave nothing of it behind.

    Args:
        guide: whether a guide is a model of its own.
        unguided: whether training without any guide was asked for.
        checkpoint: where to go on from.

    Returns:
        The batches of an epoch in this process; None of a stream.

    Raises:
        Exception: whatever training raises.
    """
    arguments = copy.copy(arguments)
    # What concerns the real model alone was checked, or is when that is loaded; nothing leaves this machine.
    arguments.max_length = arguments.guide_max_length = None
    arguments.matryoshka_dims = arguments.matryoshka_weights = None
    # Kernels would be compiled for the stand-in's widths; whether the backend runs here was asked already.
    arguments.backend = "reference"
    _check_hub(arguments)
    arguments.push_to_hub = False
    arguments.disable_tqdm = True
    with tempfile.TemporaryDirectory(prefix="gist-fast-") as folder, unnoticed():
        arguments.output_dir = folder
        trainer = _Rehearsal(
            model=copy.deepcopy(stand_in()),
            args=arguments,
            train_dataset=train,
            eval_dataset=evaluation,
            guide=copy.deepcopy(stand_in()) if guide else None,
            guided=False if unguided else None,
            evaluator=evaluator,
        )
        if checkpoint is not None:
            trainer.check_checkpoint(checkpoint, known_early(run_settings(trainer), checkpoint))
        loader = trainer.get_train_dataloader()
        for name, dataset in by_name(evaluation).items():
            trainer.get_eval_dataloader(name or None)
            _check_stream(dataset, arguments)
        trainer.shrink(train, evaluation)
        with contextlib.suppress(_EnoughError):
            trainer.train()
    return len(loader) if has_length(loader) else None


def _check_stream(dataset: Any, arguments: GISTTrainingArguments) -> None:
    """Raise `InputError` where a stream ends before it has filled a batch that it is evaluated in."""
    size = arguments.eval_batch_size
    if hasattr(dataset, "__len__") or not arguments.dataloader_drop_last:
        return
    rows = sum(1 for _ in dataset.take(size))
    if rows < size:
        raise InputError(
            f"per_device_eval_batch_size: expected at most {rows}, the rows of the evaluation dataset, with "
            f"dataloader_drop_last, got {size}, so that there is no batch. Lower it, or set that to false."
        )


def _check_hub(arguments: GISTTrainingArguments) -> None:
    """Raise `InputError` where nothing could be pushed to the hub, as far as this machine can tell."""
    from huggingface_hub import constants, get_token

    if not arguments.push_to_hub:
        return
    lacking = "HF_HUB_OFFLINE unset" if constants.HF_HUB_OFFLINE else None
    if not (arguments.hub_token or get_token()):
        lacking = lacking or "a token (hub_token, or hf auth login)"
    if lacking:
        raise InputError(f"push_to_hub: expected {lacking}, to make the repository when the run starts, got none.")


def blamed(config: TrainConfig, error: Exception, attempt: Callable[[TrainConfig], Any]) -> InputError:
    """The error of an attempt with a configuration as one that names the settings to blame.

    Args:
        attempt: tried again, without one of the settings each time.
    """
    said = " ".join(str(error).split()).removeprefix("training: ") or type(error).__name__
    ours = isinstance(error, WrongInput) and not str(error).startswith("training: ")
    named = said.partition(":")[0]
    if ours:
        return InputError(f"{_section(named)}.{said}" if named.partition(".")[0] in argument_hints() else said)
    names: list[str] = []
    for name in _suspects(config.arguments, said):
        if names and name not in said:
            break
        try:
            with unnoticed():
                attempt(_without(config, name))
            names.append(name)
        except Exception as again:
            if (type(again), str(again)) != (type(error), str(error)) and not names:
                names.append(name)
    if not names:
        return InputError(f"training: {said}")
    values = ", ".join(shown(config.arguments[name]) for name in names)
    expected = "a value with which training can start" if len(names) == 1 else "values which go together"
    keys = ", ".join(f"{_section(name)}.{name}" for name in names)
    reason = said if isinstance(error, WrongInput) else f"{type(error).__name__}: {said}"
    return InputError(f"{keys}: expected {expected}, got {values} ({reason.rstrip('.')}).")


def _suspects(arguments: dict[str, Any], said: str) -> list[str]:
    """The settings, those first that an error mentions, by name or by value."""
    words = said.lower()

    def mentioned(name: str) -> int:
        value = str(arguments[name]).lower()
        return 2 * (name in words) + (len(value) > 3 and value in words)

    return sorted((name for name in arguments if name != "output_dir"), key=mentioned, reverse=True)


def _without(config: TrainConfig, name: str) -> TrainConfig:
    return dataclasses.replace(config, arguments={k: v for k, v in config.arguments.items() if k != name})


def _section(name: str) -> str:
    return "loss" if name in loss_settings() else "training"


class _EnoughError(Exception):
    """The rehearsal need not go on."""


class _Stop(TrainerCallback):
    """Ends the training after its first step, or before it where the model would have to be compiled.

    Args:
        evaluates: whether to evaluate after that step.
    """

    def __init__(self, *, evaluates: bool) -> None:
        self.evaluates = evaluates

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.torch_compile:
            raise _EnoughError

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True
        control.should_evaluate = self.evaluates


class _Rehearsal(GISTTrainer):
    """A trainer of one step that reports to nobody and saves nothing."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None, as it would read a part of the data."""

    def shrink(self, train: Loaded, evaluation: Loaded | None) -> None:
        """Train on a few short texts from now on, and let nobody know."""
        args = self.args
        self.train_dataset = self.preprocess_dataset(_few(train), dataset_name="train")
        self.eval_dataset, self.evaluator = None, None
        for name, dataset in list(by_name(evaluation).items())[:1]:
            few = _few(dataset)
            few = DatasetDict({name: few}) if name else few
            self.eval_dataset = self.preprocess_dataset(few, dataset_name="eval")
            args.metric_for_best_model, args.greater_is_better = f"{name}_loss" if name else "loss", False
        args.per_device_eval_batch_size = min(args.per_device_eval_batch_size, 2)
        self._train_batch_size = args.per_device_train_batch_size = min(args.per_device_train_batch_size, 2)
        args.gradient_accumulation_steps = 1
        # Workers need time to start; what the dataloader says of them, it said when it was made.
        args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
        args.dataloader_persistent_workers, args.dataloader_multiprocessing_context = False, None
        args.auto_find_batch_size = args.load_best_model_at_end = args.eval_on_start = False
        args.dataloader_drop_last = args.world_size > 1
        args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
        args.save_strategy = SaveStrategy.NO
        talking = (PrinterCallback, ProgressCallback, JITCheckpointCallback)
        for callback in (*get_reporting_integration_callbacks(args.report_to), *talking):
            self.remove_callback(callback)
        self.add_callback(_Stop(evaluates=self.eval_dataset is not None))
        # There is nothing to free, and the collection of garbage takes longer than all the rest.
        self.accelerator.free_memory = lambda *objects: list(objects)  # type: ignore[method-assign]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing."""


def _few(data: Loaded) -> Loaded:
    """A few rows of each dataset, with short texts."""
    few = {}
    for name, dataset in by_name(data).items():
        rows = list(dataset.with_format(None).take(ROWS))
        columns = {
            column: [row[column][:LETTERS] if is_text_role(column) else row[column] for row in rows]
            for column in dataset.column_names or rows[0]
        }
        few[name] = Dataset.from_dict(columns, features=dataset.features)
    return DatasetDict(few) if isinstance(data, dict) else few[""]


@functools.cache
def stand_in() -> SentenceTransformer:
    """A BERT of one layer that knows letters; to be copied."""
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [*string.ascii_lowercase, *string.digits]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    width = 8
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": width,
    }
    with tempfile.TemporaryDirectory(prefix="gist-fast-") as folder, without_progress_bars():
        model = BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=TOKENS, **sizes))
        # Not save_pretrained, which writes in the first of several processes only.
        model.config.to_json_file(Path(folder, "config.json"), use_diff=False)
        save_file(model.state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
        BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}).save_pretrained(folder)
        return SentenceTransformer(modules=[Transformer(folder, max_seq_length=TOKENS), Pooling(width)], device="cpu")


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """A context in which nothing is said, and after which random numbers and accelerate are as before."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), random_state_kept():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        # The next trainer may compute in another precision.
        AcceleratorState._reset_state()
